"""Extra memory of one call: what it holds at its peak, beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def extra(step: Callable[[], Any], device: str) -> float | None:
    """Peak memory of ``step()`` above idle, outputs included, in bytes.

    On the CPU from the kernel's high-water mark of resident memory: exact to about a megabyte, and
    what an allocator kept from earlier calls does not show. None where there is no such mark.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS:")
    except (OSError, AttributeError, KeyError):
        return None
    held = step()
    peak = _status("VmHWM:")
    del held
    return float(max(0, peak - before))
