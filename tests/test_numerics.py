"""numerics.py, the list of files in machines.py, and CLSP_SIMD, which restricts the instruction sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import machines
import numpy as np
import pytest
import torch
from numerics import assert_agrees, assert_as_exact, error

EPS = 2.0**-23


def test_an_error_may_be_twice_plain_torchs_and_a_few_roundings() -> None:
    truth = np.array([3.0, 4.0])
    plain = truth + np.array([0.0, 1e-3])
    few = 8 * 5 * EPS  # FEW roundings of numbers whose norm is 5
    assert_as_exact(truth + np.array([2e-3 + 0.99 * few, 0.0]), plain, truth)
    with pytest.raises(AssertionError, match=r"weight: error 0\.002, plain torch's 0\.001, bound 0\.002"):
        assert_as_exact(truth + np.array([2e-3 + 1.01 * few, 0.0]), plain, truth, name="weight")


def test_roundings_are_counted_in_the_dtype_and_the_size() -> None:
    for dtype, eps in ((np.float32, EPS), (torch.bfloat16, 2.0**-7), (torch.float64, 2.0**-52)):
        assert_agrees(1 + 9 * eps, 1.0, count=10, dtype=dtype)
        assert_agrees(1 + 19 * eps, 1.0, count=10, dtype=dtype, size=torch.tensor([-2.0]))
        with pytest.raises(AssertionError, match="bound"):
            assert_agrees(1 + 11 * eps, 1.0, count=10, dtype=dtype)


def test_infinities_must_be_equal_and_nan_is_refused() -> None:
    infinite = torch.tensor([1.0, -torch.inf])
    assert error(infinite, infinite) == 0
    assert_agrees(infinite, infinite, count=1, dtype=np.float32)
    for other in (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0])):
        with pytest.raises(AssertionError):
            assert_agrees(other, infinite, count=1e9, dtype=np.float32)
        with pytest.raises(AssertionError):
            assert_as_exact(other, infinite, infinite)
    with pytest.raises(AssertionError, match="shape"):
        error(torch.ones(2), torch.ones(2, 1))


COMPARISONS = re.compile(r"allclose|assert_close|approx|\bnumerics\b")
# Files that use such a comparison, but whose results are the same on every processor.
EXCEPTIONS = {
    "test_card.py": "compares estimates with their formula",
    "test_bench.py": "compares given times, and float64 losses to 1e-6",
    "data/test_loader.py": "compares durations, shares and sums of Python numbers",
}


def test_the_matrix_has_every_file_that_compares_floating_point_results() -> None:
    folder = Path(__file__).parent
    paths = [path for path in folder.rglob("test_*.py") if COMPARISONS.search(path.read_text())]
    comparing = {str(path.relative_to(folder)) for path in paths}
    assert len(paths) >= 35
    assert comparing - set(EXCEPTIONS) <= set(machines.FILES)
    assert set(EXCEPTIONS) <= comparing - set(machines.FILES), "an exception that is no longer needed"
    assert set(machines.PART_FILES) <= set(machines.FILES)
    assert all((folder / name).exists() for name in machines.FILES)


def instruction_sets_with(value: str) -> subprocess.CompletedProcess[str]:
    code = "from clsp_fast import _C; print(*_C.instruction_sets())"
    settings = os.environ | {"CLSP_SIMD": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False
    )


def test_older_instruction_sets_are_chosen_by_name() -> None:
    names = instruction_sets_with("").stdout.split()
    for place, name in enumerate(names):
        assert instruction_sets_with(name).stdout.split() == names[: place + 1]
    assert instruction_sets_with("sse9").returncode != 0
    assert "CLSP_SIMD must be baseline, avx2 or avx512, got 'sse9'" in instruction_sets_with("sse9").stderr


def test_what_the_processor_lacks_is_refused() -> None:
    if "avx512" in instruction_sets_with("").stdout.split():
        pytest.skip("this processor has every instruction set")
    assert "got 'avx512', which this processor lacks" in instruction_sets_with("avx512").stderr
