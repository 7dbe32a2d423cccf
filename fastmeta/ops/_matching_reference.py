"""Matching attention in plain PyTorch: fallback on every device and oracle of the kernels.

All functions take the raw ops' arguments: query [T, Q, D], support [T, S, D], labels [T, S], scale
[T] or [1], weight [T, D] or [1, D] or None, and hold one [T, Q, S] array at a time (the compiled
kernels never do). ``euclidean`` and ``additive`` look at all pairs of features, [T, Q, S, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.ops._define import acc_dtype

__all__ = ["SIMILARITIES", "attention", "attention_backward", "nll", "nll_backward"]

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
