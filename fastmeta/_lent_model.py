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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fastmeta import _task_calls
from fastmeta.errors import fail

__all__ = ["BATCH_NORM", "Held", "LentModel", "PaddingMixes", "Slots", "find_slots"]

_saving_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks

#: The choices of ``batch_norm``.
BATCH_NORM = ("batch", "running")

#: A dictionary of a module and a key of it.
Slot = tuple[dict[str, Any], str]

#: Where a parameter is held: for each name, the dictionaries and keys (several when it is tied).
Slots = dict[str, list[Slot]]


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
        self.hooks: Any = None
        self._graph_stays = torch.is_grad_enabled()
        self._batch_norm_policy = batch_norm
        self._second_order = second_order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._graph_stays and _saving_hooks(True) != self.hooks:
            wanted = (
                "one that does not checkpoint itself: what torch.utils.checkpoint runs again in "
                "the backward pass would have other weights (task_chunk bounds the memory)"
            )
            fail(RuntimeError, "MAML", "model", wanted, "saved-tensor hooks within it")
        rule = self._RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)

    def _batch_norm(
        self,
        func: Callable[..., Tensor],
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
            own = _task_calls.batch_norm(input, weight, bias, eps)
            if own is not None:
                return own
            return func(input, None, None, weight, bias, True, momentum, eps)
        _require_running(running_mean)
        return func(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def _conv2d(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        own = _task_calls.conv2d(*args, **kwargs)
        return func(*args, **kwargs) if own is None else own

    def _instance_norm(
        self,
        func: Callable[..., Tensor],
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
            return func(input, None, None, weight, bias, True, momentum, eps)
        return func(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def _weight_norm(
        self, func: Callable[..., Tensor], direction: Tensor, size: Tensor, dim: int = 0
    ) -> Tensor:
        """In plain terms: the fused one's second derivative is wrong, and vmap cannot map it."""
        others = [d for d in range(direction.dim()) if d != dim or dim == -1]
        if not others:
            return direction * (size / direction.abs())
        norm = torch.linalg.vector_norm(direction, dim=others, keepdim=dim != -1)
        return direction * (size / norm)

    def _attention(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On torch's plain attention, if need be: its fused ones have no second derivative."""
        if not self._second_order:
            return func(*args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)

    #: Functions, not bound methods: a mode that held itself would live, with all that it has seen,
    #: until the garbage collector comes by.
    _RULES: ClassVar[dict[Any, Callable[..., Any]]] = {
        F.batch_norm: _batch_norm,
        F.conv2d: _conv2d,
        F.instance_norm: _instance_norm,
        F.scaled_dot_product_attention: _attention,
        F.multi_head_attention_forward: _attention,
        torch._weight_norm: _weight_norm,
    }


def _require_running(running_mean: Tensor | None) -> None:
    if running_mean is None:
        wanted = "'batch' for a model whose batch norm keeps no running statistics"
        fail(ValueError, "MAML", "batch_norm", wanted, "'running'")


@dataclass(frozen=True)
class Held:
    """What a forward pass reads besides its input and the parameters that are lent to it.

    Attributes:
        parameters: Where the other parameters are.
        buffers: Where the buffers are that it may read.
        tensors: What is there, parameters first.
        modes: For each module whether it is in training mode.
    """

    parameters: list[Slot]
    buffers: list[Slot]
    tensors: list[Tensor]
    modes: list[tuple[nn.Module, bool]]


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
        self._names = names
        self._running = batch_norm == "running"
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
        for held, key, value in reversed(self._saved):
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
        self._rules.hooks = _saving_hooks(True)
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

    def wrote_buffers(self) -> bool:
        """Whether a forward pass has written or replaced any buffer since they were fresh."""
        return any(
            held.get(key) is not copy or copy._version for held, key, _, copy in self._copies
        )

    def held(self) -> Held:
        """What a forward pass reads now, to `restore` it later."""
        adapted = set(self._names)
        parameters = [
            slot for n, slots in self._slots.items() if n not in adapted for slot in slots
        ]
        buffers = [(held, key) for held, key, _, _ in self._copies]
        modes = []
        for module in self._model.modules():
            modes.append((module, module.training))
            if isinstance(module, _NormBase) and self._running:
                own = module._buffers
                buffers += [(own, k) for k in ("running_mean", "running_var") if own[k] is not None]
        tensors = [held[key] for held, key in parameters + buffers]
        return Held(parameters, buffers, tensors, modes)

    @contextmanager
    def holding(self, held: Held, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Meanwhile the first of ``tensors`` stand for the parameters that are not lent."""
        for (where, key), value in zip(held.parameters, tensors, strict=False):
            where[key] = value
        try:
            yield
        finally:
            for (where, key), value in zip(held.parameters, held.tensors, strict=False):
                where[key] = value

    def restore(self, held: Held, tensors: Sequence[Tensor]) -> None:
        """Have the next forward passes read ``tensors``, as ``held`` has them, in its modes."""
        for module, mode in held.modes:
            self._saved.append((module.__dict__, "training", module.training))
            module.training = mode
        for (where, key), value in zip(held.parameters + held.buffers, tensors, strict=True):
            self._saved.append((where, key, where[key]))
            where[key] = value

    def replaced_buffers(self) -> Iterator[str]:
        """Names of the buffers that the forward pass has bound to other tensors."""
        return (key for held, key, _, copy in self._copies if held.get(key) is not copy)
