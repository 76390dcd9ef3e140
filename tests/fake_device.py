"""Compiles and loads the fake CUDA device of `fake_cuda_guard.cpp`. This file does not import torch."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_TORCH = Path(importlib.util.find_spec("torch").origin).parent
_GUARD = Path(__file__).parent / "fake_cuda_guard.cpp"
NOT_COMPILED = 77
"""Exit status of a process that could not compile the device for its version of torch."""


def load_guard() -> None:
    """Compiles the device of `fake_cuda_guard.cpp`, once for each version of torch, and loads it."""
    if "torch" in sys.modules:
        raise RuntimeError("the fake device must be loaded before torch is imported")
    key = _GUARD.read_bytes() + (_TORCH / "version.py").read_bytes() + str(_TORCH).encode()
    library = (
        Path(tempfile.gettempdir()) / f"clsp-fast-{os.getuid()}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    )
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may compile it now
        if not library.exists():
            compile_guard(library)
    for name in ("libc10.so", "libtorch_cpu.so"):  # the guard uses their symbols
        ctypes.CDLL(str(_TORCH / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def compile_guard(library: Path) -> None:
    """Compiles the device. A failure ends the process with NOT_COMPILED and the compiler's messages."""
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = f"-I{_TORCH / 'include'}"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        include,
        str(_GUARD),
        "-o",
        str(unfinished),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        sys.exit(NOT_COMPILED)
    unfinished.replace(library)
