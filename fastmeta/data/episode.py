"""The episode: what every sampler gives and every learner takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.errors import IGNORE_INDEX, fail

__all__ = ["Episode", "collate_episodes"]


class Episode(NamedTuple):
    """A batch of T few-shot tasks, each a support set to learn from and queries to answer.

    A named tuple: ``support_x, support_y, query_x, query_y = episode`` unpacks it, and torch's own
    tools (pytrees, ``DataLoader``, pinning) know it. Where tasks differ in size, the shorter ones
    are padded at the end with ``x = 0`` and ``y = -100``: the ops skip such supports, and
    ``torch.nn.functional.cross_entropy`` skips such targets.

    Attributes:
        support_x: ``Tensor[T, S, ...]``, the items to learn from.
        support_y: ``Tensor[T, S]`` int64, class labels 0..ways-1 of each task on its own, or -100;
            in a regression task float targets ``[T, S, ...]``.
        query_x: ``Tensor[T, Q, ...]``, the items to answer.
        query_y: ``Tensor[T, Q]`` int64 like ``support_y``, or float targets ``[T, Q, ...]``.

    Example:
        >>> import torch
        >>> episode = Episode(torch.rand(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, -100]]),
        ...                   torch.rand(2, 1, 4), torch.tensor([[2], [0]]))
        >>> episode.tasks, episode.num_classes, episode.ways.tolist()
        (2, 3, [3, 2])
        >>> episode.task(1).support_x.shape  # one task, its padding taken off
        torch.Size([1, 2, 4])
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Episode:
        """Copy to a device, and floating tensors to ``dtype``; integer labels stay int64."""

        def move(value: Tensor) -> Tensor:
            kind = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=kind, non_blocking=non_blocking)

        return Episode(*map(move, self))

    def pin_memory(self) -> Episode:
        """Copy to page-locked memory, where ``.to("cuda", non_blocking=True)`` does not wait."""
        return Episode(*(value.pin_memory() for value in self))

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    @property
    def num_classes(self) -> int:
        """C, the largest number of ways of any task: what the ops take as ``num_classes``.

        Reads the labels, which waits for the device when they are on one.
        """
        self._check_labels("num_classes")
        return int(self.support_y.max()) + 1 if self.support_y.numel() else 0

    @property
    def ways(self) -> Tensor:
        """``Tensor[T]`` int64, the number of classes that have a support, of each task."""
        return (self.shots > 0).sum(1)

    @property
    def shots(self) -> Tensor:
        """``Tensor[T, C]`` int64, the number of supports of each class."""
        return self._count("shots", self.support_y)

    @property
    def queries(self) -> Tensor:
        """``Tensor[T, C]`` int64, the number of queries of each class."""
        return self._count("queries", self.query_y)

    @property
    def support_lengths(self) -> Tensor:
        """``Tensor[T]`` int64, the number of supports of each task without the padding."""
        return _lengths(self.support_x, self.support_y)

    @property
    def query_lengths(self) -> Tensor:
        """``Tensor[T]`` int64, the number of queries of each task without the padding."""
        return _lengths(self.query_x, self.query_y)

    def task(self, index: int) -> Episode:
        """One task as an episode with T = 1, its padding taken off."""
        if not -self.tasks <= index < self.tasks:
            fail(IndexError, "Episode.task", "index", f"in [0, {self.tasks})", index)
        parts = []
        for x, y in ((self.support_x, self.support_y), (self.query_x, self.query_y)):
            if y.is_floating_point():
                parts += [x[index].unsqueeze(0), y[index].unsqueeze(0)]
            else:
                valid = y[index] != IGNORE_INDEX
                parts += [x[index][valid].unsqueeze(0), y[index][valid].unsqueeze(0)]
        return Episode(*parts)

    def _check_labels(self, what: str) -> None:
        if self.support_y.is_floating_point():
            wanted = "integer labels (this is a regression episode, it has no classes)"
            fail(TypeError, f"Episode.{what}", "support_y", wanted, self.support_y.dtype)

    def _count(self, what: str, labels: Tensor) -> Tensor:
        self._check_labels(what)
        classes = self.num_classes
        # Padding is counted in one class more, which is then cut off.
        slot = labels.masked_fill(labels < 0, classes)
        count = labels.new_zeros(labels.shape[0], classes + 1)
        return count.scatter_add_(1, slot, torch.ones_like(slot))[:, :classes]


def _lengths(x: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return (y != IGNORE_INDEX).sum(1)


def collate_episodes(episodes: Sequence[Episode]) -> Episode:
    """Join episodes along the task dimension, padding the smaller ones.

    Args:
        episodes: one or more; items of the same shape and dtype.

    Returns:
        One episode with the tasks of all, in order.

    Raises:
        ValueError: nothing was given, or float targets would need padding, for which there is no
            mark.
    """
    if not episodes:
        fail(ValueError, "collate_episodes", "episodes", "at least one Episode", "none")
    support_x, support_y, query_x, query_y = zip(*episodes, strict=True)
    return Episode(
        _pad_cat(support_x, 0), _pad_cat(support_y, IGNORE_INDEX),
        _pad_cat(query_x, 0), _pad_cat(query_y, IGNORE_INDEX),
    )  # fmt: skip


def _pad_cat(parts: Sequence[Tensor], value: int) -> Tensor:
    sizes = {part.shape[1] for part in parts}
    if len(sizes) == 1:
        return torch.cat(list(parts))
    if value == IGNORE_INDEX and parts[0].is_floating_point():
        wanted = "of equal sizes when targets are floats, which cannot be marked as padding"
        fail(ValueError, "collate_episodes", "episodes", wanted, f"sizes {sorted(sizes)}")
    tasks, longest = sum(part.shape[0] for part in parts), max(sizes)
    out = parts[0].new_full((tasks, longest, *parts[0].shape[2:]), value)
    start = 0
    for part in parts:
        out[start : start + part.shape[0], : part.shape[1]] = part
        start += part.shape[0]
    return out
