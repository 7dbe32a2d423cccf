"""Ops ``task_linear``, ``task_conv2d``, ``task_batch_norm``: layers with weights for each task.

The derivatives of each are such ops again, so that a second derivative stays one call for all
tasks. (torch's way to give every image its own weights is a grouped convolution, and the derivative
of *its* derivative is a loop over the groups.) Kernels: ``csrc/task_layers/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastmeta.errors import check_float_tensor, check_integer, describe, fail, is_number
from fastmeta.ops._define import LIBRARY, Op, acc_dtype, define_op, fold_tasks
from fastmeta.ops._task_norm import norm as _norm

__all__ = ["task_batch_norm", "task_conv2d", "task_linear"]

Pair = int | Sequence[int]


def task_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer whose weights are each task's own.

    .. math:: y_{tn} = W_t \, x_{tn} + b_t

    Args:
        x: Tensor[T, N, I], float32, float64, bfloat16 or float16.
        weight: Tensor[T, O, I], of the dtype of ``x``.
        bias: Tensor[T, O], or None.

    Returns:
        Tensor[T, N, O], differentiable to any order, every derivative in calls for all tasks.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or device does not fit; the message names the argument.

    Note:
        Sums in float32 (float64 for float64). On CUDA, float32 factors are rounded to TF32 where
        ``torch.backends.cuda.matmul.allow_tf32`` says so.

    Example:
        >>> import torch, fastmeta as fm
        >>> x, weight = torch.ones(2, 1, 3), torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 5.0]]])
        >>> fm.task_linear(x, weight)
        tensor([[[6.]],
        <BLANKLINE>
                [[5.]]])
    """
    name = "task_linear"
    check_float_tensor(name, "x", x)
    if x.dim() != 3:
        fail(ValueError, name, "x", "of shape [T, N, I]", f"shape {list(x.shape)}")
    tasks, _, inputs = x.shape
    _check_like(name, "weight", weight, x, (tasks, None, inputs), "[T, O, I]")
    if bias is not None:
        _check_like(name, "bias", bias, x, (tasks, weight.shape[1]), "[T, O]")
    return _linear(x, weight, bias)  # type: ignore[no-any-return]


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    r"""A two-dimensional convolution (cross-correlation) whose weights are each task's own.

    .. math:: y_{tno} = b_{to} + \sum_c w_{toc} \star x_{tnc}

    as :func:`torch.nn.functional.conv2d` computes it for each task by itself.

    Args:
        x: Tensor[T, N, C, H, W], float32, float64, bfloat16 or float16.
        weight: Tensor[T, O, C / groups, kh, kw], of the dtype of ``x``.
        bias: Tensor[T, O], or None.
        stride: Of the window, at least 1: an integer, or one each for rows and columns.
        padding: Zeros on both sides, at least 0.
        dilation: Distance of the window's elements, at least 1.
        groups: Number of groups of channels, a divisor of C and O.

    Returns:
        Tensor[T, N, O, H', W'] with H' = floor((H + 2 padding - dilation (kh - 1) - 1) / stride)
        + 1, differentiable to any order, every derivative in calls for all tasks.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or number does not fit; the message names the argument.

    Note:
        Sums in float32 (float64 for float64). On CUDA, float32 factors are rounded to TF32 where
        torch rounds those of its convolutions, ``torch.backends.cudnn.allow_tf32`` (its default).

    Example:
        >>> import torch, fastmeta as fm
        >>> x, weight = torch.ones(2, 1, 1, 3, 3), torch.ones(2, 1, 1, 3, 3)
        >>> fm.task_conv2d(x, weight, padding=1).shape, float(fm.task_conv2d(x, weight)[0].sum())
        (torch.Size([2, 1, 1, 3, 3]), 9.0)
    """
    name = "task_conv2d"
    check_float_tensor(name, "x", x)
    if x.dim() != 5:
        fail(ValueError, name, "x", "of shape [T, N, C, H, W]", f"shape {list(x.shape)}")
    groups = check_integer(name, "groups", groups, 1)
    tasks, channels = x.shape[0], x.shape[2]
    if channels % groups or channels == 0:
        fail(ValueError, name, "groups", f"a divisor of the {channels} channels of x", groups)
    shape = (tasks, None, channels // groups, None, None)
    _check_like(name, "weight", weight, x, shape, "[T, O, C / groups, kh, kw]")
    if weight.shape[1] % groups or 0 in weight.shape[1:]:
        wanted = f"with O a multiple of groups={groups}, and no empty dimension"
        fail(ValueError, name, "weight", wanted, f"shape {list(weight.shape)}")
    if bias is not None:
        _check_like(name, "bias", bias, x, (tasks, weight.shape[1]), "[T, O]")
    geometry = (
        *_pair(name, "stride", stride, 1),
        *_pair(name, "padding", padding, 0),
        *_pair(name, "dilation", dilation, 1),
        groups,
    )
    if min(_conv_size(x, weight, geometry)) < 1:
        wanted = f"at least as large, with its padding, as the window {list(weight.shape[3:])}"
        fail(ValueError, name, "x", wanted, f"shape {list(x.shape)}")
    return _conv(x, weight, bias, *geometry)  # type: ignore[no-any-return]


def task_batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Batch normalisation by each task's own batch, with weights of its own.

    .. math:: y = w_{tc} \, \frac{x - \mu_{tc}}{\sqrt{\sigma^2_{tc} + \epsilon}} + b_{tc}

    with mean and (biased) variance over all of a task's rows and positions. Ioffe and Szegedy 2015,
    arXiv:1502.03167.

    Args:
        x: Tensor[T, N, C, ...], float32, float64, bfloat16 or float16.
        weight: Tensor[T, C], of the dtype of ``x``, or None for 1.
        bias: Tensor[T, C], of the dtype of ``x``, or None for 0.
        eps: Added to the variance, above 0.

    Returns:
        Tensor[T, N, C, ...], differentiable to any order.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or number does not fit; the message names the argument.

    Note:
        Sums in float32 (float64 for float64). A single value normalises to 0.

    Example:
        >>> import torch, fastmeta as fm
        >>> fm.task_batch_norm(torch.tensor([[[1.0], [3.0]], [[5.0], [5.0]]]))
        tensor([[[-1.0000],
                 [ 1.0000]],
        <BLANKLINE>
                [[ 0.0000],
                 [ 0.0000]]])
    """
    name = "task_batch_norm"
    check_float_tensor(name, "x", x)
    if x.dim() < 3:
        fail(ValueError, name, "x", "of shape [T, N, C, ...]", f"shape {list(x.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check_like(name, argument, value, x, (x.shape[0], x.shape[2]), "[T, C]")
    if not is_number(eps):
        fail(TypeError, name, "eps", "a number", describe(eps))
    if not eps > 0:
        fail(ValueError, name, "eps", "above 0", eps)
    flat = x if x.dim() == 4 else x.unsqueeze(3) if x.dim() == 3 else x.flatten(3)
    return _norm(flat, weight, bias, float(eps))[0].reshape(x.shape)  # type: ignore[no-any-return]


def _check_like(
    function: str, argument: str, value: Any, x: Tensor, shape: Sequence[int | None], form: str
) -> None:
    check_float_tensor(function, argument, value)
    fits = value.dim() == len(shape) and all(
        s is None or n == s for n, s in zip(value.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("*" if s is None else str(s) for s in shape)
        wanted = f"of shape {form} = [{sizes}]"
        fail(ValueError, function, argument, wanted, f"shape {list(value.shape)}")
    if value.dtype != x.dtype:
        fail(TypeError, function, argument, f"{x.dtype}, like x", value.dtype)
    if value.device != x.device:
        fail(ValueError, function, argument, f"on {x.device}, like x", value.device)


def _pair(function: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        fail(TypeError, function, argument, "an integer or a pair of integers", describe(value))
    first, second = (check_integer(function, argument, v, least, 2**31) for v in pair)
    return first, second


# ---- linear: of x and weight it is a product, and so is either derivative.


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = acc_dtype(x.dtype)
    out = x.to(acc) @ weight.to(acc).mT
    if bias is not None:
        out += bias.to(acc).unsqueeze(1)
    return out.to(x.dtype).contiguous()


def _linear_fake(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return (
        _linear(grad, weight.mT, None) if needed[0] else None,
        _linear(grad.mT, x.mT, None) if needed[1] else None,
        grad.sum(1) if needed[2] else None,
    )


_linear: Op = define_op(
    "task_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
    setup_context=_linear_setup,
    backward=_linear_grads,
    vmap=fold_tasks(lambda *a: _linear(*a)),
)


def allow_tf32_conv() -> bool:
    """Whether torch lets convolutions of float32 round to TF32: what the CUDA bridge asks."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


LIBRARY.define("allow_tf32_conv() -> bool")
LIBRARY.impl("allow_tf32_conv", allow_tf32_conv, "CompositeExplicitAutograd")


# ---- convolution: y = C(x, w), and its adjoints X(y, w) to the input and W(y, x) to the weights.
# <y, C(x, w)> = <x, X(y, w)> = <w, W(y, x)> is linear in each of the three, so that the derivatives
# of any one of the ops are the two others.


def _conv_size(x: Tensor, weight: Tensor, geometry: Sequence[int]) -> tuple[int, int]:
    stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:6]
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[3:], weight.shape[3:], stride, padding, dilation, strict=True
        )
    )
    return height, width


def _as_groups(x: Tensor) -> Tensor:
    """[T, N, C, ...] as one batch whose channels are all tasks'."""
    return x.transpose(0, 1).flatten(1, 2)


def _as_tasks(x: Tensor, tasks: int) -> Tensor:
    return x.unflatten(1, (tasks, -1)).transpose(0, 1).contiguous()


def _torchs(geometry: Sequence[int], tasks: int) -> dict[str, Any]:
    sh, sw, ph, pw, dh, dw, groups = geometry
    return {
        "stride": (sh, sw),
        "padding": (ph, pw),
        "dilation": (dh, dw),
        "groups": tasks * groups,
    }


def _conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    tasks, acc = x.shape[0], acc_dtype(x.dtype)
    if 0 in x.shape[:2]:
        return _conv_fake(x, weight, bias, *geometry)
    flat = _as_groups(x).to(acc)
    rows = None if bias is None else bias.flatten().to(acc)
    out = F.conv2d(flat, weight.flatten(0, 1).to(acc), rows, **_torchs(geometry, tasks))
    return _as_tasks(out.to(x.dtype), tasks)


def _conv_input_reference(
    grad: Tensor, weight: Tensor, height: int, width: int, *geometry: int
) -> Tensor:
    tasks, acc = grad.shape[0], acc_dtype(grad.dtype)
    if 0 in grad.shape[:2]:
        return _conv_input_fake(grad, weight, height, width, *geometry)
    size = (grad.shape[1], tasks * geometry[6] * weight.shape[2], height, width)
    flat, rows = _as_groups(grad).to(acc), weight.flatten(0, 1).to(acc)
    out = conv2d_input(size, rows, flat, **_torchs(geometry, tasks))
    return _as_tasks(out.to(grad.dtype), tasks)


def _conv_weight_reference(
    grad: Tensor, x: Tensor, height: int, width: int, *geometry: int
) -> Tensor:
    tasks, acc = grad.shape[0], acc_dtype(grad.dtype)
    if 0 in grad.shape[:2]:
        return _conv_weight_fake(grad, x, height, width, *geometry).zero_()
    size = (tasks * grad.shape[2], x.shape[2] // geometry[6], height, width)
    flat, rows = _as_groups(grad).to(acc), _as_groups(x).to(acc)
    out = conv2d_weight(rows, size, flat, **_torchs(geometry, tasks))
    return out.to(grad.dtype).unflatten(0, (tasks, -1)).contiguous()


def _conv_fake(x: Tensor, weight: Tensor, _bias: Tensor | None, *geometry: int) -> Tensor:
    size = _conv_size(x, weight, geometry)
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1], *size))


def _conv_input_fake(
    grad: Tensor, weight: Tensor, height: int, width: int, *geometry: int
) -> Tensor:
    channels = weight.shape[2] * geometry[6]
    return grad.new_empty((grad.shape[0], grad.shape[1], channels, height, width))


def _conv_weight_fake(grad: Tensor, x: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    channels = x.shape[2] // geometry[6]
    return grad.new_empty((grad.shape[0], grad.shape[2], channels, height, width))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _conv_grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needed, geometry = ctx.needs_input_grad, ctx.geometry
    return (
        _conv_input(grad, weight, *x.shape[3:], *geometry) if needed[0] else None,
        _conv_weight(grad, x, *weight.shape[3:], *geometry) if needed[1] else None,
        grad.sum((1, 3, 4)) if needed[2] else None,
        *(None for _ in geometry),
    )


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, other, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad, other)


def _conv_input_grads(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    needed, geometry = ctx.needs_input_grad, ctx.geometry
    return (
        _conv(cotangent, weight, None, *geometry) if needed[0] else None,
        _conv_weight(grad, cotangent, *weight.shape[3:], *geometry) if needed[1] else None,
        *(None for _ in range(2 + len(geometry))),
    )


def _conv_weight_grads(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    needed, geometry = ctx.needs_input_grad, ctx.geometry
    return (
        _conv(x, cotangent, None, *geometry) if needed[0] else None,
        _conv_input(grad, cotangent, *x.shape[3:], *geometry) if needed[1] else None,
        *(None for _ in range(2 + len(geometry))),
    )


_GEOMETRY = (
    "SymInt stride_h, SymInt stride_w, SymInt padding_h, SymInt padding_w, "
    "SymInt dilation_h, SymInt dilation_w, SymInt groups"
)

_conv: Op = define_op(
    f"task_conv2d(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    reference=_conv_reference,
    fake=_conv_fake,
    setup_context=_conv_setup,
    backward=_conv_grads,
    vmap=fold_tasks(lambda *a: _conv(*a)),
)

_conv_input: Op = define_op(
    "task_conv2d_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
    f"{_GEOMETRY}) -> Tensor",
    reference=_conv_input_reference,
    fake=_conv_input_fake,
    setup_context=_adjoint_setup,
    backward=_conv_input_grads,
    vmap=fold_tasks(lambda *a: _conv_input(*a)),
)

_conv_weight: Op = define_op(
    "task_conv2d_weight(Tensor grad, Tensor x, SymInt height, SymInt width, "
    f"{_GEOMETRY}) -> Tensor",
    reference=_conv_weight_reference,
    fake=_conv_weight_fake,
    setup_context=_adjoint_setup,
    backward=_conv_weight_grads,
    vmap=fold_tasks(lambda *a: _conv_weight(*a)),
)
