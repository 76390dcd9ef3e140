"""All cases by name, in the order in which they run."""

from __future__ import annotations

from bench import frontend_cases, loss_cases, similarity_cases
from bench.measure import Case

CASES: dict[str, Case] = {
    case.name: case for case in (*frontend_cases.CASES, *loss_cases.CASES, *similarity_cases.CASES)
}
