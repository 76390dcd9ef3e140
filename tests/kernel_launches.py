"""Prints what the launchers would compile on a card. The driver here has targets, but no device.

Each line is the JSON of one launch: the kernel, target and dtype, and the signature, constants, alignment and
options of two binaries: of the launched one, and of the one that budgets.py measures.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from clsp_fast.kernels import _launch, budgets, contrastive, rank


class Driver:
    """The methods that triton needs to choose a binary.

    Triton caches binaries by device number, so the target is the device number.
    """

    target = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


def report(target: int, dtype: str, fn: Any, compile: dict[str, Any]) -> None:
    """Prints what a launch of `fn` would compile."""
    name = next(name for name, kernel in budgets.KERNELS.items() if kernel is fn.jit_function)
    source, options = budgets.source(name, target, dtype)
    constants = {fn.jit_function.arg_names[at[0]]: value for at, value in compile["constants"].items()}
    launched = {
        "signature": compile["signature"],
        "constants": constants,
        "aligned": sorted(at[0] for at, value in compile["configs"][0].items() if value),
        "options": {key: compile[key] for key in ("num_warps", "num_stages")},
    }
    measured = {
        "signature": source.signature,
        "constants": {source.fn.arg_names[at[0]]: value for at, value in source.constants.items()},
        "aligned": sorted(at[0] for at in source.attrs),
        "options": {"num_warps": 4, "num_stages": 3} | options,
    }
    line = {"kernel": name, "target": target, "dtype": dtype, "launched": launched, "measured": measured}
    print(json.dumps(line))


def launch(target: int, dtype: str) -> None:
    """Launches every kernel; nothing runs."""
    Driver.target = target

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton calls this before a compilation. The result True stops the launch."""
        report(target, dtype, fn, compile)
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    x, y = (torch.zeros(rows, 512, dtype=budgets.DTYPES[dtype], requires_grad=True) for rows in (300, 700))
    owner = torch.arange(700) % 300
    row_M, column_N = contrastive.negative_lse(x, y, 1.0, owner)
    (row_M.sum() + column_N.sum() + contrastive.negative_softplus(x, y, 1.0, owner).sum()).backward()
    rank.rank_counts(x, y, owner)
    rank._topk_chunk(x, y, rank.MOST_NEIGHBOURS)  # topk would read results that nothing wrote


def main() -> None:
    driver.set_active(Driver())
    _launch.target_of = lambda device: Driver.target
    for target, dtype in itertools.product(_launch.TARGETS, budgets.DTYPES):
        launch(target, dtype)


if __name__ == "__main__":
    main()
