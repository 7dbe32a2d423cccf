"""Chunks of tasks without their graphs: the backward pass of each runs it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastmeta._inner_losses import NamedLoss
from fastmeta._recompute import reads_more, recompute
from fastmeta.errors import fail

__all__ = ["recomputed_chunk"]


def recomputed_chunk(
    run: Callable[..., Tensor], loss: Any, draws: bool = True
) -> Callable[..., Tensor]:
    """``run(weights, rates, supports, queries)`` without its graph.

    The second run sees the model in the modes and with the buffers of the first. A buffer, or a
    class weight of ``loss``, that was written in place meanwhile is torch's usual error. ``draws``
    says whether random numbers may be drawn.
    """

    def again(weights: Any, rates: Any, supports: Any, queries: Any) -> Tensor:
        held = {name: slots[0][0][slots[0][1]] for name, slots in weights.slots.items()}
        held |= dict(zip(weights.names, weights.theta, strict=True))
        before = _Snapshot(weights.model)
        given = [*held.values(), *rates.tensors, supports.x, supports.y, queries.x]

        def from_tensors(tensors: list[Tensor]) -> Tensor:
            tensors = tensors[: len(given)]
            values = dict(zip(held, tensors, strict=False))
            theta = [values.pop(name) for name in weights.names]
            *rate, support_x, support_y, query_x = tensors[len(held) :]
            return run(
                replace(weights, theta=theta, others=values),
                replace(rates, tensors=rate),
                replace(supports, x=support_x, y=support_y),
                replace(queries, x=query_x),
            )

        def checked(tensors: list[Tensor]) -> Tensor:
            with before.restored():
                out = from_tensors(tensors)
            if all(t.is_leaf for t in tensors) and reads_more(out, tensors):
                wanted = (
                    "None for a model or loss that reads tensors with requires_grad=True which "
                    "are not the model's own parameters, because no gradient would come to them"
                )
                fail(RuntimeError, "MAML", "task_chunk", wanted, "a number")
            return out

        weight = loss.weight if isinstance(loss, NamedLoss) else None
        read = [*before.tensors, *([] if weight is None else [weight])]
        # Those that are read alone: saved, so that torch notices writes.
        tensors = [*given, *(t for t in read if not t.requires_grad)]
        device = supports.x.device
        return recompute(from_tensors, tensors, device, checked, draws)  # type: ignore[no-any-return]

    return again


class _Snapshot:
    """The modes of a model and its buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module._buffers, key, buffer)
            for module, _ in self._modes
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer for _, _, buffer in self._buffers]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Meanwhile the model is as it was."""
        modes = [(module, module.training) for module, _ in self._modes]
        buffers = [(held, key, held.get(key)) for held, key, _ in self._buffers]
        try:
            for module, mode in self._modes:
                module.training = mode
            for held, key, buffer in self._buffers:
                held[key] = buffer
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for held, key, now in buffers:
                held[key] = now
