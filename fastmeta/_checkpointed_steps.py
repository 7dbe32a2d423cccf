"""Gradient steps without their graphs: of K steps only the trajectory of the parameters is kept.

The backward pass of a step builds the graph of that step again, from the parameters that it started
at, and pulls the cotangent through it: one Hessian-vector product. So there is one step's graph at
a time, however many steps. The last step keeps its graph from the forward pass on: its backward
pass is the first to come, so that giving it up would cost time and bound nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmeta._descent import Rates, descend
from fastmeta._lent_model import Held, LentModel
from fastmeta._recompute import reads_more, recompute, rng_restore, rng_state
from fastmeta.errors import fail

__all__ = ["Adaptation"]


@dataclass
class Adaptation:
    """What adapts: a model, and its loss on the supports x and y at the parameters theta.

    Attributes:
        lend: Lends the model once more, to the backward pass.
        loss_of: ``(lent, theta, x, y) -> scalar``.
        x: Inputs.
        y: Labels or targets.
        draws: Whether random numbers may be drawn.
    """

    lend: Callable[[], LentModel]
    loss_of: Callable[[LentModel, list[Tensor], Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    draws: bool = True

    def taped(
        self, lent: LentModel, theta: list[Tensor], rates: Rates, steps: int, second_order: bool
    ) -> list[Tensor]:
        """``steps`` steps from ``theta``, each in the graph."""
        return descend(
            lambda theta: self.loss_of(lent, theta, self.x, self.y),
            theta,
            rates,
            steps,
            second_order,
        )

    def checkpointed(
        self, lent: LentModel, theta: list[Tensor], rates: Rates, steps: int
    ) -> list[Tensor]:
        """The same, of second order, with a graph of the last step alone.

        A step that cannot be run again from tensors that are known, because the model writes
        buffers or because it or its loss reads other tensors that require gradients, is found
        out; then all steps are taped.
        """
        start, held = theta, lent.held()
        state = rng_state(self.x.device) if self.draws else None
        for index in range(steps - 1):
            step = _Step(self, lent, held, rates.single(index), len(theta))
            theta = step.take(theta, look=index == 0)
            if not step.repeatable:
                if state is not None:
                    rng_restore(state, self.x.device)
                lent.fresh_buffers()
                return self.taped(lent, start, rates, steps, True)
        return self.taped(lent, theta, rates.single(steps - 1), 1, True)


class _Step:
    """One step, that can be run again: from parameters, rates, inputs, and what the model holds."""

    def __init__(
        self, what: Adaptation, lent: LentModel, held: Held, rates: Rates, parameters: int
    ) -> None:
        self.repeatable = True
        self._what = what
        self._rates = rates
        self._parameters = parameters
        self._held = held
        self._lent: LentModel | None = lent
        self._look = False
        self._loss: Tensor | None = None

    def take(self, theta: list[Tensor], *, look: bool) -> list[Tensor]:
        """The parameters after the step; ``look`` at the graph for tensors that are not known."""
        what, self._look = self._what, look
        tensors = [*theta, *self._rates.tensors, what.x, what.y, *self._held.tensors]
        result = recompute(self._first, tensors, what.x.device, again=self._again, draws=what.draws)
        self._lent = None
        return list(result)

    def _split(self, tensors: list[Tensor]) -> tuple[list[Tensor], Rates, Adaptation, list[Tensor]]:
        first = self._parameters
        second = first + len(self._rates.tensors)
        x, y = tensors[second : second + 2]
        rates = replace(self._rates, tensors=tensors[first:second])
        what = replace(self._what, x=x, y=y)
        return tensors[:first], rates, what, tensors[second + 2 :]

    def _first(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        theta, rates, what, held = self._split(tensors)
        lent = self._lent
        assert lent is not None
        seen: list[tuple[Tensor, list[Tensor]]] = []

        def loss_of(lent: LentModel, theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            loss = self._what.loss_of(lent, theta, x, y)
            seen.append((loss, theta))
            return loss

        with lent.holding(self._held, held):
            what = replace(what, loss_of=loss_of)
            result = what.taped(lent, theta, rates, 1, False)
        loss, leaves = seen[0]
        self._loss = loss.detach()
        self.repeatable = not (lent.wrote_buffers() or (self._look and reads_more(loss, leaves)))
        return tuple(result)

    def _again(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        theta, rates, what, held = self._split(tensors)
        losses: list[Tensor] = []

        def loss_of(lent: LentModel, theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            loss = self._what.loss_of(lent, theta, x, y)
            losses.append(loss.detach())
            return loss

        with self._what.lend() as lent:
            lent.restore(self._held, held)
            what = replace(what, loss_of=loss_of)
            result = what.taped(lent, theta, rates, 1, True)
        assert self._loss is not None
        _check_same(self._loss, losses[0])
        return tuple(result)


def _check_same(first: Tensor, again: Tensor) -> None:
    """That the loss came out as it did at first. On the CPU alone: a look at a GPU would stall."""
    if first.device.type != "cpu":
        return
    a, b = float(first), float(again)
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 1e-2
    if abs(a - b) <= tolerance * max(abs(a), abs(b)) or a == b or (a != a and b != b):
        return
    wanted = (
        "a module whose numbers the backward pass can get by running it again: with its state in "
        "buffers, if it keeps any"
    )
    fail(RuntimeError, "MAML", "model", wanted, f"a support loss of {a:g} first and {b:g} again")
