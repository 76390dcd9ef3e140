"""Every kernel, compiled for every target without a card, stays within its committed budget."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from clsp_fast.kernels import budgets
from clsp_fast.kernels._launch import TARGETS

FOLDER = Path(__file__).parent.parent / "kernels"
COMMITTED = json.loads((FOLDER / "budgets.json").read_text())


def run(*arguments: object) -> str:
    """The output of another process. This process may interpret kernels, and then it cannot compile them."""
    command = [sys.executable, *map(str, arguments)]
    settings = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Compiling everything takes minutes. CHOSEN has all kernels in one dtype of two bytes, as both such dtypes
# compile to the same code, and in four bytes the kernel that needs the most registers.
NARROW = {80: "bf16", 89: "fp16", 90: "bf16", 100: "fp16"}
CHOSEN = [["--targets", target, "--dtypes", dtype] for target, dtype in NARROW.items()]
CHOSEN.append(["--dtypes", "fp32", "--kernels", "panel"])


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: "-".join(map(str, chosen[1::2])))
def test_kernels_compile_to_what_their_budget_allows(chosen: list[object]) -> None:
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the budget is of triton {COMMITTED['triton']}, not {triton.__version__}")
    measured = json.loads(run("-m", "clsp_fast.kernels.budgets", "measure", *chosen))
    assert measured
    for variant, kernels in measured.items():
        assert kernels
        for name, measurement in kernels.items():
            budget, what = COMMITTED["kernels"][variant][name], f"{variant} {name}"
            for key in ("registers", "spills", "shared_bytes", "exp2", "atomics", "narrow_copies"):
                assert measurement[key] <= budget[key], f"{what}: {key}"
            assert measurement["mma"] == budget["mma"], what
            assert measurement["tma_loads"] >= budget["tma_loads"], what


def test_the_budget_covers_every_kernel_and_keeps_the_promises() -> None:
    assert list(COMMITTED["kernels"]) == [
        f"{target} {dtype}" for target in TARGETS for dtype in budgets.DTYPES
    ]
    for variant, kernels in COMMITTED["kernels"].items():
        target = int(variant.split()[0])
        assert set(kernels) == set(budgets.KERNELS)
        for name, budget in kernels.items():
            assert budget["spills"] == budget["atomics"] == budget["narrow_copies"] == 0, f"{variant} {name}"
            assert budget["shared_bytes"] <= budgets.SHARED_MEMORY_BYTES[target], f"{variant} {name}"
            assert budget["registers"] <= 255
            if name not in ("combine", "add"):
                assert (budget["tma_loads"] > 0) == (target >= 90), f"{variant} {name}"
                kind = {80: "HMMA", 89: "HMMA", 90: "HGMMA.64x", 100: "UTC"}[target]
                assert budget["mma"], f"{variant} {name}"
                assert all(shape.startswith(kind) for shape in budget["mma"]), f"{variant} {name}"


def test_the_tables_of_the_readme_are_those_of_the_budget() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert budgets.with_table(readme, COMMITTED) == readme
    assert budgets.as_json(COMMITTED) == (FOLDER / "budgets.json").read_text()


def test_what_is_measured_is_what_is_launched() -> None:
    lines = run(Path(__file__).parent / "kernel_launches.py").splitlines()
    launches = [json.loads(line) for line in lines]
    seen = {(launch["target"], launch["dtype"], launch["kernel"]) for launch in launches}
    assert seen == set(itertools.product(TARGETS, budgets.DTYPES, budgets.KERNELS))
    ranks: dict[tuple[int, str], list[object]] = {}
    for launch in launches:
        what = launch["target"], launch["dtype"]
        for side in ("launched", "measured"):
            for name in ("FIRST", "LAST"):  # they differ between the panels that combine adds
                launch[side]["constants"].pop(name, None)
        assert launch["launched"] == launch["measured"], (*what, launch["kernel"])
        if launch["kernel"] == "rank":
            ranks.setdefault(what, []).append(launch["launched"])
    for first, second in ranks.values():
        assert first == second, "the scores of targets come from another binary"
