"""Small instruments of training loops: intervals, running means, progress."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.errors import check_float_tensor, fail

__all__ = ["Interval", "Progress", "mean_interval"]


class Interval(NamedTuple):
    """A mean and the half width of its 95% confidence interval.

    Attributes:
        mean: the mean.
        half: 1.96 standard errors; infinite for a single value.
        n: how many values.
    """

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        """As percentages, ``81.3 ± 0.7``."""
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"

    def signed(self) -> str:
        """As percentages with the sign of the mean, ``+5.2 ± 0.7``."""
        return f"{100 * self.mean:+.1f} ± {100 * self.half:.1f}"


def mean_interval(values: Tensor) -> Interval:
    """Mean over tasks and its 95% confidence interval, mean ± 1.96 s / sqrt(n).

    Queries of one task share its classes and supports, so the task is the unit that is independent:
    give one accuracy per task, not one per query.

    Args:
        values: ``Tensor[n]`` floating, one number per task, n at least 1.

    Returns:
        The interval; s is the sample standard deviation (n - 1).

    Raises:
        TypeError: not a floating tensor.
        ValueError: not one-dimensional, or empty.

    Example:
        >>> import torch
        >>> str(mean_interval(torch.tensor([0.8, 1.0, 0.6, 0.8])))
        '80.0 ± 16.0'
    """
    check_float_tensor("mean_interval", "values", values)
    if values.dim() != 1 or not len(values):
        wanted = "of shape [n] with n at least 1"
        fail(ValueError, "mean_interval", "values", wanted, f"shape {list(values.shape)}")
    values = values.to(torch.float64)
    if len(values) == 1:
        return Interval(float(values[0]), float("inf"), 1)
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return Interval(float(values.mean()), half, len(values))


class Progress:
    """A progress bar on stderr: tqdm's where it is installed, else a line every tenth of the way.

    Args:
        label: what is going on.
        total: how many steps it will take.
        quiet: show nothing.

    Example:
        >>> with Progress("training", 3, quiet=True) as bar:
        ...     for step in range(3):
        ...         bar.step(f"loss {0.1 * step:.1f}")
    """

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.done = 0
        self._start = time.perf_counter()
        self._bar = None
        if quiet:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        form = "{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=total, desc=label, bar_format=form, file=sys.stderr)

    def step(self, note: str = "") -> None:
        """One step further; ``note`` stands behind the bar."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif not self.quiet and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            seconds = time.perf_counter() - self._start
            percent = 100 * self.done // self.total
            sys.stderr.write(f"{self.label} {percent:3d}% after {seconds:.0f} s  {note}\n")

    def __enter__(self) -> Progress:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
