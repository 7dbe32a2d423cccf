"""The losses that tasks adapt by, with their checks: each maps one task to a scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta._lent_model import PaddingMixes
from fastmeta.errors import IGNORE_INDEX, describe, fail, is_tracing

__all__ = ["LOSSES", "Loss", "Supports", "check_supports", "task_loss"]

Loss = str | Callable[[Tensor, Tensor], Tensor]

#: The losses that are known by name.
LOSSES = ("cross_entropy", "mse")


@dataclass
class Supports:
    """The supports of T tasks, and what a look at their labels said.

    Attributes:
        x: Tensor[T, S, ...].
        y: Tensor[T, S, ...].
        top: Largest label, or None where labels were not looked at.
        known: Whether rows of padding are among them; None until someone asks.
    """

    x: Tensor
    y: Tensor
    top: int | None = None
    known: bool | None = field(default=None)

    def padded(self) -> bool:
        """Whether any row is padding. Looks at the labels once, and only where it matters."""
        if self.known is None:
            self.known = bool((self.y == IGNORE_INDEX).any())
        return self.known

    def rows(self, task: int) -> tuple[Tensor, Tensor]:
        """The supports of one task, without rows of padding."""
        x, y = self.x[task], self.y[task]
        if self.padded():
            valid = (y != IGNORE_INDEX).flatten(1).any(1) if y.dim() > 1 else y != IGNORE_INDEX
            x, y = x[valid], y[valid]
        return x, y

    def part(self, start: int, stop: int) -> Supports:
        """The supports of the tasks [start, stop)."""
        return Supports(self.x[start:stop], self.y[start:stop], self.top, self.known)


def check_supports(function: str, support_x: Any, support_y: Any, loss: Loss) -> Supports:
    """Check the supports against each other and against ``loss``."""
    for argument, value in (("support_x", support_x), ("support_y", support_y)):
        if not isinstance(value, Tensor):
            fail(TypeError, function, argument, "a tensor", describe(value))
    if support_x.dim() < 2 or 0 in support_x.shape[:2]:
        wanted = "of shape [T, S, ...] with at least one task and one support"
        fail(ValueError, function, "support_x", wanted, f"shape {list(support_x.shape)}")
    if support_y.shape[:2] != support_x.shape[:2]:
        wanted = f"of shape {list(support_x.shape[:2])} + [...], as support_x has [T, S]"
        fail(ValueError, function, "support_y", wanted, f"shape {list(support_y.shape)}")
    if support_y.device != support_x.device:
        wanted = f"on {support_x.device}, like support_x"
        fail(ValueError, function, "support_y", wanted, support_y.device)
    integral = not (support_y.is_floating_point() or support_y.is_complex())
    if loss == "cross_entropy" and (not integral or support_y.dtype == torch.bool):
        wanted = "an integer tensor of class labels for loss='cross_entropy'"
        fail(TypeError, function, "support_y", wanted, describe(support_y))
    if loss == "mse" and not support_y.is_floating_point():
        wanted = "a floating tensor for loss='mse'"
        fail(TypeError, function, "support_y", wanted, describe(support_y))
    if not integral or support_y.dtype == torch.bool:
        return Supports(support_x, support_y, known=False)
    if loss == "cross_entropy":
        support_y = support_y.long()
    if support_y.device.type != "cpu" or is_tracing(support_y) or support_y.numel() == 0:
        return Supports(support_x, support_y)
    return _look(function, support_x, support_y, loss)


def _look(function: str, support_x: Tensor, support_y: Tensor, loss: Loss) -> Supports:
    low, top = (int(v) for v in torch.aminmax(support_y))
    padded = low < 0 and bool((support_y == IGNORE_INDEX).any())
    if low < 0 and loss == "cross_entropy":
        wrong = (support_y < 0) & (support_y != IGNORE_INDEX)
        if wrong.any():
            wanted = f"class labels from 0 on, or {IGNORE_INDEX} for padding"
            fail(ValueError, function, "support_y", wanted, int(support_y[wrong][0]))
    return Supports(support_x, support_y, top, padded)


def task_loss(
    loss: Loss, supports: Supports, *, trimmed: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one task's predictions; ``trimmed`` says that rows of padding are taken out."""
    if loss == "cross_entropy":
        top, padded = supports.top, supports.known is not False

        def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
            _check_logits(prediction, target, top)
            if not padded:
                return F.cross_entropy(prediction, target)
            # A task without any support has loss 0 and stays as it is, where the mean would be NaN.
            total = F.cross_entropy(prediction, target, ignore_index=IGNORE_INDEX, reduction="sum")
            return total / (target != IGNORE_INDEX).sum().clamp(min=1)

        return cross_entropy
    if loss == "mse":
        return _mse
    assert callable(loss)

    def custom(prediction: Tensor, target: Tensor) -> Tensor:
        if not trimmed and supports.padded():
            raise PaddingMixes("a loss of one's own may not know padding")
        return call_loss(loss, prediction, target)

    return custom


def call_loss(
    loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor
) -> Tensor:
    """A user's loss, which must be a scalar."""
    value = loss(prediction, target)
    if not isinstance(value, Tensor) or value.dim() != 0:
        wanted = "a function (prediction, target) that returns a scalar tensor for one task"
        fail(ValueError, "MAML", "loss", wanted, describe(value))
    return value


def _check_logits(prediction: Tensor, target: Tensor, top: int | None) -> None:
    fits = prediction.dim() == target.dim() + 1 and (
        prediction.shape[:1] + prediction.shape[2:] == target.shape
    )
    if not fits:
        rows = ", ".join(str(n) for n in target.shape[1:])
        wanted = f"a module that returns [{target.shape[0]}, C{', ' + rows if rows else ''}] here"
        fail(ValueError, "MAML", "model", wanted, f"shape {list(prediction.shape)}")
    if top is not None and top >= prediction.shape[1]:
        wanted = f"in [0, {prediction.shape[1]}), the outputs of the model, or {IGNORE_INDEX}"
        fail(ValueError, "MAML", "support_y", wanted, top)


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    # Broadcasting [S, 1] against [S] would train on S x S pairs without a word.
    if prediction.shape != target.shape:
        wanted = f"a module that returns the shape of the targets, {list(target.shape)} a task"
        fail(ValueError, "MAML", "model", wanted, f"shape {list(prediction.shape)}")
    return F.mse_loss(prediction, target)
