"""Op ``adam_update``: a step of Adam for all tasks' parameters. Kernels: ``csrc/update/``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.errors import check_integer, describe, fail
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

__all__ = ["AdamState", "adam_update"]


class AdamState(NamedTuple):
    """What `adam_update` keeps from step to step.

    Attributes:
        step: Number of steps taken.
        mean: Structured like the parameters, the running mean of gradients.
        square: Likewise, that of their squares.
    """

    step: int
    mean: Any
    square: Any


def adam_update(
    params: Params,
    grads: Params,
    state: AdamState | None,
    lr: Any,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> tuple[Params, AdamState]:
    r"""One step of Adam for all parameters of all tasks in one call.

    .. math:: m' = \beta_1 m + (1 - \beta_1) g, \qquad v' = \beta_2 v + (1 - \beta_2) g^2, \qquad
       \theta' = \theta - \alpha
       \frac{m' / (1 - \beta_1^k)}{\sqrt{v' / (1 - \beta_2^k) + \epsilon_0} + \epsilon}

    in step :math:`k = 1, 2, \dots` (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1). Nothing is
    changed in place, and the results are differentiable to any order in parameters, gradients,
    state and rate, so that an inner loop may take such steps.

    The root has no derivative at 0, where a gradient of exactly zero has been seen by a parameter
    whose state is still zero (behind a dead ReLU, say), and autograd's way through the formula
    gives NaN there. Here the derivative of a root that is 0 is left out, and what remains is the
    exact derivative of the step at :math:`g = m = v = 0`, namely
    :math:`\partial \theta' / \partial g = -\alpha / \epsilon`. That is large: a positive
    ``eps_root`` makes it small.

    Args:
        params: A tensor, a sequence or a mapping of tensors: Tensor[T, ...] each, or Tensor[...]
            shared by the tasks of its gradient; float32, float64, bfloat16 or float16.
        grads: Of the same structure, the gradients, Tensor[T, ...] each; None where a parameter has
            none: it and its state stay as they are (but ``step`` counts for all: a parameter whose
            first gradient comes later has the smaller bias correction of that step).
        state: What the last step returned; None before the first. Its entries are Tensor[T, ...]
            each, float32 (float64 for float64), or None for zero.
        lr: Step size: a number, a tensor that broadcasts to every gradient, or a structure like
            ``params`` of such, one for each: a scalar, per element Tensor[...], or per task
            Tensor[T, 1, ...].
        betas: :math:`\beta_1, \beta_2`, at least 0 and below 1.
        eps: :math:`\epsilon`, at least 0, outside of the root.
        eps_root: :math:`\epsilon_0`, at least 0, inside of the root.

    Returns:
        The updated parameters in the structure of ``params``, each of its gradient's shape, and the
        new state.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: Structures, shapes or devices do not fit, or a number is out of its range; the
            message names the argument.

    Note:
        Arithmetic is in float32 (float64 for float64), and each result is rounded once.

    Example:
        >>> import torch, fastmeta as fm
        >>> theta, state = torch.zeros(2), None
        >>> for _ in range(3):
        ...     theta, state = fm.adam_update(theta, torch.tensor([1.0, 10.0]), state, 0.1)
        >>> theta, state.step
        (tensor([-0.3000, -0.3000]), 3)
    """
    function = "adam_update"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail(TypeError, function, "betas", "two numbers", describe(betas))
    beta1 = check_number(function, "betas[0]", betas[0], 0, 1)
    beta2 = check_number(function, "betas[1]", betas[1], 0, 1)
    numbers = (
        beta1,
        beta2,
        check_number(function, "eps", eps, 0),
        check_number(function, "eps_root", eps_root, 0),
    )
    if state is None:
        state = AdamState(0, None, None)
    elif not isinstance(state, AdamState):
        fail(TypeError, function, "state", "an AdamState or None", describe(state))
    step = check_integer(function, "state.step", state.step, 0) + 1
    entries = Entries(function, params)
    grads_, rates = entries.column("grads", grads), entries.shared_column("lr", lr)
    updated: list[Any] = list(entries.params)
    means = entries.state_column("state.mean", state.mean)
    squares = entries.state_column("state.square", state.square)
    states = {"state.mean": means, "state.square": squares}
    for group, operands in Groups(entries, grads_, rates, states):
        for i, *results in zip(group, *_adam(*operands, *numbers, step), strict=True):
            updated[i], means[i], squares[i] = results
    new = AdamState(step, entries.rebuild(means), entries.rebuild(squares))
    return entries.rebuild(updated), new


class _Moments:
    """The intermediate values of a step, as tensors in the accumulation dtype.

    ``flat`` marks roots that are 0; ``inverse`` is one over the root, and 0 there.
    """

    def __init__(
        self,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        eps_root: float,
        step: int,
    ) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean_scale, self.square_scale = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
        self.grad = grad
        self.mean = beta1 * mean + (1 - beta1) * grad
        self.square = beta2 * square + (1 - beta2) * grad.square()
        under = self.square_scale * self.square + eps_root
        flat = under == 0
        root = torch.where(flat, 0, torch.where(flat, 1, under).sqrt())
        self.inverse = torch.where(flat, 0, 1 / torch.where(flat, 1, root))
        self.divisor = root + eps
        self.step = self.mean_scale * self.mean / self.divisor

    def along(self, grad: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        """Tangents of mean, square, root and step along those of gradient, mean and square."""
        mean = self.beta1 * mean + (1 - self.beta1) * grad
        square = self.beta2 * square + 2 * (1 - self.beta2) * self.grad * grad
        root = 0.5 * self.square_scale * square * self.inverse
        step = (self.mean_scale * mean - self.step * root) / self.divisor
        return mean, square, root, step

    def to_inputs(self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of gradient, mean and square from those of the new mean and square."""
        grad = (1 - self.beta1) * mean + 2 * (1 - self.beta2) * self.grad * square
        return grad, self.beta1 * mean, self.beta2 * square


def _reference(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    lrs: list[Tensor],
    *numbers: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results = []
    for p, g, m, v, r in zip(params, grads, means, squares, lrs, strict=True):
        new = _Moments(g.to(r.dtype), m, v, *numbers)
        updated = (p.to(r.dtype) - r * new.step).to(p.dtype)
        results.append((updated.contiguous(), new.mean.contiguous(), new.square.contiguous()))
    return _columns(results, 3)  # type: ignore[return-value]


def _reference_backward(
    grad_outs: list[Tensor],
    grad_out_means: list[Tensor],
    grad_out_squares: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    lrs: list[Tensor],
    *numbers: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    *numbers, with_lr = numbers  # type: ignore[assignment]
    results = []
    lists = (grad_outs, grad_out_means, grad_out_squares, grads, means, squares, lrs)
    for o, om, os, g, m, v, r in zip(*lists, strict=True):
        new = _Moments(g.to(r.dtype), m, v, *numbers)
        to_step = r * o / new.divisor
        to_mean = om - new.mean_scale * to_step
        to_square = os + 0.5 * new.square_scale * to_step * new.step * new.inverse
        to_g, to_m, to_v = (x.contiguous() for x in new.to_inputs(to_mean, to_square))
        to_r = -(o * new.step).sum_to_size(r.shape) if with_lr else r.new_empty(0)
        results.append((to_g.to(g.dtype), to_m, to_v, to_r))
    return _columns(results, 4)  # type: ignore[return-value]


def _columns(rows: list[tuple[Any, ...]], count: int) -> tuple[list[Any], ...]:
    return tuple([row[i] for row in rows] for i in range(count))


def _fake(
    _params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], *_: Any
) -> tuple[list[Tensor], ...]:
    return tuple([x.new_empty(x.shape) for x in column] for column in (grads, means, squares))


def _fake_backward(*args: Any) -> tuple[list[Tensor], ...]:
    grads, means, squares, lrs, with_lr = *args[3:7], args[-1]
    like = tuple([x.new_empty(x.shape) for x in column] for column in (grads, means, squares))
    return (*like, [r.new_empty(r.shape if with_lr else (0,)) for r in lrs])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *columns = inputs[:5]
    ctx.numbers = inputs[5:]
    ctx.count = len(columns[0])
    ctx.save_for_backward(*(x for column in columns for x in column))


def _saved(ctx: Any, columns: int) -> list[list[Tensor]]:
    saved, count = list(ctx.saved_tensors), ctx.count
    return [saved[i * count : (i + 1) * count] for i in range(columns)]


def _grads(ctx: Any, grad_outs: Any, grad_out_means: Any, grad_out_squares: Any) -> tuple[Any, ...]:
    cotangents = [list(grad_outs), list(grad_out_means), list(grad_out_squares)]
    with_lr = any(ctx.needs_input_grad[4])
    *results, grad_lrs = _adam_backward(*cotangents, *_saved(ctx, 4), *ctx.numbers, with_lr)
    to_lrs = grad_lrs if with_lr else [None] * ctx.count
    return (cotangents[0], *results, to_lrs, None, None, None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    columns = inputs[:7]
    *ctx.numbers, ctx.with_lr = inputs[7:]
    ctx.count = len(columns[0])
    ctx.save_for_backward(*(x for column in columns for x in column))


def _grads_backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
    """With (x, y, z, w) the cotangents of the four gradients, derivatives along (x, y, z, w).

    The backward is the gradient of <o, theta'> + <a, mean'> + <b, square'>. So its transpose gives
    o, a and b the tangents of theta', mean' and square', and gradient, state and rate the tangents
    of the backward itself, which is symmetric.
    """
    rows = []
    for o, _, b, g, m, v, r, x, y, z, w in zip(*_saved(ctx, 7), *cotangents, strict=True):
        new = _Moments(g.to(r.dtype), m, v, *ctx.numbers)
        x, o_acc = x.to(r.dtype), o.to(r.dtype)
        mean, square, root, step = new.along(x, y, z)
        # slope: of square' in the backward, without lr * o. Each *_along is a tangent.
        slope = 0.5 * new.square_scale * new.step * new.inverse / new.divisor
        slope_along = 0.5 * new.square_scale * step * new.inverse / new.divisor
        slope_along = slope_along - slope * root * (new.inverse + 1 / new.divisor)
        rate_along = w * o_acc if ctx.with_lr else torch.zeros_like(o_acc)
        mean_along = rate_along / new.divisor - r * o_acc * root / new.divisor.square()
        to_square = b + r * o_acc * slope
        square_along = rate_along * slope + r * o_acc * slope_along
        to_g, to_m, to_v = new.to_inputs(-new.mean_scale * mean_along, square_along)
        to_g = to_g + 2 * (1 - new.beta2) * x * to_square
        to_out = -r * step - (w * new.step if ctx.with_lr else 0)
        to_r = -(o_acc * step).sum_to_size(r.shape)
        rows.append((to_out.to(o.dtype), mean, square, to_g.to(g.dtype), to_m, to_v, to_r))
    return (*_columns(rows, 7), None, None, None, None, None, None)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    lists, numbers = args[:5], args[5:]
    ranks = ranks_of(lists[1], in_dims[1])
    dims = [0] * len(ranks)
    operands = lead(info.batch_size, lists, in_dims, ranks, expand=False)
    return _adam(*operands, *numbers), (dims, dims, dims)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    lists, numbers = args[:7], args[7:]
    ranks = ranks_of(lists[3], in_dims[3])
    operands = lead(info.batch_size, lists, in_dims, ranks, expand=True)
    *results, grad_lrs = _adam_backward(*operands, *numbers)
    dims: list[Any] = [0] * len(ranks)
    if not numbers[-1]:
        return (*results, grad_lrs), (dims, dims, dims, [None] * len(ranks))
    grad_lrs = unlead_rates(info.batch_size, grad_lrs, lists[6], in_dims[6])
    return (*results, grad_lrs), (dims, dims, dims, dims)


_adam_backward: Op = define_op(
    "adam_update_backward(Tensor[] grad_outs, Tensor[] grad_out_means, Tensor[] grad_out_squares, "
    "Tensor[] grads, Tensor[] means, Tensor[] squares, Tensor[] lrs, float beta1, float beta2, "
    "float eps, float eps_root, SymInt step, bool with_lr) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[])",
    reference=_reference_backward,
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_grads_backward,
    vmap=_vmap_backward,
)

_adam: Op = define_op(
    "adam_update(Tensor[] params, Tensor[] grads, Tensor[] means, Tensor[] squares, Tensor[] lrs, "
    "float beta1, float beta2, float eps, float eps_root, SymInt step) "
    "-> (Tensor[], Tensor[], Tensor[])",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    vmap=_vmap,
)
