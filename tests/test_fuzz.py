"""The fuzz target compiles, and the script makes its first inputs, so that both stay usable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_target_compiles() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("needs a compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-I", ROOT / "csrc"]
    subprocess.run([compiler, *flags, ROOT / "tests/fuzz/fuzz_load.cpp"], check=True)


def test_the_first_inputs_are_made(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "tests/fuzz/seeds.py", tmp_path, "all"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    inputs = [path.read_bytes()[4:] for path in tmp_path.iterdir()]
    assert sum(data.startswith(b"fLaC") for data in inputs) >= 100
    assert sum(data.startswith(b"RIFF") for data in inputs) >= 30
