"""The estimates of kernels' times, and the tables of kernels/README.md that show them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from clsp_fast.kernels import tables
from clsp_fast.kernels.estimates import CARDS, kernel_seconds, product_clocks, resident_blocks, rest_clocks

FOLDER = Path(__file__).parent.parent / "kernels"
H100 = next(card for card in CARDS if card.name == "H100")
TILE = {"rows": 128, "columns": 256, "depth": 64, "before": 200, "step": 90, "after": 600}


def budget(registers: int = 200, shared_bytes: int = 147_456, **special: int) -> dict[str, Any]:
    tile = {**TILE, "special": special}
    return {"registers": registers, "shared_bytes": shared_bytes, "threads": 256, "tile": tile}


def test_the_clock_follows_from_the_data_sheet() -> None:
    assert H100.clock_hz == pytest.approx(989e12 / 132 / 4096)


def test_the_slowest_of_product_loads_and_instructions_counts() -> None:
    cores, loads, instructions = product_clocks(H100, budget())
    assert cores == pytest.approx(2 * 128 * 256 * 512 / (0.85 * 4096))
    assert loads == pytest.approx((128 + 256) * 512 * 2 / 46)
    assert instructions == 8 * 90 * 8 / 4
    assert cores > loads > instructions
    assert rest_clocks(H100, budget(EX2=128, RCP=1)) == (800 * 8 / 4, 129 * 256 / 16)
    slow = budget()
    slow["tile"]["step"] = 1000
    narrow = budget(EX2=128)
    narrow["tile"] |= {"rows": 16, "step": 0}
    for changed, product, rest in (
        (slow, 8 * 1000 * 8 / 4, 800 * 8 / 4),
        (narrow, (16 + 256) * 512 * 2 / 46, 128 * 256 / 16),
    ):
        seconds = (8000 + product + rest) / H100.clock_hz
        assert kernel_seconds(H100, changed, 16, 256) == pytest.approx(seconds)


def test_blocks_of_a_multiprocessor_share_registers_memory_and_threads() -> None:
    assert resident_blocks(H100, budget(registers=129)) == 1
    assert resident_blocks(H100, budget(registers=128)) == 1  # 144 KB of 228 KB
    assert resident_blocks(H100, budget(registers=128, shared_bytes=100_000)) == 2
    assert resident_blocks(H100, budget(registers=32, shared_bytes=0)) == 8


def test_rounds_of_tiles_count_in_full() -> None:
    product, rest = product_clocks(H100, budget())[0], rest_clocks(H100, budget())[0]
    one = (8000 + product + rest) / H100.clock_hz
    assert kernel_seconds(H100, budget(), 128 * 132, 256) == pytest.approx(one)
    assert kernel_seconds(H100, budget(), 128 * 132 + 1, 256) == pytest.approx(2 * one)
    pair = budget(registers=128, shared_bytes=100_000)
    two = (8000 + 2 * max(product, rest)) / H100.clock_hz
    assert kernel_seconds(H100, pair, 128 * 264, 256) == pytest.approx(two)
    several = budget()
    several["tile"]["before"] = 0
    rest = rest_clocks(H100, several)[0]
    assert kernel_seconds(H100, several, 1, 1) == pytest.approx((4500 + product + rest) / H100.clock_hz)
    assert kernel_seconds(H100, budget(), 128, 256, written_bytes=3.35e12) == pytest.approx(1 / 0.9)


def copied(folder: Path) -> Path:
    """A kernels/ folder with the budgets and without results of cards."""
    (folder / "kernels").mkdir()
    for path in FOLDER.glob("budgets*.json"):
        shutil.copy(path, folder / "kernels")
    (folder / "bench/results").mkdir(parents=True)
    return folder / "kernels"


def write_results(
    results: Path, name: str, gpu: str, cases: dict[str, dict[str, object]], *, dry_run: bool = False
) -> None:
    """A file as bench.card writes it; its name ends in its date."""
    document = {"dry_run": dry_run, "date": name[-10:], "machine": {"gpu": gpu}, "stages": {}, "cases": cases}
    (results / f"{name}.json").write_text(json.dumps(document))


def write_times(results: Path, name: str, gpu: str, milliseconds: float, dry_run: bool = False) -> None:
    cases: dict[str, dict[str, object]] = {
        "loss/32768/clsp_fast/part/lse": {"area": "card", "ms": milliseconds},
        "loss/32768/clsp_fast/part/products": {"area": "card", "ms": 2.75, "launches": 2},
        "loss/8192/memeff": {"area": "card", "error": "too old"},
        "ranks/32768/bfloat16/clsp_fast": {"area": "card", "ms": 3 * milliseconds},
    }
    write_results(results, name, gpu, cases, dry_run=dry_run)


def test_measured_times_appear_when_a_card_has_written_results(tmp_path: Path) -> None:
    kernels, results = copied(tmp_path), tmp_path / "bench/results"
    (results / "cpu-2026-01-01.json").write_text(json.dumps({"cases": {}}))
    before = tables.table(kernels)
    assert "measured |" not in before
    assert "Parts on one A100" not in before
    assert "No kernel has been timed on a card yet, so" in before
    assert "whole call" not in before
    write_times(results, "nvidia-a100-2026-02-01", "NVIDIA A100-SXM4-80GB", 7.25, dry_run=True)
    write_results(results, "nvidia-b200-2026-02-01", "NVIDIA B200", {"ceilings/copy": {"ms": 1.0}})
    assert tables.table(kernels) == before
    write_times(results, "nvidia-h100-2026-02-01", "NVIDIA H100 80GB HBM3", 1.25)
    write_times(results, "nvidia-h100-2026-03-01", "NVIDIA H100 80GB HBM3", 1.5)
    lines = tables.table(kernels).split("Parts on one H100")[1].split("Compiled by")[0].splitlines()
    heads = next(line for line in lines if line.startswith("| part |")).split(" | ")
    cells = next(line for line in lines if line.startswith("| lse | ")).split(" | ")
    assert cells[heads.index("M = N = 32,768: measured")] == "1.50 ms", "the newest file counts"
    assert cells[heads.index("M = N = 8,192: measured")] == ""
    assert [line for line in lines if line.startswith("| two products") and "2.75 ms" in line]
    at = heads.index("M = N = 32,768: estimate")
    rows = {line.split(" | ")[0]: line.split(" | ")[at : at + 2] for line in lines if line.startswith("| r")}
    assert rows["| rank"][0].endswith(" ms")
    assert rows["| rank"][1] == "", "the call is not the kernel"
    assert rows["| ranks, whole call"] == ["", "4.50 ms"]
    write_times(results, "nvidia-a100-2026-02-01", "NVIDIA A100-SXM4-80GB", 7.25)
    write_times(results, "nvidia-h200-2026-03-01", "NVIDIA H200", 1.125)
    write_times(results, "nvidia-gh200-2026-04-01", "NVIDIA GH200 480GB", 1.0)
    text = tables.table(kernels)
    assert "Parts on one A100" in text
    lse = next(
        line for line in text.split("Parts on one H200")[1].splitlines() if line.startswith("| lse | ")
    )
    assert lse.split(" | ")[at + 1] == "1.12 ms"
    cards = "A100, H100, H200, NVIDIA GH200 480GB (it has no column below)."
    assert f"Cards that have timed kernels: {cards}" in text


def test_a_newer_file_replaces_only_the_cases_that_it_timed(tmp_path: Path) -> None:
    gpu, lse, panel = "NVIDIA H100 80GB HBM3", *(f"loss/8192/clsp_fast/part/{x}" for x in ("lse", "panel"))
    write_results(tmp_path, "nvidia-h100-2026-02-01", gpu, {lse: {"ms": 1.0}, panel: {"ms": 2.0}})
    newer = {panel: {"ms": 2.5}, lse: {"error": "out of memory"}, "ceilings/copy": {"ms": 3}}
    write_results(tmp_path, "a-second-2026-03-01", gpu, newer)
    write_results(tmp_path, "nvidia-h100-2026-04-01", gpu, {lse: {"ms": 9.0}}, dry_run=True)
    assert tables.card_times(tmp_path) == {"H100": {lse: 1.0, panel: 2.5, "ceilings/copy": 3.0}}


def test_runs_of_a_day_are_ordered_by_their_number(tmp_path: Path) -> None:
    gpu, lse = "NVIDIA H100 80GB HBM3", "loss/8192/clsp_fast/part/lse"
    write_results(tmp_path, "nvidia-h100-2026-02-01", gpu, {lse: {"ms": 1.0}})
    write_results(tmp_path, "nvidia-h100-run-10-2026-02-01", gpu, {lse: {"ms": 10.0}})
    write_results(tmp_path, "nvidia-h100-run-9-2026-02-01", gpu, {lse: {"ms": 9.0}})
    assert tables.card_times(tmp_path) == {"H100": {lse: 10.0}}
    renamed = tmp_path / "nvidia-h100-2026-02-01.json"
    renamed.write_text(json.dumps(json.loads(renamed.read_text()) | {"run": 11}))
    assert tables.card_times(tmp_path) == {"H100": {lse: 1.0}}
    write_results(tmp_path, "nvidia-h100-2026-02-02", gpu, {lse: {"ms": 2.0}})
    assert tables.card_times(tmp_path) == {"H100": {lse: 2.0}}


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM2e", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
    ],
)
def test_only_the_variant_of_the_estimate_gets_a_column(tmp_path: Path, gpu: str, card: str | None) -> None:
    write_results(tmp_path, "results-2026-02-01", gpu, {"ceilings/copy": {"ms": 3.0}})
    assert list(tables.card_times(tmp_path)) == [card or gpu]


COMPLETE = {"stages": {}, "dry_run": False, "date": "", "machine": {"gpu": "NVIDIA H100"}, "cases": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged, Expecting"),
        ("[1]", "expected a JSON object, got list"),
        ({"stages": {}}, "damaged results of bench.card, 'dry_run' is missing"),
        (COMPLETE | {"machine": {}}, "damaged results of bench.card, 'gpu' is missing"),
        (COMPLETE | {"machine": []}, "damaged results of bench.card, "),
        (COMPLETE | {"run": "second"}, "damaged results of bench.card, "),
        (COMPLETE | {"machine": {"gpu": None}}, "damaged results of bench.card, "),
        (COMPLETE | {"cases": {"a": {"ms": None}}}, "damaged results of bench.card, "),
        (COMPLETE | {"cases": {"a": 1}}, "damaged results of bench.card, "),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, content: str | dict[str, object], message: str) -> None:
    path = tmp_path / "nvidia-h100-2026-02-01.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(tables.FileError, match=re.escape(f"{path}: {message}")):
        tables.card_times(tmp_path)


def test_a_damaged_budget_is_named(tmp_path: Path) -> None:
    kernels = copied(tmp_path)
    (kernels / "budgets.json").write_text('{"triton": "3')
    with pytest.raises(tables.FileError, match=r"kernels/budgets.json: damaged, "):
        tables.table(kernels)


def test_results_of_other_benchmarks_are_ignored() -> None:
    assert list((FOLDER.parent / "bench/results").glob("*.json"))
    assert "Intel" not in str(tables.card_times(FOLDER.parent / "bench/results"))


def test_the_terms_of_an_estimate_give_its_time(tmp_path: Path) -> None:
    """As kernels/README.md says for lse on an H100, where a multiprocessor holds one block."""
    lines = tables.table(copied(tmp_path)).splitlines()
    heads = next(line for line in lines if line.startswith("| kernel | card |")).strip("| ").split(" | ")
    cells = next(line for line in lines if line.startswith("| lse | H100 |")).strip("| ").split(" | ")
    row = dict(zip(heads, cells, strict=True))
    kinds = ("start", "product", "rest")
    clocks = {
        kind: max(float(row[head].replace(",", "")) for head in heads if head.startswith(kind))
        for kind in kinds
    }
    assert row["blocks"] == "1"
    seconds = int(row["rounds"]) * sum(clocks.values()) / H100.clock_hz
    assert row["time"] == f"{1e3 * seconds:.2f} ms"


def test_another_version_of_triton_has_its_own_table(tmp_path: Path) -> None:
    kernels = copied(tmp_path)
    other = json.loads((kernels / "budgets.json").read_text()) | {"triton": "3.0.0"}
    for kernels_of_variant in other["kernels"].values():
        kernels_of_variant["lse"]["spills"] = 0
    other["kernels"]["89 fp32"]["lse"]["spills"] = 17
    (kernels / "budgets-3.0.0.json").write_text(json.dumps(other))
    text = tables.table(kernels).split("Under triton 3.0.0")[1]
    assert "| lse | 0 | 17 | 0 | 0 |" in text
