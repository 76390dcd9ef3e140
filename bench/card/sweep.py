"""Tile sizes of the two kernels of the softmax loss, at 16,384 x 16,384 pairs."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch

from bench.card.loss import loss_of, part_finder
from bench.card.record import Record
from bench.card.timing import kernel_times, time_together
from bench.loss_cases import Batch, batch
from bench.measure import Call, one_line
from clsp_fast.kernels._launch import Tile, override_tiles

SIZE, COMPILED_SIZE = 16384, 1024
DRY_SIZE = 40
KERNELS = ("lse", "panel")
# Rows, columns, depth, warps, stages.
TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 2),
    Tile(128, 128, 64, 4, 3),
    Tile(64, 256, 64, 4, 2),
    Tile(64, 128, 64, 4, 4),
    Tile(256, 128, 64, 8, 3),
)
DRY_TILES = (Tile(32, 32, 32, 4, 1), Tile(32, 64, 32, 4, 1))


def run(record: Record) -> None:
    """Compiles every tile in parallel, then times each kernel with each tile that compiled."""
    tiles = DRY_TILES if record.dry_run else TILES
    pairs = [(kernel, tile) for tile in tiles for kernel in KERNELS]
    failures = compile_all(pairs, record)
    size = DRY_SIZE if record.dry_run else SIZE
    given = [batch(size, 1, torch.bfloat16, record.device.type) for _ in range(2)]
    for kernel, tile in pairs:
        case = f"sweep/{kernel}/{tile.rows} x {tile.columns} x {tile.depth}"
        case += f", {tile.num_warps} warps, {tile.num_stages} stages"
        if reason := failures.get((kernel, tile)):
            # A tile that does not fit this card says nothing against the library.
            record.add(case, {"peer": True, "error": reason})
            continue
        try:
            with override_tiles(**{kernel: tile}):
                record.add(case, measure(kernel, given, record))
        except RuntimeError as error:
            record.add(case, {"peer": True, "error": one_line(repr(error))})


def measure(kernel: str, given: list[Batch], record: Record) -> dict[str, Any]:
    """Time of the pass that launches the kernel, by device events, and of the kernel alone."""
    # The backward pass begins from a loss that was computed with the same tiles.
    calls = [call_of(kernel, x) for x in given]
    values = time_together({kernel: calls}, record.device, seconds=0.5)[kernel]
    if "ms" in values and not record.dry_run:
        parts = kernel_times(calls[0], record.device, rounds=3, part_of=part_finder())
        values["kernel_ms"] = parts[kernel]["ms"] if kernel in parts else None
    return values


def call_of(kernel: str, given: Batch) -> Call:
    """The forward pass for `lse`, the backward pass for `panel`."""
    if kernel == "lse":
        return torch.no_grad()(partial(loss_of, given))  # type: ignore[no-any-return]
    inputs, loss = (given.audio_MD, given.text_ND, given.scale), loss_of(given)
    return lambda: torch.autograd.grad(loss, inputs, retain_graph=True)


def compile_all(pairs: list[tuple[str, Tile]], record: Record) -> dict[tuple[str, Tile], str]:
    """Compiles in several processes, which fill Triton's cache on the disk; returns what failed, and why."""
    workers = 1 if record.dry_run else min(len(pairs), os.cpu_count() or 1)
    size = DRY_SIZE if record.dry_run else COMPILED_SIZE
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pair: pool.submit(compile_tile, *pair, size, record.device.type) for pair in pairs}
        reasons = {pair: _result_or_error(job) for pair, job in jobs.items()}
    return {pair: reason for pair, reason in reasons.items() if reason}


def _result_or_error(job: Future[str]) -> str:
    try:
        return job.result()
    except BrokenProcessPool as error:  # the compiler has crashed in a process
        return one_line(repr(error))


def compile_tile(kernel: str, tile: Tile, size: int, device: str) -> str:
    """Launches a kernel with a tile once, on a small batch; returns the error, or ""."""
    try:
        with override_tiles(**{kernel: tile}):
            call_of(kernel, batch(size, 1, torch.bfloat16, device))()
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # any error of the compiler is a result
        return one_line(repr(error)) or "failed"
    return ""
