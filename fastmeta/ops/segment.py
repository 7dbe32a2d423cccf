"""Op ``segment_mean``: class prototypes of ragged supports. Kernels: ``csrc/segment/``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmeta.errors import (
    check_float_tensor,
    check_int_tensor,
    check_labels,
    check_num_classes,
    fail,
)
from fastmeta.ops._define import Op, acc_dtype, define_op, fold_tasks

__all__ = ["segment_mean"]


def segment_mean(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    r"""Mean of the rows of each class: the prototypes of a support set.

    .. math:: \mathrm{mean}_c = \frac{1}{n_c} \sum_{i: y_i = c} v_i, \qquad n_c = |\{i : y_i = c\}|

    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", arXiv:1703.05175, eq. 1.

    Args:
        values: Tensor[..., S, D], float32, float64, bfloat16 or float16.
        labels: Tensor[..., S] of integers in [0, ``num_classes``), in any order; -100 marks
            padding. Leading (task) dimensions broadcast against those of ``values``.
        num_classes: C, at least 1.

    Returns:
        The means, Tensor[..., C, D] in the dtype of ``values``, and the counts, Tensor[..., C] in
        the accumulation dtype. A class without rows has mean 0 and count 0.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or label does not fit; the message names the argument.

    Note:
        Sums in float32 (float64 for float64), in the order of the rows. NaN spreads within its
        class and feature only. Labels are checked on the CPU; on CUDA and under tracing one outside
        the range counts as padding. Differentiable to any order in ``values``.

    Example:
        >>> import torch, fastmeta as fm
        >>> values, labels = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2])
        >>> fm.segment_mean(values, labels, 3)
        (tensor([[2.],
                [0.],
                [5.]]), tensor([2., 0., 1.]))
    """
    name = "segment_mean"
    check_float_tensor(name, "values", values, min_dim=2)
    num_classes = check_num_classes(name, num_classes)
    check_int_tensor(name, "labels", labels, device=values.device)
    if labels.dim() < 1 or labels.shape[-1] != values.shape[-2]:
        wanted = f"of shape [..., S={values.shape[-2]}], like values"
        fail(ValueError, name, "labels", wanted, f"shape {list(labels.shape)}")
    labels = labels.long()
    check_labels(name, "labels", labels, num_classes)
    if values.dim() == 3 and labels.shape == values.shape[:2]:
        return _segment_mean(values, labels, num_classes)  # type: ignore[no-any-return]
    try:
        leading = torch.broadcast_shapes(values.shape[:-2], labels.shape[:-1])
    except RuntimeError:
        wanted = f"of leading shape {list(values.shape[:-2])}, like values"
        fail(ValueError, name, "labels", wanted, f"shape {list(labels.shape)}")
    tasks = math.prod(leading)
    rows, dim = values.shape[-2:]
    mean, count = _segment_mean(
        values.expand(*leading, rows, dim).reshape(tasks, rows, dim),
        labels.expand(*leading, rows).reshape(tasks, rows),
        num_classes,
    )
    return mean.reshape(*leading, num_classes, dim), count.reshape(*leading, num_classes)


def _index(labels: Tensor, num_classes: int) -> Tensor:
    """Class of each row, C for padding."""
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def _reference(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    acc, (tasks, _, dim) = acc_dtype(values.dtype), values.shape
    index = _index(labels, num_classes)
    count = values.new_zeros(tasks, num_classes + 1, dtype=acc)
    count = count.scatter_add(1, index, torch.ones_like(index, dtype=acc))[:, :num_classes]
    sums = values.new_zeros(tasks, num_classes + 1, dim, dtype=acc)
    sums = sums.scatter_add(1, index.unsqueeze(-1).expand(values.shape), values.to(acc))
    mean = sums[:, :num_classes] / count.clamp(min=1).unsqueeze(-1)
    return mean.to(values.dtype), count.contiguous()


def _reference_backward(grad: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    num_classes, dim = grad.shape[1:]
    index = _index(labels, num_classes)
    scaled = grad.to(count.dtype) / count.clamp(min=1).unsqueeze(-1)
    scaled = torch.nn.functional.pad(scaled, (0, 0, 0, 1))
    rows = scaled.gather(1, index.unsqueeze(-1).expand(*index.shape, dim))
    return rows.to(grad.dtype)


def _fake(values: Tensor, _labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    tasks, _, dim = values.shape
    acc = acc_dtype(values.dtype)
    return (
        values.new_empty((tasks, num_classes, dim)),
        values.new_empty((tasks, num_classes), dtype=acc),
    )


def _fake_backward(grad: Tensor, labels: Tensor, _count: Tensor) -> Tensor:
    return grad.new_empty((*labels.shape, grad.shape[2]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, labels, _ = inputs
    _, count = output
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(labels, count)


def _grads(ctx: Any, grad: Tensor | None, _grad_count: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    labels, count = ctx.saved_tensors
    return _segment_mean_backward(grad, labels, count), None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, labels, _ = inputs
    ctx.num_classes = grad.shape[1]
    ctx.save_for_backward(labels)


def _grads_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (labels,) = ctx.saved_tensors
    # The adjoint of "spread the class gradient over its rows, divided by their count" is the mean.
    return _segment_mean(grad, labels, ctx.num_classes)[0], None, None


_segment_mean_backward: Op = define_op(
    "segment_mean_backward(Tensor grad, Tensor labels, Tensor count) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_grads_backward,
    vmap=fold_tasks(lambda *a: _segment_mean_backward(*a)),
)

_segment_mean: Op = define_op(
    "segment_mean(Tensor values, Tensor labels, SymInt num_classes) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    vmap=fold_tasks(lambda *a: _segment_mean(*a)),
)
