"""The losses that tasks adapt by, with their checks: each maps one task to a scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta._lent_model import PaddingMixes
from fastmeta._padding import Supports, free_to_look
from fastmeta.errors import IGNORE_INDEX, describe, fail, is_tracing

__all__ = [
    "LOSSES",
    "Loss",
    "NamedLoss",
    "Supports",
    "check_prediction",
    "check_supports",
    "labels_padded",
    "named_loss",
    "query_losses",
    "task_loss",
]

#: The losses that are known by name.
LOSSES = ("cross_entropy", "mse", "huber", "bce")


@dataclass(frozen=True)
class NamedLoss:
    """A loss whose formula is known: a mean over what counts.

    Attributes:
        kind: One of `LOSSES`.
        smoothing: Of the labels, for cross-entropy.
        ignore: The label that does not count, for cross-entropy.
        delta: Where Huber's loss goes from square to line.
        source: The module of torch that it came as, which holds the class weights.
    """

    kind: str
    smoothing: float = 0.0
    ignore: int = IGNORE_INDEX
    delta: float = 1.0
    source: nn.Module | None = None

    @property
    def weight(self) -> Tensor | None:
        """Weights of the classes, for cross-entropy."""
        return getattr(self.source, "weight", None)

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels; else they are numbers of the prediction's shape."""
        return self.kind == "cross_entropy"

    def __call__(self, prediction: Tensor, target: Tensor, *, padded: bool = True) -> Tensor:
        """The loss of one task. Where nothing counts it is 0, and the mean would be NaN."""
        if self.kind == "mse":
            return F.mse_loss(prediction, target)
        if self.kind == "huber":
            return F.huber_loss(prediction, target, delta=self.delta)
        if self.kind == "bce":
            return F.binary_cross_entropy_with_logits(prediction, target)
        if not padded and self.weight is None:
            return F.cross_entropy(prediction, target, label_smoothing=self.smoothing)
        valid = target != IGNORE_INDEX
        if self.weight is not None:
            return self._weighted(prediction, target, valid, self.weight)
        total = F.cross_entropy(prediction, target, reduction="sum", label_smoothing=self.smoothing)
        return total / valid.sum().clamp(min=1)

    def _weighted(
        self, prediction: Tensor, target: Tensor, valid: Tensor, weight: Tensor
    ) -> Tensor:
        """By hand: torch's cannot be mapped by vmap with class weights and smoothing."""
        logs = F.log_softmax(prediction, 1)
        total = F.nll_loss(logs, target, weight, reduction="sum")
        if self.smoothing:
            spread = -logs.movedim(1, -1) @ weight / weight.shape[0]
            spread = torch.where(valid, spread, 0).sum()
            total = (1 - self.smoothing) * total + self.smoothing * spread
        mass = torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()
        return torch.where(mass == 0, 0, total / torch.where(mass == 0, 1, mass))


Loss = NamedLoss | Callable[[Tensor, Tensor], Tensor]

#: As torch names them.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def named_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss as one that is known, if it is: by name, as torch's function or its module."""
    if isinstance(loss, str):
        return NamedLoss(loss)
    for kind, function in _FUNCTIONS.items():
        if loss is function:
            return NamedLoss(kind)
    if getattr(loss, "reduction", None) != "mean":
        return loss
    if isinstance(loss, nn.Module) and (loss._forward_hooks or loss._forward_pre_hooks):
        return loss
    if type(loss) is nn.CrossEntropyLoss:
        return NamedLoss("cross_entropy", loss.label_smoothing, loss.ignore_index, source=loss)
    if type(loss) is nn.MSELoss:
        return NamedLoss("mse", source=loss)
    if type(loss) is nn.HuberLoss:
        return NamedLoss("huber", delta=loss.delta, source=loss)
    if type(loss) is nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None:
        return NamedLoss("bce", source=loss)
    return loss


def check_supports(
    function: str, support_x: Any, support_y: Any, loss: Loss, role: str = "support"
) -> Supports:
    """Check supports (or, as ``role`` says, queries) against each other and against ``loss``."""
    for argument, value in ((f"{role}_x", support_x), (f"{role}_y", support_y)):
        if not isinstance(value, Tensor):
            fail(TypeError, function, argument, "a tensor", describe(value))
    letter = role[0].upper()
    if support_x.dim() < 2 or 0 in support_x.shape[:2]:
        wanted = f"of shape [T, {letter}, ...] with at least one task and one {role}"
        fail(ValueError, function, f"{role}_x", wanted, f"shape {list(support_x.shape)}")
    if support_y.shape[:2] != support_x.shape[:2]:
        wanted = f"of shape {list(support_x.shape[:2])} + [...], as {role}_x has [T, {letter}]"
        fail(ValueError, function, f"{role}_y", wanted, f"shape {list(support_y.shape)}")
    if support_y.device != support_x.device:
        wanted = f"on {support_x.device}, like {role}_x"
        fail(ValueError, function, f"{role}_y", wanted, support_y.device)
    integral = not (support_y.is_floating_point() or support_y.is_complex())
    if isinstance(loss, NamedLoss):
        name = f"loss={loss.kind!r}"
        if loss.labelled and (not integral or support_y.dtype == torch.bool):
            wanted = (
                f"an integer tensor of class labels for {name} (probabilities of classes take a "
                "loss function of your own)"
            )
            fail(TypeError, function, f"{role}_y", wanted, describe(support_y))
        if not loss.labelled and not support_y.is_floating_point():
            fail(
                TypeError,
                function,
                f"{role}_y",
                f"a floating tensor for {name}",
                describe(support_y),
            )
    if not integral or support_y.dtype == torch.bool:
        return Supports(support_x, support_y, known=False, role=role)
    if isinstance(loss, NamedLoss):
        support_y = support_y.long()
        if loss.ignore != IGNORE_INDEX:
            support_y = torch.where(support_y == loss.ignore, IGNORE_INDEX, support_y)
    found = Supports(support_x, support_y, role=role)
    if not free_to_look(support_y) or is_tracing(support_y) or support_y.numel() == 0:
        return found
    return _look(function, found, loss)


def _look(function: str, found: Supports, loss: Loss) -> Supports:
    labels = found.y
    low, found.top = (int(v) for v in torch.aminmax(labels))
    found.known = low < 0 and bool((labels == IGNORE_INDEX).any())
    if low < 0 and isinstance(loss, NamedLoss):
        wrong = (labels < 0) & (labels != IGNORE_INDEX)
        if wrong.any():
            wanted = f"class labels from 0 on, or {IGNORE_INDEX} for padding"
            fail(ValueError, function, f"{found.role}_y", wanted, int(labels[wrong][0]))
    return found


def labels_padded(loss: Loss, *labels: Tensor) -> bool:
    """Whether any row of ``labels``, as they came, is padding: one look."""
    found = []
    for y in labels:
        if not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
            found.append((y == IGNORE_INDEX).any())
            if isinstance(loss, NamedLoss) and loss.ignore != IGNORE_INDEX:
                found.append((y == loss.ignore).any())
    return bool(found) and bool(torch.stack(found).any())


def task_loss(
    loss: Loss, supports: Supports, *, trimmed: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one task's predictions; ``trimmed`` says that rows of padding are taken out."""
    if isinstance(loss, NamedLoss):
        named = loss

        def known(prediction: Tensor, target: Tensor) -> Tensor:
            check_prediction(named, prediction.shape, target.shape, supports)
            return named(prediction, target, padded=supports.known is not False)

        return known

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


def check_prediction(
    loss: NamedLoss, prediction: torch.Size, target: torch.Size, rows: Supports
) -> None:
    """Raise unless a prediction of this shape can be held against the targets of one task."""
    if not loss.labelled:
        # Broadcasting [S, 1] against [S] would train on S x S pairs without a word.
        if prediction != target:
            wanted = f"a module that returns the shape of the targets, {list(target)} a task"
            fail(ValueError, "MAML", "model", wanted, f"shape {list(prediction)}")
        return
    fits = len(prediction) == len(target) + 1 and prediction[:1] + prediction[2:] == target
    if not fits:
        others = ", ".join(str(n) for n in target[1:])
        wanted = f"a module that returns [{target[0]}, C{', ' + others if others else ''}] here"
        fail(ValueError, "MAML", "model", wanted, f"shape {list(prediction)}")
    if rows.top is not None and rows.top >= prediction[1]:
        wanted = f"in [0, {prediction[1]}), the outputs of the model, or {IGNORE_INDEX}"
        fail(ValueError, "MAML", f"{rows.role}_y", wanted, rows.top)


def query_losses(loss: Loss, prediction: Tensor, queries: Supports) -> Tensor:
    """The loss of each task's predictions, Tensor[T]; rows of padding count for nothing."""
    if isinstance(loss, NamedLoss):
        check_prediction(loss, prediction.shape[1:], queries.y.shape[1:], queries)
        return torch.func.vmap(loss)(prediction, queries.y)
    losses = []
    for task in range(prediction.shape[0]):
        kept = prediction[task], queries.y[task]
        if queries.padded():
            valid = queries.valid(task)
            kept = kept[0][valid], kept[1][valid]
        if kept[1].shape[0]:
            losses.append(call_loss(loss, *kept))
        else:  # the mean over nothing would be NaN
            losses.append(prediction[task].sum() * 0)
    return torch.stack(losses)
