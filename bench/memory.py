"""Peak memory of a stretch of code, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def _status(field: str) -> int | None:
    """A field of Linux's account of this process, in bytes; None where there is no such account."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """The most memory this process ever held.

    Linux's VmHWM belongs to this program alone; `ru_maxrss` also remembers the process that forked it.
    """
    peak = _status("VmHWM")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def reset_peak() -> int:
    """Forget earlier peaks, hand freed memory back to the system, and return the bytes now held."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not permitted: peaks then count from the start of the process
        pass
    return _status("VmRSS") or peak_bytes()


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which memory grows at its highest while `run` runs."""
    before = reset_peak()
    run()
    return max(0, peak_bytes() - before)
