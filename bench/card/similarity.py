"""Ranks and nearest neighbours in bfloat16 and float32, beside one product and torch.topk in chunks."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import similarity_cases
from bench.card.record import Record
from bench.card.timing import time_case
from bench.measure import Case

RANKS = (8192, 32768, 65536)
DRY_RANKS = (200,)
ROWS = 1_000_000
DRY_ROWS = 2000
# The other providers would need 100 GB for their matrices, or use the CPU.
TIMED = ("clsp_fast", "one product", "chunked count", "torch.topk in chunks")


def run(record: Record) -> None:
    """Ranks of both sizes, then the ten nearest rows of a million for a thousand queries."""
    device = record.device.type
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for size in DRY_RANKS if record.dry_run else RANKS:
            case = similarity_cases.ranks_case(size, device, dtype)
            record.add_all(f"ranks/{size}/{name}", time_case(_reduced(case)))
        rows = DRY_ROWS if record.dry_run else ROWS
        case = similarity_cases.topk_case(rows, device, dtype)
        record.add_all(f"topk/{rows}/{name}", time_case(_reduced(case)))


def _reduced(case: Case) -> Case:
    return replace(case, providers=tuple(p for p in case.providers if p.name in TIMED))
