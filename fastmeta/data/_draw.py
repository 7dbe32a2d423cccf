"""How a task's sizes, classes and items are drawn: plain numpy, for many tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.random import Generator

from fastmeta.errors import fail

Size: TypeAlias = "int | tuple[int, int] | Sequence[int] | Callable[..., Any]"


class SizeRule:
    """A size that is fixed or drawn for each task."""

    def __init__(self, name: str, rule: Size) -> None:
        self.name = name
        self.rule = rule
        self.function: Callable[..., Any] | None = None
        self.choices: tuple[int, ...] = ()
        # Tasks without queries are of use (adapting only), tasks without classes or supports are
        # not.
        low = 0 if name == "queries" else 1
        if callable(rule):
            self.function = rule
            self.most = 0  # not known before it is called
            return
        if _whole(rule):
            self.choices = (int(cast("int", rule)),)
        elif isinstance(rule, tuple) and len(rule) == 2 and all(map(_whole, rule)):
            if rule[0] > rule[1]:
                fail(ValueError, "EpisodeSampler", name, "(low, high) with low <= high", rule)
            self.choices = tuple(range(int(rule[0]), int(rule[1]) + 1))
        elif isinstance(rule, (list, range, np.ndarray)) and len(rule) and all(map(_whole, rule)):
            self.choices = tuple(int(value) for value in rule)
        else:
            wanted = "an int, a tuple (low, high), a list of ints or a function"
            fail(TypeError, "EpisodeSampler", name, wanted, repr(rule))
        if min(self.choices) < low:
            fail(ValueError, "EpisodeSampler", name, f"at least {low}", min(self.choices))
        self.most = max(self.choices)

    def __str__(self) -> str:
        """The rule as it is kept in a sampler's state."""
        if self.function is not None:
            return getattr(self.function, "__qualname__", type(self.function).__name__)
        return str(list(self.choices))

    def draw(self, generator: Generator) -> int:
        """A size for a task."""
        if self.function is not None:
            return int(self._checked(self.function(generator), None)[0])
        if len(self.choices) == 1:
            return self.choices[0]
        return self.choices[int(generator.random() * len(self.choices))]

    def draw_rows(self, generator: Generator, ways: int) -> np.ndarray:
        """A size for each class of a task, ``[ways]``."""
        if self.function is None:
            return np.full(ways, self.draw(generator))
        return np.broadcast_to(self._checked(self.function(generator, ways), ways), ways)

    def _checked(self, value: Any, ways: int | None) -> np.ndarray:
        sizes = np.atleast_1d(np.asarray(value))
        low = 0 if self.name == "queries" else 1
        several = "" if ways is None else f" or {ways} of them"
        right = sizes.ndim == 1 and len(sizes) in {1, ways} and sizes.dtype.kind in "iu"
        if not right or sizes.min() < low:
            wanted = f"a function that returns an int of at least {low}{several}"
            fail(ValueError, "EpisodeSampler", self.name, wanted, repr(value))
        return sizes


class ClassPool:
    """Items sorted by class: which, and where each class begins."""

    def __init__(self, class_of: np.ndarray, classes: int, chosen: np.ndarray) -> None:
        items = np.flatnonzero(chosen)
        self.items = items[np.argsort(class_of[items], kind="stable")]
        self.counts = np.bincount(class_of[items], minlength=classes)
        self.starts = np.cumsum(self.counts) - self.counts

    def pick(self, classes: np.ndarray, sizes: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        """``sizes[r]`` distinct items of class ``classes[r]`` in random order, ``[R, W]``."""
        first, second = stack_keys(keys)
        inside = subsets(self.counts[classes], sizes, first, second)
        # Unused places (-1) point at some item of the class: nothing reads them.
        place = self.starts[classes][:, None] + np.maximum(inside, 0)
        picked: np.ndarray = self.items[np.minimum(place, len(self.items) - 1)]
        return picked


def stack_keys(keys: list[np.ndarray]) -> np.ndarray:
    """Random keys ``[2, rows, width]`` of several tasks in one array, the narrow ones padded."""
    width = max(key.shape[2] for key in keys)
    if any(key.shape[2] < width for key in keys):
        keys = [np.pad(key, ((0, 0), (0, 0), (0, width - key.shape[2]))) for key in keys]
    return np.concatenate(keys, axis=1)


def subsets(
    sizes: np.ndarray, counts: np.ndarray, keys: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Draw ``counts[r]`` distinct numbers below ``sizes[r]`` for every row, in random order.

    Floyd's algorithm (Bentley and Floyd 1987, "A sample of brilliance"), all rows at once: its work
    grows with the sample and not with the population.

    Args:
        sizes: ``[R]``, the populations.
        counts: ``[R]``, at most ``sizes``.
        keys: ``[R, W]``, uniform in [0, 1), W at least the largest count.
        order: ``[R, W]``, uniform in [0, 1), for the order.

    Returns:
        ``[R, W]`` int64; -1 beyond a row's count.
    """
    drawn = np.full(keys.shape, -1, dtype=np.int64)
    width = keys.shape[1]
    for step in range(width):
        top = sizes - counts + step
        value = np.minimum((keys[:, step] * (top + 1)).astype(np.int64), top)
        clash = (drawn[:, :step] == value[:, None]).any(axis=1)
        drawn[:, step] = np.where(step < counts, np.where(clash, top, value), -1)
    ranks = np.where(np.arange(width) < counts[:, None], order, 2.0)
    return np.take_along_axis(drawn, np.argsort(ranks, axis=1, kind="stable"), axis=1)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
