"""The time that each kernel should take on a card: an estimate from its budget, and lower bounds.

Nothing here was measured. kernels/README.md states the formula; `kernel_seconds` is the formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .launches import DEPTH

Budget = Mapping[str, Any]
"""A kernel's entry in budgets.json."""

# Assumptions. Large products of cuBLAS reach about 80 % of the data sheet's peak: power limits the clock.
LIBRARY_SHARE = 0.8
MEMORY_SHARE = 0.9
# Published products on Hopper cards reach 502 TFLOP/s, and 564 if a program computes several tiles, at
# K = 1,024; 741 at K = 2,048 and 791 at K = 4,096 (kernels/README.md names the sources). So the product takes
# 85 % of the peak rate, and a tile of 128 x 256 takes 5,000 to 13,000 clocks more; their epilogues need about
# 1,000 of these. Several tiles a program save 3,500. The other cards are assumed to be like the H100.
PRODUCT_SHARE = 0.85
FIRST_TILE_CLOCKS, NEXT_TILE_CLOCKS = 8000, 4500
"""From the start of a tile to a full pipeline: in a program of one tile, and in one of several tiles."""
L2_BYTES_PER_CLOCK = 46
"""Bytes that a multiprocessor reads from L2 in a clock, while all of them read."""
# What the architectures state.
_WARP_INSTRUCTIONS_PER_CLOCK = 4
_SPECIAL_PER_CLOCK = 16
_REGISTERS, _THREADS = 65536, 2048
_BYTES = 2


@dataclass(frozen=True)
class Card:
    """A card, by its data sheet.

    Attributes:
        target: its key in TILES.
        peak_tflops: of products of 16-bit operands without sparsity.
        memory_tbps: memory bandwidth in TB/s.
        processors: number of multiprocessors.
        product_flops: of a multiprocessor in a clock; with the peak, this gives the clock.
        shared_bytes: shared memory of a multiprocessor.
    """

    name: str
    target: int
    peak_tflops: float
    memory_tbps: float
    processors: int
    product_flops: int
    shared_bytes: int

    @property
    def clock_hz(self) -> float:
        return self.peak_tflops * 1e12 / (self.processors * self.product_flops)


CARDS = (
    Card("A100", 80, 312, 2.0, 108, 2048, 164 << 10),  # 80 GB, SXM
    Card("H100", 90, 989, 3.35, 132, 4096, 228 << 10),  # 80 GB, SXM
    Card("H200", 90, 989, 4.8, 132, 4096, 228 << 10),  # SXM
    Card("B200", 100, 2250, 8.0, 148, 8192, 228 << 10),
)
"""Other variants of these cards, such as PCIe, are other cards: tables.py gives them no column."""


def bound_seconds(card: Card, flops: float, memory_bytes: float) -> float:
    """FLOPs at the peak or bytes at the memory bandwidth, whichever takes longer."""
    return max(flops / (card.peak_tflops * 1e12), memory_bytes / (card.memory_tbps * 1e12))


def library_seconds(card: Card, flops: float, memory_bytes: float) -> float:
    """The same with the shares of both that large products reach: the time of a product of torch."""
    return max(
        flops / (LIBRARY_SHARE * card.peak_tflops * 1e12),
        memory_bytes / (MEMORY_SHARE * card.memory_tbps * 1e12),
    )


def resident_blocks(card: Card, budget: Budget) -> int:
    """How many blocks of a kernel a multiprocessor holds at once."""
    warp_registers = -(-budget["registers"] // 8) * 8 * 32
    return min(
        _REGISTERS // (warp_registers * budget["threads"] // 32),
        card.shared_bytes // (budget["shared_bytes"] + 1024),
        _THREADS // budget["threads"],
    )


def product_clocks(card: Card, budget: Budget) -> tuple[float, float, float]:
    """Clocks of a multiprocessor for the product of a tile: tensor cores, loads from L2, instructions."""
    tile = budget["tile"]
    rows, columns = tile["rows"], tile["columns"]
    return (
        2 * rows * columns * DEPTH / (PRODUCT_SHARE * card.product_flops),
        (rows + columns) * DEPTH * _BYTES / L2_BYTES_PER_CLOCK,
        DEPTH / tile["depth"] * tile["step"] * budget["threads"] / 32 / _WARP_INSTRUCTIONS_PER_CLOCK,
    )


def rest_clocks(card: Card, budget: Budget) -> tuple[float, float]:
    """Clocks before and after the product of a tile: instructions, and special functions alone."""
    tile, threads = budget["tile"], budget["threads"]
    return (
        (tile["before"] + tile["after"]) * threads / 32 / _WARP_INSTRUCTIONS_PER_CLOCK,
        sum(tile["special"].values()) * threads / _SPECIAL_PER_CLOCK,
    )


def start_clocks(budget: Budget) -> int:
    """Clocks until the pipeline of the product is full."""
    return FIRST_TILE_CLOCKS if budget["tile"]["before"] else NEXT_TILE_CLOCKS


def rounds_of(card: Card, budget: Budget, rows: int, columns: int) -> int:
    """Number of rounds. In a round, each multiprocessor computes as many tiles as it holds blocks."""
    tile = budget["tile"]
    tiles = -(-rows // tile["rows"]) * -(-columns // tile["columns"])
    return -(-tiles // (card.processors * resident_blocks(card, budget)))


def kernel_seconds(card: Card, budget: Budget, rows: int, columns: int, written_bytes: float = 0) -> float:
    """Expected time of a kernel over all tiles of (rows, columns), which writes `written_bytes` to memory."""
    product, rest = max(product_clocks(card, budget)), max(rest_clocks(card, budget))
    blocks = resident_blocks(card, budget)
    # With two blocks, one computes its product while the other executes other instructions.
    clocks = product + rest if blocks == 1 else blocks * max(product, rest)
    seconds = rounds_of(card, budget, rows, columns) * (start_clocks(budget) + clocks) / card.clock_hz
    return max(seconds, written_bytes / (MEMORY_SHARE * card.memory_tbps * 1e12))
