"""What ``MAML.loss`` and ``MAML.backward`` do with a loss that comes with its gradients.

The engine's op and CUDA graphs return both at once. `in_graph` puts them into autograd's graph,
`hand_out` past it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.ops._define import _below_autograd
from fastmeta.ops.engine import WANTED, refuse_twice

_graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
_meta_step = torch.ops.fastmeta.meta_step.default


class Work(NamedTuple):
    """A meta-step but for its differentiable tensors.

    Attributes:
        program: Its text.
        counts: Of adapted and of shared tensors; rates, supports and queries follow.
        targets: Those of supports and queries.
        options: Steps, seed, first order.
        task_chunk: Tasks whose gradients are in memory at a time; None: what suits the kernel.
    """

    program: str
    counts: tuple[int, int]
    targets: tuple[Tensor, Tensor]
    options: tuple[int, int, bool]
    task_chunk: int | None = None

    def __call__(
        self, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean query loss, and its gradients for those of ``tensors`` that need one."""
        fast, shared = self.counts[0], sum(self.counts)
        tasks, chunk = tensors[-1].shape[0], self.task_chunk
        if chunk is not None and chunk < tasks:
            return self._by_chunks(tensors, needs, chunk)
        with _below_autograd():
            mean, fast_grads, shared_grads, *grads = _meta_step(
                self.program,
                tensors[:fast],
                tensors[fast:shared],
                *tensors[shared : shared + 2],
                self.targets[0],
                tensors[-1],
                self.targets[1],
                *self.options,
                _wanted(tuple(needs), fast, shared),
            )
        found = [*fast_grads, *shared_grads, *grads]
        return mean, list(itertools.compress(found, needs))

    def _by_chunks(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], chunk: int
    ) -> tuple[Tensor, list[Tensor]]:
        """`__call__` for ``chunk`` tasks after the other."""
        tasks, inputs = tensors[-1].shape[0], len(tensors) - 2
        count = sum(needs[:inputs])
        total = tensors[-1].new_zeros(())
        sums: list[Tensor] = []
        of_inputs: list[list[Tensor]] = [[] for need in needs[inputs:] if need]
        steps, seed, first_order = self.options
        with _below_autograd():
            for start in range(0, tasks, chunk):
                part = slice(start, start + chunk)
                share = min(chunk, tasks - start) / tasks
                # A chunk's dropout has masks of its own.
                options = steps, (seed + start * 0x9E3779B97F4A7C15) % 2**62, first_order
                targets = self.targets[0][part], self.targets[1][part]
                work = self._replace(targets=targets, options=options, task_chunk=None)
                mean, grads = work([*tensors[:inputs], *(t[part] for t in tensors[inputs:])], needs)
                total.add_(mean, alpha=share)
                if not start:
                    sums = [grad.mul_(share) for grad in grads[:count]]
                elif count:
                    torch._foreach_add_(sums, grads[:count], alpha=share)
                for parts, grad in zip(of_inputs, grads[count:], strict=True):
                    parts.append(grad.mul_(share))
                del grads  # before there are others
        return total, sums + [torch.cat(parts) for parts in of_inputs]

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """The mean query loss, in autograd's graph."""
        return in_graph(self, tensors)  # type: ignore[arg-type]

    def gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The mean query loss, which tensors need a gradient, and these."""
        needs = [t.requires_grad for t in tensors]
        loss, grads = self(tensors, needs)
        return loss, list(itertools.compress(tensors, needs)), grads


@functools.cache
def _wanted(needs: tuple[bool, ...], fast: int, shared: int) -> int:
    """The op's bits for the kinds of tensors of which one needs a gradient."""
    asked = (any(needs[:fast]), any(needs[fast:shared]), *needs[shared:])
    return sum(bit for bit, asks in zip(WANTED.values(), asked, strict=True) if asks)


#: From tensors, and which of them need a gradient, to the loss and these gradients.
Both = Callable[[Sequence[Tensor], Sequence[bool]], tuple[Tensor, list[Tensor]]]


def in_graph(both: Both, tensors: Sequence[Tensor]) -> Tensor:
    """The loss, in autograd's graph, which is to own its gradients."""
    return _MetaLoss.apply(both, torch.is_grad_enabled(), *tensors)  # type: ignore[no-any-return]


def hand_out(loss: Tensor, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """As ``backward()``: adds to ``.grad`` of leaves, and goes on where there is a graph.

    Returns:
        The loss.
    """
    if not tensors:
        raise RuntimeError("MAML.backward: neither parameters, rates nor inputs require a gradient")
    others, sums, more = [], [], []
    for tensor, grad in zip(tensors, grads, strict=True):
        if not tensor.is_leaf or tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            others.append((tensor, grad))
        elif tensor.grad is None:
            tensor.grad = grad
        else:
            sums.append(tensor.grad)
            more.append(grad)
    if sums:
        _add(sums, more)
    if others:
        torch.autograd.backward([t for t, _ in others], [g for _, g in others])
    return loss


def _add(sums: list[Tensor], more: list[Tensor]) -> None:
    """Adds to each of ``sums``; at once, which on a GPU takes that each is another tensor."""
    with _below_autograd():
        if sums[0].is_cpu or len({id(t) for t in sums}) == len(sums):
            torch._foreach_add_(sums, more)
            return
        for total, grad in zip(sums, more, strict=True):
            total.add_(grad)


class _MetaLoss(torch.autograd.Function):
    """The mean query loss. Its gradients are there before anyone asks; backward scales them."""

    @staticmethod
    def forward(ctx: Any, work: Both, learning: bool, *tensors: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:] if learning else (False,) * len(tensors)
        # No saved tensors: those are held until after the backward pass, so that each would be
        # copied into its parameter's .grad instead of becoming it.
        loss, ctx.grads = work(tensors, needs)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError(
                "MAML: trying to go backward through MAML.loss a second time, after its gradients "
                "were handed out: the first time, backward(retain_graph=True) keeps them"
            )
        if _graph_is_kept():  # for the next time, whatever becomes of those that go out
            grads = [g.clone() for g in grads]
        else:
            ctx.grads = None
        if not (grad.is_cpu and grad.item() == 1):  # as it is after loss.backward()
            grads = torch._foreach_mul(grads, grad.detach())
        if torch.is_grad_enabled():
            grads = _Final.apply(torch.zeros((), requires_grad=True), *grads)
        following = iter(grads)
        needs = ctx.needs_input_grad[2:]
        return (None, None, *[next(following) if need else None for need in needs])


class _Final(torch.autograd.Function):
    """Gradients as they are, in a graph that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *grads: Tensor) -> Any:
        return tuple(g.clone() for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_twice()
