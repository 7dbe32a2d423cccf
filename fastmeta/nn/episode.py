"""Taking an episode apart: checks of its tensors, number of classes, what is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.errors import (
    check_int_tensor,
    check_labels,
    check_num_classes,
    describe,
    fail,
    is_tracing,
)
from fastmeta.ops._matching_inputs import mask_labels

__all__ = ["Episode", "read_episode"]


@dataclass(frozen=True)
class Episode:
    """Checked tensors of T tasks."""

    #: Tensor[T, S, ...].
    support_x: Tensor
    #: Tensor[T, S], -100 where a support does not count.
    labels: Tensor
    #: Tensor[T, Q, ...], or None where only the supports were asked for.
    query_x: Tensor | None
    #: Tensor[T, Q], or None outside a loss.
    targets: Tensor | None
    num_classes: int
    #: Rows that count, [T, S] and [T, Q]; None: all of them.
    support_valid: Tensor | None
    query_valid: Tensor | None
    #: Whether the rows that do not count are to be kept away from the encoder.
    gather: bool
    #: False for one task that came without the task dimension.
    batched: bool


def read_episode(
    name: str,
    support_x: Tensor,
    support_y: Tensor,
    num_classes: int | None,
    *,
    one_encoder: bool,
    mixes_rows: Callable[[], bool],
    has_queries: bool = True,
    query_x: Tensor | None = None,
    query_y: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    padded: bool | None = None,
) -> Episode:
    """Check everything, give one task its task dimension, and find out what is padding.

    Args:
        name: Of the learner, for messages.
        support_x: See `fastmeta.MatchingNetwork`, as for all arguments that are not named here.
        support_y: Supports' labels.
        num_classes: Number of classes.
        one_encoder: Whether supports and queries go through one encoder, so must be alike.
        mixes_rows: Whether padding that reaches the encoder would change other rows.
        has_queries: Whether ``query_x`` belongs to the call.
        query_x: Queries.
        query_y: Queries' labels, in a loss.
        lengths: Number of supports that count.
        mask: Supports that count.
        query_mask: Queries that count.
        padded: Whether there is padding; None: look.

    Returns:
        The episode.
    """
    if not isinstance(support_x, Tensor):
        fail(TypeError, name, "support_x", "a tensor", describe(support_x))
    device = support_x.device
    check_int_tensor(name, "support_y", support_y, device=device)
    if support_y.dim() not in (1, 2):
        wanted = "of shape [T, S], or [S] for one task"
        fail(ValueError, name, "support_y", wanted, f"shape {list(support_y.shape)}")
    batched = support_y.dim() == 2
    leading = list(support_y.shape)
    _check_leading(name, "support_x", support_x, leading, "support_y")
    if has_queries:
        _check_queries(name, query_x, support_x, batched, one_encoder)
    if query_y is not None:
        assert query_x is not None
        check_int_tensor(name, "query_y", query_y, device=device)
        _check_shape(name, "query_y", query_y, query_x.shape[: 1 + batched], "query_x")
    _check_bool(name, "mask", mask, support_y.shape, "support_y", device)
    if query_mask is not None:
        assert query_x is not None
        _check_bool(name, "query_mask", query_mask, query_x.shape[: 1 + batched], "query_x", device)
    if isinstance(lengths, Tensor):
        _check_shape(name, "lengths", lengths, leading[:-1], "support_y without S")
    declared = lengths is not None or mask is not None or query_mask is not None
    if padded is False and declared:
        fail(ValueError, name, "padded", "None or True with lengths or a mask", "False")

    labels = mask_labels(name, support_y, lengths, mask, device)
    query_y = None if query_y is None else query_y.long()
    looking = not is_tracing(support_x, support_y) and not _capturing(device)
    bounds = None
    if looking and (num_classes is None or padded is None):
        bounds = _bounds(labels, query_y, query_mask)
    if num_classes is None:
        num_classes = _count_classes(name, bounds)
    else:
        num_classes = check_num_classes(name, num_classes)
    check_labels(name, "support_y", labels, num_classes)
    if query_y is not None:
        check_labels(name, "query_y", query_y, num_classes)

    if padded is None and bounds is not None:
        padded = bounds[0] < 0 or bounds[1] >= num_classes
    elif not looking and (padded or declared) and mixes_rows():
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
    tensors = (support_x, labels, query_x, query_y, support_valid, query_valid)
    if not batched:
        tensors = tuple(None if t is None else t.unsqueeze(0) for t in tensors)  # type: ignore[assignment]
    support_x, labels, query_x, query_y, support_valid, query_valid = tensors
    gather = looking and support_valid is not None
    return Episode(
        support_x,
        labels,
        query_x,
        query_y,
        num_classes,
        support_valid,
        query_valid,
        gather,
        batched,
    )


def _check_leading(name: str, argument: str, x: Tensor, leading: list[int], like: str) -> None:
    if list(x.shape[: len(leading)]) != leading:
        wanted = f"of shape [{', '.join(map(str, leading))}, ...], like {like}"
        fail(ValueError, name, argument, wanted, f"shape {list(x.shape)}")


def _check_shape(name: str, argument: str, x: Tensor, shape: Sequence[int], like: str) -> None:
    if list(x.shape) != list(shape):
        wanted = f"of shape {list(shape)}, like {like}"
        fail(ValueError, name, argument, wanted, f"shape {list(x.shape)}")


def _check_bool(
    name: str,
    argument: str,
    x: Tensor | None,
    shape: Sequence[int],
    like: str,
    device: torch.device,
) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        fail(TypeError, name, argument, "a bool tensor", describe(x))
    if x.device != device:
        fail(ValueError, name, argument, f"on {device}, like the other tensors", x.device)
    _check_shape(name, argument, x, shape, like)


def _check_queries(
    name: str, query_x: Tensor | None, support_x: Tensor, batched: bool, one_encoder: bool
) -> None:
    if not isinstance(query_x, Tensor):
        fail(TypeError, name, "query_x", "a tensor", describe(query_x))
    if query_x.device != support_x.device:
        fail(ValueError, name, "query_x", f"on {support_x.device}, like support_x", query_x.device)
    tasks = list(support_x.shape[:batched])
    rows = list(support_x.shape[1 + batched :])
    fits = query_x.dim() > batched and list(query_x.shape[:batched]) == tasks
    if not fits or (one_encoder and list(query_x.shape[1 + batched :]) != rows):
        shape = ", ".join(map(str, [*tasks, "Q", *(rows if one_encoder else ["..."])]))
        wanted = f"of shape [{shape}], like support_x"
        fail(ValueError, name, "query_x", wanted, f"shape {list(query_x.shape)}")
    if one_encoder and query_x.dtype != support_x.dtype:
        fail(TypeError, name, "query_x", f"{support_x.dtype}, like support_x", query_x.dtype)


def _count_classes(name: str, bounds: tuple[int, int] | None) -> int:
    if bounds is None:
        wanted = "given under torch.compile, torch.func and graph capture"
        fail(ValueError, name, "num_classes", wanted, "None")
    if bounds[1] < 0:
        fail(ValueError, name, "num_classes", "given when no support counts", "None")
    return bounds[1] + 1


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bounds(labels: Tensor, query_y: Tensor | None, query_mask: Tensor | None) -> tuple[int, int]:
    """Least label (below 0 with padding) and greatest label of the supports, by one copy."""
    lows = [rows.min() for rows in (labels, query_y) if rows is not None and rows.numel()]
    if query_mask is not None:
        lows.append(query_mask.all().long() - 1)
    high = labels.max() if labels.numel() else labels.new_tensor(-1)
    values = torch.stack([*lows, high]).tolist()
    return min(values), values[-1]
