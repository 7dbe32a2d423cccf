"""Op ``sgd_update``: a gradient step of all tasks' parameters. Kernels: ``csrc/update/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmeta.errors import check_float_tensor, describe, fail
from fastmeta.ops._define import Op, acc_dtype, define_op

__all__ = ["sgd_update"]

Params = TypeVar("Params", Tensor, Sequence[Tensor], Mapping[str, Tensor])


def sgd_update(params: Params, grads: Params, lr: Any) -> Params:
    r"""One gradient step for all parameters of all tasks in one call.

    .. math:: \theta'_t = \theta_t - \alpha \, g_t

    Finn et al. 2017 (MAML, arXiv:1703.03400, eq. 1); with a learnt ``lr`` per element, Li et al.
    2017 (Meta-SGD, arXiv:1707.09835). Nothing is changed in place, and the result is
    differentiable to any order in parameters, gradients and rate.

    Args:
        params: A tensor, a sequence or a mapping of tensors: Tensor[T, ...] each, or Tensor[...]
            shared by the tasks of its gradient; float32, float64, bfloat16 or float16.
        grads: Of the same structure, the gradients, Tensor[T, ...] each; None where a parameter has
            none and stays as it is.
        lr: Step size, in units of parameter per gradient: a number, a tensor that broadcasts to
            every gradient, or a structure like ``params`` of such, one for each: a scalar, per
            element Tensor[...], or per task Tensor[T, 1, ...].

    Returns:
        The updated parameters in the structure of ``params``, each of its gradient's shape.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: Structures, shapes or devices do not fit; the message names the argument.

    Note:
        The product and difference are formed in float32 (float64 for float64). NaN and infinity
        propagate as IEEE arithmetic has them.

    Example:
        >>> import torch, fastmeta as fm
        >>> theta = {"weight": torch.ones(2), "bias": torch.zeros(())}
        >>> grad = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.ones(2)}
        >>> fm.sgd_update(theta, grad, 0.5)["weight"]  # two tasks step from shared parameters
        tensor([[ 0.5000,  0.0000],
                [-0.5000, -1.0000]])
    """
    if isinstance(params, Tensor):
        return sgd_update([params], [grads], [lr])[0]
    if isinstance(params, Mapping):
        return _update_mapping(params, grads, lr)
    if not isinstance(params, (list, tuple)):
        wanted = "a tensor, or a list, tuple or mapping of tensors"
        fail(TypeError, "sgd_update", "params", wanted, describe(params))
    names = [f"[{i}]" for i in range(len(params))]
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(params)
    for argument, values in (("grads", grads), ("lr", rates)):
        if not isinstance(values, (list, tuple)) or len(values) != len(params):
            wanted = f"of {len(params)} entries, like params"
            got = (
                f"{len(values)} entries" if isinstance(values, (list, tuple)) else describe(values)
            )
            fail(ValueError, "sgd_update", argument, wanted, got)
    updated = _update_list(names, params, grads, rates)
    return updated if isinstance(params, list) else _like_tuple(params, updated)


def _like_tuple(params: tuple[Tensor, ...], updated: list[Tensor]) -> Any:
    if hasattr(params, "_fields"):
        return type(params)(*updated)
    return tuple(updated)


def _update_mapping(params: Mapping[str, Tensor], grads: Any, lr: Any) -> Any:
    names = list(params)
    for argument, values in (("grads", grads), ("lr", lr)):
        if argument == "lr" and not isinstance(lr, Mapping):
            continue
        if not isinstance(values, Mapping) or set(values) != set(names):
            got = f"keys {sorted(values)}" if isinstance(values, Mapping) else describe(values)
            fail(
                ValueError, "sgd_update", argument, f"a mapping with the keys {sorted(names)}", got
            )
    updated = _update_list(
        [f"[{n!r}]" for n in names],
        list(params.values()),
        [grads[n] for n in names],
        [lr[n] if isinstance(lr, Mapping) else lr for n in names],
    )
    return dict(zip(names, updated, strict=True))


def _update_list(
    names: list[str], params: Sequence[Tensor], grads: Sequence[Tensor | None], rates: list[Any]
) -> list[Tensor]:
    updated = list(params)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    shared: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
    operands: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for i, (name, param, grad, rate) in enumerate(zip(names, params, grads, rates, strict=True)):
        if grad is None:
            continue
        param, rate = _check(name, param, grad, rate, shared)
        operands[i] = (param, grad, rate)
        groups.setdefault((grad.dtype, grad.device), []).append(i)
    for group in groups.values():
        p, g, r = (list(column) for column in zip(*(operands[i] for i in group), strict=True))
        for i, value in zip(group, _sgd(p, g, r), strict=True):
            updated[i] = value
    return updated


def _check(
    name: str,
    param: Tensor,
    grad: Tensor,
    rate: Any,
    shared: dict[tuple[float, torch.dtype, torch.device], Tensor],
) -> tuple[Tensor, Tensor]:
    """The parameter expanded to its gradient's shape, and the rate as a tensor."""
    function = "sgd_update"
    check_float_tensor(function, f"params{name}", param)
    check_float_tensor(function, f"grads{name}", grad)
    if grad.dtype != param.dtype:
        fail(TypeError, function, f"grads{name}", f"{param.dtype}, like its parameter", grad.dtype)
    if grad.device != param.device:
        wanted = f"on {param.device}, like its parameter"
        fail(ValueError, function, f"grads{name}", wanted, grad.device)
    if param.shape != grad.shape:
        if not _broadcasts(param.shape, grad.shape):
            wanted = f"of a shape that {list(param.shape)} (its parameter) broadcasts to"
            fail(ValueError, function, f"grads{name}", wanted, f"shape {list(grad.shape)}")
        param = param.expand(grad.shape)
    acc = acc_dtype(grad.dtype)
    if isinstance(rate, Tensor):
        check_float_tensor(function, f"lr{name}", rate)
        if rate.device != grad.device:
            fail(ValueError, function, f"lr{name}", f"on {grad.device}, like grads", rate.device)
        if not _broadcasts(rate.shape, grad.shape):
            wanted = f"of a shape that broadcasts to {list(grad.shape)} (its gradient)"
            fail(ValueError, function, f"lr{name}", wanted, f"shape {list(rate.shape)}")
        return param, rate.to(acc)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        fail(TypeError, function, f"lr{name}", "a number or a tensor", describe(rate))
    key = (float(rate), acc, grad.device)
    if key not in shared:
        shared[key] = torch.full((), key[0], dtype=acc, device=grad.device)
    return param, shared[key]


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def _reference(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return [
        (p.to(r.dtype) - r * g.to(r.dtype)).to(g.dtype).contiguous()
        for p, g, r in zip(params, grads, lrs, strict=True)
    ]


def _reference_backward(
    grad_outs: list[Tensor], grads: list[Tensor], lrs: list[Tensor], with_lr: bool
) -> tuple[list[Tensor], list[Tensor]]:
    grad_grads = [(-r * o).to(o.dtype).contiguous() for o, r in zip(grad_outs, lrs, strict=True)]
    if not with_lr:
        return grad_grads, [r.new_empty(0) for r in lrs]
    grad_lrs = [
        -(o.to(r.dtype) * g.to(r.dtype)).sum_to_size(r.shape)
        for o, g, r in zip(grad_outs, grads, lrs, strict=True)
    ]
    return grad_grads, grad_lrs


def _fake(_params: list[Tensor], grads: list[Tensor], _lrs: list[Tensor]) -> list[Tensor]:
    return [g.new_empty(g.shape) for g in grads]


def _fake_backward(
    grad_outs: list[Tensor], _grads: list[Tensor], lrs: list[Tensor], with_lr: bool
) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [o.new_empty(o.shape) for o in grad_outs],
        [r.new_empty(r.shape if with_lr else (0,)) for r in lrs],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grads, lrs = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grads, *lrs)


def _grads(ctx: Any, *grad_outs: Any) -> tuple[Any, ...]:
    outs = list(grad_outs[0])
    saved = ctx.saved_tensors
    grads, lrs = list(saved[: ctx.count]), list(saved[ctx.count :])
    with_lr = any(ctx.needs_input_grad[2])
    grad_grads, grad_lrs = _sgd_backward(outs, grads, lrs, with_lr)
    return outs, grad_grads, grad_lrs if with_lr else [None] * ctx.count


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_outs, grads, lrs, with_lr = inputs
    ctx.count, ctx.with_lr = len(grads), with_lr
    ctx.save_for_backward(*grad_outs, *grads, *lrs)


def _grads_backward(ctx: Any, to_grads: list[Any], to_lrs: list[Any]) -> tuple[Any, ...]:
    """With v, u the cotangents of -lr * out and -sum(out * grad): plain products."""
    count, saved = ctx.count, ctx.saved_tensors
    outs, grads, lrs = saved[:count], saved[count : 2 * count], saved[2 * count :]
    grad_outs, grad_grads, grad_lrs = [], [], []
    for out, grad, lr, v, u in zip(outs, grads, lrs, to_grads, to_lrs, strict=True):
        to_out = -lr * v
        to_grad = None
        if ctx.with_lr:
            to_out = to_out - grad * u
            to_grad = (-out * u).to(grad.dtype)
        grad_outs.append(to_out.to(out.dtype))
        grad_grads.append(to_grad)
        grad_lrs.append(-(out * v).to(lr.dtype).sum_to_size(lr.shape))
    return grad_outs, grad_grads, grad_lrs, None


def _lead(tensor: Tensor, dim: int | None, batch: int, rank: int, expand: bool) -> Tensor:
    """The mapped dim in front of ``rank`` logical dims: [B or 1, 1, ..., *shape]."""
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    ones = (1,) * (rank - (tensor.dim() - 1))
    tensor = tensor.reshape(tensor.shape[0], *ones, *tensor.shape[1:])
    return tensor.expand(batch, *tensor.shape[1:]) if expand else tensor


def _vmap(info: Any, in_dims: Any, *columns: list[Tensor]) -> Any:
    """An update is elementwise, so the mapped dim is one more leading dim of every operand."""
    ranks = [t.dim() - (d is not None) for t, d in zip(columns[1], in_dims[1], strict=True)]
    params, grads, lrs = (
        [
            _lead(t, d, info.batch_size, rank, expand=column < 2)
            for t, d, rank in zip(columns[column], in_dims[column], ranks, strict=True)
        ]
        for column in range(3)
    )
    return _sgd(params, grads, lrs), [0] * len(ranks)


def _vmap_backward(info: Any, in_dims: Any, *columns: Any) -> Any:
    *lists, with_lr = columns
    ranks = [t.dim() - (d is not None) for t, d in zip(lists[1], in_dims[1], strict=True)]
    outs, grads, lrs = (
        [
            _lead(t, d, info.batch_size, rank, expand=True)
            for t, d, rank in zip(lists[column], in_dims[column], ranks, strict=True)
        ]
        for column in range(3)
    )
    grad_grads, grad_lrs = _sgd_backward(outs, grads, lrs, with_lr)
    if with_lr:
        grad_lrs = [
            g.reshape(info.batch_size, *(t.shape if d is None else t.movedim(d, 0).shape[1:]))
            for g, t, d in zip(grad_lrs, lists[2], in_dims[2], strict=True)
        ]
    dims = [0] * len(ranks)
    return (grad_grads, grad_lrs), (dims, dims if with_lr else [None] * len(ranks))


_sgd_backward: Op = define_op(
    "sgd_update_backward(Tensor[] grad_outs, Tensor[] grads, Tensor[] lrs, bool with_lr) "
    "-> (Tensor[], Tensor[])",
    reference=_reference_backward,
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_grads_backward,
    vmap=_vmap_backward,
)

_sgd: Op = define_op(
    "sgd_update(Tensor[] params, Tensor[] grads, Tensor[] lrs) -> Tensor[]",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    vmap=_vmap,
)
