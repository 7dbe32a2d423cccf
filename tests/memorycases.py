"""What a process holds in memory, for tests of peaks and of growth."""

import ctypes
import gc
from pathlib import Path


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident():
    """Bytes in memory, after giving back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS:")


def extra(step):
    """Bytes that ``step()`` takes at its peak beyond those before it."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step()
    return _status("VmHWM:") - before
