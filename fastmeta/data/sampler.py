"""Few-shot tasks out of any labelled data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from fastmeta.data._draw import ClassPool, Size, SizeRule, stack_keys, subsets
from fastmeta.data.episode import Episode
from fastmeta.data.images import LabelledImages, to_float
from fastmeta.data.stream import EpisodeStream, task_generator
from fastmeta.errors import IGNORE_INDEX, check_choice, fail

__all__ = ["BatchTransform", "EpisodeSampler"]

Array: TypeAlias = "np.ndarray | Tensor | Sequence[int]"
Transform: TypeAlias = "Callable[[Tensor, Generator], Tensor] | BatchTransform"


@runtime_checkable
class BatchTransform(Protocol):
    """A random change of items that is applied to a whole batch of tasks at once.

    Randomness and work are apart: ``draw`` takes the few numbers that an item needs from the
    generator of its task, ``apply`` does the arithmetic for all items of all tasks in one call.
    """

    def draw(self, generator: Generator, count: int) -> np.ndarray:
        """Numbers for ``count`` items, ``[count, ...]``, from the generator of their task."""

    def apply(self, items: Tensor, numbers: Tensor) -> Tensor:
        """Changed items ``[N, ...]``, of ``items [N, ...]`` and their ``numbers [N, ...]``."""


class EpisodeSampler(EpisodeStream):
    """An endless or finite stream of few-shot tasks drawn from labelled data.

    A task draws ``ways`` classes, and of each of them ``shots`` supports and ``queries`` queries,
    all without replacement: support and query never share an item. Labels are 0..ways-1 in the
    order of the draw; items are sorted by class.

    ``ways``, ``shots`` and ``queries`` are each an int, a tuple ``(low, high)`` (drawn per task,
    both ends included), a list to choose from, or a function of the task's generator (of the
    generator and the number of ways for shots and queries, where it may return one number for each
    class). Tasks of different size in a batch are padded, see :class:`fastmeta.data.Episode`.

    Task ``i`` depends on ``(seed, i)`` alone: see :class:`fastmeta.data.EpisodeStream` for
    iteration, workers and resuming.

    Args:
        data: :class:`fastmeta.data.LabelledImages`; or an array or tensor of items ``[N, ...]``; or
            a map-style torch dataset whose items are tensors, arrays, or tuples that begin with
            one. uint8 items become float32 in [0, 1], bool float32, others keep their type.
        labels: class of every item, ``[N]`` integers, any values. Optional when ``data`` has
            ``labels`` or ``targets``. A dataset is never read through to find them.
        ways: classes in a task.
        shots: supports of each class.
        queries: queries of each class.
        tasks: T, tasks in a batch.
        batches: how many batches a loop gives; None for an endless stream.
        seed: in [0, 2**64).
        small: what to do about classes with fewer than ``shots + queries`` items. ``"error"``;
            ``"skip"`` leaves them out of tasks that are too large for them; ``"reuse"`` lets items
            appear more than once, supports among supports and queries among queries (of use with a
            ``transform`` that changes each appearance).
        rotations: every class turned by 90, 180 and 270 degrees is a class of its own (square
            images).
        support_items: items that may be supports, indices or a mask ``[N]``; default all. Given
            with ``query_items``, and disjoint from it.
        query_items: items that may be queries.
        transform: change of items, seeded by the task: a :class:`BatchTransform` such as
            :class:`fastmeta.data.Augment`, or a function ``(items, generator) -> items`` called
            with one task's items ``[n, ...]`` (supports first).
        workers: processes that make batches ahead; 0 makes them in this process.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: too few classes or items, labels that do not match, pools that overlap.

    Example:
        >>> import torch
        >>> items, labels = torch.rand(60, 1, 28, 28), torch.arange(60) % 6
        >>> sampler = EpisodeSampler(items, labels, ways=5, shots=1, queries=3, tasks=4, seed=1)
        >>> support_x, support_y, query_x, query_y = sampler[0]
        >>> support_x.shape, query_y.shape
        (torch.Size([4, 5, 1, 28, 28]), torch.Size([4, 15]))
    """

    def __init__(
        self,
        data: Any,
        labels: Array | None = None,
        *,
        ways: Size = 5,
        shots: Size = 1,
        queries: Size = 15,
        tasks: int = 16,
        batches: int | None = None,
        seed: int = 0,
        small: str = "error",
        rotations: bool = False,
        support_items: Array | None = None,
        query_items: Array | None = None,
        transform: Transform | None = None,
        workers: int = 0,
    ) -> None:
        """Index the items by class and check that the tasks asked for can be made."""
        super().__init__(tasks=tasks, batches=batches, seed=seed, workers=workers)
        check_choice("EpisodeSampler", "small", small, ("error", "skip", "reuse"))
        self.small = small
        self.turns = 4 if rotations else 1
        self._ways = SizeRule("ways", ways)
        self._shots = SizeRule("shots", shots)
        self._queries = SizeRule("queries", queries)
        self._data, self._names = _items_of(data)
        if labels is not None:  # others than those that have names
            self._names = ()
        if isinstance(self._data, Tensor) and rotations and not _square(self._data):
            wanted = "square images [..., H, H] when rotations=True"
            fail(ValueError, "EpisodeSampler", "data", wanted, f"shape {list(self._data.shape)}")
        values = _labels_of(data, labels, len(self._data))
        self.class_labels, index = np.unique(values, return_inverse=True)
        count = len(self.class_labels)
        if (support_items is None) != (query_items is None):
            got = "only one of the two"
            wanted = "given together with query_items"
            fail(ValueError, "EpisodeSampler", "support_items", wanted, got)
        self._split = support_items is not None
        everything = np.ones(len(values), bool)
        self._support = ClassPool(index, count, _mask("support_items", support_items, everything))
        self._query = self._support
        if self._split:
            chosen = _mask("query_items", query_items, everything)
            self._query = ClassPool(index, count, chosen)
            shared = np.intersect1d(self._support.items, self._query.items).size
            if shared:
                wanted = "disjoint from support_items"
                fail(ValueError, "EpisodeSampler", "query_items", wanted, f"{shared} shared items")
        if not (transform is None or callable(transform) or isinstance(transform, BatchTransform)):
            wanted = "a function (items, generator) -> items or a BatchTransform"
            fail(TypeError, "EpisodeSampler", "transform", wanted, repr(transform))
        self.transform = transform
        self._eligible_cache: dict[tuple[int, int], np.ndarray] = {}
        # A request that can never be met fails here and not after an hour of training.
        if self._ways.most and self._shots.most and self._queries.most:
            self._eligible(self._ways.most, self._shots.most, self._queries.most)

    def signature(self) -> dict[str, Any]:
        """What must agree for a saved position to mean the same place."""
        return {
            **super().signature(),
            "items": len(self._data),
            "classes": len(self.class_labels) * self.turns,
            "ways": str(self._ways),
            "shots": str(self._shots),
            "queries": str(self._queries),
            "small": self.small,
        }

    def class_names(self, index: int) -> list[list[str]]:
        """Names of the classes 0..ways-1 of each task in batch ``index``, for reports."""
        names = []
        for task in self.task_numbers(index):
            plan = self._plan(task_generator(self.seed, task))
            picked = self._pick_classes([plan])[0]
            names.append([self._name(int(c) // self.turns, int(c) % self.turns) for c in picked])
        return names

    def make(self, tasks: range) -> Episode:
        """Make the tasks of these numbers as one episode."""
        generators = [task_generator(self.seed, task) for task in tasks]
        plans = [self._plan(generator) for generator in generators]
        # From here on a row is one class of one task.
        classes = np.concatenate(self._pick_classes(plans))
        shots = np.concatenate([plan.shots for plan in plans])
        queries = np.concatenate([plan.queries for plan in plans])
        support, query = self._pick_items(classes // self.turns, shots, queries, plans)
        ways = np.array([len(plan.shots) for plan in plans])
        task_of = np.repeat(np.arange(len(plans)), ways)
        label_of = np.arange(len(task_of)) - np.repeat(np.cumsum(ways) - ways, ways)
        sides = [
            _Side(support, shots, task_of, label_of, classes % self.turns, len(plans)),
            _Side(query, queries, task_of, label_of, classes % self.turns, len(plans)),
        ]
        x = self._read_items(sides, generators)
        pieces = x.tensor_split([len(sides[0].items)])
        (sx, sy), (qx, qy) = (
            side.lay_out(piece) for side, piece in zip(sides, pieces, strict=True)
        )
        return Episode(sx, sy, qx, qy)

    def _plan(self, generator: Generator) -> _Plan:
        ways = self._ways.draw(generator)
        shots = self._shots.draw_rows(generator, ways)
        queries = self._queries.draw_rows(generator, ways)
        eligible = self._eligible(ways, int(shots.max()), int(queries.max()))
        class_keys = generator.random((2, 1, ways))
        if self._split:
            widths = [int(shots.max()), int(queries.max())]
        else:
            widths = [int((shots + queries).max())]
        item_keys = [generator.random((2, ways, width)) for width in widths]
        return _Plan(shots, queries, eligible, class_keys, item_keys)

    def _pick_classes(self, plans: list[_Plan]) -> list[np.ndarray]:
        """Virtual class (class * turns + quarter turns) of each way, for each task."""
        keys = stack_keys([plan.class_keys for plan in plans])
        sizes = np.array([len(plan.eligible) * self.turns for plan in plans])
        picked = subsets(sizes, np.array([len(plan.shots) for plan in plans]), keys[0], keys[1])
        out = []
        for plan, row in zip(plans, picked, strict=True):
            chosen = row[: len(plan.shots)]
            out.append(plan.eligible[chosen // self.turns] * self.turns + chosen % self.turns)
        return out

    def _pick_items(
        self, classes: np.ndarray, shots: np.ndarray, queries: np.ndarray, plans: list[_Plan]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item numbers ``[rows, most shots]`` and ``[rows, most queries]``."""
        reuse = self.small == "reuse"
        if self._split:
            room_s, room_q = self._support.counts[classes], self._query.counts[classes]
            own_s = np.minimum(shots, room_s) if reuse else shots
            own_q = np.minimum(queries, room_q) if reuse else queries
            order_s = self._support.pick(classes, own_s, [plan.item_keys[0] for plan in plans])
            order_q = self._query.pick(classes, own_q, [plan.item_keys[1] for plan in plans])
            return _cycle(order_s, 0, own_s, shots), _cycle(order_q, 0, own_q, queries)
        room = self._support.counts[classes]
        # A class too small for its task gives half of its items to each side at least.
        own_s = np.minimum(shots, np.maximum(room - queries, (room + 1) // 2)) if reuse else shots
        own_q = np.minimum(queries, room - own_s) if reuse else queries
        order = self._support.pick(classes, own_s + own_q, [plan.item_keys[0] for plan in plans])
        return _cycle(order, 0, own_s, shots), _cycle(order, own_s, own_q, queries)

    def _eligible(self, ways: int, shots: int, queries: int) -> np.ndarray:
        """Classes that can give so many items; raises when they are too few."""
        key = (shots, queries)
        if key not in self._eligible_cache:
            self._eligible_cache[key] = self._find_eligible(shots, queries)
        found = self._eligible_cache[key]
        if ways > len(found) * self.turns:
            turned = f" x {self.turns} rotations" if self.turns > 1 else ""
            got = f"{len(found)} usable of {len(self.class_labels)} classes{turned}"
            wanted = (
                f"such that {ways} classes with {shots} shots and {queries} queries can be drawn"
            )
            fail(ValueError, "EpisodeSampler", "data", wanted, got)
        return found

    def _find_eligible(self, shots: int, queries: int) -> np.ndarray:
        support, query = self._support.counts, self._query.counts
        if self._split:
            fits = (support >= shots) & (query >= queries)
            least = (support >= 1) & (query >= min(queries, 1))
        else:
            fits, least = support >= shots + queries, support >= 1 + min(queries, 1)
        if self.small == "reuse":
            return np.flatnonzero(least)
        if self.small == "error" and not fits.all():
            worst = np.flatnonzero(~fits)
            label, row = self.class_labels[worst[0]], worst[0]
            if self._split:
                wanted = f"{shots} support and {queries} query items in every class"
                got = f"{support[row]} and {query[row]} in class {label!s}"
            else:
                wanted = (
                    f"{shots + queries} items ({shots} shots + {queries} queries) in every class"
                )
                got = f"{support[row]} in class {label!s}"
            got += f" ({len(worst)} of {len(fits)} classes are too small)"
            hint = f'with at least {wanted}; small="skip" or small="reuse" would allow it'
            fail(ValueError, "EpisodeSampler", "data", hint, got)
        return np.flatnonzero(fits)

    def _read_items(self, sides: list[_Side], generators: list[Generator]) -> Tensor:
        """All supports, then all queries: read, turned, changed."""
        numbers = np.concatenate([side.items for side in sides])
        tasks = np.concatenate([side.tasks for side in sides])
        if isinstance(self._data, Tensor):
            x = to_float(self._data[torch.from_numpy(numbers)])
        else:
            x = to_float(_read_dataset(self._data, numbers, tasks, generators))
        if self.turns > 1:
            turns = np.concatenate([side.turns for side in sides])
            for quarter in (1, 2, 3):
                rows = torch.from_numpy(np.flatnonzero(turns == quarter))
                x[rows] = torch.rot90(x[rows], quarter, (-2, -1))
        if self.transform is None:
            return x
        # Of each task the rows of its supports, then of its queries.
        rows_of = np.split(np.argsort(tasks, kind="stable"), np.cumsum(np.bincount(tasks))[:-1])
        pairs = list(zip(rows_of, generators, strict=True))
        if isinstance(self.transform, BatchTransform):
            drawn = np.concatenate([self.transform.draw(g, len(rows)) for rows, g in pairs])
            spread = np.empty_like(drawn)
            spread[np.concatenate(rows_of)] = drawn
            return self.transform.apply(x, torch.from_numpy(spread))
        changed = torch.cat([self.transform(x[torch.from_numpy(rows)], g) for rows, g in pairs])
        out = torch.empty_like(changed)
        out[torch.from_numpy(np.concatenate(rows_of))] = changed
        return out

    def _name(self, index: int, quarter: int) -> str:
        label = self.class_labels[index]
        name = self._names[int(label)] if self._names else str(label)
        return f"{name}, turned {90 * quarter}" if quarter else name


class _Plan:
    """What the generator of a task has decided, before any array of items is touched."""

    def __init__(
        self,
        shots: np.ndarray,
        queries: np.ndarray,
        eligible: np.ndarray,
        class_keys: np.ndarray,
        item_keys: list[np.ndarray],
    ) -> None:
        self.shots, self.queries, self.eligible = shots, queries, eligible
        self.class_keys, self.item_keys = class_keys, item_keys


class _Side:
    """Supports or queries of all tasks, one after another, and where they go in the episode."""

    def __init__(
        self,
        items: np.ndarray,
        counts: np.ndarray,
        task_of: np.ndarray,
        label_of: np.ndarray,
        turns: np.ndarray,
        tasks: int,
    ) -> None:
        used = np.arange(items.shape[1])[None, :] < counts[:, None]
        self.items = items[used]
        self.tasks = np.repeat(task_of, counts)
        self.labels = np.repeat(label_of, counts)
        self.turns = np.repeat(turns, counts)
        self.sizes = np.bincount(self.tasks, minlength=tasks)

    def lay_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Items ``[T, longest, ...]`` and labels ``[T, longest]``, padded where tasks differ."""
        tasks, longest = len(self.sizes), int(self.sizes.max())
        labels = torch.from_numpy(self.labels)
        if (self.sizes == longest).all():
            return x.reshape(tasks, longest, *x.shape[1:]), labels.reshape(tasks, longest)
        place = np.arange(len(self.tasks)) - np.repeat(
            np.cumsum(self.sizes) - self.sizes, self.sizes
        )
        where = (torch.from_numpy(self.tasks), torch.from_numpy(place))
        padded_x = x.new_zeros((tasks, longest, *x.shape[1:]))
        padded_y = labels.new_full((tasks, longest), IGNORE_INDEX)
        padded_x[where] = x
        padded_y[where] = labels
        return padded_x, padded_y


def _cycle(order: np.ndarray, start: Any, own: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``counts[r]`` items of a row, going round the ``own[r]`` ones that begin at ``start[r]``."""
    round_ = np.arange(counts.max())[None, :] % np.maximum(own, 1)[:, None]
    place = np.minimum(np.reshape(start, (-1, 1)) + round_, order.shape[1] - 1)
    # A row that wants none keeps some number, which nothing reads.
    return np.take_along_axis(order, place, 1)


def _items_of(data: Any) -> tuple[Any, tuple[str, ...]]:
    """The items, as a CPU tensor where they are one, and the names of their classes."""
    if isinstance(data, LabelledImages):
        return data.images, data.classes
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(np.ascontiguousarray(data))
    if isinstance(data, Tensor):
        if data.dim() == 0 or data.device.type != "cpu":
            got = f"shape {list(data.shape)} on {data.device}"
            fail(ValueError, "EpisodeSampler", "data", "items [N, ...] on the CPU", got)
        return data.detach(), ()
    indexable = hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__")
    if indexable and not isinstance(data, (list, tuple, dict, str, bytes)):
        return data, ()
    wanted = "LabelledImages, an array or tensor [N, ...], or a map-style dataset"
    fail(TypeError, "EpisodeSampler", "data", wanted, type(data).__name__)


def _labels_of(data: Any, labels: Any, count: int) -> np.ndarray:
    source = labels
    if source is None and not isinstance(data, (np.ndarray, Tensor)):
        source = next((getattr(data, n) for n in ("labels", "targets") if hasattr(data, n)), None)
    if source is None:
        wanted = "given, for data without a labels or targets attribute"
        fail(ValueError, "EpisodeSampler", "labels", wanted, None)
    values = source.detach().cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
    if values.ndim != 1 or len(values) != count:
        wanted = f"one label for each of the {count} items"
        fail(ValueError, "EpisodeSampler", "labels", wanted, f"shape {list(values.shape)}")
    if values.dtype.kind not in "iu":
        fail(TypeError, "EpisodeSampler", "labels", "integers", values.dtype)
    return values


def _mask(argument: str, items: Any, everything: np.ndarray) -> np.ndarray:
    if items is None:
        return everything
    values = items.detach().cpu().numpy() if isinstance(items, Tensor) else np.asarray(items)
    count = len(everything)
    if values.dtype == bool and values.shape == (count,):
        return values
    indices = values.dtype.kind in "iu" and values.ndim == 1 and values.size > 0
    if indices and values.min() >= 0 and values.max() < count:
        mask = np.zeros(count, bool)
        mask[values] = True
        return mask
    wanted = f"a mask of shape [{count}] or indices in [0, {count})"
    fail(ValueError, "EpisodeSampler", argument, wanted, f"{values.dtype} {list(values.shape)}")


def _square(items: Tensor) -> bool:
    return items.dim() >= 3 and items.shape[-1] == items.shape[-2]


def _read_dataset(
    data: Any, numbers: np.ndarray, tasks: np.ndarray, generators: list[Generator]
) -> Tensor:
    """Items of a dataset, whose own random transforms are seeded by the task."""
    items: list[Any] = [None] * len(numbers)
    for task, generator in enumerate(generators):
        with _seeded(int(generator.integers(2**32))):
            for row in np.flatnonzero(tasks == task):
                item = data[int(numbers[row])]
                items[row] = _as_tensor(item[0] if isinstance(item, (tuple, list)) else item)
    shapes = sorted({tuple(item.shape) for item in items})
    if len(shapes) > 1:
        fail(ValueError, "EpisodeSampler", "data", "of items of one shape", shapes)
    return torch.stack(items)


def _as_tensor(item: Any) -> Tensor:
    if isinstance(item, (Tensor, np.ndarray)):
        return torch.as_tensor(item)
    wanted = "a dataset of tensors or arrays (give it a transform such as torchvision's ToTensor)"
    fail(TypeError, "EpisodeSampler", "data", wanted, f"an item of type {type(item).__name__}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that datasets' transforms use, and put them back after."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
