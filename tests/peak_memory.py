"""The peak memory of a block of code, in C++ and Python."""

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
    """Bytes above the memory that the process had when the block began. Set when the block ends."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures resident memory. Only Linux reports its peak; elsewhere the result is 0."""
    peak = Peak()
    if sys.platform != "linux":
        yield peak
        return
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    start = status_bytes("VmRSS")
    yield peak
    peak.bytes = status_bytes("VmHWM") - start


def release_freed_memory() -> None:
    """Returns freed memory to the system: a later allocation could use it, and then would not be measured."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def status_bytes(key: str) -> int:
    """A value of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
