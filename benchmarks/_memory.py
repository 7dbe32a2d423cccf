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


def keep_freed() -> None:
    """Let glibc keep what is freed for the next call; elsewhere this does nothing.

    Otherwise blocks of megabytes go back to the system and come anew, page by page, or do not, by
    the luck of what lies above them on the heap: an update of 32 networks then takes 3 or 10 ms.
    """
    try:
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        glibc.mallopt(-4, 0)  # M_MMAP_MAX
    except (OSError, AttributeError):
        return


def resident() -> int:
    """Resident memory of the process after giving back what is free, in bytes; 0 if unknown."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS:")
    except (OSError, AttributeError, KeyError):
        return 0


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
