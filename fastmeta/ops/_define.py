"""How an op of fastmeta is defined: one call binds its schema, reference and derivative rules.

Schemas live in Python and every reference is registered for all devices
(``CompositeExplicitAutograd``); the compiled extension only adds CPU and CUDA kernels over it. So a
missing extension changes speed, not behaviour.

One derivative formula serves three routes, because each of torch's ways lacks something:

* ``register_autograd`` on the raw op serves ``torch.compile``, ``torch.export`` and callers of
  ``torch.ops.fastmeta``. It raises under ``torch.func`` transforms, gives forward-mode AD a silent
  zero, and costs several times the kernel on small problems;
* in eager mode a plain ``torch.autograd.Function`` calls the kernel below autograd: the least
  overhead;
* while functorch transforms or forward-mode AD are active, a ``torch.autograd.Function`` with a
  ``vmap`` rule is taken. It has no ``jvp``: forward-mode AD raises there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmeta.ops._dynamo import allow_in_graph

__all__ = ["LIBRARY", "OPS", "Op", "acc_dtype", "define_op", "fold_tasks"]

LIBRARY = torch.library.Library("fastmeta", "DEF")

#: An op as Python calls it: its positional arguments, on the right autograd route.
Op = Callable[..., Any]

#: Names of all ops defined so far, in order: what ``fastmeta info`` lists.
OPS: list[str] = []

# Private names of torch, bound here once, so that a torch without them fails at import.
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
_below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd


def _forward_ad_active() -> bool:
    return forward_ad._current_level >= 0


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that kernels accumulate in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flatten(args: Sequence[Any]) -> tuple[tuple[int | None, ...], list[Any]]:
    """Lists among ``args`` laid out flat; the spec has their lengths, None for other values."""
    spec = tuple(len(a) if isinstance(a, (list, tuple)) else None for a in args)
    flat: list[Any] = []
    for value, length in zip(args, spec, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat.extend(value)
    return spec, flat


def _unflatten(spec: tuple[int | None, ...], flat: Sequence[Any]) -> tuple[Any, ...]:
    values: list[Any] = []
    start = 0
    for length in spec:
        values.append(flat[start] if length is None else list(flat[start : start + length]))
        start += 1 if length is None else length
    return tuple(values)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: a reference's own products keep the accumulation dtype."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        device = next((a.device.type for a in _flatten(args)[1] if isinstance(a, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return call


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
    eager_options: tuple[Any, ...] = (),
) -> Op:
    """Define ``fastmeta::<op>`` and return the function that calls it on the right autograd route.

    Args:
        schema: Op schema, ``"name(Tensor a, Tensor[] b) -> Tensor"``; positional arguments only.
        reference: Pure PyTorch implementation, the fallback on every device.
        fake: Shape function for ``torch.compile`` and ``torch.export``; never reads data.
        setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs.
        backward: ``(ctx, *grads)``, returns one gradient (or list, or None) an input, computed by
            differentiable operations; ``ctx.needs_input_grad`` has a list of flags for a list.
        vmap: ``(info, in_dims, *inputs)``, returns ``(output, out_dims)``.
        eager_options: Trailing arguments of the schema on the eager route, where a backward is
            likely to follow; elsewhere their defaults hold.

    Returns:
        A function of the op's positional arguments.
    """
    name = schema.split("(", 1)[0]
    OPS.append(name)
    LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    LIBRARY.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    qualified = f"fastmeta::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
    raw = getattr(torch.ops.fastmeta, name).default

    def function_forward(spec: Any, *flat: Any) -> Any:
        output = raw(*_unflatten(spec, flat))
        return _flat_output(output)

    def function_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        spec, *flat = inputs
        ctx.spec = spec
        setup_context(ctx, _unflatten(spec, flat), output)

    def function_backward(ctx: Any, *grads: Any) -> Any:
        view = _StructuredContext(ctx)
        result = backward(view, *_unflat_grads(raw, grads, ctx.spec))
        _, flat = _flatten(result if isinstance(result, tuple) else (result,))
        return (None, *flat)

    def function_vmap(info: Any, in_dims: Any, spec: Any, *flat: Any) -> Any:
        output, out_dims = vmap(info, _unflatten(spec, in_dims[1:]), *_unflatten(spec, flat))
        if isinstance(output, Tensor):
            return output, out_dims
        _, flat_output = _flatten(output)
        if not isinstance(out_dims, (list, tuple)):
            return tuple(flat_output), tuple(out_dims for _ in flat_output)
        return tuple(flat_output), tuple(_flatten(out_dims)[1])

    function = type(
        "".join(part.capitalize() for part in name.split("_")),
        (torch.autograd.Function,),
        {
            "forward": staticmethod(function_forward),
            "setup_context": staticmethod(function_setup_context),
            "backward": staticmethod(function_backward),
            "vmap": staticmethod(function_vmap),
        },
    )

    @allow_in_graph
    def functorch_call(*args: Any) -> Any:
        spec, flat = _flatten(args)
        return _structured_output(raw, function.apply(spec, *flat), spec)  # type: ignore[attr-defined]

    lists = any(str(a.type) == "List[Tensor]" for a in raw._schema.arguments)
    eager_call = _eager_route(
        name, raw, setup_context, backward, function_backward, lists, eager_options
    )

    def call(*args: Any) -> Any:
        if _functorch_active() or _forward_ad_active():
            return functorch_call(*args)
        if torch.compiler.is_compiling():
            return raw(*args)
        if lists and any(isinstance(a, Tensor) and _is_batched(a) for a in _flatten(args)[1]):
            # torch.autograd.grad(is_grads_batched=True), whose vmap cannot take lists.
            return reference(*args)
        if torch.is_grad_enabled() and _requires_grad(args):
            return eager_call(*args)
        with _below_autograd():
            return raw(*args)

    call.__name__ = name
    return call


def _requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _requires_grad(arg):
            return True
    return False


def _eager_route(
    name: str,
    raw: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flat_backward: Callable[..., Any],
    lists: bool,
    options: tuple[Any, ...],
) -> Callable[..., Any]:
    """The op through an autograd Function of the old style, which torch calls fastest.

    Its backward is the formula as it stands, or ``flat_backward`` for one that takes ``lists``.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = raw(*args, *options)
        setup_context(ctx, args, output)
        return output

    def flat_forward(ctx: Any, spec: Any, *flat: Any) -> Any:
        args = _unflatten(spec, flat)
        ctx.spec = spec
        return _flat_output(forward(ctx, *args))

    function = type(
        "".join(part.capitalize() for part in name.split("_")) + "Eager",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(flat_forward if lists else forward),
            "backward": staticmethod(flat_backward if lists else backward),
        },
    )
    if not lists:
        return function.apply  # type: ignore[attr-defined, no-any-return]

    def call(*args: Any) -> Any:
        spec, flat = _flatten(args)
        return _structured_output(raw, function.apply(spec, *flat), spec)  # type: ignore[attr-defined]

    return call


def _flat_output(output: Any) -> Any:
    """Autograd Functions return a tensor or a flat tuple of tensors."""
    if isinstance(output, Tensor):
        return output
    return tuple(_flatten(output)[1])


def _list_returns(raw: Any) -> list[bool]:
    return [str(r.type) == "List[Tensor]" for r in raw._schema.returns]


def _output_spec(raw: Any, spec: Sequence[int | None]) -> tuple[int | None, ...]:
    """Spec of the outputs: the i-th list an op returns is as long as its i-th list argument."""
    lengths = (length for length in spec if length is not None)
    return tuple(next(lengths) if kind else None for kind in _list_returns(raw))


def _structured_output(raw: Any, output: Any, spec: Sequence[int | None]) -> Any:
    """Inverse of `_flat_output`."""
    if isinstance(output, Tensor):
        output = (output,)
    values = _unflatten(_output_spec(raw, spec), output)
    return values[0] if len(values) == 1 else values


def _unflat_grads(raw: Any, grads: Sequence[Any], spec: Sequence[int | None] = ()) -> Sequence[Any]:
    return _unflatten(_output_spec(raw, spec), grads) if any(_list_returns(raw)) else grads


class _StructuredContext:
    """A Function's ctx whose ``needs_input_grad`` is structured as ``register_autograd`` has it."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = _unflatten(ctx.spec, ctx.needs_input_grad[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def fold_tasks(call: Callable[..., Any]) -> Callable[..., Any]:
    """Vmap rule of ops whose tensors all lead with the task dimension: the mapped dim joins it.

    A tensor argument has T rows, or one that serves all tasks (a shared ``scale``); outputs have T.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        batch = info.batch_size
        tensors = [
            (a if d is None else a.movedim(d, 0)[0])
            for a, d in zip(args, in_dims, strict=True)
            if isinstance(a, Tensor)
        ]
        tasks = max((t.shape[0] for t in tensors), default=1)
        if any(t.shape[0] == 0 for t in tensors):
            tasks = 0

        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor) or (dim is None and arg.shape[0] != tasks):
                return arg
            arg = arg.unsqueeze(0).expand(batch, *arg.shape) if dim is None else arg.movedim(dim, 0)
            if arg.shape[1] != tasks:
                arg = arg.expand(batch, tasks, *arg.shape[2:])
            return arg.reshape(batch * tasks, *arg.shape[2:])

        output = call(*(fold(a, d) for a, d in zip(args, in_dims, strict=True)))

        def unfold(value: Tensor) -> Tensor:
            return value.reshape(batch, tasks, *value.shape[1:])

        if isinstance(output, Tensor):
            return unfold(output), 0
        return tuple(unfold(v) for v in output), tuple(0 for _ in output)

    return rule
