"""All cases by name, in the order in which they run."""

from __future__ import annotations

from bench import (
    busy_cases,
    caption_cases,
    frontend_cases,
    kernel_cases,
    loss_cases,
    model_cases,
    similarity_cases,
)
from bench.measure import Case, Report

CASES: dict[str, Case | Report] = {
    case.name: case
    for area in (
        frontend_cases,
        caption_cases,
        loss_cases,
        similarity_cases,
        model_cases,
        busy_cases,
        kernel_cases,
    )
    for case in area.CASES
}
