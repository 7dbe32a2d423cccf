"""The capture of one meta-step in a CUDA graph, and what a replay gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmeta._cuda_recorder import RECORDERS
from fastmeta._inner_loop import TaskRunner
from fastmeta._inner_losses import NamedLoss
from fastmeta._padding import Look
from fastmeta._recompute import reads_more, rng_restore, rng_state
from fastmeta._structure import Structure

__all__ = ["Graph", "NoGraph", "Request", "record"]

#: Runs before a capture; the first is as any other, the rest are as they will be captured.
WARM_UPS = 3

Places = list[tuple[dict[str, Any], str]]


@dataclass
class Request:
    """A meta-step that is asked for.

    Attributes:
        given: The user's four inputs.
        modules: Where its parameters and buffers are.
        options: What else tells it from others.
        runner: What runs it.
        step: From inputs to the loss, in autograd's graph.
    """

    given: Sequence[Any]
    modules: list[nn.Module]
    options: tuple[Any, ...]
    runner: TaskRunner
    step: Callable[[Sequence[Tensor], Look], Tensor]

    @property
    def device(self) -> torch.device:
        """That of the first input."""
        return self.given[0].device  # type: ignore[no-any-return]


class NoGraph(Exception):
    """Why a meta-step has no graph."""


@dataclass(eq=False)
class Graph:
    """A captured meta-step.

    Attributes:
        key: Its signature.
        runner: What ran it.
        modules: Whose parameters it reads.
        static: The inputs that it reads.
        recorder: What replays it.
        looks: Whether it holds only for rows without padding.
        loss: The loss that it writes.
        grads: The gradients that it writes.
        targets: What these are of: a parameter, or the place of an input.
        last: Strategy and reason, for the plan.
    """

    key: Any
    runner: TaskRunner
    modules: list[nn.Module]
    static: list[Tensor]
    recorder: Any
    looks: bool = False
    loss: Tensor = field(init=False)
    grads: list[Tensor] = field(init=False)
    targets: list[int | Tensor] = field(init=False)
    last: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        # With the first, what a loss of one's own is made of.
        own = () if isinstance(self.runner.loss, NamedLoss) else (self.runner.loss,)
        self._structures = [
            Structure(module, *(() if i else own)) for i, module in enumerate(self.modules)
        ]
        self.places: Places = []
        for structure in self._structures:
            self.places += [slots[0] for slots in structure.slots.values()]
            self.places += structure.buffers.values()
        for held, key in self.places:
            tensor = held[key]
            if tensor.layout != torch.strided or tensor.is_inference():
                raise NoGraph(f"{key!r} is no ordinary tensor but a sparse or inference one")
            if tensor.device != self.static[0].device:
                raise NoGraph(f"{key!r} is on {tensor.device}")
        self._at = self._where()

    @property
    def buffers(self) -> Places:
        """Where buffers are."""
        return [place for s in self._structures for place in s.buffers.values()]

    def _where(self) -> list[Any]:
        tensors = [held[key] for held, key in self.places]
        return [(t.data_ptr(), t.stride()) for t in tensors]

    def moved(self) -> bool:
        """Whether a parameter or buffer is elsewhere in memory, or gone."""
        try:
            return self._where() != self._at
        except (KeyError, AttributeError, RuntimeError):
            return True

    def same(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the modules are what they were, but for the numbers."""
        if len(modules) != len(self.modules):
            return False
        both = zip(modules, self.modules, self._structures, strict=True)
        return all(now is then and structure.same() for now, then, structure in both)

    @torch.no_grad()
    def copy_in(self, given: Sequence[Tensor]) -> None:
        """Give the graph its inputs."""
        torch._foreach_copy_(self.static, list(given))

    def wanted(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the gradients are of, now."""
        return [given[t] if isinstance(t, int) else t for t in self.targets]

    def both(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        """The loss and the gradients, which the next replay does not touch."""
        pairs = zip(tensors, self.grads, needs, strict=True)
        return self.loss.clone(), _copies([(t, g) for t, g, need in pairs if need])

    def borrowed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, copied where they are to become someone's: not where they are added."""
        kept = [
            not t.is_leaf
            or t.grad is None
            or bool(t._backward_hooks or t._post_accumulate_grad_hooks)
            for t in tensors
        ]
        triples = list(zip(tensors, self.grads, kept, strict=True))
        copies = iter(_copies([(t, g) for t, g, keep in triples if keep]))
        return [next(copies) if keep else g for _, g, keep in triples]


@torch.no_grad()
def _copies(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gradients in tensors that have the layout of what they are of, as ``.grad`` has it."""
    made = [torch.empty_like(tensor, dtype=grad.dtype) for tensor, grad in pairs]
    if made:
        torch._foreach_copy_(made, [grad for _, grad in pairs])
    return made


def record(key: Any, request: Request) -> Graph | None:
    """Warm up and capture; None for a batch that runs without a graph, where others may not."""
    runner, device = request.runner, request.device
    parameters = [p for module in request.modules for p in module.parameters()]
    if not all(type(p) is nn.Parameter and p.is_leaf for p in parameters):
        return None  # torch.func.functional_call puts others there for the time of a call
    recorder = RECORDERS[device.type](device)
    graph = Graph(key, runner, request.modules, _static(request.given), recorder)
    leaves = _Leaves(graph, request)
    before = _Before(graph.buffers, device)
    try:
        look = Look()
        recorder.warm_up(lambda: leaves.run(look, searched=True))
        if look.found is not None and any(look.found):
            return None
        graph.last = runner.last
        host, draws = before.drawn()
        if runner.last is not None and runner.last[0] == "loop" != runner.strategy:
            raise NoGraph(f"tasks run one after another: {runner.last[1]}")
        if host:
            raise NoGraph("random numbers are drawn on the host")
        graph.looks = look.found is not None
        _as_captured(graph, leaves, request.given, draws)
        if before.replaced() or not graph.same(request.modules):
            raise NoGraph("the forward pass changes the module")
    finally:
        before.restore()
    if graph.last is not None:
        graph.last = graph.last[0], f"{graph.last[1]}; replayed as a CUDA graph"
    return graph


def _as_captured(graph: Graph, leaves: _Leaves, given: Sequence[Any], draws: bool) -> None:
    """Run and capture it in the form that needs nothing of the host."""

    def run() -> tuple[Tensor, list[Tensor | None]]:
        look = Look(answer=False) if graph.looks else Look(refuse=True)
        return leaves.run(look)

    runner, recorder = graph.runner, graph.recorder
    runner.recording, runner.draws = True, draws
    try:
        for _ in range(WARM_UPS - 1):
            graph.copy_in(given)  # the model may have written to its input
            recorder.warm_up(run, strict=True)
        loss, grads = recorder.capture(run)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise NoGraph(f"it cannot be captured ({type(error).__name__}: {first})") from error
    finally:
        runner.recording, runner.draws = False, True
    found = [(t, g) for t, g in zip(leaves.targets, grads, strict=True) if g is not None]
    if any(g.layout != torch.strided for _, g in found):
        raise NoGraph("a gradient is sparse")
    graph.loss, graph.targets = loss, [t for t, _ in found]
    graph.grads = [g for _, g in found]


class _Leaves:
    """A meta-step of a graph's own inputs, with all its gradients."""

    def __init__(self, graph: Graph, request: Request) -> None:
        self._static, self._step = graph.static, request.step
        self._device = request.device.type
        parameters: dict[int, Tensor] = {}
        for module in request.modules:
            parameters |= {id(p): p for p in module.parameters() if p.requires_grad}
        self.targets: list[int | Tensor] = [*parameters.values()]
        self.targets += [i for i, t in enumerate(self._static) if t.requires_grad]
        self._tensors = [self._static[t] if isinstance(t, int) else t for t in self.targets]

    def run(self, look: Look, searched: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients; ``searched`` for tensors that would get a gradient beside those."""
        # Casts that autocast keeps for later calls would be read by every replay.
        autocast = torch.autocast(
            self._device,
            torch.get_autocast_dtype(self._device),
            torch.is_autocast_enabled(self._device),
            cache_enabled=False,
        )
        with autocast:
            loss = self._step(self._static, look)
            if not loss.requires_grad:
                return loss.detach(), [None] * len(self._tensors)
            if searched and reads_more(loss, self._tensors):
                raise NoGraph("tensors that require a gradient are read from outside the modules")
            with _unhooked(self._tensors):
                grads = torch.autograd.grad(loss, self._tensors, allow_unused=True)
        return loss.detach(), list(grads)


@contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile hooks of the tensors do not run: they do when gradients are handed out."""
    hooks: list[Any] = [t._backward_hooks for t in tensors]
    try:
        for tensor, own in zip(tensors, hooks, strict=True):
            if own:
                tensor._backward_hooks = None
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            if own:
                tensor._backward_hooks = own


class _Before:
    """Buffers and random numbers as they are before a warm-up, to which nothing may happen."""

    def __init__(self, buffers: Places, device: torch.device) -> None:
        self._buffers = [(h, k, h[k], h[k].detach().clone(), h[k]._version) for h, k in buffers]
        self._device = device
        self._torch = rng_state(device)
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002

    def drawn(self) -> tuple[bool, bool]:
        """Whether random numbers were drawn on the host, and on the device."""
        host, own = rng_state(self._device)
        host_drew = not torch.equal(host, self._torch[0])
        drew = random.getstate() != self._python
        drew = drew or str(np.random.get_state()) != str(self._numpy)  # noqa: NPY002
        if own is None or self._torch[1] is None:  # where the host is the device
            return drew, host_drew
        return drew or host_drew, not torch.equal(own, self._torch[1])

    def replaced(self) -> bool:
        """Whether other tensors are where the buffers were, which a replay would not do."""
        return any(held.get(key) is not buffer for held, key, buffer, _, _ in self._buffers)

    def restore(self) -> None:
        """Set all as it was."""
        for held, key, buffer, value, version in self._buffers:
            held[key] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
        rng_restore(self._torch, self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


@torch.no_grad()
def _static(given: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the graph's own with the numbers and strides of the inputs."""
    made = []
    for t in given:
        if torch._debug_has_internal_overlap(t) == 1:  # expanded: no place to write to
            own = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        else:
            own = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        made.append(own.copy_(t).requires_grad_(t.requires_grad))
    return made
