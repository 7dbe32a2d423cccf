"""Rows of T tasks, and whether any of them are padding: asked only where it matters, and once.

On the CPU labels are looked at when they are checked. On a GPU a look makes the host wait for all
that was launched before, so there it is put off until someone has to know: batch norm by batch
statistics, or a loss of one's own. Losses known by name leave padding out on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.errors import IGNORE_INDEX

__all__ = ["Look", "Queries", "Supports", "free_to_look", "valid_rows"]


def free_to_look(tensor: Tensor) -> bool:
    """Whether a look at the numbers of a tensor makes nobody wait."""
    return tensor.device.type == "cpu"


class Look:
    """One look for all rows of a call.

    Args:
        answer: What it says without looking; None: it looks.
        refuse: Whether to raise instead of looking.
    """

    def __init__(self, answer: bool | None = None, *, refuse: bool = False) -> None:
        self._answer = answer
        self._refuse = refuse
        self._asked: list[Callable[[], Tensor]] = []
        self.found: list[bool] | None = None

    def share(self, *rows: Supports | Queries) -> None:
        """Have ``rows`` ask here whether they are padded, unless they know or are free to look."""
        for part in rows:
            if part.known is None and part.marks is not None and not free_to_look(part.marks):
                part.look = functools.partial(self._at, len(self._asked))
                self._asked.append(part.any_padding)

    def _at(self, index: int) -> bool:
        if self._refuse:
            raise RuntimeError("labels are looked at")
        if self.found is None:
            self.found = (
                torch.stack([ask() for ask in self._asked]).tolist()
                if self._answer is None
                else [self._answer] * len(self._asked)
            )
        return self.found[index]


@dataclass
class Supports:
    """The supports of T tasks, and what a look at their labels said.

    Attributes:
        x: Tensor[T, S, ...].
        y: Tensor[T, S, ...].
        top: Largest label, or None where labels were not looked at.
        known: Whether rows of padding are among them; None until someone asks.
        role: ``"support"`` or ``"query"``: what messages call them.
        look: What says whether there is padding, where a look is shared.
    """

    x: Tensor
    y: Tensor
    top: int | None = None
    known: bool | None = None
    role: str = "support"
    look: Callable[[], bool] | None = None

    @property
    def marks(self) -> Tensor:
        """What tells padding."""
        return self.y

    def any_padding(self) -> Tensor:
        """Whether any row is padding, on the device."""
        return (self.y == IGNORE_INDEX).any()

    def padded(self) -> bool:
        """Whether any row is padding. Looks at the labels once, and only where it matters."""
        if self.known is None:
            self.known = bool(self.any_padding()) if self.look is None else self.look()
        return self.known

    def rows(self, task: int) -> tuple[Tensor, Tensor]:
        """The supports of one task, without rows of padding."""
        x, y = self.x[task], self.y[task]
        if self.padded():
            valid = self.valid(task)
            x, y = x[valid], y[valid]
        return x, y

    def valid(self, task: int) -> Tensor:
        """Which rows of one task are no padding, bool Tensor[S]."""
        return valid_rows(self.y[task : task + 1])[0]

    def part(self, start: int, stop: int) -> Supports:
        """The supports of the tasks [start, stop)."""
        x, y = self.x[start:stop], self.y[start:stop]
        return Supports(x, y, self.top, self.known, self.role, self.look)


@dataclass
class Queries:
    """The queries of T tasks: x Tensor[T, Q, ...], mask Tensor[T, Q] (True: a query) or None."""

    x: Tensor
    mask: Tensor | None = None
    known: bool | None = None
    look: Callable[[], bool] | None = None

    @property
    def marks(self) -> Tensor | None:
        """What tells padding."""
        return self.mask

    def any_padding(self) -> Tensor:
        """Whether any row is padding, on the device."""
        assert self.mask is not None
        return ~self.mask.all()

    def padded(self) -> bool:
        """Whether any row is padding."""
        if self.known is None:
            if self.mask is None:
                self.known = False
            else:
                self.known = bool(self.any_padding()) if self.look is None else self.look()
        return self.known

    def part(self, start: int, stop: int) -> Queries:
        """The queries of the tasks [start, stop)."""
        mask = None if self.mask is None else self.mask[start:stop]
        return Queries(self.x[start:stop], mask, self.known, self.look)


def valid_rows(labels: Tensor) -> Tensor:
    """Which rows of Tensor[T, N, ...] are no padding, bool Tensor[T, N]."""
    own = labels != IGNORE_INDEX
    return own.flatten(2).any(2) if own.dim() > 2 else own
