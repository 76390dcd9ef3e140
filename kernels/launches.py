"""What the launchers would compile on each card, without a card.

The launchers run on CPU tensors, with a driver that has targets but no device. Before triton compiles a
kernel, it calls a hook, which records the compilation and stops the launch. So what budgets.py measures is
what a launch runs: argument types, alignment, constants, tile and options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from . import contrastive, grouping, loss, loss_terms, neighbours, positives, rank, sigmoid
from ._launch import DTYPES, assume_target

_MODULES = (contrastive, sigmoid, grouping, positives, loss_terms, loss, rank, neighbours)
KERNELS = {name: kernel for module in _MODULES for name, kernel in module.KERNELS.items()}
DEPTH = 512
NAMES = dict(zip(("bf16", "fp16", "fp32"), DTYPES, strict=True))
"""Triton's name of each dtype -> the dtype."""
# Neither is a multiple of a tile or of 16.
_ROWS, _COLUMNS = 300, 701


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would compile it.

    Attributes:
        constants: values of the compile-time arguments, by name.
        source, options: what triton compiles.
    """

    kernel: str
    target: int
    constants: dict[str, Any]
    source: ASTSource
    options: dict[str, Any]

    @property
    def threads(self) -> int:
        return 32 * int(self.options["num_warps"])

    @property
    def key(self) -> str:
        """Equal for equal binaries."""
        return f"{self.source.hash()} {self.options}"

    @property
    def elements(self) -> int:
        """Elements of a tile of scores for each thread; 0 if the kernel has no such tile."""
        return self.constants.get("BM", 0) * self.constants.get("BN", 0) // self.threads

    def compile(self) -> Any:
        """Compiles the kernel ahead of time."""
        return triton.compile(
            self.source, target=GPUTarget("cuda", self.target, 32), options=dict(self.options)
        )


def launches(
    target: int, dtype: str, rows: int = _ROWS, columns: int = _COLUMNS, smoothing: float = 0.1
) -> dict[str, list[Launch]]:
    """Kernel -> its different compilations, for inputs of D = 512. Some kernels are compiled more than once.

    Replaces triton's driver, so call it in a process that does nothing else. The results of the launchers are
    undefined.

    Raises:
        RuntimeError: the process interprets kernels, or no launcher launches some kernel.
    """
    recorded: dict[str, list[Launch]] = {name: [] for name in KERNELS}
    with _recorded(target, recorded):
        x, y = (
            torch.zeros(length, DEPTH, dtype=NAMES[dtype], requires_grad=True) for length in (rows, columns)
        )
        _launch_all(x, y, torch.arange(columns) % rows, smoothing)
    missing = [name for name, compilations in recorded.items() if not compilations]
    if missing:
        raise RuntimeError(f"_launch_all of kernels/launches.py launches no {', '.join(missing)}")
    return recorded


def _launch_all(x: Tensor, y: Tensor, owner: Tensor, smoothing: float) -> None:
    """Calls the launcher of every kernel in KERNELS."""
    row_M, column_N = contrastive.negative_lse(x, y, 1.0, owner)
    (row_M.sum() + column_N.sum() + contrastive.negative_softplus(x, y, 1.0, owner).sum()).backward()
    _launch_positives(x, y, owner, row_M, column_N, smoothing)
    rank.rank_counts(x, y, owner)
    neighbours._topk_chunk(x, y, neighbours.LARGEST_K)
    neighbours.Neighbours(x, neighbours.LARGEST_K).add(0, y)  # `result` would read what nothing wrote


def _launch_positives(
    x: Tensor, y: Tensor, owner: Tensor, row_M: Tensor, column_N: Tensor, smoothing: float
) -> None:
    """Calls the launchers of all kernels of positive pairs, in the variants that have the longest code."""
    weights = torch.ones(len(y), requires_grad=True)
    order, offset, _ = grouping.group_by_owner(owner, len(x), weights)
    scale, one = torch.ones(()), torch.ones((), dtype=torch.float64)
    options = {"groups": (order, offset), "weights_N": weights}
    products = positives.pair_products(
        x, y, owner, **options, dtype=torch.float32, normalize=True, smooth=True
    )
    loss.softmax_loss(
        row_M.detach(),
        column_N.detach(),
        products.dot_N,
        scale,
        **options,
        smoothing=smoothing,
        sums_3D=products.sums_3D,
        all_sums_3D=products.sums_3D,
        sum_over_ranks=lambda count: one,
    ).backward()
    loss_terms.sigmoid_terms(row_M.detach(), products.dot_N.detach(), scale, scale, smoothing)


class _Driver:
    """The methods that triton needs to choose a binary.

    Triton caches binaries by device number, so the target is the device number.
    """

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _recorded(target: int, recorded: dict[str, list[Launch]]) -> Iterator[None]:
    """Adds what would be compiled to `recorded`, each different compilation once."""
    names = {kernel: name for name, kernel in KERNELS.items()}
    if any(not isinstance(kernel, triton.JITFunction) for kernel in names):
        raise RuntimeError("cannot record launches while TRITON_INTERPRET=1")

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton calls this before a compilation. The result True stops the launch."""
        function = fn.jit_function
        options = json.loads(compile["specialization_data"])["options"]
        launch = Launch(
            names[function],
            target,
            {function.arg_names[path[0]]: value for path, value in compile["constants"].items()},
            ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0]),
            {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()},
        )
        if all(launch.key != known.key for known in recorded[launch.kernel]):
            recorded[launch.kernel].append(launch)
        return True

    driver.set_active(_Driver(target))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        with assume_target(target):
            yield
    finally:
        triton.knobs.runtime.jit_cache_hook = None
