"""How tests judge floating-point error: against float64, beside plain torch's, or by counted roundings.

A bound that was read off one machine fails on the next, where wider vectors, another order of addition or
fused multiplication round otherwise. The judgements here follow from arithmetic. They measure the Euclidean
norm of the whole difference, because the error of a single element is a draw.

Torch is not imported, so that tests of the extension alone can use this under a sanitizer.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A handful of operations beside the one that is judged: scaling, loading, storing.
FEW = 8


def wide(values: Any) -> NDArray[np.float64]:
    """Tensor, array, number or sequence of numbers as a float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def in_float64(model: Any) -> Any:
    """A copy of a model in float64, for the truth that a float32 result is held against."""
    return copy.deepcopy(model).double()


def norm(values: Any) -> float:
    """Euclidean norm of all finite elements."""
    values = wide(values)
    return float(np.sqrt(np.square(values[np.isfinite(values)]).sum()))


def error(found: Any, truth: Any) -> float:
    """Norm of the difference in float64. Equal infinities do not differ; NaN is beyond every bound."""
    found, truth = wide(found), wide(truth)
    assert found.shape == truth.shape, f"shape {found.shape}, expected {truth.shape}"
    differ = found != truth
    return float(np.sqrt(np.square(found[differ] - truth[differ]).sum()))


def eps(dtype: Any) -> float:
    """The spacing of numbers at 1 in a dtype of numpy or torch; one rounding errs by half of it at most."""
    if not str(dtype).startswith("torch."):
        return float(np.finfo(dtype).eps)
    import torch

    return torch.finfo(dtype).eps


def assert_as_exact(
    found: Any, plain: Any, truth: Any, *, dtype: Any = np.float32, size: Any = None, name: str = ""
) -> None:
    """err(found) <= 2 x err(plain) + FEW x eps x size, both errors against float64.

    Args:
        found: the result of the code under test.
        plain: what plain torch, or another reference, makes of the same in the same dtype on this machine.
        truth: the result in float64. It must not come from the code under test alone, where a fault would be
            in both.
        dtype: of numpy or torch, in which `found` and `plain` were computed.
        size: number or array whose norm is that of the terms from which the result is summed; None: `truth`.
            A sum of terms of both signs rounds as its terms do.
        name: of what is judged, for the message.
    """
    ours, theirs = error(found, truth), error(plain, truth)
    bound = 2 * theirs + FEW * eps(dtype) * norm(truth if size is None else size)
    assert ours <= bound, f"{name}: error {ours:.3g}, plain torch's {theirs:.3g}, bound {bound:.3g}"


def assert_agrees(
    found: Any, expected: Any, *, count: float, dtype: Any = np.float64, size: Any = None, name: str = ""
) -> None:
    """err(found, expected) <= count x eps x size, where there is no more exact truth to hold both against.

    Args:
        found: the result of the code under test.
        expected: the same from its definition, from another order of operations, or recorded elsewhere.
        count: how many roundings may add up: operations in a chain, times what the function multiplies an
            error of its input by. In float64 it may be generous: a wrong formula errs by far more.
        dtype: of numpy or torch, the coarser one of the two results.
        size: as in `assert_as_exact`; None: `expected`.
        name: of what is judged, for the message.
    """
    difference = error(found, expected)
    bound = count * eps(dtype) * norm(expected if size is None else size)
    assert difference <= bound, (
        f"{name}: difference {difference:.3g}, bound {bound:.3g} ({count:g} roundings)"
    )
