"""GPU kernels without a GPU: the resources that they compile to, and lower bounds of their time."""

from __future__ import annotations

import json
from pathlib import Path

from bench import loss_cases, similarity_cases
from bench.measure import Case, Report

BUDGETS = Path(__file__).parent.parent / "kernels/budgets.json"
# Dense bf16 peak in TFLOP/s and memory bandwidth in TB/s, from the data sheets: A100 80 GB, H100 SXM, B200.
CARDS = {"A100": (312.0, 2.0), "H100": (989.0, 3.35), "B200": (2250.0, 8.0)}


def budgets(path: Path = BUDGETS) -> list[tuple[str, ...]]:
    """Registers, spills, shared memory and matrix instructions of the committed budget file, by target.

    Raises:
        FileNotFoundError: there is no budget file.
    """
    rows: list[tuple[str, ...]] = [
        ("kernel", "target", "registers", "spills", "shared KB", "matrix instructions")
    ]
    for variant, kernels in json.loads(path.read_text())["kernels"].items():
        for name, budget in kernels.items():
            shared = f"{budget['shared_bytes'] / 1024:.0f}"
            matrix = ", ".join(budget["mma"]) or "none"
            rows.append(
                (name, f"sm_{variant}", str(budget["registers"]), str(budget["spills"]), shared, matrix)
            )
    return rows


def bounds() -> list[tuple[str, ...]]:
    """Lower bound of each GPU case's time: FLOPs at the card's peak, or bytes at its bandwidth."""
    rows: list[tuple[str, ...]] = [("case", "GFLOP", "MB", *(f"{card}, at least" for card in CARDS))]
    cases = [c for c in (*loss_cases.CASES, *similarity_cases.CASES) if c.device == "cuda"]
    for case in cases:
        times = [f"{1e3 * bound_s(case, *card):.3g} ms" for card in CARDS.values()]
        rows.append((case.name, f"{case.flops / 1e9:,.0f}", f"{case.bytes / 1e6:,.0f}", *times))
    return rows


def bound_s(case: Case, peak_tflops: float, memory_tbps: float) -> float:
    """A lower bound of the seconds that a call takes."""
    return max(case.flops / (peak_tflops * 1e12), case.bytes / (memory_tbps * 1e12))


CASES = (
    Report("kernel-budgets", "kernels", "what the kernels compile to, from kernels/budgets.json", budgets),
    Report("kernel-bounds", "kernels", "lower bounds of the GPU cases' times; nothing was timed", bounds),
)
