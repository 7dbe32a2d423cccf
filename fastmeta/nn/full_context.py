"""Full-context embeddings of Matching Networks: embeddings that see the whole support set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.errors import check_float_tensor, check_integer, fail

__all__ = ["FullContextEmbedding"]


class FullContextEmbedding(nn.Module):
    r"""Embeds supports and queries in the context of the support set.

    Vinyals et al. 2016, "Matching Networks for One Shot Learning", arXiv:1606.04080, appendix A.
    The supports (A.2, function g) pass through a bidirectional LSTM with a skip connection,

    .. math:: g(x_i) = \vec h_i + \overleftarrow h_i + g'(x_i),

    and the queries (A.1, function f) through K steps of an LSTM that reads the supports by
    attention:

    .. math:: \hat h_k, c_k = \mathrm{LSTM}(f'(x), [h_{k-1}, r_{k-1}], c_{k-1}), \quad
              h_k = \hat h_k + f'(x), \quad
              r_k = \sum_i \mathrm{softmax}_i(h_k \cdot g(x_i)) \, g(x_i), \quad f(x) = h_K.

    The paper leaves the start open; here :math:`\hat h_0 = c_0 = 0`, so :math:`h_0 = f'(x)`, and
    the states of g start at 0. The result depends on the order of the supports, which is taken as
    given. Arithmetic is made of primitive operations, so it is
    differentiable to any order on every device, and works under ``torch.func`` and
    ``torch.compile`` (which unrolls the S + K steps).

    Args:
        embedding_dim: D, features of the embeddings and of the LSTM states.
        steps: K, processing steps of f; 0 leaves the queries as they are.

    Shape:
        - ``support``: Tensor[T, S, D], ``query``: Tensor[T, Q, D], ``mask``: Tensor[T, S] of bool,
          True where a support counts, anywhere in the row (None: all count).
        - returns: the supports, Tensor[T, S, D], 0 where they do not count, and the queries,
          Tensor[T, Q, D]. Padded supports, even NaN, influence nothing: the LSTM of each direction
          starts at the first valid support that it meets. Without any valid support every
          :math:`r_k` is 0.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or option does not fit; the message names the argument.

    Note:
        Weights start uniform in :math:`\pm 1 / \sqrt D` as those of `torch.nn.LSTM`, with 1 added
        to the bias of the forget gates. Each LSTM has one bias. Under autocast products are in low
        precision, the cell states in float32.

    Example:
        >>> import torch, fastmeta as fm
        >>> context = fm.nn.FullContextEmbedding(8, steps=3)
        >>> support, query = context(torch.randn(2, 5, 8), torch.randn(2, 4, 8))
        >>> support.shape, query.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 4, 8]))
    """

    def __init__(self, embedding_dim: int, steps: int = 5) -> None:
        super().__init__()
        name = "FullContextEmbedding"
        self.embedding_dim = dim = check_integer(name, "embedding_dim", embedding_dim, 1)
        self.steps = check_integer(name, "steps", steps, 0)
        # Gates in the order of torch.nn.LSTM: input, forget, cell, output. First index of the
        # supports' weights: the direction (forward, backward). The queries' recurrent weight takes
        # [h, r].
        self.support_weight_ih = nn.Parameter(torch.empty(2, 4 * dim, dim))
        self.support_weight_hh = nn.Parameter(torch.empty(2, 4 * dim, dim))
        self.support_bias = nn.Parameter(torch.empty(2, 4 * dim))
        self.query_weight_ih = nn.Parameter(torch.empty(4 * dim, dim))
        self.query_weight_hh = nn.Parameter(torch.empty(4 * dim, 2 * dim))
        self.query_bias = nn.Parameter(torch.empty(4 * dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        bound = 1 / math.sqrt(self.embedding_dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        for bias in (self.support_bias, self.query_bias):
            bias[..., self.embedding_dim : 2 * self.embedding_dim] += 1

    def forward(
        self, support: Tensor, query: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Supports and queries in context; the class documents the arguments."""
        support = self.embed_support(support, mask)
        return support, self.embed_query(query, support, mask)

    def embed_support(self, support: Tensor, mask: Tensor | None = None) -> Tensor:
        """g: supports [T, S, D] in the context of each other, 0 where ``mask`` [T, S] is False."""
        self._check("support", support)
        if mask is not None:
            self._check_mask(mask, support)
            # Before anything else, so that even a NaN of the padding reaches no weight's gradient.
            support = torch.where(mask.unsqueeze(-1), support, 0)
        tasks, supports, dim = support.shape
        both_ways = torch.stack((support, support.flip(1)))
        gates = torch.einsum("btsd,bgd->bstg", both_ways, self.support_weight_ih)
        gates = gates + self.support_bias[:, None, None]
        valid = None if mask is None else torch.stack((mask, mask.flip(1))).unsqueeze(-1)
        recurrent = self.support_weight_hh.transpose(1, 2)
        h = c = self.support_bias.new_zeros(2, tasks, dim)
        states = []
        for i in range(supports):
            next_h, next_c = _cell(gates[:, i] + torch.bmm(h, recurrent), c)
            if valid is not None:
                next_h = torch.where(valid[:, :, i], next_h, h)
                next_c = torch.where(valid[:, :, i], next_c, c)
            h, c = next_h, next_c
            states.append(h)
        if not states:
            return support
        ahead, back = torch.stack(states, 2).unbind(0)
        embedded = support + ahead + back.flip(1)
        return embedded if mask is None else torch.where(mask.unsqueeze(-1), embedded, 0)

    def embed_query(self, query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        """f: queries [T, Q, D] that read ``support`` [T, S, D], the output of `embed_support`."""
        self._check("query", query)
        self._check("support", support)
        if query.shape[0] != support.shape[0]:
            wanted = f"of shape [T={support.shape[0]}, Q, D], like support"
            fail(ValueError, "FullContextEmbedding", "query", wanted, f"shape {list(query.shape)}")
        if mask is not None:
            self._check_mask(mask, support)
            mask = mask.unsqueeze(1)
        gates = F.linear(query, self.query_weight_ih, self.query_bias)
        transposed = support.transpose(1, 2)
        h, c = query, torch.zeros_like(query, dtype=self.query_bias.dtype)
        for _ in range(self.steps):
            scores = torch.matmul(h, transposed)
            if mask is not None:
                # Finite, so that a task without supports gives weights, of supports that are 0, not
                # NaN.
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            read = torch.matmul(scores.softmax(-1), support)
            state = torch.cat((h, read), -1)
            h, c = _cell(gates + F.linear(state, self.query_weight_hh), c)
            h = h + query
        return h

    def extra_repr(self) -> str:
        """Options, for `repr`."""
        return f"{self.embedding_dim}, steps={self.steps}"

    def _check(self, argument: str, value: Tensor) -> None:
        name = "FullContextEmbedding"
        check_float_tensor(name, argument, value)
        if value.dim() != 3 or value.shape[-1] != self.embedding_dim:
            wanted = f"of shape [T, ..., embedding_dim={self.embedding_dim}] and three dimensions"
            fail(ValueError, name, argument, wanted, f"shape {list(value.shape)}")

    def _check_mask(self, mask: Tensor, support: Tensor) -> None:
        name, wanted = "FullContextEmbedding", list(support.shape[:2])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            fail(TypeError, name, "mask", "a bool tensor", getattr(mask, "dtype", type(mask)))
        if mask.shape != support.shape[:2]:
            fail(ValueError, name, "mask", f"of shape {wanted}, like support", list(mask.shape))


def _cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step from the sums of input, recurrence and bias: new hidden and cell state."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
