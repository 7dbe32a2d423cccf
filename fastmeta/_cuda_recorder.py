"""A function captured in a CUDA graph, and replayed: all that is CUDA's own about it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

__all__ = ["RECORDERS", "CudaRecorder"]

Result = TypeVar("Result")


class CudaRecorder:
    """Warms a function up, captures it and replays it, on one device.

    All three happen in the order of the caller's current stream. What the function returned when it
    was captured is what a replay writes to.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._graph: Any = None

    @staticmethod
    def busy() -> bool:
        """Whether someone else captures already what is launched."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, run: Callable[[], Result], *, strict: bool = False) -> Result:
        """Run it as it is; ``strict``: raise where the host would wait for the device."""
        with self._aside(), _no_waiting(strict):
            return run()

    def capture(self, run: Callable[[], Result]) -> Result:
        """Capture it. Nothing is computed; an error leaves streams and generators as they were."""
        # As torch.cuda.graph does: the graph has memory of its own.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with self._aside():
                # By hand: torch.cuda.graph leaves its stream current when the capture fails. Other
                # threads (that pin memory) may do what this one may not.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    result = run()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._mend(pool)
            raise
        self._graph = graph
        return result

    def replay(self) -> None:
        """Launch what was captured."""
        self._graph.replay()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a side stream, as torch wants it; one for all, for libraries keep workspaces of it."""
        current, side = torch.cuda.current_stream(self._device), _side_stream(self._device.index)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            current.wait_stream(side)

    def _mend(self, pool: Any) -> None:
        """After a capture that failed: give back its memory, and its hold on the generator."""
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
        except RuntimeError:
            pass  # it got as far as to do that itself
        else:
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(self._device.index, pool)
        # Before torch 2.13 the generator waits for the end of that capture, and neither draws nor
        # lets other graphs run until there is one: this one's.
        with suppress(RuntimeError), torch.cuda.stream(_side_stream(self._device.index)):
            graph = torch.cuda.CUDAGraph()
            one = torch.zeros((), device=self._device)
            graph.capture_begin(capture_error_mode="thread_local")
            one.add_(1)
            graph.capture_end()
        torch.cuda.synchronize(self._device)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextmanager
def _no_waiting(strict: bool) -> Iterator[None]:
    """Meanwhile it is an error that the host waits for the device, as in a capture."""
    if not strict:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():  # that it is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


#: What captures on which kind of device.
RECORDERS: dict[str, Any] = {"cuda": CudaRecorder}
