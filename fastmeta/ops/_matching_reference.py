"""Matching attention in plain PyTorch: fallback on every device and oracle of the kernels.

All functions take the raw ops' arguments: query [T, Q, D], support [T, S, D], labels [T, S], scale
[T] or [1], weight [T, D] or [1, D] or None, and hold one [T, Q, S] array at a time (the compiled
kernels never do). ``euclidean`` and ``additive`` look at all pairs of features, [T, Q, S, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.ops._define import acc_dtype

__all__ = [
    "SIMILARITIES",
    "attention",
    "attention_backward",
    "attention_double_backward",
    "nll",
    "nll_backward",
    "nll_double_backward",
]

SIMILARITIES = ("dot", "cosine", "sqeuclidean", "euclidean", "additive")

_NEG_INF = float("-inf")


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension, 0 for the zero vector. [..., D] -> [..., 1]."""
    squared = x.square().sum(-1, keepdim=True)
    nonzero = squared > 0
    return torch.where(nonzero, torch.where(nonzero, squared, 1).rsqrt(), 0)


def _inverse_distance(difference: Tensor) -> Tensor:
    """1 / |difference| over the last dimension, 0 where the points coincide."""
    return _inverse_norm(difference).squeeze(-1)


def similarity_matrix(
    query: Tensor, support: Tensor, similarity: str, weight: Tensor | None
) -> Tensor:
    """Similarity of all pairs, unscaled. -> [T, Q, S]."""
    if similarity == "dot":
        return query @ support.mT
    if similarity == "cosine":
        return (query * _inverse_norm(query)) @ (support * _inverse_norm(support)).mT
    if similarity == "sqeuclidean":
        squares = query.square().sum(-1).unsqueeze(-1) + support.square().sum(-1).unsqueeze(-2)
        return -(squares - 2 * (query @ support.mT)).clamp(min=0)
    if similarity == "euclidean":
        difference = query.unsqueeze(2) - support.unsqueeze(1)
        return -difference.square().sum(-1) * _inverse_distance(difference)
    assert weight is not None
    hidden = torch.tanh(query.unsqueeze(2) + support.unsqueeze(1))
    return (hidden * weight[:, None, None]).sum(-1)


def _similarity_backward(
    grad: Tensor, query: Tensor, support: Tensor, similarity: str, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `similarity_matrix` for grad [T, Q, S]; the weight's is [T, D] or [T, 0]."""
    grad_weight = query.new_zeros(query.shape[0], 0)
    if similarity == "dot":
        return grad @ support, grad.mT @ query, grad_weight
    if similarity == "cosine":
        inverse_q, inverse_s = _inverse_norm(query), _inverse_norm(support)
        unit_q, unit_s = query * inverse_q, support * inverse_s
        to_q, to_s = grad @ unit_s, grad.mT @ unit_q
        grad_query = inverse_q * (to_q - unit_q * (to_q * unit_q).sum(-1, keepdim=True))
        grad_support = inverse_s * (to_s - unit_s * (to_s * unit_s).sum(-1, keepdim=True))
        return grad_query, grad_support, grad_weight
    if similarity == "sqeuclidean":
        grad_query = 2 * (grad @ support - grad.sum(2).unsqueeze(-1) * query)
        grad_support = 2 * (grad.mT @ query - grad.sum(1).unsqueeze(-1) * support)
        return grad_query, grad_support, grad_weight
    if similarity == "euclidean":
        difference = query.unsqueeze(2) - support.unsqueeze(1)
        pull = (grad * _inverse_distance(difference)).unsqueeze(-1) * difference
        return -pull.sum(2), pull.sum(1), grad_weight
    assert weight is not None
    hidden = torch.tanh(query.unsqueeze(2) + support.unsqueeze(1))
    pull = grad.unsqueeze(-1) * (1 - hidden.square()) * weight[:, None, None]
    return pull.sum(2), pull.sum(1), (grad.unsqueeze(-1) * hidden).sum((1, 2))


def _similarity_tangent(
    query: Tensor,
    support: Tensor,
    similarity: str,
    weight: Tensor | None,
    sims: Tensor,
    query_dot: Tensor,
    support_dot: Tensor,
    weight_dot: Tensor | None,
) -> Tensor:
    """Derivative of `similarity_matrix` along the directions (the _dot). -> [T, Q, S]."""
    if similarity == "dot":
        return query_dot @ support.mT + query @ support_dot.mT
    if similarity == "cosine":
        inverse_q, inverse_s = _inverse_norm(query), _inverse_norm(support)
        unit_q, unit_s = query * inverse_q, support * inverse_s
        stretch_q, stretch_s = _stretches(query, support, query_dot, support_dot)
        turn = (query_dot * inverse_q) @ unit_s.mT + unit_q @ (support_dot * inverse_s).mT
        return turn - sims * (stretch_q + stretch_s)
    if similarity == "sqeuclidean":
        own = (query * query_dot).sum(-1).unsqueeze(-1) + (support * support_dot).sum(-1)[:, None]
        return -2 * (own - query_dot @ support.mT - query @ support_dot.mT)
    pairs_dot = query_dot.unsqueeze(2) - support_dot.unsqueeze(1)
    if similarity == "euclidean":
        pairs = query.unsqueeze(2) - support.unsqueeze(1)
        return -(pairs * pairs_dot).sum(-1) * _inverse_distance(pairs)
    assert weight is not None
    assert weight_dot is not None
    hidden = torch.tanh(query.unsqueeze(2) + support.unsqueeze(1))
    hidden_dot = (1 - hidden.square()) * (query_dot.unsqueeze(2) + support_dot.unsqueeze(1))
    return (hidden_dot * weight[:, None, None] + hidden * weight_dot[:, None, None]).sum(-1)


def _stretches(
    query: Tensor, support: Tensor, query_dot: Tensor, support_dot: Tensor
) -> tuple[Tensor, Tensor]:
    """Relative growth of the norms, d log |q| as [T, Q, 1] and d log |s| as [T, 1, S]."""
    stretch_q = (query * query_dot).sum(-1, keepdim=True) * _inverse_norm(query).square()
    stretch_s = (support * support_dot).sum(-1, keepdim=True) * _inverse_norm(support).square()
    return stretch_q, stretch_s.mT


def _tangent_backward(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    similarity: str,
    weight: Tensor | None,
    sims: Tensor,
    tangent: Tensor,
    query_dot: Tensor,
    support_dot: Tensor,
    weight_dot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `_similarity_tangent` to query, support and weight, directions held fixed."""
    grad_weight = query.new_zeros(query.shape[0], 0)
    if similarity == "dot":
        return grad @ support_dot, grad.mT @ query_dot, grad_weight
    if similarity == "cosine":
        inverse_q, inverse_s = _inverse_norm(query), _inverse_norm(support)
        unit_q, unit_s = query * inverse_q, support * inverse_s
        turn_q, turn_s = query_dot * inverse_q, support_dot * inverse_s
        stretch_q, stretch_s = _stretches(query, support, query_dot, support_dot)
        slowed = grad * (stretch_q + stretch_s)
        along, level = grad * tangent, grad * sims
        to_q = grad @ turn_s - slowed @ unit_s - level.sum(2).unsqueeze(-1) * turn_q
        to_s = grad.mT @ turn_q - slowed.mT @ unit_q - level.sum(1).unsqueeze(-1) * turn_s
        own_q = (along - 2 * level * stretch_q).sum(2).unsqueeze(-1)
        own_s = (along - 2 * level * stretch_s).sum(1).unsqueeze(-1)
        grad_query = inverse_q * (to_q - own_q * unit_q)
        return grad_query, inverse_s * (to_s - own_s * unit_s), grad_weight
    if similarity == "sqeuclidean":
        grad_query = 2 * (grad @ support_dot - grad.sum(2).unsqueeze(-1) * query_dot)
        grad_support = 2 * (grad.mT @ query_dot - grad.sum(1).unsqueeze(-1) * support_dot)
        return grad_query, grad_support, grad_weight
    pairs_dot = query_dot.unsqueeze(2) - support_dot.unsqueeze(1)
    if similarity == "euclidean":
        pairs = query.unsqueeze(2) - support.unsqueeze(1)
        inverse = _inverse_distance(pairs)
        pull = (grad * inverse).unsqueeze(-1) * pairs_dot
        pull = pull + (grad * tangent * inverse.square()).unsqueeze(-1) * pairs
        return -pull.sum(2), pull.sum(1), grad_weight
    assert weight is not None
    assert weight_dot is not None
    hidden = torch.tanh(query.unsqueeze(2) + support.unsqueeze(1))
    slope = grad.unsqueeze(-1) * (1 - hidden.square())
    moved = slope * (query_dot.unsqueeze(2) + support_dot.unsqueeze(1))
    pull = slope * weight_dot[:, None, None] - 2 * moved * hidden * weight[:, None, None]
    return pull.sum(2), pull.sum(1), moved.sum((1, 2))


def _scores(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Similarities, w = exp(z - class lse), class index [T, Q, S] (C = padding), class lse, lse."""
    sims = similarity_matrix(query, support, similarity, weight)
    z = sims * scale[:, None, None]
    valid = (labels >= 0) & (labels < num_classes)
    index = torch.where(valid, labels, num_classes).unsqueeze(1).expand(z.shape)
    shape = (*z.shape[:2], num_classes + 1)
    peak = z.detach().new_full(shape, _NEG_INF).scatter_reduce(2, index, z.detach(), "amax")
    peak = torch.where(peak == _NEG_INF, 0, peak)
    exps = torch.exp(z - peak.gather(2, index))
    sums = z.new_zeros(shape).scatter_add(2, index, exps)[..., :num_classes]
    present = sums > 0
    class_lse = torch.where(
        sums == 0, _NEG_INF, torch.where(present, sums, 1).log() + peak[..., :num_classes]
    )
    class_lse = torch.where(sums.isnan(), sums, class_lse)
    top = class_lse.detach().amax(-1, keepdim=True)
    top = torch.where(top == _NEG_INF, 0, top)
    total = torch.exp(class_lse - top).sum(-1)
    lse = torch.where(
        total == 0, _NEG_INF, torch.where(total == 0, 1, total).log() + top.squeeze(-1)
    )
    per_item = torch.where(
        index == num_classes, 1, torch.nn.functional.pad(sums, (0, 1)).gather(2, index)
    )
    w = torch.where(index == num_classes, 0, exps / per_item)
    return sims, w, index, class_lse, lse


def _log_probs(class_lse: Tensor, lse: Tensor) -> Tensor:
    """Class lse - lse, -inf where the class is empty even if the whole task is."""
    return torch.where(class_lse == _NEG_INF, _NEG_INF, class_lse - lse.unsqueeze(-1))


def _prepare(
    query: Tensor, support: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Inputs in the accumulation dtype; padded supports as zeros, so that none sees them."""
    valid = ((labels >= 0) & (labels < num_classes)).unsqueeze(-1)
    acc = acc_dtype(query.dtype)
    return query.to(acc), torch.where(valid, support.to(acc), 0)


def attention(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """Reference of ``matching_attention``: logp [T, Q, C], lse [T, Q], as accumulated."""
    query, support = _prepare(query, support, labels, num_classes)
    if support.shape[1] == 0:
        shape = (*query.shape[:2], num_classes)
        return query.new_full(shape, _NEG_INF), query.new_full(shape[:2], _NEG_INF)
    *_, class_lse, lse = _scores(query, support, labels, scale, weight, num_classes, similarity)
    return _log_probs(class_lse, lse), lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, support, scale [T] and weight [T, D]: dL/dz = w (G - P sum_c G)."""
    dtypes = query.dtype, support.dtype
    query, support = _prepare(query, support, labels, num_classes)
    if support.shape[1] == 0:
        width = query.shape[2] if weight is not None else 0
        zero = query.new_zeros(query.shape[0], width)
        return (
            torch.zeros_like(query).to(dtypes[0]),
            torch.zeros_like(support).to(dtypes[1]),
            zero.new_zeros(query.shape[0]),
            zero,
        )
    sims, w, index, class_lse, lse = _scores(
        query, support, labels, scale, weight, num_classes, similarity
    )
    logp = _log_probs(class_lse, lse)
    empty = logp == _NEG_INF
    grad = torch.where(empty, 0, grad)
    per_class = grad - torch.exp(logp) * grad.sum(-1, keepdim=True)
    grad_z = w * torch.nn.functional.pad(per_class, (0, 1)).gather(2, index)
    grad_scale = (grad_z * sims).sum((1, 2))
    grad_query, grad_support, grad_weight = _similarity_backward(
        grad_z * scale[:, None, None], query, support, similarity, weight
    )
    return grad_query.to(dtypes[0]), grad_support.to(dtypes[1]), grad_scale, grad_weight


def attention_double_backward(
    grad_query: Tensor | None,
    grad_support: Tensor | None,
    grad_scale: Tensor | None,
    grad_weight: Tensor | None,
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, ...]:
    """Gradients of `attention_backward` to grad, query, support, scale [T] and weight [T, D].

    Its outputs, contracted with their gradients (None: zero), are the derivative of sum(grad *
    logp) along them: with z' that of the scores and m_c = sum_{i in c} w_i z'_i,
    sum_c G_c m_c - (sum_c G_c) (sum_c P_c m_c). That is what is differentiated here.
    """
    dtypes = query.dtype, support.dtype
    valid = ((labels >= 0) & (labels < num_classes)).unsqueeze(-1)
    query, support = _prepare(query, support, labels, num_classes)
    tasks, width = query.shape[0], query.shape[2] if weight is not None else 0
    if support.shape[1] == 0:
        nothing = query.new_zeros(tasks), query.new_zeros(tasks, width)
        zeros = torch.zeros_like(query).to(dtypes[0]), torch.zeros_like(support).to(dtypes[1])
        return torch.zeros_like(grad), *zeros, *nothing
    query_dot = torch.zeros_like(query) if grad_query is None else grad_query.to(query.dtype)
    support_dot = torch.zeros_like(support)
    if grad_support is not None:
        support_dot = torch.where(valid, grad_support.to(support.dtype), 0)
    scale_dot = query.new_zeros(tasks) if grad_scale is None else grad_scale
    weight_dot = query.new_zeros(tasks, width) if grad_weight is None else grad_weight
    sims, w, index, class_lse, lse = _scores(
        query, support, labels, scale, weight, num_classes, similarity
    )
    tangent = _similarity_tangent(
        query, support, similarity, weight, sims, query_dot, support_dot, weight_dot
    )
    z_dot = scale[:, None, None] * tangent + scale_dot[:, None, None] * sims

    def per_item(per_class: Tensor) -> Tensor:
        return torch.nn.functional.pad(per_class, (0, 1)).gather(2, index)

    logp = _log_probs(class_lse, lse)
    empty = logp == _NEG_INF
    shares = torch.exp(logp)
    grad = torch.where(empty, 0, grad)
    total = grad.sum(-1, keepdim=True)
    moves = z_dot.new_zeros(*z_dot.shape[:2], num_classes + 1).scatter_add(2, index, w * z_dot)
    moves = torch.where(empty, 0, moves[..., :num_classes])
    move = (shares * moves).sum(-1, keepdim=True)
    grad_grad = torch.where(empty, 0, moves - move)
    grad_tangent = w * per_item(grad - shares * total)
    grad_z = w * (
        per_item(grad) * (z_dot - per_item(moves)) - per_item(shares * total) * (z_dot - move)
    )
    to_sims = grad_z * scale[:, None, None] + grad_tangent * scale_dot[:, None, None]
    to_tangent = grad_tangent * scale[:, None, None]
    first = _similarity_backward(to_sims, query, support, similarity, weight)
    second = _tangent_backward(
        to_tangent,
        query,
        support,
        similarity,
        weight,
        sims,
        tangent,
        query_dot,
        support_dot,
        weight_dot,
    )
    to_query, to_support, to_weight = (a + b for a, b in zip(first, second, strict=True))
    to_scale = (grad_z * sims + grad_tangent * tangent).sum((1, 2))
    return grad_grad, to_query.to(dtypes[0]), to_support.to(dtypes[1]), to_scale, to_weight


def _targets_index(targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    counted = (targets >= 0) & (targets < num_classes)
    return counted, torch.where(counted, targets, 0).unsqueeze(-1)


def nll(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    targets: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """Reference of ``matching_nll``: (nll [T, Q], lse [T, Q]) in the accumulation dtype."""
    logp, lse = attention(query, support, labels, scale, weight, num_classes, similarity)
    counted, index = _targets_index(targets, num_classes)
    return torch.where(counted, -logp.gather(2, index).squeeze(-1), 0), lse


def nll_backward(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    targets: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention_backward` with G = -grad at the target."""
    counted, index = _targets_index(targets, num_classes)
    dense = grad.new_zeros(*grad.shape, num_classes)
    dense = dense.scatter(2, index, torch.where(counted, -grad, 0).unsqueeze(-1))
    return attention_backward(dense, query, support, labels, scale, weight, num_classes, similarity)


def nll_double_backward(
    grad_query: Tensor | None,
    grad_support: Tensor | None,
    grad_scale: Tensor | None,
    grad_weight: Tensor | None,
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    targets: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    num_classes: int,
    similarity: str,
) -> tuple[Tensor, ...]:
    """`attention_double_backward` with G = -grad at the target."""
    counted, index = _targets_index(targets, num_classes)
    dense = grad.new_zeros(*grad.shape, num_classes)
    dense = dense.scatter(2, index, torch.where(counted, -grad, 0).unsqueeze(-1))
    dense_grad, *grads = attention_double_backward(
        grad_query,
        grad_support,
        grad_scale,
        grad_weight,
        dense,
        query,
        support,
        labels,
        scale,
        weight,
        num_classes,
        similarity,
    )
    grad_grad = torch.where(counted, -dense_grad.gather(2, index).squeeze(-1), 0)
    return grad_grad, *grads
