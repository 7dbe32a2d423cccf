"""Streams of episodes: iteration, worker processes and resuming, for any source of tasks."""

from __future__ import annotations

import copy
import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastmeta.data.episode import Episode
from fastmeta.errors import check_integer, fail

__all__ = ["EpisodeStream", "task_generator"]

Stream = TypeVar("Stream", bound="EpisodeStream")


def task_generator(seed: int, task: int) -> np.random.Generator:
    """The random generator of one task: a function of ``(seed, task)`` and of nothing else.

    Philox is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): two
    keys give independent streams, so a task can be made alone, in any order and in any process.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, task], dtype=np.uint64)))


class EpisodeStream(ABC):
    """A seeded stream of batches of tasks.

    Batch ``i`` holds tasks ``i * tasks`` to ``(i + 1) * tasks - 1``, and a task depends on the seed
    and its number alone. So the stream is the same with any number of workers, from any starting
    point, and ``stream[i]`` gives batch ``i`` directly.

    Without ``batches`` the stream is endless, and every loop over it goes on where the last one
    stopped. With ``batches`` it is a fixed set: every loop gives the same batches from the first
    on. After ``load_state_dict`` the next loop begins at the saved place in both cases.

    To make one's own, derive a class and write :meth:`make`.

    Args:
        tasks: T, tasks in a batch.
        batches: how many batches a loop gives; None for an endless stream.
        seed: in [0, 2**64).
        workers: processes that make batches ahead; 0 makes them in this process.
    """

    def __init__(
        self, *, tasks: int, batches: int | None = None, seed: int = 0, workers: int = 0
    ) -> None:
        """Set the stream to its first batch."""
        name = type(self).__name__
        self.tasks = check_integer(name, "tasks", tasks, 1)
        self.batches = None if batches is None else check_integer(name, "batches", batches, 1)
        self.seed = check_integer(name, "seed", seed, 0, 2**64)
        self.workers = check_integer(name, "workers", workers, 0)
        self._rank, self._ranks = 0, 1
        self._position = 0
        self._resumed = False

    def shard(self: Stream, rank: int, ranks: int) -> Stream:
        """The part of this stream that one of several processes reads, from its beginning.

        Batch ``i`` of the part is batch ``i * ranks + rank`` of the whole. Of a stream with an end
        all parts are of one length: the last ``batches % ranks`` batches are nobody's. A state of
        one part serves all, so that one process can save it.

        Args:
            rank: of this process (``torch.distributed.get_rank()``).
            ranks: number of processes (``torch.distributed.get_world_size()``).

        Raises:
            ValueError: a number is out of range, there are fewer batches than processes, or the
                stream is a part already.

        Example:
            >>> from fastmeta.data import sinusoids
            >>> stream = sinusoids(tasks=4, batches=7)
            >>> [len(stream.shard(rank, 2)) for rank in range(2)]
            [3, 3]
        """
        name = f"{type(self).__name__}.shard"
        if self._ranks != 1:
            fail(ValueError, name, "the stream", "a whole one", f"1 of {self._ranks} parts")
        ranks = check_integer(name, "ranks", ranks, 1)
        rank = check_integer(name, "rank", rank, 0, ranks)
        if self.batches is not None and self.batches < ranks:
            fail(ValueError, name, "ranks", f"at most the {self.batches} batches", ranks)
        part = copy.copy(self)
        part._rank, part._ranks = rank, ranks
        part.batches = None if self.batches is None else self.batches // ranks
        part._position, part._resumed = 0, False
        return part

    @abstractmethod
    def make(self, tasks: range) -> Episode:
        """Make the tasks of these numbers as one episode, each from its own generator."""

    def signature(self) -> dict[str, Any]:
        """What must agree for a saved position to mean the same place; kept in the state."""
        return {"stream": type(self).__name__, "seed": self.seed, "tasks": self.tasks}

    def __getitem__(self, index: int) -> Episode:
        """Batch ``index``, whatever has been read before."""
        index = operator.index(index)
        if index < 0 or (self.batches is not None and index >= self.batches):
            top = "" if self.batches is None else f" and below {self.batches}"
            fail(IndexError, type(self).__name__, "index", f"not negative{top}", index)
        return self.make(self.task_numbers(index))

    def task_numbers(self, index: int) -> range:
        """Numbers of the tasks in batch ``index``."""
        batch = index * self._ranks + self._rank
        return range(batch * self.tasks, (batch + 1) * self.tasks)

    def __len__(self) -> int:
        """The number of batches of a stream that has an end."""
        if self.batches is None:
            raise TypeError(
                f"{type(self).__name__} is endless; give batches= for one with a length"
            )
        return self.batches

    def __iter__(self) -> Iterator[Episode]:
        """Give the batches in order (see the class for where a loop begins)."""
        if self.batches is not None and not self._resumed:
            self._position = 0
        self._resumed = False
        # The place moves when a batch is handed over, not when a worker has made it.
        for index, episode in zip(self._indices(), self._read(), strict=False):
            self._position = index + 1
            yield episode

    def _indices(self) -> Iterator[int]:
        start = self._position
        return iter(itertools.count(start) if self.batches is None else range(start, self.batches))

    def _read(self) -> Iterator[Episode]:
        if self.workers == 0:
            return map(self.__getitem__, self._indices())
        loader = DataLoader(
            cast("Dataset[Episode]", self),
            batch_size=None,
            sampler=_Order(self._position, self.batches),
            num_workers=self.workers,
            collate_fn=cast("Any", _identity),
            # The loader draws a seed for its workers; from the global generator it would disturb
            # the caller's random numbers.
            generator=torch.Generator(torch.get_default_device()),
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream: what :meth:`load_state_dict` needs to go on from here."""
        return {**self.signature(), "ranks": self._ranks, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the next loop begins there.

        Raises:
            ValueError: the state is of another stream (seed, tasks, data or sizes differ).
        """
        name = f"{type(self).__name__}.load_state_dict"
        state = {"ranks": 1, **state}
        mine = {**self.signature(), "ranks": self._ranks}
        for key in (*mine, "position"):
            if key not in state:
                fail(
                    ValueError, name, "state", f"a state of state_dict() with {key!r}", list(state)
                )
        for key, value in mine.items():
            if state[key] != value:
                fail(ValueError, name, f"state[{key!r}]", f"{value!r} as here", repr(state[key]))
        self._position = check_integer(name, "state['position']", state["position"], 0)
        self._resumed = True


class _Order:
    """The order in which a loader reads: from a place to the end, or for ever."""

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(
            itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        )


def _identity(episode: Episode) -> Episode:
    return episode
