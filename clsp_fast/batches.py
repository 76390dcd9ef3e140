"""Recordings of any kind -> batches of features of like length, within bounds of memory.

A file of its own because the model is about towers, and every bulk command embeds through this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsp_fast import features
from clsp_fast.audio import AudioError, AudioErrorReason

MIN_FRAMES = 9
"""Fewest input frames that give one frame after the convolutional front."""


def feature_batches(
    items: list[Any], sample_rate: int | None, most_frames: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(index, features, lengths) of clips of like length, count times the longest within `most_frames`."""
    for block in _blocks(items):
        chosen = [items[i] for i in block]
        if hasattr(chosen[0], "shape"):
            batch = features.extract(chosen, sample_rate=sample_rate)
        else:
            batch = features.extract_files(chosen)
        order = batch.lengths.argsort(descending=True, stable=True)
        least = int(batch.lengths[order[-1]])
        if least < MIN_FRAMES:
            name = chosen[int(order[-1])]
            name = f"audio[{block[int(order[-1])]}]" if hasattr(name, "shape") else str(name)
            what = f"has {least} frames of 10 ms, less than the {MIN_FRAMES} that the model needs"
            raise AudioError(name, AudioErrorReason.TOO_SHORT, what)
        start = 0
        while start < len(order):
            longest = int(batch.lengths[order[start]])
            rows = order[start : start + max(1, int(most_frames // longest))]
            yield torch.tensor(block)[rows], batch.values[rows, :longest], batch.lengths[rows]
            start += len(rows)


def _blocks(items: list[Any], most_bytes: int = 64 * 2**20) -> Iterator[list[int]]:
    """Indices of clips of like size, longest first, in blocks whose features fit in memory together.

    A recording's length is not known before it is decoded; its size in bytes is near enough for this purpose.
    """
    arrays = [hasattr(item, "shape") for item in items]
    if any(arrays) and not all(arrays):
        raise TypeError("audio must be all waveforms or all recordings, got both")
    sizes = [_bytes_of(item) for item in items]
    block: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: -sizes[i]):
        if block and (len(block) + 1) * sizes[block[0]] > most_bytes:
            yield block
            block = []
        block.append(index)
    if block:
        yield block


def _bytes_of(item: Any) -> int:
    """Size of a recording as 16-bit audio, roughly; a file that cannot be opened is reported later."""
    if hasattr(item, "shape"):
        return 2 * int(item.shape[0]) if len(item.shape) else 0
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        return path.stat().st_size if path.is_file() else 0
    return len(item) if isinstance(item, bytes) else 2**20
