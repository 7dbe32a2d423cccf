"""Matching Networks: classification by attention over the labelled supports of a task."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.errors import (
    IGNORE_INDEX,
    check_choice,
    check_float_tensor,
    check_int_tensor,
    check_integer,
    check_labels,
    describe,
    fail,
    is_tracing,
)
from fastmeta.nn.episode import Episode
from fastmeta.nn.episodic import Comparison, EpisodicClassifier
from fastmeta.nn.full_context import FullContextEmbedding
from fastmeta.ops._define import acc_dtype
from fastmeta.ops.matching import matching_attention

__all__ = ["MatchingNetwork", "MatchingNetworks"]

#: Default scale of each similarity. Cosines lie in [-1, 1]: unscaled, the softmax over them is
#: nearly flat: with all classes equally apart, no 20-way 1-shot loss gets below 2.0.
_SCALES = {
    "dot": 1.0,
    "cosine": 10.0,
    "sqeuclidean": 1.0,
    "euclidean": 1.0,
    "additive": 1.0,
    "concat": 1.0,
}


class MatchingNetwork(EpisodicClassifier):
    r"""Softmax attention of embedded queries over the embedded supports of their task.

    .. math:: p(c \mid x) = \sum_{i: y_i = c} a(x, x_i), \qquad
              a(x, x_i) = \operatorname{softmax}_i
              \bigl(\mathrm{scale} \cdot \mathrm{similarity}(f(x), g(x_i))\bigr)

    Vinyals et al. 2016, "Matching Networks for One Shot Learning", arXiv:1606.04080. T tasks go
    through one call of the encoder and one fused op; `loss` fuses the loss in as well.

    Args:
        encoder: Any module from a flat batch [N, ...] to [N, D] (more dimensions are flattened): g,
            and f unless ``query_encoder`` is given.
        similarity: ``"cosine"``, ``"dot"``, ``"sqeuclidean"``, ``"euclidean"`` (negative
            distances), ``"additive"``: ``v . tanh(W_q q + W_s s)`` with learned W_q, W_s, v
            (Bahdanau et al. 2015), or ``"concat"``: ``w . [s; q] + b`` with learned w, b. The
            latter is for compatibility: its query part is the same for all supports and cancels in
            the softmax, so **every query of a task gets the same prediction**. ``"additive"`` is
            the working form.
        scale: Inverse temperature at the start, positive. None: 10 for cosine, else 1.
        learn_scale: Learn the scale, as its logarithm in the parameter ``log_scale`` (leave that
            out of weight decay, which would pull the scale to 1).
        full_context: Full-context embeddings of the paper's appendix. False: none; True or an
            integer K: a `fastmeta.nn.FullContextEmbedding` of 5 or K processing steps; or your own
            instance. They depend on the order of the supports.
        embedding_dim: D, needed by ``full_context``, ``"additive"`` and ``"concat"``. None: that of
            ``encoder.embedding_dim``, which the encoders of `fastmeta.nn` know.
        query_encoder: Separate encoder of the queries, f.
        encode: ``"joint"``: supports and queries of all tasks form one batch, so batch norm in
            training takes its statistics over all of them (transductive); ``"separate"``: one batch
            of all supports and one of all queries, as always with ``query_encoder``. In evaluation
            mode batch norm uses its running statistics and both agree.
        normalize_support: Divide support embeddings by their length before they are compared.

    Shape:
        - ``support_x``: Tensor[T, S, ...], ``support_y``: Tensor[T, S] of integers in [0, C), -100
          for padding, ``query_x``: Tensor[T, Q, ...]; or one task without T (``[S, ...], [S],
          [Q, ...]``).
        - ``num_classes``: C. None: the greatest support label plus 1.
        - ``lengths`` Tensor[T] of integers, or ``mask`` Tensor[T, S] of bool: which supports count,
          as in `fastmeta.matching_attention`; ``query_mask`` Tensor[T, Q] of bool: which queries
          do.
        - ``padded``: whether the episode has padding. None: look; False: your word that it has
          none.
        - returns: Tensor[T, Q, C] of log-probabilities (float32 under autocast); -inf for a class
          without support.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device, label or option does not fit; the message names the argument.

    Note:
        Padding never reaches the encoder, so it enters no batch statistics: valid rows are
        gathered, encoded, and scattered back. To look for padding and to find ``num_classes`` costs
        one read of the labels, on CUDA one synchronisation; give ``num_classes`` and
        ``padded=False`` to avoid it, as CUDA graph capture requires. Under ``torch.compile`` and
        ``torch.func`` nothing can be looked at: ``num_classes`` is required, and all rows are
        encoded, padding too, which still takes no part in context and attention; declared padding
        then raises if a batch norm would see it.

    Example:
        >>> import torch, fastmeta as fm
        >>> net = fm.MatchingNetwork(fm.nn.Conv4())
        >>> support_x, query_x = torch.rand(2, 5, 1, 28, 28), torch.rand(2, 3, 1, 28, 28)
        >>> support_y = torch.arange(5).repeat(2, 1)
        >>> net(support_x, support_y, query_x).shape
        torch.Size([2, 3, 5])
        >>> net.loss(support_x, support_y, query_x, support_y[:, :3]).backward()
    """

    def __init__(
        self,
        encoder: nn.Module,
        similarity: str = "cosine",
        scale: float | None = None,
        *,
        learn_scale: bool = True,
        full_context: bool | int | FullContextEmbedding = False,
        embedding_dim: int | None = None,
        query_encoder: nn.Module | None = None,
        encode: str = "joint",
        normalize_support: bool = False,
    ) -> None:
        name = type(self).__name__
        check_choice(name, "similarity", similarity, tuple(_SCALES))
        scale = _SCALES[similarity] if scale is None else scale
        super().__init__(encoder, query_encoder, encode, scale, learn_scale)
        self.similarity = similarity
        self.normalize_support = normalize_support
        self.embedding_dim = embedding_dim
        if embedding_dim is None:
            self.embedding_dim = getattr(encoder, "embedding_dim", None)
        self.context: FullContextEmbedding | None = None
        if isinstance(full_context, FullContextEmbedding):
            self.context = full_context
        elif full_context is not False:
            steps = 5
            if full_context is not True:
                steps = check_integer(name, "full_context", full_context, 0)
            self.context = FullContextEmbedding(self._require_dim("full_context"), steps)
        self.attention: nn.Module | None = None
        if similarity == "additive":
            self.attention = _AdditiveScore(self._require_dim("similarity='additive'"))
        elif similarity == "concat":
            self.attention = nn.Linear(2 * self._require_dim("similarity='concat'"), 1)

    def attention_weights(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        num_classes: int | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        padded: bool | None = None,
    ) -> Tensor:
        """Weight of every support in the answer to every query, for inspection.

        Arguments as in the call.

        Returns:
            Tensor[T, Q, S] ([Q, S] for one task). Rows sum to 1; supports that do not count have
            weight 0, as all have in a task without any that counts.
        """
        episode = self._episode(
            support_x,
            support_y,
            num_classes,
            query_x=query_x,
            lengths=lengths,
            mask=mask,
            query_mask=query_mask,
            padded=padded,
        )
        compared = self._compare(*self._embed(episode), episode)
        # With one class a support, the probabilities of the classes are the weights of the
        # supports.
        labels = compared.labels
        supports = labels.shape[1]
        counts = (labels >= 0) & (labels < episode.num_classes)
        weights = matching_attention(
            compared.query,
            compared.support,
            torch.where(counts, torch.arange(supports, device=labels.device), IGNORE_INDEX),
            max(supports, 1),
            similarity=compared.similarity,
            scale=self.scale,
            weight=compared.weight,
            output="probs",
        )[..., :supports]
        return weights if episode.batched else weights.squeeze(0)

    def extra_repr(self) -> str:
        """Options, for `repr`."""
        return f"similarity={self.similarity!r}, {super().extra_repr()}"

    def _require_dim(self, purpose: str) -> int:
        dim: Any = self.embedding_dim
        integral = hasattr(type(dim), "__index__") and not isinstance(dim, bool)
        if not integral or dim < 1:
            wanted = (
                f"the number of features of the encoder (at least 1) with {purpose}, since "
                "encoder.embedding_dim does not tell it"
            )
            fail(ValueError, type(self).__name__, "embedding_dim", wanted, repr(dim))
        return operator.index(dim)

    def _compare(self, support: Tensor, query: Tensor | None, episode: Episode) -> Comparison:
        assert query is not None
        if self.context is not None or self.attention is not None:
            dim = self.embedding_dim if self.context is None else self.context.embedding_dim
            if support.shape[-1] != dim:
                wanted = f"{support.shape[-1]}, the number of features that the encoder gives"
                fail(ValueError, type(self).__name__, "embedding_dim", wanted, dim)
        if self.context is not None:
            support, query = self.context(support, query, episode.support_valid)
        if self.normalize_support:
            support = _unit_rows(support)
        if isinstance(self.attention, _AdditiveScore):
            query, support = self.attention(query, support)
            return Comparison(query, support, episode.labels, "additive", self.attention.weight)
        if self.attention is not None:
            query, support = _concat_factors(self.attention, query, support)
            return Comparison(query, support, episode.labels, "dot")
        return Comparison(query, support, episode.labels, self.similarity)


class MatchingNetworks(nn.Module):
    r"""The classic two-layer Matching Network on feature vectors, with a learned attention.

    A shared encoder (Linear, ReLU, Linear), attention ``softmax_i(score(s_i, q))`` over the
    supports, and as output the attention-weighted sum of their one-hot labels.

    Args:
        input_size: F, features of the input.
        hidden_size: H, width of both layers of the encoder.
        num_classes: C.
        attention: ``"concat"``, the classic score ``w . [s; q] + b``, or ``"additive"``,
            ``v . tanh(W_q q + W_s s)``.

    Shape:
        - ``support_set``: Tensor[S, F], ``support_labels``: Tensor[S] of integers in [0, C), -100
          for padding, or one-hot Tensor[S, C] of floats; ``query``: Tensor[Q, F]; or batched over
          tasks, with a leading dimension T on each.
        - returns: probabilities Tensor[Q, C] or Tensor[T, Q, C]; rows sum to 1. For a loss take
          `log_probs`, which is exact where the logarithm of a probability is not.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device, label or option does not fit; the message names the argument.

    Note:
        Read what the classic score says: ``w . [s; q] + b = w_s . s + (w_q . q + b)``, and the
        second term, the same for all supports, cancels in the softmax. So with
        ``attention="concat"`` **the weights do not depend on the query: all queries of a task get
        the same distribution**, and w_q and b get no gradient. It is here because it is what that
        formula computes; use ``"additive"``, or `fastmeta.MatchingNetwork`, to classify. One-hot
        labels are checked and turned into integers, which on CUDA synchronises; under
        ``torch.compile`` and ``torch.func`` labels must be integers.

    Example:
        >>> import torch, fastmeta as fm
        >>> net = fm.MatchingNetworks(4, 8, num_classes=3, attention="additive")
        >>> support_set, support_labels = torch.rand(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> net(support_set, support_labels, torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_classes: int, *, attention: str = "concat"
    ) -> None:
        super().__init__()
        name = "MatchingNetworks"
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_classes": num_classes}
        input_size, hidden_size, num_classes = (
            check_integer(name, argument, size, 1) for argument, size in sizes.items()
        )
        check_choice(name, "attention", attention, ("concat", "additive"))
        self.input_size = input_size
        self.num_classes = num_classes
        self.encoder = nn.Sequential(
            nn.Linear(input_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.attention: nn.Module = (
            nn.Linear(2 * hidden_size, 1) if attention == "concat" else _AdditiveScore(hidden_size)
        )

    def forward(self, support_set: Tensor, support_labels: Tensor, query: Tensor) -> Tensor:
        """Probabilities of the classes for each query, [Q, C] or [T, Q, C]."""
        return self._attend(support_set, support_labels, query, "probs", per_support=False)

    def log_probs(self, support_set: Tensor, support_labels: Tensor, query: Tensor) -> Tensor:
        """Logarithm of what the call returns; -inf for a class without support."""
        return self._attend(support_set, support_labels, query, "log_probs", per_support=False)

    def attention_weights(
        self, support_set: Tensor, support_labels: Tensor, query: Tensor
    ) -> Tensor:
        """Weights of the supports for each query, [Q, S] or [T, Q, S]; they sum to 1 over S."""
        return self._attend(support_set, support_labels, query, "probs", per_support=True)

    def _attend(
        self, support: Tensor, labels: Tensor, query: Tensor, output: str, *, per_support: bool
    ) -> Tensor:
        labels = self._check(support, labels, query)
        valid = (labels >= 0) & (labels < self.num_classes)
        # So that even a NaN of the padding reaches no weight's gradient.
        support = torch.where(valid.unsqueeze(-1), support, 0)
        num_classes, supports = self.num_classes, labels.shape[-1]
        if per_support:
            labels = torch.arange(supports, device=labels.device).where(valid, IGNORE_INDEX)
            num_classes = max(supports, 1)
        support, query = self.encoder(support), self.encoder(query)
        weight = None
        if isinstance(self.attention, _AdditiveScore):
            query, support = self.attention(query, support)
            weight = self.attention.weight
        else:
            query, support = _concat_factors(self.attention, query, support)
        result = matching_attention(
            query,
            support,
            labels,
            num_classes,
            similarity="dot" if weight is None else "additive",
            weight=weight,
            output=output,
        )
        return result[..., :supports] if per_support else result

    def _check(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Labels as integers; raise where something does not fit."""
        name, features = "MatchingNetworks", self.input_size
        check_float_tensor(name, "support_set", support)
        check_float_tensor(name, "query", query)
        wanted = f"of shape [S, {features}] or [T, S, {features}]"
        if support.dim() not in (2, 3) or support.shape[-1] != features:
            fail(ValueError, name, "support_set", wanted, f"shape {list(support.shape)}")
        tasks = list(support.shape[:-2])
        if query.dim() != support.dim() or list(query.shape[:-2]) != tasks:
            wanted = f"of shape [{', '.join(map(str, [*tasks, 'Q', features]))}], like support_set"
            fail(ValueError, name, "query", wanted, f"shape {list(query.shape)}")
        if query.shape[-1] != features:
            wanted = f"of {features} features"
            fail(ValueError, name, "query", wanted, f"shape {list(query.shape)}")
        if isinstance(labels, Tensor) and labels.is_floating_point():
            labels = self._from_one_hot(labels, support)
        check_int_tensor(name, "support_labels", labels, device=support.device)
        if labels.shape != support.shape[:-1]:
            wanted = f"of shape {list(support.shape[:-1])}, like support_set"
            fail(ValueError, name, "support_labels", wanted, f"shape {list(labels.shape)}")
        labels = labels.long()
        check_labels(name, "support_labels", labels, self.num_classes)
        return labels

    def _from_one_hot(self, labels: Tensor, support: Tensor) -> Tensor:
        name, shape = "MatchingNetworks", [*support.shape[:-1], self.num_classes]
        if list(labels.shape) != shape:
            wanted = f"integers of shape {shape[:-1]}, or one-hot of shape {shape}"
            fail(ValueError, name, "support_labels", wanted, describe(labels))
        if is_tracing(labels):
            wanted = "integers under torch.compile and torch.func"
            fail(TypeError, name, "support_labels", wanted, labels.dtype)
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(-1) == 1).all()):
            fail(ValueError, name, "support_labels", "one-hot rows", "rows that are not")
        return labels.argmax(-1)


class _AdditiveScore(nn.Module):
    """Parameters of the score ``weight . tanh(W_q q + W_s s)`` of Bahdanau et al. 2015."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.support = nn.Linear(dim, dim, bias=False)
        self.weight = nn.Parameter(torch.empty(dim))
        for matrix in (self.query.weight, self.support.weight):
            nn.init.xavier_uniform_(matrix)
        nn.init.xavier_uniform_(self.weight.data.unsqueeze(0))

    def forward(self, query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(query), self.support(support)


def _concat_factors(score: nn.Module, query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Two-dimensional vectors whose inner products are the scores ``w . [s; q] + b``.

    ``[1, w_q . q + b] . [w_s . s, 1]``; w acts on the support first.
    """
    assert isinstance(score, nn.Linear)
    of_support, of_query = score.weight.chunk(2, -1)
    query = F.linear(query, of_query, score.bias)
    support = F.linear(support, of_support)
    return (
        torch.cat((torch.ones_like(query), query), -1),
        torch.cat((support, torch.ones_like(support)), -1),
    )


def _unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their length; zero rows stay zero and get no gradient of any order."""
    squared = x.to(acc_dtype(x.dtype)).square().sum(-1, keepdim=True)
    positive = squared > 0
    factor = torch.where(positive, torch.where(positive, squared, 1).rsqrt(), 0)
    return x * factor.to(x.dtype)
