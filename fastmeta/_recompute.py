"""Recomputation in place of a stored graph, and the states of random numbers that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["recompute", "rng_restore", "rng_state"]

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
    run: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], device: torch.device
) -> Tensor:
    """``run(tensors)`` without its graph, which the backward pass builds by running it again.

    Unlike ``torch.utils.checkpoint`` it lets ``run`` take gradients itself, and the result can be
    given to ``torch.autograd.grad``. It can be differentiated once.
    """
    return _Recomputed.apply(run, device, *tensors)  # type: ignore[no-any-return]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, device: torch.device, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.device = run, device
        ctx.state = rng_state(device)
        ctx.autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }
        ctx.save_for_backward(*tensors)
        result: Tensor = run(list(tensors))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        tensors = [
            t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        now = rng_state(ctx.device)
        rng_restore(ctx.state, ctx.device)
        try:
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                result = ctx.run(tensors)
            wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
            found = iter(torch.autograd.grad(result, wanted, grad, allow_unused=True))
        finally:
            rng_restore(now, ctx.device)
        return (None, None, *(next(found) if n else None for n in needed))
