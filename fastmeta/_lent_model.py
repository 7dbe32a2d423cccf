"""A module lent to the inner loop: run with weights that are not its own, and given back untouched.

Three things happen between entering and leaving `LentModel`:

* its parameters may be replaced by others, tied ones together (as ``torch.func.functional_call``
  does, but once a call instead of once a forward pass);
* its buffers are copies, so that whatever the forward pass writes is dropped;
* normalisation follows the stated policy, and where torch has several ways, one that has (right)
  second derivatives is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fastmeta.errors import fail

__all__ = ["BATCH_NORM", "LentModel", "PaddingMixes", "Slots", "find_slots"]

#: The choices of ``batch_norm``.
BATCH_NORM = ("batch", "running")

#: Where a parameter is held: for each name, the dictionaries and keys (several when it is tied).
Slots = dict[str, list[tuple[dict[str, Any], str]]]


class PaddingMixes(Exception):
    """No error but a signal between strategies: rows of padding would influence other rows."""


def find_slots(model: nn.Module) -> Slots:
    """Where each parameter of ``model`` is now, named and ordered as ``named_parameters``."""
    slots: Slots = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                name = names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                slots.setdefault(name, []).append((module._parameters, key))
    return slots


class _Rules(TorchFunctionMode):
    """What calls of torch become within a lent model.

    A mode, not a replacement of modules, because a forward pass may well call ``F.batch_norm``
    itself.
    """

    def __init__(self, batch_norm: str, second_order: bool) -> None:
        super().__init__()
        self.padded: Callable[[], bool] | None = None
        self._batch_norm_policy = batch_norm
        self._rules: dict[Any, Callable[..., Any]] = {
            F.batch_norm: self._batch_norm,
            F.instance_norm: self._instance_norm,
            torch._weight_norm: _weight_norm,
        }
        if second_order:
            for func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
                self._rules[func] = _with_second_derivative(func)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self._rules.get(func)
        if rule is not None:
            func = rule
        return func(*args, **kwargs) if kwargs else func(*args)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self._batch_norm_policy == "batch":
            if self.padded is not None and self.padded():
                raise PaddingMixes("batch norm takes its statistics over all rows of a task")
            return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        _require_running(running_mean)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self._batch_norm_policy == "batch" or running_mean is None:
            return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _weight_norm(direction: Tensor, size: Tensor, dim: int = 0) -> Tensor:
    """In plain terms: the fused one's second derivative is wrong, and vmap cannot map it."""
    others = [d for d in range(direction.dim()) if d != dim or dim == -1]
    if not others:
        return direction * (size / direction.abs())
    return direction * (size / torch.linalg.vector_norm(direction, dim=others, keepdim=dim != -1))


def _require_running(running_mean: Tensor | None) -> None:
    if running_mean is None:
        wanted = "'batch' for a model whose batch norm keeps no running statistics"
        fail(ValueError, "MAML", "batch_norm", wanted, "'running'")


def _with_second_derivative(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on torch's plain attention: its fused ones have no second derivative."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)

    return attention


class LentModel(AbstractContextManager["LentModel"]):
    """``lent(theta, x)`` is ``model(x)`` with ``theta`` in place of the parameters ``names``."""

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        names: Sequence[str],
        *,
        batch_norm: str,
        second_order: bool,
    ) -> None:
        self._model = model
        self._slots = slots
        self._lent = [slot for name in names for slot in slots[name]]
        self._repeats = [len(slots[name]) for name in names]
        self._tied = any(r != 1 for r in self._repeats)
        self._rules = _Rules(batch_norm, second_order)
        self._stack = ExitStack()
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._copies: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._second_order = second_order

    def __enter__(self) -> LentModel:
        for slots in self._slots.values():
            self._saved.extend((held, key, held[key]) for held, key in slots)
        for module in self._model.modules():
            if module._buffers:
                self._save_buffers(module)
            if isinstance(module, nn.RNNBase):
                self._save_flat_weights(module)
        return self

    def __exit__(self, *exc: object) -> None:
        for held, key, value in self._saved:
            held[key] = value
        self._saved.clear()
        self._copies.clear()
        self._stack.close()

    def _save_buffers(self, module: nn.Module) -> None:
        held = module._buffers
        for key, value in held.items():
            if value is None:
                continue
            if not isinstance(module, _NormBase):
                self._saved.append((held, key, value))
                held[key] = copy = value.clone()
                self._copies.append((held, key, value, copy))
            elif key == "num_batches_tracked":
                # Absent, it is not counted up; the running statistics are kept by the rules.
                self._saved.append((held, key, value))
                held[key] = None

    def _save_flat_weights(self, module: nn.RNNBase) -> None:
        # An RNN rebuilds these lists when it finds other weights; left so, it would keep the graph
        # alive.
        for key in ("_flat_weights", "_flat_weight_refs"):
            if key in module.__dict__:
                self._saved.append((module.__dict__, key, module.__dict__[key]))
        if self._second_order and any(p.is_cuda for p in module.parameters()):
            # cuDNN's recurrent layers have no second derivative.
            self._stack.enter_context(torch.backends.cudnn.flags(enabled=False))

    def __call__(self, theta: Sequence[Tensor], x: Any) -> Tensor:
        """Output of the model for one task, in torch's own words if it fails."""
        for (held, key), value in zip(self._lent, self._spread(theta), strict=True):
            held[key] = value
        with self._rules:
            output = self._model(x)
        if not isinstance(output, Tensor):
            fail(
                TypeError, "MAML", "model", "a module that returns a tensor", type(output).__name__
            )
        return output

    def _spread(self, theta: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._tied:
            return theta
        return [t for t, n in zip(theta, self._repeats, strict=True) for _ in range(n)]

    def place(self, values: dict[str, Tensor]) -> None:
        """Put ``values`` where the parameters of these names are."""
        for name, value in values.items():
            for held, key in self._slots[name]:
                held[key] = value

    def pad(self, padded: Callable[[], bool] | None) -> None:
        """State whether rows of padding are among those that come next (None: there are none)."""
        self._rules.padded = padded

    def fresh_buffers(self) -> None:
        """Buffers as the model has them, for the next task."""
        for i, (held, key, value, copy) in enumerate(self._copies):
            if held.get(key) is not copy or copy._version:
                held[key] = copy = value.clone()
                self._copies[i] = (held, key, value, copy)

    def replaced_buffers(self) -> Iterator[str]:
        """Names of the buffers that the forward pass has bound to other tensors."""
        return (key for held, key, _, copy in self._copies if held.get(key) is not copy)
