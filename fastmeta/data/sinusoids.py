"""Sinusoid regression: the smallest task distribution on which meta-learning shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmeta.data.episode import Episode
from fastmeta.data.stream import EpisodeStream, task_generator
from fastmeta.errors import check_integer, fail

__all__ = ["Sinusoids", "sinusoids"]


class Sinusoids(EpisodeStream):
    """A stream of regression tasks ``y = amplitude * sin(x - phase)``; see :func:`sinusoids`."""

    def __init__(
        self,
        *,
        shots: int,
        queries: int,
        amplitude: tuple[float, float],
        phase: tuple[float, float],
        x_range: tuple[float, float],
        noise: float,
        tasks: int,
        batches: int | None,
        seed: int,
        workers: int,
    ) -> None:
        """Check the ranges."""
        super().__init__(tasks=tasks, batches=batches, seed=seed, workers=workers)
        self.shots = check_integer("sinusoids", "shots", shots, 1)
        self.queries = check_integer("sinusoids", "queries", queries, 0)
        ranges = {"amplitude": amplitude, "phase": phase, "x_range": x_range}
        for name, value in ranges.items():
            if len(value) != 2 or not value[0] <= value[1]:
                fail(ValueError, "sinusoids", name, "(low, high) with low <= high", value)
        if not noise >= 0:
            fail(ValueError, "sinusoids", "noise", "at least 0", noise)
        self.amplitude, self.phase, self.x_range, self.noise = amplitude, phase, x_range, noise

    def signature(self) -> dict[str, Any]:
        """What must agree for a saved position to mean the same place."""
        names = ("shots", "queries", "amplitude", "phase", "x_range", "noise")
        return {**super().signature(), **{name: getattr(self, name) for name in names}}

    def make(self, tasks: range) -> Episode:
        """Make the tasks of these numbers as one episode."""
        x, y = (
            torch.from_numpy(np.stack(part)[..., None].astype(np.float32))
            for part in zip(*(self._task(task) for task in tasks), strict=True)
        )
        s = self.shots
        return Episode(x[:, :s], y[:, :s], x[:, s:], y[:, s:])

    def _task(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        generator = task_generator(self.seed, task)
        amplitude, phase = generator.uniform(*self.amplitude), generator.uniform(*self.phase)
        x = generator.uniform(*self.x_range, size=self.shots + self.queries)
        y = amplitude * np.sin(x - phase)
        if self.noise:
            y[: self.shots] += self.noise * generator.standard_normal(self.shots)
        return x, y


def sinusoids(
    *,
    shots: int = 10,
    queries: int = 10,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, np.pi),
    x_range: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
    tasks: int = 25,
    batches: int | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Sinusoids:
    """Regression tasks ``y = amplitude * sin(x - phase)``, each a sine of its own.

    Finn et al. 2017, arXiv:1703.03400, section 5.1; the defaults are the paper's.

    Args:
        shots: supports of a task.
        queries: queries of a task.
        amplitude: range from which a task draws its amplitude, uniformly.
        phase: range of the phase, in radians.
        x_range: range of the inputs.
        noise: standard deviation of Gaussian noise on the supports' targets; queries have none.
        tasks: T, tasks in a batch.
        batches: how many batches a loop gives; None for an endless stream.
        seed: in [0, 2**64).
        workers: processes that make batches ahead; 0 makes them in this process.

    Returns:
        A stream (:class:`fastmeta.data.EpisodeStream`) of episodes with float32 inputs
        ``[T, shots or queries, 1]`` and targets of the same shape.

    Raises:
        ValueError: an empty range, a negative size.

    Example:
        >>> from fastmeta.data import sinusoids
        >>> support_x, support_y, query_x, query_y = sinusoids(shots=5, tasks=4)[0]
        >>> support_x.shape, query_y.shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """
    return Sinusoids(
        shots=shots, queries=queries, amplitude=amplitude, phase=phase, x_range=x_range,
        noise=noise, tasks=tasks, batches=batches, seed=seed, workers=workers,
    )  # fmt: skip
