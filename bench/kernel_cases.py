"""GPU kernels without a GPU: the resources that they compile to, and lower bounds of their time."""

from __future__ import annotations

import json
from pathlib import Path

from bench import loss_cases, similarity_cases
from bench.measure import Report

BUDGETS = Path(__file__).parent.parent / "kernels/budgets.json"


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
    from clsp_fast.kernels.estimates import CARDS, bound_seconds  # needs triton

    rows: list[tuple[str, ...]] = [("case", "GFLOP", "MB", *(f"{card.name}, at least" for card in CARDS))]
    cases = [c for c in (*loss_cases.CASES, *similarity_cases.CASES) if c.device == "cuda"]
    for case in cases:
        times = [f"{1e3 * bound_seconds(card, case.flops, case.bytes):.3g} ms" for card in CARDS]
        rows.append((case.name, f"{case.flops / 1e9:,.0f}", f"{case.bytes / 1e6:,.0f}", *times))
    return rows


CASES = (
    Report("kernel-budgets", "kernels", "what the kernels compile to, from kernels/budgets.json", budgets),
    Report("kernel-bounds", "kernels", "lower bounds of the GPU cases' times; nothing was timed", bounds),
)
