"""Gradient steps of the inner loop: their rates, one after another, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.errors import fail
from fastmeta.ops._define import acc_dtype
from fastmeta.ops.update import _sgd as fused_sgd
from fastmeta.ops.update import sgd_update

__all__ = ["Rates", "descend", "gradients"]

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


@dataclass
class Rates:
    """Learning rates of all steps, as tensors that can be handed through a recomputation.

    Attributes:
        value: The constant rate, where nothing is learned.
        tensors: The learned rates: one, or one for each adapted parameter.
        shared: Whether ``tensors`` is one rate for all parameters.
        per_step: Whether their first dimension is the step.
    """

    value: float
    tensors: list[Tensor] = field(default_factory=list)
    shared: bool = False
    per_step: bool = False

    def at(self, step: int) -> float | Tensor | list[Tensor]:
        """Rates of one step, as ``sgd_update`` takes them; past the last, those of the last."""
        if not self.tensors:
            return self.value
        tensors = self.single(step).tensors
        return tensors[0] if self.shared else tensors

    def single(self, step: int) -> Rates:
        """The rates of one step alone."""
        if not self.per_step:
            return self
        tensors = [t[min(step, t.shape[0] - 1)] for t in self.tensors]
        return Rates(self.value, tensors, self.shared)


def gradients(
    loss_of: Callable[[list[Tensor]], Tensor], theta: list[Tensor], second_order: bool
) -> Sequence[Any]:
    """Gradient at ``theta``, in the graph if ``second_order``; None for what is not used."""
    if _transforms_active():
        grads = torch.func.grad(loss_of)(theta)
        return list(grads if second_order else (g.detach() for g in grads))
    if second_order:
        theta = [t if t.requires_grad else t.detach().requires_grad_() for t in theta]
    else:
        theta = [t.detach().requires_grad_() for t in theta]
    with torch.enable_grad():
        loss = loss_of(theta)
        found: Sequence[Any] = (None,)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, theta, create_graph=second_order, allow_unused=True)
    if all(g is None for g in found):
        wanted = "a module whose output depends on the adapted parameters"
        fail(RuntimeError, "MAML", "model", wanted, "a support loss that none of them moves")
    return found


def descend(
    loss_of: Callable[[list[Tensor]], Tensor],
    theta: list[Tensor],
    rates: Rates,
    steps: int,
    second_order: bool,
) -> list[Tensor]:
    """``steps`` gradient steps from ``theta``."""
    constant: Tensor | None = None
    for step in range(steps):
        grads = gradients(loss_of, theta, second_order)
        rate = rates.at(step)
        first = theta[0]
        alike = all(g is not None and g.dtype == first.dtype for g in grads)
        if not alike or any(t.device != first.device for t in theta):
            theta = list(sgd_update(theta, grads, rate))
            continue
        # What sgd_update would check and convert holds here, and would cost as much as the step.
        acc = acc_dtype(first.dtype)
        if isinstance(rate, float):
            if constant is None:
                constant = torch.full((), rate, dtype=acc, device=first.device)
            rate = constant
        columns = [rate] * len(theta) if isinstance(rate, Tensor) else rate
        theta = fused_sgd(theta, list(grads), [r.to(acc) for r in columns])
    return theta
