"""How exact float32 products are on a GPU.

TF32 keeps 10 of the 23 bits of a factor's mantissa, so a product has a relative error of about 5e-4. Tensor
cores then compute it several times faster. torch's default is TF32 for convolutions, but not for matrix
products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from clsp_fast.checks import check_precision

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """In this context, float32 products and convolutions use TF32 if `precision` is "tf32", and no TF32 if it
    is "fp32" or "bf16". Afterwards, torch has its former settings. On the CPU nothing changes.

    The settings belong to the process: other threads compute with them too. With "tf32", torch's older
    functions for the same settings raise RuntimeError if they are called in this context, for example
    `torch.backends.cuda.matmul.allow_tf32` and `torch.get_float32_matmul_precision()`.
    `torch.backends.cuda.matmul.fp32_precision` works everywhere.

    Raises:
        ValueError: precision is none of the three.
    """
    check_precision(precision)
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for kind, setting in zip(kinds, before, strict=True):
            kind.fp32_precision = setting


def as_configured(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of a configuration: it computes with the configuration's `precision`."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        config = arguments[0] if arguments else options["config"]
        with products(config.precision):  # type: ignore[attr-defined]
            return function(*arguments, **options)

    return call
