"""Whether Triton's interpreter works with the installed numpy. Import it only with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(out, steps):
    for step in range(0, steps):
        tl.store(out, step + 1)


def count(steps: int) -> int:
    """Counts to `steps` in a kernel."""
    out = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](out, steps)
    return int(out)


def problem(count: Callable[[int], int] = count) -> str:
    """Why kernels cannot be interpreted, and what to do about it; or ""."""
    try:
        count(2)
    except Exception as error:
        return (
            f"triton {triton.__version__} cannot interpret kernels with numpy {np.__version__}: {error}. "
            "The interpreter of triton 3.6 converts arrays of one element to integers, and numpy 2.4 refuses "
            "that. Install numpy<2.4 or a later triton, or run `make test-triton`, which has its own numpy."
        )
    return ""
