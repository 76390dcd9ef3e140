"""Every kernel, compiled for every target without a card, stays within its committed budget."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from clsp_fast.kernels import budgets, tables
from clsp_fast.kernels._launch import TARGETS, TILES

FOLDER = Path(__file__).parent.parent / "kernels"
FILES = {path: json.loads(path.read_text()) for path in sorted(FOLDER.glob("budgets*.json"))}
VERSIONS = {committed["triton"]: committed for committed in FILES.values()}
LIMITED = ("registers", "spills", "shared_bytes", "atomics", "narrow_copies", "flushed_comparisons")
EXPONENTIALS = ("lse", "starved", "panel", "softplus", "sigmoid_panel")


BUDGETS = ("-m", "clsp_fast.kernels.budgets")


# Versions of torch and triton may warn when a process imports them; tests compare what a process says.
QUIET = {"PYTHONWARNINGS": "ignore"}


def process(*arguments: object, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """Another process. This process may interpret kernels, and then it cannot compile them."""
    command = [sys.executable, *map(str, arguments)]
    settings = os.environ | QUIET | {"TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def run(*arguments: object) -> str:
    """The output of another process, which must succeed."""
    done = process(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Compiling everything takes minutes. CHOSEN has all kernels in one dtype of two bytes, as both such dtypes
# compile to the same code. In four bytes it has the kernel that needs the most registers, and `rank`.
NARROW = {80: "bf16", 89: "fp16", 90: "bf16", 100: "fp16"}
CHOSEN = [["--targets", target, "--dtypes", dtype] for target, dtype in NARROW.items()]
CHOSEN.append(["--dtypes", "fp32", "--kernels", "panel", "rank"])


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: "-".join(map(str, chosen[1::2])))
def test_kernels_compile_to_what_their_budget_allows(chosen: list[object]) -> None:
    if triton.__version__ not in VERSIONS:
        pytest.skip(f"the budgets are of triton {' and '.join(VERSIONS)}, not {triton.__version__}")
    measured = json.loads(run(*BUDGETS, "measure", *chosen))
    assert measured
    for variant, kernels in measured.items():
        assert kernels
        for name, measurement in kernels.items():
            budget = VERSIONS[triton.__version__]["kernels"][variant][name]
            what = f"{variant} {name}"
            for key in LIMITED:
                assert measurement[key] <= budget[key], f"{what}: {key}"
            assert measurement["mma"] == budget["mma"], what
            assert measurement["tma_loads"] >= budget["tma_loads"], what
            # A tile is what repeats. A kernel without one is measured by its whole code.
            for key in ("before", "step", "after", "narrow_stores", "shuffles"):
                parts = [kernel["tile"] or kernel for kernel in (measurement, budget)]
                if key in parts[1]:
                    assert parts[0][key] <= parts[1][key], f"{what}: {key}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_budget_covers_every_kernel_and_keeps_the_promises(version: str) -> None:
    variants = VERSIONS[version]["kernels"]
    assert list(variants) == [f"{target} {dtype}" for target in TARGETS for dtype in budgets.DTYPES]
    for variant, kernels in variants.items():
        target = int(variant.split()[0])
        assert set(kernels) == set(budgets.KERNELS)
        for name, budget in kernels.items():
            what = f"{variant} {name}"
            assert budget["spills"] == budget["atomics"] == budget["narrow_copies"] == 0, what
            assert budget["shared_bytes"] <= budgets.SHARED_MEMORY_BYTES[target], what
            assert budget["registers"] <= 255, what
            if name == "rank":  # it compares scores with the number below 0, which is a denormal
                assert budget["flushed_comparisons"] == 0, what
            assert (budget["tile"] is None) == (name not in TILES), what
            if name in TILES:
                assert (budget["tma_loads"] > 0) == (target >= 90), what
                kind = {80: "HMMA", 89: "HMMA", 90: "HGMMA.64x", 100: "UTC"}[target]
                assert budget["mma"], what
                assert all(shape.startswith(kind) for shape in budget["mma"]), what
            if name in EXPONENTIALS:
                elements = budget["tile"]["rows"] * budget["tile"]["columns"] // budget["threads"]
                assert budget["tile"]["special"]["EX2"] >= elements, what


def test_warps_that_cover_more_than_a_tile_hold_its_elements_several_times() -> None:
    layout = "#mma{} = #ttg.nvidia_mma<{{versionMajor = 2, warpsPerCTA = [8, {}], instrShape = [16, 8]}}>\n"
    assert budgets.element_copies(128, 64, "") == 1
    assert budgets.element_copies(128, 64, layout.format("", 1)) == 1
    assert budgets.element_copies(64, 64, layout.format("", 1)) == 2
    assert budgets.element_copies(64, 4, layout.format("", 1)) == 4
    assert budgets.element_copies(64, 8, layout.format("", 1) + layout.format("1", 2)) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_the_code_after_a_product_is_short_on_an_h100(version: str) -> None:
    """The tensor cores wait while it runs. An exponential and a multiplication for each element are 256."""
    kernels = VERSIONS[version]["kernels"]["90 bf16"]
    assert kernels["lse"]["tile"]["after"] <= 700
    assert kernels["panel"]["tile"]["after"] <= 850


@pytest.mark.parametrize("version", VERSIONS)
def test_panels_are_stored_16_bytes_at_a_time(version: str) -> None:
    for variant, kernels in VERSIONS[version]["kernels"].items():
        item_bytes = budgets.NAMES[variant.split()[1]].itemsize
        for name in ("panel", "sigmoid_panel"):
            tile, threads = kernels[name]["tile"], kernels[name]["threads"]
            stored = 16 * tile["stores"].get("16", 0)
            what = f"{variant} {name}: {tile['stores']}"
            assert stored == tile["rows"] * tile["columns"] * item_bytes // threads, what
            assert tile["narrow_stores"] <= 1, what  # the sum of a tile


def test_the_tables_of_the_readme_are_those_of_the_budget() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert tables.with_table(readme, FOLDER) == readme
    for path, committed in FILES.items():
        assert budgets.as_json(committed) == path.read_text()


def checkout(folder: Path) -> Path:
    """A copy of kernels/, with an empty folder of results beside it."""
    shutil.copytree(FOLDER, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "bench/results").mkdir(parents=True)
    return folder / "kernels"


def test_a_wrong_folder_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "measure", lambda: pytest.fail("it was measured"))
    monkeypatch.setattr(budgets, "INTERPRETED", False)
    kernels = checkout(tmp_path)
    (tmp_path / "README.md").write_text("# Another page")
    for folder in (tmp_path / "kernel", tmp_path):
        with pytest.raises(SystemExit, match="has no generated tables; give the folder kernels/ of"):
            budgets.main(["write", str(folder)])
    with (kernels / "rank.py").open("a") as file:
        file.write("\n")
    (kernels / "new.py").touch()
    for command in ("write", "tables"):
        with pytest.raises(SystemExit, match=r"in new.py, rank.py: install first \(pip install .\)"):
            budgets.main([command, str(kernels)])
    shutil.copy(FOLDER / "rank.py", kernels)
    (kernels / "new.py").unlink()
    damaged = tmp_path / "bench/results/nvidia-h100-2026-01-01.json"
    damaged.write_text("{")
    with pytest.raises(SystemExit, match=f"{damaged}: damaged"):
        budgets.main(["write", str(kernels)])


def test_a_card_without_a_column_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = checkout(tmp_path)
    cases = {"loss/8192/clsp_fast": {"ms": 1.0}}
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"):
        document = {"dry_run": False, "date": "", "machine": {"gpu": gpu}, "stages": {}, "cases": cases}
        (tmp_path / f"bench/results/{gpu}.json").write_text(json.dumps(document))
    monkeypatch.chdir(kernels)
    budgets.main(["tables", "."])
    assert capsys.readouterr().out == (
        "bench/results has times of NVIDIA GeForce RTX 4090, for which the tables have no column\n"
    )
    assert "timed kernels: H100, NVIDIA GeForce RTX 4090 (it has" in (kernels / "README.md").read_text()


def test_what_prevents_a_measurement_is_said_in_a_line() -> None:
    done = process(*BUDGETS, "blocks", "add", 90, "bf16", interpret="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "kernels are not compiled while TRITON_INTERPRET=1: unset it"
    without_triton = "import runpy, sys; sys.modules['triton'] = None; runpy.run_module({!r}, run_name={!r})"
    done = process("-c", without_triton.format(BUDGETS[1], "__main__"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "triton is missing: pip install 'clsp_fast[triton]'"


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    command = [sys.executable, *BUDGETS, "blocks", "add", "90", "bf16"]
    settings = os.environ | QUIET | {"TRITON_INTERPRET": "0"}
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=settings, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == ""
    assert writer.returncode == 1


def test_launches_compile_the_same_for_every_batch_and_each_tile_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two launches of the ranks must also share a binary: scores of both are compared."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # no launch may depend on triton's default
    lines = [json.loads(line) for line in run(Path(__file__).parent / "kernel_launches.py").splitlines()]
    assert {(line["target"], line["dtype"]) for line in lines} == set(
        itertools.product(TARGETS, budgets.DTYPES)
    )
    for line in lines:
        first, *others = line["keys"]
        assert set(first) == set(budgets.KERNELS)
        assert all(keys == first for keys in others), f"{line['target']} {line['dtype']}"
        assert all(len(first[name]) == 1 for name in TILES)
        for name, keys in first.items():
            assert all("'enable_fp_fusion': True" in key for key in keys), name
