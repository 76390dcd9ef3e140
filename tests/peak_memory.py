"""The most memory that a block takes, in C++ as in Python."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """Bytes beyond those that the process had when the block began; known when it has ended."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures resident memory; elsewhere than on Linux, which tells it, the peak stays 0."""
    peak = Peak()
    if sys.platform != "linux":
        yield peak
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)  # what others freed would hide what the block takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    start = status_bytes("VmRSS")
    yield peak
    peak.bytes = status_bytes("VmHWM") - start


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
