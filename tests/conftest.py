"""What every test shares: golden data, a fixed seed, single-threaded torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loads tests/golden/<name>.safetensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")
