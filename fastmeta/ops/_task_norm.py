r"""The op behind ``task_batch_norm``, and its first and second derivatives.

With :math:`\hat x = (x - \mu) r`, :math:`r = (\sigma^2 + \epsilon)^{-1/2}`, m values of a task and
channel, means :math:`\langle\cdot\rangle` over them, and :math:`P(a) = a - \langle a \rangle -
\hat x \langle a \hat x \rangle`:

* :math:`y = w \hat x + b` and :math:`d\hat x = r P(dx)`, where P is its own adjoint, so that
* the gradients for a cotangent g are :math:`w r P(g)`, :math:`\sum g \hat x`, :math:`\sum g`;
* theirs, for cotangents u, v, z of these three, are
  :math:`w r P(u) + v \hat x + z` for g,
  :math:`r \sum u P(g)` for w, and
  :math:`v r P(g) - w r^2 (\langle u P(g) \rangle \hat x + \langle g \hat x \rangle P(u) +
  \langle u \hat x \rangle P(g))` for x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.ops._define import Op, acc_dtype, define_op, fold_tasks

__all__ = ["norm"]

_OVER = (1, 3)  # of [T, N, C, L]


def _column(value: Tensor) -> Tensor:
    """[T, C] as [T, 1, C, 1]."""
    return value.unsqueeze(1).unsqueeze(3)


def _mean(value: Tensor) -> Tensor:
    count = max(1, value.shape[1] * value.shape[3])
    return value.sum(_OVER, keepdim=True) / count


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation, [T, 1, C, 1]."""
    mean = _mean(x)
    return mean, (_mean((x - mean).square()) + eps).rsqrt()


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    mean, rstd = _statistics(x.to(acc), eps)
    out = (x.to(acc) - mean) * rstd
    if weight is not None:
        out = out * _column(weight.to(acc))
    if bias is not None:
        out = out + _column(bias.to(acc))
    shape = (x.shape[0], x.shape[2])
    return out.to(x.dtype).contiguous(), mean.reshape(shape), rstd.reshape(shape)


def _fake(
    x: Tensor, _weight: Tensor | None, _bias: Tensor | None, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape, acc = (x.shape[0], x.shape[2]), acc_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=acc), x.new_empty(shape, dtype=acc)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    acc, rstd = mean.dtype, _column(rstd)
    g, normal = grad.to(acc), (x.to(acc) - _column(mean)) * rstd
    products = g * normal
    out = rstd * (g - _mean(g) - normal * _mean(products))
    if weight is not None:
        out = out * _column(weight.to(acc))
    sums = (products.sum(_OVER).to(x.dtype), g.sum(_OVER).to(x.dtype))
    return out.to(x.dtype).contiguous(), *sums


def _backward_fake(
    grad: Tensor, x: Tensor, _weight: Tensor | None, _mean: Tensor, _rstd: Tensor, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2])
    return grad.new_empty(x.shape), grad.new_empty(shape), grad.new_empty(shape)


def _second(
    u: Tensor, v: Tensor, z: Tensor, grad: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to grad, x and weight; columns are [T, 1, C, 1], all in the dtype of sums."""
    normal = (x - mean) * rstd

    def project(a: Tensor) -> tuple[Tensor, Tensor]:
        along = _mean(a * normal)
        return a - _mean(a) - normal * along, along

    project_u, u_along = project(u)
    project_g, g_along = project(grad)
    both = u * project_g
    to_grad = w * rstd * project_u + v * normal + z
    to_x = v * rstd * project_g - w * rstd.square() * (
        _mean(both) * normal + g_along * project_u + u_along * project_g
    )
    return to_grad, to_x, (rstd * both).sum(_OVER)


def _second_reference(
    u: Tensor,
    v: Tensor,
    z: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    _eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = mean.dtype
    w = mean.new_ones(()) if weight is None else _column(weight.to(acc))
    v, z = _column(v.to(acc)), _column(z.to(acc))
    columns = (w, _column(mean), _column(rstd))
    found = _second(u.to(acc), v, z, grad.to(acc), x.to(acc), *columns)
    to_grad, to_x, to_weight = (value.to(x.dtype).contiguous() for value in found)
    return to_grad, to_x, to_weight


def _second_fake(u: Tensor, _v: Tensor, _z: Tensor, grad: Tensor, x: Tensor, *_: Any) -> Any:
    shape = (x.shape[0], x.shape[2])
    return grad.new_empty(x.shape), grad.new_empty(x.shape), grad.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)


def _grads(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    needed = ctx.needs_input_grad
    found = _norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return (*(f if n else None for f, n in zip(found, needed, strict=False)), None)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_grads(ctx: Any, u: Tensor, v: Tensor, z: Tensor) -> tuple[Any, ...]:
    # The mean and deviation are functions of x: their share is in its gradient.
    to_grad, to_x, to_weight = _norm_second(u, v, z, *ctx.saved_tensors, ctx.eps)
    return to_grad, to_x, to_weight if ctx.needs_input_grad[2] else None, None, None, None


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _second_grads(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """By torch, through the formula with the statistics as functions of x."""
    u, v, z, grad, x, weight = ctx.saved_tensors
    plain = weight if weight is not None else torch.ones_like(v)

    def formula(
        u: Tensor, v: Tensor, z: Tensor, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        acc = acc_dtype(x.dtype)
        columns = (_column(weight.to(acc)), *_statistics(x.to(acc), ctx.eps))
        v, z = _column(v.to(acc)), _column(z.to(acc))
        found = _second(u.to(acc), v, z, grad.to(acc), x.to(acc), *columns)
        return tuple(value.to(x.dtype) for value in found)

    *found, to_weight = torch.func.vjp(formula, u, v, z, grad, x, plain)[1](cotangents)
    return *found, None if weight is None else to_weight, None, None, None


norm: Op = define_op(
    "task_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    vmap=fold_tasks(lambda *a: norm(*a)),
)

_norm_backward: Op = define_op(
    "task_batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_backward_setup,
    backward=_backward_grads,
    vmap=fold_tasks(lambda *a: _norm_backward(*a)),
)

_norm_second: Op = define_op(
    "task_batch_norm_second(Tensor u, Tensor v, Tensor z, Tensor grad, Tensor x, Tensor? weight, "
    "Tensor mean, Tensor rstd, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_second_reference,
    fake=_second_fake,
    setup_context=_second_setup,
    backward=_second_grads,
    vmap=fold_tasks(lambda *a: _norm_second(*a)),
)
