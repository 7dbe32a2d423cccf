"""Recomputation in place of a stored graph, and the states of random numbers that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["reads_more", "recompute", "rng_restore", "rng_state"]

RngState = tuple[Tensor, Tensor | None]


def rng_state(device: torch.device) -> RngState:
    """State of the random numbers of the CPU and, if it is another, of ``device``."""
    return torch.get_rng_state(), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def rng_restore(state: RngState, device: torch.device) -> None:
    """Set what `rng_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def recompute(
    run: Callable[[list[Tensor]], Any],
    tensors: list[Tensor],
    device: torch.device,
    again: Callable[[list[Tensor]], Any] | None = None,
    draws: bool = True,
) -> Any:
    """``run(tensors)`` without its graph, which the backward pass builds by running it again.

    Unlike ``torch.utils.checkpoint`` it lets ``run`` take gradients itself, and the result can be
    given to ``torch.autograd.grad``; with ``create_graph`` that has the graph of the run.

    Args:
        run: From tensors to a tensor or a tuple of tensors. What it computes may depend on other
            tensors, but no gradient comes to those.
        tensors: What it is run on.
        device: Device whose random numbers it may draw.
        again: What is run in the backward pass, if it is not ``run`` itself.
        draws: Whether it may draw any; while a CUDA graph is captured, their state is out of reach.
    """
    return _Recomputed.apply(run, again or run, device, draws, *tensors)


def reads_more(result: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether the graph of ``result`` comes to a leaf that is none of ``leaves``."""
    known = {id(leaf) for leaf in leaves}
    seen: set[Any] = set()
    ahead: list[Any] = [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in known:
            return True
        ahead.extend(following for following, _ in node.next_functions)
    return False


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Any, again: Any, device: torch.device, draws: bool, *tensors: Tensor
    ) -> Any:
        ctx.again, ctx.device = again, device
        ctx.state = rng_state(device) if draws else None
        ctx.autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return run([t.detach() for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        tensors, further = list(ctx.saved_tensors), torch.is_grad_enabled()
        if not further:
            tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        now = rng_state(ctx.device) if ctx.state is not None else None
        if ctx.state is not None:
            rng_restore(ctx.state, ctx.device)
        try:
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                results = ctx.again(tensors)
        finally:
            if now is not None:
                rng_restore(now, ctx.device)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [
            (r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad
        ]
        wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
        found: Iterator[Any] = iter([None] * len(wanted))
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = iter(
                torch.autograd.grad(
                    outputs, wanted, cotangents, create_graph=further, allow_unused=True
                )
            )
        return (None, None, None, None, *(next(found) if n else None for n in needed))
