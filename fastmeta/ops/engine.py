r"""Ops ``adapt`` and ``meta_step``: inner loops of T tasks in one call. Kernels: ``csrc/engine/``.

For each task, from the initial weights :math:`\theta_0`, with :math:`L_S` the loss of its supports,

.. math:: \theta_{k+1} = \theta_k - \alpha_k \nabla L_S(\theta_k), \qquad k = 0, \dots, K - 1,

and the prediction :math:`f_{\theta_K}(x_Q)` (Finn et al. 2017, arXiv:1703.03400). Network and loss
come as a program: a text (`fastmeta.ops._engine_program`), which `fastmeta.MAML` makes of a module.

The tensors of all three ops, floating ones of one dtype, float32 or float64:

* ``fast``: the initial weights that adapt; ``shared``: all else that the program uses;
* ``rates`` Tensor[R, E]: R is 1 or ``steps``; E is 1, ``len(fast)`` (a rate for each tensor) or the
  count of all numbers in ``fast`` (a rate for each);
* ``support_x`` Tensor[T, S, ...], ``support_y`` int64 Tensor[T, S], or targets of the shape of the
  predictions; ``query_x`` Tensor[T, Q, ...].

``seed`` is that of dropout, whose masks are functions of it alone. ``wanted`` has a bit for each
gradient that is asked for (`WANTED`); the others come back with shape [0].

``adapt`` returns the prediction Tensor[T, Q, ...], the adapted weights Tensor[T, ...] each (if
``weights``, else of shape [0]) and, if ``record``, what its backward wants to have kept.
``meta_step`` returns the mean over the tasks of their query losses Tensor[] and the gradients of
this mean: forward and backward in one pass, task after task. Both gradients are
exact; a second differentiation is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmeta.errors import fail
from fastmeta.ops import _engine_reference as reference
from fastmeta.ops._define import Op, define_op
from fastmeta.ops._engine_program import parse
from fastmeta.ops._engine_reference import WANTED

__all__ = ["WANTED", "adapt", "adapt_backward", "meta_step"]

_TENSORS = (
    "str program, Tensor[] fast, Tensor[] shared, Tensor rates, Tensor support_x, "
    "Tensor support_y, Tensor query_x"
)
_GRADIENTS = (
    "Tensor[] grad_fast, Tensor[] grad_shared, Tensor grad_rates, Tensor grad_support_x, "
    "Tensor grad_query_x"
)


def _count(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _fake_prediction(program: str, support_x: Tensor, query_x: Tensor) -> Tensor:
    return query_x.new_empty(support_x.shape[0], query_x.shape[1], *parse(program).output)


def _fake_gradients(
    wanted: int,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    query_x: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    def like(name: str, tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted & WANTED[name] else (0,))

    return (
        [like("fast", t) for t in fast],
        [like("shared", t) for t in shared],
        like("rates", rates),
        like("support_x", support_x),
        like("query_x", query_x),
    )


def _fake_adapt(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    weights: bool,
    record: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    tasks = support_x.shape[0]
    return (
        _fake_prediction(program, support_x, query_x),
        [p.new_empty((tasks, *p.shape) if weights else (0,)) for p in fast],
        rates.new_empty((tasks, steps, _count(fast)) if record else (0,)),
    )


def _fake_adapt_backward(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    wanted: int,
    trajectory: Tensor,
    grad_prediction: Tensor,
    grad_adapted: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    return _fake_gradients(wanted, fast, shared, rates, support_x, query_x)


def _fake_meta_step(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    wanted: int,
) -> tuple[Any, ...]:
    return (
        rates.new_empty(()),
        *_fake_gradients(wanted, fast, shared, rates, support_x, query_x),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    program, fast, shared, rates, support_x, support_y, query_x, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.program, ctx.options, ctx.count = program, options, (len(fast), len(shared))
    ctx.save_for_backward(*fast, *shared, rates, support_x, support_y, query_x, output[-1])


def _grads(ctx: Any, grad_prediction: Any, grad_adapted: Any, _trajectory: Any) -> tuple[Any, ...]:
    fasts, shareds = ctx.count
    steps, seed, first_order, _weights, record = ctx.options
    if not record:
        wanted_flag = "True where a gradient is taken"
        fail(ValueError, "adapt", "record", wanted_flag, False)
    *flat, rates, support_x, support_y, query_x, trajectory = ctx.saved_tensors
    needs = ctx.needs_input_grad
    asked = (any(needs[1]), any(needs[2]), needs[3], needs[4], needs[6])
    empty = rates.new_empty(0)
    grad_fast, grad_shared, *others = adapt_backward(
        ctx.program,
        flat[:fasts],
        flat[fasts : fasts + shareds],
        rates,
        support_x,
        support_y,
        query_x,
        steps,
        seed,
        first_order,
        sum(bit for bit, asks in zip(WANTED.values(), asked, strict=True) if asks),
        trajectory,
        empty if grad_prediction is None else grad_prediction,
        [empty if g is None else g for g in grad_adapted],
    )
    on_rates, on_support, on_query = (
        g if asks else None for g, asks in zip(others, asked[2:], strict=True)
    )
    return (
        None,
        grad_fast if asked[0] else [None] * fasts,
        grad_shared if asked[1] else [None] * shareds,
        on_rates,
        on_support,
        None,
        on_query,
        *(None for _ in ctx.options),
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is kept: there is no backward."""


def refuse_twice(*_: Any) -> NoReturn:
    """The error of whoever differentiates a gradient of the engine."""
    raise RuntimeError(
        "MAML: a meta-gradient of the engine or a CUDA graph cannot be differentiated again, for "
        "autograd has no graph of it. MAML(..., strategy='vmap') without cuda_graph gives one that "
        "can, to any order."
    )


def _each_alone(call: Callable[..., Any]) -> Callable[..., Any]:
    """Vmap rule: one call for each, the results stacked; tasks are the dimension to batch over."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        def pick(value: Any, dim: Any, i: int) -> Any:
            if isinstance(value, (list, tuple)):
                return [pick(v, d, i) for v, d in zip(value, dim, strict=True)]
            return value if dim is None else value.select(dim, i)

        found = [
            call(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(
            torch.stack(column)
            if isinstance(column[0], Tensor)
            else [torch.stack(parts) for parts in zip(*column, strict=True)]
            for column in zip(*found, strict=True)
        )
        return stacked, tuple([0] * len(s) if isinstance(s, list) else 0 for s in stacked)

    return rule


adapt_backward: Op = define_op(
    f"adapt_backward({_TENSORS}, int steps, int seed, bool first_order, int wanted, "
    f"Tensor trajectory, Tensor grad_prediction, Tensor[] grad_adapted) -> ({_GRADIENTS})",
    reference=reference.adapt_backward,
    fake=_fake_adapt_backward,
    setup_context=_setup_nothing,
    backward=refuse_twice,
    vmap=_each_alone(lambda *args: adapt_backward(*args)),
)

adapt: Op = define_op(
    f"adapt({_TENSORS}, int steps, int seed, bool first_order, bool weights, bool record) "
    "-> (Tensor prediction, Tensor[] adapted, Tensor trajectory)",
    reference=reference.adapt,
    fake=_fake_adapt,
    setup_context=_setup,
    backward=_grads,
    vmap=_each_alone(lambda *args: adapt(*args)),
)

meta_step: Op = define_op(
    f"meta_step({_TENSORS}, Tensor query_y, int steps, int seed, bool first_order, int wanted) "
    f"-> (Tensor loss, {_GRADIENTS})",
    reference=reference.meta_step,
    fake=_fake_meta_step,
    setup_context=_setup_nothing,
    backward=refuse_twice,
    vmap=_each_alone(lambda *args: meta_step(*args)),
)
