"""What the metric learners share: taking an episode apart, encoding its valid rows, the scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.errors import (
    check_choice,
    check_int_tensor,
    check_labels,
    describe,
    fail,
    is_tracing,
)
from fastmeta.ops.matching import _mask_labels, matching_attention, matching_nll

__all__ = ["Comparison", "Episode", "EpisodicClassifier"]


@dataclass(frozen=True)
class Episode:
    """Checked tensors of T tasks; ``labels`` is -100 where a support does not count."""

    support_x: Tensor
    labels: Tensor
    query_x: Tensor | None
    targets: Tensor | None
    num_classes: int
    #: Rows that count, [T, S] and [T, Q]; None: all of them.
    support_valid: Tensor | None
    query_valid: Tensor | None
    #: Whether rows that do not count are kept away from the encoder.
    gather: bool
    #: False for one task without the task dimension.
    batched: bool


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
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not 0 < scale < math.inf:
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
        learnt = "learnt" if self.log_scale.requires_grad else "fixed"
        return f"scale={self.scale.item():.4g} ({learnt}), encode={self.encode!r}"

    def _compare(self, support: Tensor, query: Tensor | None, episode: Episode) -> Comparison:
        """What the embeddings [T, S, D] and [T, Q, D] give to the matching ops."""
        raise NotImplementedError

    # --- taking an episode apart ------------------------------------------------------------------

    def _episode(
        self,
        support_x: Tensor,
        support_y: Tensor,
        num_classes: int | None,
        *,
        query_x: Tensor | None = None,
        query_y: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        padded: bool | None = None,
    ) -> Episode:
        """Check everything, give one task its task dimension, and find out what is padding."""
        name = type(self).__name__
        if not isinstance(support_x, Tensor):
            fail(TypeError, name, "support_x", "a tensor", describe(support_x))
        device = support_x.device
        check_int_tensor(name, "support_y", support_y, device=device)
        if support_y.dim() not in (1, 2):
            wanted = "of shape [T, S], or [S] for one task"
            fail(ValueError, name, "support_y", wanted, f"shape {list(support_y.shape)}")
        batched = support_y.dim() == 2
        if not batched:
            support_x, support_y = support_x.unsqueeze(0), support_y.unsqueeze(0)
            query_x, query_y = _add_task(query_x), _add_task(query_y)
            lengths, mask, query_mask = map(_add_task, (lengths, mask, query_mask))
        self._check_rows("support_x", support_x, support_y.shape, batched)
        if query_x is not None:
            self._check_queries(query_x, support_x, batched)
        for argument, rows in (("query_y", query_y), ("query_mask", query_mask)):
            if rows is not None:
                assert query_x is not None
                self._check_per_query(argument, rows, query_x, batched)
        declared = lengths is not None or mask is not None or query_mask is not None
        if padded is False and declared:
            wanted = "None or True with lengths, mask or query_mask"
            fail(ValueError, name, "padded", wanted, "False")
        labels = _mask_labels(name, support_y, lengths, mask, device)

        looking = not is_tracing(support_x, support_y) and not _capturing(device)
        low = high = None
        if looking and (num_classes is None or padded is None):
            low, high = _bounds(labels, query_y, query_mask)
        if num_classes is None:
            num_classes = self._count_classes(high)
        check_labels(name, "support_y", labels, num_classes)
        if query_y is not None:
            query_y = query_y.long()
            check_labels(name, "query_y", query_y, num_classes)

        if padded is None and low is not None and high is not None:
            padded = low < 0 or high >= num_classes
        elif not looking and (padded or declared) and _mixes_rows(self):
            wanted = (
                "without padding while tracing, since its batch norm would see the padding "
                "(trace the encoder alone: net.encoder = torch.compile(net.encoder))"
            )
            fail(ValueError, name, "the episode", wanted, "padding")
        support_valid = query_valid = None
        if padded is not False:
            support_valid = (labels >= 0) & (labels < num_classes)
            query_valid = query_mask
            if query_y is not None:
                query_valid = (query_y >= 0) & (query_y < num_classes)
        return Episode(
            support_x,
            labels,
            query_x,
            query_y,
            num_classes,
            support_valid,
            query_valid,
            gather=looking and support_valid is not None,
            batched=batched,
        )

    def _check_rows(self, argument: str, x: Tensor, leading: torch.Size, batched: bool) -> None:
        if x.shape[:2] != leading:
            shape, labels = list(x.shape), list(leading)
            if not batched:
                shape, labels = shape[1:], labels[1:]
            wanted = f"of shape [{', '.join(map(str, labels))}, ...], like support_y"
            fail(ValueError, type(self).__name__, argument, wanted, f"shape {shape}")

    def _check_queries(self, query_x: Tensor, support_x: Tensor, batched: bool) -> None:
        name = type(self).__name__
        if not isinstance(query_x, Tensor):
            fail(TypeError, name, "query_x", "a tensor", describe(query_x))
        if query_x.device != support_x.device:
            wanted = f"on {support_x.device}, like support_x"
            fail(ValueError, name, "query_x", wanted, query_x.device)
        # A query encoder of its own may take other rows than the encoder of the supports.
        same_rows = self.query_encoder is not None or (
            query_x.dim() == support_x.dim() and query_x.shape[2:] == support_x.shape[2:]
        )
        if query_x.dim() < 2 or query_x.shape[0] != support_x.shape[0] or not same_rows:
            rows = ["..."] if self.query_encoder is not None else support_x.shape[2:]
            first = [support_x.shape[0]] if batched else []
            wanted = f"of shape [{', '.join(map(str, [*first, 'Q', *rows]))}], like support_x"
            shape = list(query_x.shape if batched else query_x.shape[1:])
            fail(ValueError, name, "query_x", wanted, f"shape {shape}")
        if self.query_encoder is None and query_x.dtype != support_x.dtype:
            fail(TypeError, name, "query_x", f"{support_x.dtype}, like support_x", query_x.dtype)

    def _check_per_query(self, argument: str, rows: Tensor, query_x: Tensor, batched: bool) -> None:
        name = type(self).__name__
        if argument == "query_y":
            check_int_tensor(name, argument, rows, device=query_x.device)
        elif not isinstance(rows, Tensor) or rows.dtype != torch.bool:
            fail(TypeError, name, argument, "a bool tensor", describe(rows))
        elif rows.device != query_x.device:
            fail(ValueError, name, argument, f"on {query_x.device}, like query_x", rows.device)
        if rows.shape != query_x.shape[:2]:
            shape, wanted = list(rows.shape), list(query_x.shape[:2])
            if not batched:
                shape, wanted = shape[1:], wanted[1:]
            fail(ValueError, name, argument, f"of shape {wanted}, like query_x", f"shape {shape}")

    def _count_classes(self, high: int | None) -> int:
        name = type(self).__name__
        if high is None:
            wanted = "given under torch.compile, torch.func and graph capture"
            fail(ValueError, name, "num_classes", wanted, "None")
        if high < 0:
            fail(ValueError, name, "num_classes", "given when no support counts", "None")
        return high + 1

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


def _add_task(value: Tensor | None) -> Tensor | None:
    """One task's tensor with the task dimension; what is no tensor is left for the checks."""
    return value.unsqueeze(0) if isinstance(value, Tensor) else value


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bounds(labels: Tensor, query_y: Tensor | None, query_mask: Tensor | None) -> tuple[int, int]:
    """Least label (below 0 with padding) and greatest label of the supports, by one copy."""
    lows = [rows.min() for rows in (labels, query_y) if rows is not None and rows.numel()]
    if query_mask is not None:
        lows.append(query_mask.all().to(labels.dtype) - 1)
    high = labels.max() if labels.numel() else labels.new_tensor(-1)
    values = torch.stack([*(low.to(labels.dtype) for low in lows), high]).tolist()
    return min(values), values[-1]


def _mixes_rows(module: nn.Module) -> bool:
    """Whether a batch norm inside takes the statistics of its batch."""
    batch_norm: Any = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(m, batch_norm) and (m.training or m.running_mean is None)
        for m in module.modules()
    )
