"""What the metric learners share: call and loss, encoding the valid rows of an episode, scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.errors import check_choice, describe, fail, is_number
from fastmeta.nn.episode import Episode, read_episode
from fastmeta.ops.matching import matching_attention, matching_nll

__all__ = ["Comparison", "EpisodicClassifier"]


@dataclass(frozen=True)
class Comparison:
    """Arguments of the matching ops: what the queries are compared with, and how."""

    query: Tensor
    support: Tensor
    labels: Tensor
    similarity: str
    weight: Tensor | None = None


class EpisodicClassifier(nn.Module):
    """Base of `fastmeta.MatchingNetwork` and `fastmeta.PrototypicalNetwork`.

    A subclass says in ``_compare`` what the embedded queries are compared with.
    """

    def __init__(
        self,
        encoder: nn.Module,
        query_encoder: nn.Module | None,
        encode: str,
        scale: float,
        learn_scale: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(encoder, nn.Module):
            fail(TypeError, name, "encoder", "a torch.nn.Module", describe(encoder))
        if query_encoder is not None and not isinstance(query_encoder, nn.Module):
            wanted = "a torch.nn.Module or None"
            fail(TypeError, name, "query_encoder", wanted, describe(query_encoder))
        check_choice(name, "encode", encode, ("joint", "separate"))
        if not is_number(scale) or not 0 < scale < math.inf:
            fail(ValueError, name, "scale", "a positive number", describe(scale))
        self.encoder = encoder
        self.query_encoder = query_encoder
        self.encode = encode
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    @property
    def scale(self) -> Tensor:
        """Inverse temperature of the softmax, a scalar tensor: ``log_scale.exp()``, so positive."""
        return self.log_scale.exp()

    def forward(
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
        """Log-probabilities of the classes for each query; the class documents the arguments."""
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
        logp = matching_attention(
            compared.query,
            compared.support,
            compared.labels,
            episode.num_classes,
            similarity=compared.similarity,
            scale=self.scale,
            weight=compared.weight,
        )
        return logp if episode.batched else logp.squeeze(0)

    def loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        num_classes: int | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        padded: bool | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Negative log-likelihood of the query labels, fused: see `fastmeta.matching_nll`.

        ``DistributedDataParallel`` hooks into ``forward`` only: there, take torch's ``nll_loss`` of
        the log-probabilities instead.

        Args:
            support_x: As in the call.
            support_y: As in the call.
            query_x: As in the call.
            query_y: Tensor[T, Q] of integers in [0, ``num_classes``). A query labelled -100 is
                padding: it has no loss and does not reach the encoder.
            num_classes: As in the call.
            lengths: As in the call.
            mask: As in the call.
            padded: As in the call; speaks of the queries too.
            reduction: ``"mean"`` over the queries that count, ``"sum"``, or ``"none"``.

        Returns:
            A scalar, or with ``"none"`` Tensor[T, Q] ([Q] for one task). A query whose class has no
            support has loss +inf.
        """
        check_choice(type(self).__name__, "reduction", reduction, ("mean", "sum", "none"))
        episode = self._episode(
            support_x,
            support_y,
            num_classes,
            query_x=query_x,
            query_y=query_y,
            lengths=lengths,
            mask=mask,
            padded=padded,
        )
        assert episode.targets is not None
        compared = self._compare(*self._embed(episode), episode)
        value = matching_nll(
            compared.query,
            compared.support,
            compared.labels,
            episode.targets,
            episode.num_classes,
            similarity=compared.similarity,
            scale=self.scale,
            weight=compared.weight,
            reduction=reduction,
        )
        return value.squeeze(0) if reduction == "none" and not episode.batched else value

    def extra_repr(self) -> str:
        """Options, for `repr`."""
        return f"learn_scale={self.log_scale.requires_grad}, encode={self.encode!r}"

    def _compare(self, support: Tensor, query: Tensor | None, episode: Episode) -> Comparison:
        """What the embeddings [T, S, D] and [T, Q, D] give to the matching ops."""
        raise NotImplementedError

    def _episode(
        self, support_x: Tensor, support_y: Tensor, num_classes: int | None, **options: Any
    ) -> Episode:
        return read_episode(
            type(self).__name__,
            support_x,
            support_y,
            num_classes,
            one_encoder=self.query_encoder is None,
            mixes_rows=lambda: _mixes_rows(self),
            **options,
        )

    # --- encoding ---------------------------------------------------------------------------------

    def _embed(self, episode: Episode) -> tuple[Tensor, Tensor | None]:
        """Embeddings [T, S, D] and [T, Q, D]; 0 for padding that was kept away from the encoder."""
        support_x, query_x = episode.support_x, episode.query_x
        support_valid, query_valid = episode.support_valid, episode.query_valid
        if not episode.gather:
            support_valid = query_valid = None
        if query_x is None:
            return self._encode("encoder", support_x, support_valid), None
        if self.query_encoder is not None or self.encode == "separate":
            query_name = "encoder" if self.query_encoder is None else "query_encoder"
            support = self._encode("encoder", support_x, support_valid)
            query = self._encode(query_name, query_x, query_valid)
            if support.shape[-1] != query.shape[-1]:
                wanted = f"one that gives D={support.shape[-1]} features, as encoder does"
                fail(ValueError, type(self).__name__, query_name, wanted, query.shape[-1])
            return support, query
        valid = None
        if support_valid is not None:
            if query_valid is None:
                query_valid = support_valid.new_ones(query_x.shape[:2])
            valid = torch.cat((support_valid, query_valid), 1)
        embedded = self._encode("encoder", torch.cat((support_x, query_x), 1), valid)
        support, query = embedded.split((support_x.shape[1], query_x.shape[1]), 1)
        return support, query

    def _encode(self, which: str, x: Tensor, valid: Tensor | None) -> Tensor:
        """Rows [T, R, ...] to embeddings [T, R, D] by one call of the encoder on the valid ones."""
        name, encoder = type(self).__name__, getattr(self, which)
        tasks, rows = x.shape[:2]
        flat = x.flatten(0, 1)
        index = None if valid is None else valid.flatten().nonzero().squeeze(1)
        embedded = encoder(flat if index is None else flat.index_select(0, index))
        if not isinstance(embedded, Tensor):
            fail(TypeError, name, which, "a module that returns a tensor", describe(embedded))
        wanted_rows = tasks * rows if index is None else index.shape[0]
        if embedded.dim() < 2 or embedded.shape[0] != wanted_rows:
            wanted = f"a module that maps [N={wanted_rows}, ...] to [N, D] or [N, ...]"
            fail(ValueError, name, which, wanted, f"an output of shape {list(embedded.shape)}")
        embedded = embedded.flatten(1)
        if index is not None:
            padded = embedded.new_zeros(tasks * rows, embedded.shape[1])
            embedded = padded.index_copy(0, index, embedded)
        return embedded.unflatten(0, (tasks, rows))


def _mixes_rows(module: nn.Module) -> bool:
    """Whether a batch norm inside takes the statistics of its batch."""
    batch_norm: Any = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(m, batch_norm) and (m.training or m.running_mean is None)
        for m in module.modules()
    )
