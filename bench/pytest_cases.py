"""Runs the cases with pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import CASES
from bench.measure import Case, Provider


def tests_of(area: str) -> Callable[..., None]:
    """A test of every provider of every case of an area, without optional cases."""
    cases = [c for c in CASES.values() if isinstance(c, Case) and c.area == area and not c.optional]
    pairs = [
        pytest.param(case, provider, id=f"{case.name}-{provider.name}")
        for case in cases
        for provider in case.providers
    ]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("case", "provider"), pairs)
    def test(benchmark: Any, case: Case, provider: Provider) -> None:
        if case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device: not run")
        benchmark.group = case.name
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            inputs = case.inputs()
            try:
                call = provider.prepare(inputs)
            except ImportError as error:
                pytest.skip(f"missing: {error}")
            agrees, how = (provider.gate or case.gate)(case.expected(inputs), call())
            assert agrees, how
            benchmark(call)
        finally:
            torch.set_num_threads(threads)

    return test
