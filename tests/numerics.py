"""How tests judge floating-point error: relative to the error of plain torch, or by counting roundings.

A bound that was measured on one machine fails on the next, where wider vectors, another order of addition or
fused multiplication round differently. The bounds here follow from arithmetic. They bound the Euclidean norm
of the whole difference, because the error of a single element is random.

This file does not import torch, so that tests of the extension can use it under a sanitizer.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Roundings of the operations around the one that is judged, such as scaling, loading and storing.
FEW = 8


def wide(values: Any) -> NDArray[np.float64]:
    """Tensor, array, number or sequence of numbers as a float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def in_float64(model: Any) -> Any:
    """A copy of a model in float64, which computes the truth for a float32 result."""
    return copy.deepcopy(model).double()


def norm(values: Any) -> float:
    """Euclidean norm of all finite elements."""
    values = wide(values)
    return float(np.sqrt(np.square(values[np.isfinite(values)]).sum()))


def error(result: Any, truth: Any) -> float:
    """Norm of the difference in float64. Equal infinities do not differ; NaN exceeds every bound."""
    result, truth = wide(result), wide(truth)
    assert result.shape == truth.shape, f"shape {result.shape}, expected {truth.shape}"
    differ = result != truth
    return float(np.sqrt(np.square(result[differ] - truth[differ]).sum()))


def eps(dtype: Any) -> float:
    """The spacing of numbers at 1 in a dtype of numpy or torch. One rounding errs by at most half of it."""
    if not str(dtype).startswith("torch."):
        return float(np.finfo(dtype).eps)
    import torch

    return torch.finfo(dtype).eps


def assert_as_exact(
    result: Any, plain: Any, truth: Any, *, dtype: Any = np.float32, size: Any = None, name: str = ""
) -> None:
    """err(result) <= 2 x err(plain) + FEW x eps x size, both errors against float64.

    Args:
        result: the result of the code under test.
        plain: the result of plain torch, or of another reference, in the same dtype on this machine.
        truth: the result in float64. It must not come from the code under test alone: both would have its
            faults.
        dtype: of numpy or torch, in which `result` and `plain` were computed.
        size: number or array with the norm of the terms that add up to the result; default `truth`. A sum of
            terms of both signs has the rounding error of its terms.
        name: what is judged, for the message.
    """
    result_error, plain_error = error(result, truth), error(plain, truth)
    bound = 2 * plain_error + FEW * eps(dtype) * norm(truth if size is None else size)
    assert result_error <= bound, (
        f"{name}: error {result_error:.3g}, plain torch's {plain_error:.3g}, bound {bound:.3g}"
    )


def assert_agrees(
    result: Any, expected: Any, *, count: float, dtype: Any = np.float64, size: Any = None, name: str = ""
) -> None:
    """err(result, expected) <= count x eps x size, for results without a truth that is more exact than both.

    Args:
        result: the result of the code under test.
        expected: the same result from its definition, from another order of operations, or from a record.
        count: how many roundings may add up: the operations in a chain, times the factor by which the
            function multiplies an error of its input. In float64 it may be generous: the error of a wrong
            formula is far larger.
        dtype: of numpy or torch, the coarser one of the two results.
        size: as in `assert_as_exact`; default `expected`.
        name: what is judged, for the message.
    """
    difference = error(result, expected)
    bound = count * eps(dtype) * norm(expected if size is None else size)
    assert difference <= bound, (
        f"{name}: difference {difference:.3g}, bound {bound:.3g} ({count:g} roundings)"
    )
