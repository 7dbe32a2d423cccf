"""``MAML(cuda_graph=True)``: meta-steps that are captured once and replayed after.

A meta-step of a small network is hundreds of launches of a few microseconds each, and the host
takes longer to ask for them than the device to run them. A graph asks once. What is captured
computes the loss and its gradients into tensors that stay; handing these out is left to the host,
so that it happens as it does without graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._cuda_recorder import RECORDERS
from fastmeta._engine import unusual_call
from fastmeta._engine_loss import hand_out, in_graph
from fastmeta._graph_capture import Graph, NoGraph, Request, record
from fastmeta._inner_loop import TaskRunner
from fastmeta._inner_losses import labels_padded

__all__ = ["GraphedSteps", "Request"]

#: Graphs that are kept, each with memory of its own, and signatures known to have none.
KEPT = 8
KEPT_REFUSALS = 64


class GraphedSteps:
    """The graphs of one MAML. A copy or a pickle of it has none."""

    def __init__(self) -> None:
        self._known: list[Graph | _Refusal] = []
        self._padded: list[Any] = []  # signatures that were met with padding and have to know

    def __deepcopy__(self, memo: Any) -> GraphedSteps:
        return GraphedSteps()

    def __reduce__(self) -> Any:
        return GraphedSteps, ()

    def __call__(self, request: Request, backward: bool) -> Tensor | None:
        """The loss by a graph, which is captured if need be; None: run it without.

        ``backward``: the gradients are handed out; else the loss has them in autograd's graph.
        """
        if not _can_be_graphed(request):
            return None
        key = _key(request)
        found = self._find(key, request)
        if isinstance(found, _Refusal):
            return None
        if found is not None:
            if found.looks and labels_padded(request.runner.loss, *request.given[1::2]):
                return None
        else:
            signature = key, request.runner
            if signature in self._padded and labels_padded(
                request.runner.loss, *request.given[1::2]
            ):
                return None
            try:
                found = record(key, request)
            except NoGraph as reason:
                self._keep(_Refusal(key, request.runner, _modes(request.modules)))
                warnings.warn(
                    f"MAML: cuda_graph=True without a graph, because {reason}. The numbers are the "
                    "same.",
                    stacklevel=2,
                )
                return None
            if found is None:
                if signature not in self._padded:
                    self._padded = [*self._padded[1 - KEPT_REFUSALS :], signature]
                return None
            self._keep(found)
        if backward and not found.targets:
            return None  # to say so in the usual words
        found.copy_in(request.given)
        found.recorder.replay()
        request.runner.last = found.last
        tensors = found.wanted(request.given)
        if backward:
            return hand_out(found.loss.clone(), tensors, found.borrowed(tensors))
        return in_graph(found.both, tensors)

    def _find(self, key: Any, request: Request) -> Graph | _Refusal | None:
        for known in reversed(self._known):
            if known.key != key or known.runner is not request.runner:
                continue
            if isinstance(known, Graph) and known.moved():
                self._known.remove(known)  # it reads memory that is no longer the parameters'
                continue
            if not known.same(request.modules):
                continue
            self._known.remove(known)
            self._known.append(known)
            return known
        return None

    def _keep(self, new: Graph | _Refusal) -> None:
        self._known.append(new)
        for kind, most in ((Graph, KEPT), (_Refusal, KEPT_REFUSALS)):
            alike = [known for known in self._known if isinstance(known, kind)]
            for oldest in alike[:-most]:
                self._known.remove(oldest)


@dataclass(eq=False)
class _Refusal:
    """A signature that has no graph, for a reason that was told, in these modes of the modules."""

    key: Any
    runner: TaskRunner
    modes: list[bool]

    def same(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all train or evaluate as they did."""
        return _modes(modules) == self.modes


def _modes(modules: Sequence[nn.Module]) -> list[bool]:
    return [m.training for module in modules for m in module.modules()]


def _can_be_graphed(request: Request) -> bool:
    """Whether it is worth a try; all else runs without a graph, and without a word."""
    given = request.given
    if not all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in given):
        return False
    device = request.device
    recorder = RECORDERS.get(device.type)
    return (
        recorder is not None
        and all(t.device == device for t in given)
        and unusual_call() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_anomaly_enabled()
        and not recorder.busy()
    )


def _key(request: Request) -> Any:
    inputs = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in request.given)
    return inputs, request.options, _settings(request.device.type)


def _settings(device_type: str) -> tuple[Any, ...]:
    """What is set for all of torch that decides which kernels run."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )
