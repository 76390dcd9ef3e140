"""Every kernel, compiled for every target without a card, stays within its committed budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from clsp_fast.kernels import budgets

FOLDER = Path(__file__).parent.parent / "kernels"
COMMITTED = json.loads((FOLDER / "budgets.json").read_text())


def run(*arguments: object) -> str:
    """Output of a process of its own: where kernels are interpreted, nothing can be compiled."""
    command = [sys.executable, *map(str, arguments)]
    settings = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("variant", COMMITTED["kernels"])
def test_kernels_compile_to_what_their_budget_allows(variant: str) -> None:
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the budget is of triton {COMMITTED['triton']}, not {triton.__version__}")
    output = run("-m", "clsp_fast.kernels.budgets", "measure", *variant.split())
    measured = json.loads(output)
    budget = COMMITTED["kernels"][variant]
    assert set(measured) == set(budget)
    for name, found in measured.items():
        for key in ("registers", "spills", "shared_bytes", "exp2", "atomics", "narrow_copies"):
            assert found[key] <= budget[name][key], f"{name}: {key}"
        assert found["mma"] == budget[name]["mma"], name
        assert found["tma_loads"] >= budget[name]["tma_loads"], name


def test_the_budget_covers_every_kernel_and_keeps_the_promises() -> None:
    assert list(COMMITTED["kernels"]) == [f"{target} {dtype}" for target, dtype in budgets.VARIANTS]
    for variant, kernels in COMMITTED["kernels"].items():
        target, dtype = int(variant.split()[0]), variant.split()[1]
        assert set(kernels) == set(budgets.KERNELS)
        for name, budget in kernels.items():
            assert budget["spills"] == budget["atomics"] == budget["narrow_copies"] == 0, f"{variant} {name}"
            assert budget["shared_bytes"] <= budgets.SHARED_MEMORY_BYTES[target], f"{variant} {name}"
            assert budget["registers"] <= 255
            if name != "combine":
                assert (budget["tma_loads"] > 0) == (target >= 90), f"{variant} {name}"
                kind = {80: "HMMA", 89: "HMMA", 90: "HGMMA.64x", 100: "UTC"}[target]
                assert budget["mma"], f"{variant} {name}"
                assert all(shape.startswith(kind) for shape in budget["mma"]), f"{variant} {name}"
        assert dtype in ("bf16", "fp32")


def test_the_tables_of_the_readme_are_those_of_the_budget() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert budgets.with_table(readme, COMMITTED) == readme


@pytest.mark.parametrize("target", [80, 90])
def test_what_is_measured_is_what_is_launched(target: int) -> None:
    launches = [
        json.loads(line)
        for line in run(Path(__file__).parent / "kernel_launches.py", str(target)).splitlines()
    ]
    assert {launch["kernel"] for launch in launches} == set(budgets.KERNELS)
    for launch in launches:
        for side in ("launched", "measured"):
            for name in ("FIRST", "LAST"):  # combine: of the first or of the last panel
                launch[side]["constants"].pop(name, None)
        assert launch["launched"] == launch["measured"], launch["kernel"]
    first, second = (launch for launch in launches if launch["kernel"] == "rank")
    assert first == second, "the scores of targets come from another binary"
