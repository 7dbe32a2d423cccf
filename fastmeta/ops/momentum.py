"""Op ``momentum_update``: a step of gradient descent with momentum. Kernels: ``csrc/update/``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmeta.errors import describe, fail
from fastmeta.ops._define import Op, define_op
from fastmeta.ops._update_inputs import (
    Entries,
    Groups,
    Params,
    check_number,
    lead,
    ranks_of,
    unlead_rates,
)

__all__ = ["momentum_update"]


def momentum_update(
    params: Params,
    grads: Params,
    buffers: Params | None,
    lr: Any,
    *,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[Params, Params]:
    r"""One step of gradient descent with momentum for all parameters of all tasks in one call.

    .. math:: b'_t = \mu \, b_t + (1 - d) \, g_t, \qquad \theta'_t = \theta_t - \alpha \, s_t

    with :math:`s_t = b'_t`, or with Nesterov's :math:`s_t = g_t + \mu \, b'_t`: what
    ``torch.optim.SGD`` does from its second step on (its first takes :math:`b' = g`, without
    dampening). Polyak 1964; Sutskever et al. 2013. Nothing is changed in place, and the results are
    differentiable to any order in parameters, gradients, buffers and rate, so that an inner loop
    may take such steps.

    Args:
        params: A tensor, a sequence or a mapping of tensors: Tensor[T, ...] each, or Tensor[...]
            shared by the tasks of its gradient; float32, float64, bfloat16 or float16.
        grads: Of the same structure, the gradients, Tensor[T, ...] each; None where a parameter has
            none: it and its buffer stay as they are.
        buffers: Of the same structure, :math:`b`, Tensor[T, ...] each, float32 (float64 for
            float64): what the last step returned. None, as a whole or for an entry: zero.
        lr: Step size, in units of parameter per gradient: a number, a tensor that broadcasts to
            every gradient, or a structure like ``params`` of such, one for each: a scalar, per
            element Tensor[...], or per task Tensor[T, 1, ...].
        momentum: :math:`\mu`, at least 0.
        dampening: :math:`d`, at least 0.
        nesterov: Whether to look ahead; as in ``torch.optim.SGD`` this wants a momentum above 0 and
            no dampening.

    Returns:
        The updated parameters and the new buffers, each in the structure of ``params`` and each
        entry of its gradient's shape.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: Structures, shapes or devices do not fit, or a number is out of its range; the
            message names the argument.

    Note:
        Arithmetic is in float32 (float64 for float64), and each result is rounded once.

    Example:
        >>> import torch, fastmeta as fm
        >>> theta, buffer = torch.zeros(2), None
        >>> for _ in range(3):
        ...     theta, buffer = fm.momentum_update(theta, torch.ones(2), buffer, 1.0, momentum=0.5)
        >>> theta, buffer
        (tensor([-4.2500, -4.2500]), tensor([1.7500, 1.7500]))
    """
    function = "momentum_update"
    momentum = check_number(function, "momentum", momentum, 0)
    dampening = check_number(function, "dampening", dampening, 0)
    if not isinstance(nesterov, bool):
        fail(TypeError, function, "nesterov", "True or False", describe(nesterov))
    if nesterov and (momentum == 0 or dampening != 0):
        wanted = "False unless momentum is above 0 and dampening is 0"
        fail(ValueError, function, "nesterov", wanted, True)
    entries = Entries(function, params)
    grads_, rates = entries.column("grads", grads), entries.shared_column("lr", lr)
    updated: list[Any] = list(entries.params)
    states = entries.state_column("buffers", buffers)
    for group, operands in Groups(entries, grads_, rates, {"buffers": states}):
        results = _momentum(*operands, momentum, dampening, nesterov)
        for i, value, buffer in zip(group, *results, strict=True):
            updated[i], states[i] = value, buffer
    return entries.rebuild(updated), entries.rebuild(states)


def _step(grad: Any, buffer: Any, momentum: float, dampening: float, nesterov: bool) -> Any:
    """The new buffer and the step, linear in both arguments."""
    new = momentum * buffer + (1 - dampening) * grad
    return new, grad + momentum * new if nesterov else new


def _transposed(
    to_step: Any, to_buffer: Any, momentum: float, dampening: float, nesterov: bool
) -> Any:
    """The transpose of `_step`: from cotangents of step and new buffer to those of grad, buffer."""
    to_new = to_buffer + (momentum * to_step if nesterov else to_step)
    to_grad = (1 - dampening) * to_new
    return to_grad + to_step if nesterov else to_grad, momentum * to_new


def _reference(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lrs: list[Tensor],
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    updated, news = [], []
    for p, g, b, r in zip(params, grads, buffers, lrs, strict=True):
        new, step = _step(g.to(r.dtype), b, momentum, dampening, nesterov)
        updated.append((p.to(r.dtype) - r * step).to(p.dtype).contiguous())
        news.append(new.contiguous())
    return updated, news


def _reference_backward(
    grad_outs: list[Tensor],
    grad_out_buffers: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lrs: list[Tensor],
    momentum: float,
    dampening: float,
    nesterov: bool,
    with_lr: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    numbers = (momentum, dampening, nesterov)
    grad_grads, grad_buffers, grad_lrs = [], [], []
    for o, ob, g, b, r in zip(grad_outs, grad_out_buffers, grads, buffers, lrs, strict=True):
        to_grad, to_buffer = _transposed(-r * o, ob, *numbers)
        grad_grads.append(to_grad.to(g.dtype).contiguous())
        grad_buffers.append(to_buffer.contiguous())
        if with_lr:
            step = _step(g.to(r.dtype), b, *numbers)[1]
            grad_lrs.append(-(o * step).sum_to_size(r.shape))
        else:
            grad_lrs.append(r.new_empty(0))
    return grad_grads, grad_buffers, grad_lrs


def _fake(
    _params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [g.new_empty(g.shape) for g in grads], [b.new_empty(b.shape) for b in buffers]


def _fake_backward(
    grad_outs: list[Tensor],
    _grad_out_buffers: list[Tensor],
    _grads: list[Tensor],
    buffers: list[Tensor],
    lrs: list[Tensor],
    _momentum: float,
    _dampening: float,
    _nesterov: bool,
    with_lr: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [o.new_empty(o.shape) for o in grad_outs],
        [b.new_empty(b.shape) for b in buffers],
        [r.new_empty(r.shape if with_lr else (0,)) for r in lrs],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grads, buffers, lrs, *ctx.numbers = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grads, *buffers, *lrs)


def _grads(ctx: Any, grad_outs: Any, grad_out_buffers: Any) -> tuple[Any, ...]:
    count, saved = ctx.count, list(ctx.saved_tensors)
    with_lr = any(ctx.needs_input_grad[3])
    grad_grads, grad_buffers, grad_lrs = _momentum_backward(
        list(grad_outs),
        list(grad_out_buffers),
        saved[:count],
        saved[count : 2 * count],
        saved[2 * count :],
        *ctx.numbers,
        with_lr,
    )
    to_lrs = grad_lrs if with_lr else [None] * count
    return list(grad_outs), grad_grads, grad_buffers, to_lrs, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_outs, _, grads, buffers, lrs, *ctx.numbers, ctx.with_lr = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grad_outs, *grads, *buffers, *lrs)


def _grads_backward(ctx: Any, to_grads: Any, to_buffers: Any, to_lrs: Any) -> tuple[Any, ...]:
    """With x, y, z the cotangents of the three gradients: the op along (x, y, z), transposed."""
    count, saved = ctx.count, ctx.saved_tensors
    columns = [saved[i * count : (i + 1) * count] for i in range(4)]
    results: list[tuple[Any, ...]] = []
    for o, g, b, r, x, y, z in zip(*columns, to_grads, to_buffers, to_lrs, strict=True):
        acc = r.dtype
        new_along, step_along = _step(x.to(acc), y, *ctx.numbers)
        to_out, to_g, to_b = -r * step_along, None, None
        if ctx.with_lr:
            to_out = to_out - z * _step(g.to(acc), b, *ctx.numbers)[1]
            to_g, to_b = _transposed(-z * o, 0, *ctx.numbers)
            to_g = to_g.to(g.dtype)
        to_r = -(o * step_along).sum_to_size(r.shape)
        results.append((to_out.to(o.dtype), new_along, to_g, to_b, to_r))
    lists = [list(column) for column in zip(*results, strict=True)] or [[]] * 5
    return (*lists, None, None, None, None)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    lists, numbers = args[:4], args[4:]
    ranks = ranks_of(lists[1], in_dims[1])
    dims = [0] * len(ranks)
    operands = lead(info.batch_size, lists, in_dims, ranks, expand=False)
    return _momentum(*operands, *numbers), (dims, dims)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    lists, numbers = args[:5], args[5:]
    ranks = ranks_of(lists[2], in_dims[2])
    operands = lead(info.batch_size, lists, in_dims, ranks, expand=True)
    *results, grad_lrs = _momentum_backward(*operands, *numbers)
    dims: list[Any] = [0] * len(ranks)
    if not numbers[-1]:
        return (*results, grad_lrs), (dims, dims, [None] * len(ranks))
    grad_lrs = unlead_rates(info.batch_size, grad_lrs, lists[4], in_dims[4])
    return (*results, grad_lrs), (dims, dims, dims)


_momentum_backward: Op = define_op(
    "momentum_update_backward(Tensor[] grad_outs, Tensor[] grad_out_buffers, Tensor[] grads, "
    "Tensor[] buffers, Tensor[] lrs, float momentum, float dampening, bool nesterov, bool with_lr) "
    "-> (Tensor[], Tensor[], Tensor[])",
    reference=_reference_backward,
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_grads_backward,
    vmap=_vmap_backward,
)

_momentum: Op = define_op(
    "momentum_update(Tensor[] params, Tensor[] grads, Tensor[] buffers, Tensor[] lrs, "
    "float momentum, float dampening, bool nesterov) -> (Tensor[], Tensor[])",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    vmap=_vmap,
)
