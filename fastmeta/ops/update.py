"""Op ``sgd_update``: a gradient step of all tasks' parameters. Kernels: ``csrc/update/``.

Its siblings with a state, `momentum_update` and `adam_update`, have files of their own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmeta.ops._define import Op, define_op
from fastmeta.ops._update_inputs import Entries, Groups, Params, lead, ranks_of, unlead_rates
from fastmeta.ops.adam import AdamState, adam_update
from fastmeta.ops.momentum import momentum_update

__all__ = ["AdamState", "adam_update", "momentum_update", "sgd_update"]


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
    entries = Entries("sgd_update", params)
    columns = entries.column("grads", grads), entries.shared_column("lr", lr)
    updated: list[Any] = list(entries.params)
    for group, operands in Groups(entries, *columns):
        for i, value in zip(group, _sgd(*operands), strict=True):
            updated[i] = value
    return entries.rebuild(updated)  # type: ignore[no-any-return]


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


def _vmap(info: Any, in_dims: Any, *columns: list[Tensor]) -> Any:
    ranks = ranks_of(columns[1], in_dims[1])
    return _sgd(*lead(info.batch_size, columns, in_dims, ranks, expand=False)), [0] * len(ranks)


def _vmap_backward(info: Any, in_dims: Any, *columns: Any) -> Any:
    *lists, with_lr = columns
    ranks = ranks_of(lists[1], in_dims[1])
    operands = lead(info.batch_size, lists, in_dims, ranks, expand=True)
    grad_grads, grad_lrs = _sgd_backward(*operands, with_lr)
    if with_lr:
        grad_lrs = unlead_rates(info.batch_size, grad_lrs, lists[2], in_dims[2])
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
