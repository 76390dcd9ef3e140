"""Embeds recordings in batches of clips of similar length. The memory in use is bounded.

A row is a whole recording, or one window of a long recording. Shape suffixes: N recordings, W rows, B rows of
one batch, R recordings of one block, K frames of one block, T frames, F mel bins, D joint dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast import contention, copies, features
from clsp_fast.audio import DEFAULT_LIMITS, AudioError, AudioErrorReason, AudioLimits, Segment, as_waveform
from clsp_fast.config import Batching
from clsp_fast.console import Progress
from clsp_fast.storage import paths

Errors: TypeAlias = dict[int, AudioError]
"""The error of each recording that cannot be used, by its position in the list."""

MIN_FRAMES = 9
"""Fewest input frames that give one frame after the convolutional front."""
FRAMES_PER_S = 100

_UNCOMPRESSED = frozenset({".wav", ".flac", ".aif", ".aiff", ".au", ".caf", ".rf64", ".w64"})
# Ratio of decoded to compressed size. Opus codes speech with about 16 kbit/s; decoded to 16-bit samples it
# has 256 kbit/s. If files are compressed less, a block holds fewer recordings than would fit, which costs
# little time. If this ratio were too small, a block could need too much memory.
_COMPRESSION = 16


class Rows(NamedTuple):
    """One batch. The first `lengths_B[b]` frames of row b are features of recording `item_B[b]`, from frame
    `start_B[b]` on. The rest of the row counts as padding. The features are on the model's device, everything
    else is on the CPU."""

    item_B: Tensor
    start_B: Tensor
    features_BTF: Tensor
    lengths_B: Tensor


def embed_recordings(
    encode: Callable[[Tensor, Tensor], Tensor],
    items: list[Any],
    batching: Batching,
    *,
    device: torch.device,
    sample_rate: int | None = None,
    errors: Errors | None = None,
    progress: bool | Callable[[int], None] = False,
) -> Tensor:
    """Embeddings (N, D) of recordings or waveforms.

    A long recording that is split into windows gets the mean of the windows' embeddings, weighted by length
    and scaled to unit norm.

    Args:
        encode: features (B, T, F) on `device` and lengths (B,) on the CPU -> (B, D).
        items: recordings as `features.extract_files` takes them, or waveforms.
        batching: size of the batches, and what is done with long recordings.
        device: device of the model.
        sample_rate: rate of the waveforms in Hz; None: 16000. The rate of a file is in its header.
        errors: a dictionary that receives the error of each recording that cannot be used. The row of such a
            recording is NaN. None: the first error is raised.
        progress: True: progress is shown on standard error; a function: called with the number of recordings
            embedded since its last call.

    Raises:
        AudioError, ValueError, TypeError: as `CLSP.encode_audio`.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    if progress is True:
        progress = Progress(len(items), "clips", lead="encoded ").add

    def check(item_B: Tensor, start_B: Tensor, is_finite: Callable[[], Tensor]) -> None:
        bad = item_B[~is_finite()].tolist()
        if bad and errors is None:
            raise ValueError(f"audio must be finite, got NaN or infinity from the clips {bad}")
        for item in bad:
            assert errors is not None
            detail = "gives an embedding that is not finite"
            errors[item] = AudioError(_name(items[item], item), AudioErrorReason.NON_FINITE, detail)
        if progress:
            progress(int((start_B == 0).sum()))

    # A batch is checked after the next one has been given to the model. So a GPU always has work.
    unchecked: tuple[Tensor, Tensor, Callable[[], Tensor]] | None = None
    for rows in feature_batches(items, batching, device, sample_rate, errors):
        embedded_BD = encode(rows.features_BTF, rows.lengths_B)
        contention.adapt_waits()
        parts.append((rows.item_B, rows.start_B, rows.lengths_B, embedded_BD))
        if unchecked is not None:
            check(*unchecked)
        unchecked = rows.item_B, rows.start_B, copies.read_later(embedded_BD.isfinite().all(1))
    if unchecked is None:
        return torch.full((len(items), 0), torch.nan)
    check(*unchecked)
    return _join_windows(*(torch.cat(column) for column in zip(*parts, strict=True)), count=len(items))


def _join_windows(
    item_W: Tensor, start_W: Tensor, lengths_W: Tensor, embedded_WD: Tensor, *, count: int
) -> Tensor:
    """Computes one embedding per recording. The windows of a recording are added in the order of time, so
    that the sum does not depend on how they were batched."""
    order_W = start_W.argsort()
    order_W = order_W[item_W[order_W].argsort(stable=True)]
    item_W, lengths_W = item_W[order_W], lengths_W[order_W]
    device, windows_N = embedded_WD.device, torch.bincount(item_W, minlength=count)
    embedded_WD = embedded_WD.index_select(0, copies.to_device(order_W, device))
    frames_N = torch.zeros_like(windows_N).index_add_(0, item_W, lengths_W)
    weight_W = copies.to_device(lengths_W / frames_N[item_W], device).to(embedded_WD)

    result_ND = embedded_WD.new_full((count, embedded_WD.shape[1]), torch.nan)
    (single_W,) = (windows_N[item_W] == 1).nonzero(as_tuple=True)
    single, items = (copies.to_device(x, device) for x in (single_W, item_W[single_W]))
    result_ND.index_copy_(0, items, embedded_WD.index_select(0, single))
    stop_N = windows_N.cumsum(0)
    for item in (windows_N > 1).nonzero()[:, 0].tolist():
        windows = slice(int(stop_N[item] - windows_N[item]), int(stop_N[item]))
        total_D = (weight_W[windows, None] * embedded_WD[windows]).sum(0)
        result_ND[item] = F.normalize(total_D, dim=0)
    return result_ND


def feature_batches(
    items: list[Any],
    batching: Batching,
    device: torch.device,
    sample_rate: int | None = None,
    errors: Errors | None = None,
) -> Iterator[Rows]:
    """Batches of rows of similar length. While the model embeds one block of recordings, a thread decodes
    the next block. The features of a block are copied to the device in one piece, and cut into rows there."""
    blocks, uploads = _blocks(items), copies.Uploads(device)

    def extract_next() -> tuple[list[int], features.Features] | None:
        block = next(blocks, None)
        if block is None:
            return None
        if hasattr(items[block[0]], "shape"):
            return _extract_waveforms(items, block, sample_rate, errors)
        return _extract_recordings(items, block, AudioLimits(slack_s=batching.slack_seconds), errors)

    with ThreadPoolExecutor(1, thread_name_prefix="clsp-decode") as pool:
        ahead = pool.submit(extract_next)
        while (block := ahead.result()) is not None:
            ahead = pool.submit(extract_next)
            yield from _rows(items, *block, batching, uploads, errors)


def _extract_waveforms(
    items: list[Any], block: list[int], sample_rate: int | None, errors: Errors | None
) -> tuple[list[int], features.Features]:
    """Positions and features of those waveforms of a block that can be used."""
    for i in block:
        if (error := _amplitude_error(items[i], i)) is not None:
            if errors is None:
                raise error
            errors[i] = error
    if errors is not None:
        min_samples = 80 * (sample_rate or features.SAMPLE_RATE_HZ) / features.SAMPLE_RATE_HZ
        for i in (i for i in block if len(items[i]) < min_samples):
            errors[i] = AudioError(_name(items[i], i), AudioErrorReason.TOO_SHORT, "is shorter than 5 ms")
        block = [i for i in block if i not in errors]
    return block, features.extract([items[i] for i in block], sample_rate=sample_rate)


def _extract_recordings(
    items: list[Any], block: list[int], limits: AudioLimits, errors: Errors | None
) -> tuple[list[int], features.Features]:
    """Positions and features of those recordings of a block that can be used."""
    extracted = features.extract_files(
        [items[i] for i in block], on_error="raise" if errors is None else "skip", limits=limits
    )
    if errors is not None:
        errors.update({block[row]: error for row, error in extracted.errors})
    return [block[row] for row in extracted.kept.tolist()], extracted


def _amplitude_error(item: Any, position: int) -> AudioError | None:
    """The error of a waveform with samples far outside [-1, 1], or None. Files have the same limit."""
    samples = as_waveform(item, f"audio[{position}]")
    limit = DEFAULT_LIMITS.max_amplitude
    if samples.size == 0 or max(samples.max(), -samples.min()) <= limit:  # false if there is a NaN
        return None
    samples = np.abs(samples)
    loud = samples[np.isfinite(samples) & (samples > limit)]
    if loud.size == 0:
        return None
    detail = f"holds {loud[0]:g}; samples are in [-1, 1] and up to {limit:g} is accepted: rescale it"
    return AudioError(_name(item, position), AudioErrorReason.AMPLITUDE, detail)


def _rows(
    items: list[Any],
    positions: list[int],
    block: features.Features,
    batching: Batching,
    uploads: copies.Uploads,
    errors: Errors | None,
) -> Iterator[Rows]:
    """Batches from the features of one block, the longest rows first."""
    max_frames = FRAMES_PER_S * batching.batch_seconds
    rows: list[tuple[int, int, int]] = []  # recording in the block, first frame, number of frames
    for recording, frames in enumerate(block.lengths.tolist()):
        spans = _spans(frames, batching)
        if isinstance(spans, str):
            position = positions[recording]
            reason = AudioErrorReason.TOO_SHORT if frames < MIN_FRAMES else AudioErrorReason.TOO_LONG
            error = AudioError(_name(items[position], position), reason, spans)
            if errors is None:
                raise error
            errors[position] = error
        else:
            rows += [(recording, start, stop - start) for start, stop in spans]
    rows.sort(key=lambda row: -row[2])
    values_RTF = uploads.upload(block.values)
    frames_KF, frames, device = values_RTF.flatten(0, 1), values_RTF.shape[1], values_RTF.device
    while rows:
        longest = rows[0][2]
        count = max(1, int(max_frames // longest))
        recording_B, start_B, lengths_B = torch.tensor(rows[:count]).unbind(1)
        first_B = recording_B * frames
        bounds_2B = copies.to_device(torch.stack([first_B + start_B, first_B + frames - 1]), device)
        # A row beyond the end of its recording repeats the block's last frame.
        index_BT = (bounds_2B[0, :, None] + torch.arange(longest, device=device)).minimum(
            bounds_2B[1, :, None]
        )
        features_BTF = frames_KF.index_select(0, index_BT.flatten()).view(*index_BT.shape, -1)
        yield Rows(torch.tensor(positions)[recording_B], start_B, features_BTF, lengths_B)
        rows = rows[count:]


def _spans(frames: int, batching: Batching) -> list[tuple[int, int]] | str:
    """(start, stop) of each window of a recording, or the reason why its length is refused."""
    if frames < MIN_FRAMES:
        return f"has {frames} frames of 10 ms, but the model needs {MIN_FRAMES}"
    window = round(FRAMES_PER_S * batching.window_s)
    if frames <= window or batching.long_audio == "whole":
        return [(0, frames)]
    if batching.long_audio == "error":
        seconds, limit = frames / FRAMES_PER_S, batching.window_s
        return f'is {seconds:.1f} s long, over {limit:g} s; long_audio="window" splits it'
    # A remainder shorter than MIN_FRAMES is added to the last window.
    starts = [start for start in range(0, frames, window) if frames - start >= MIN_FRAMES]
    return list(zip(starts, [*starts[1:], frames], strict=True))


def _blocks(items: list[Any], max_bytes: int = 64 * 2**20) -> Iterator[list[int]]:
    """Positions of recordings of similar size, largest first, in blocks whose features fit in memory.

    The length of a recording is not known before it is decoded, so it is estimated from the size in bytes.
    """
    arrays = [hasattr(item, "shape") for item in items]
    if any(arrays) and not all(arrays):
        raise TypeError("audio must be all waveforms or all recordings, got both")
    sizes = [_size_in_bytes(item) for item in items]
    block: list[int] = []
    for position in sorted(range(len(items)), key=lambda i: -sizes[i]):
        if block and (len(block) + 1) * sizes[block[0]] > max_bytes:
            yield block
            block = []
        block.append(position)
    if block:
        yield block


def _size_in_bytes(item: Any) -> int:
    """Rough size of a recording as 16-bit audio. 0 if a file cannot be opened: its error comes later."""
    if hasattr(item, "shape"):
        return 2 * int(item.shape[0]) if len(item.shape) else 0
    if isinstance(item, Segment):
        known = item.duration_s is not None
        return int(32_000 * (item.duration_s or 0)) if known else _size_in_bytes(item.source)
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        factor = 1 if path.suffix.lower() in _UNCOMPRESSED else _COMPRESSION
        return factor * path.stat().st_size if paths.is_file(path) else 0
    return len(item) if isinstance(item, bytes) else 2**20


def _name(item: Any, position: int) -> str:
    """The name of a recording in error messages: its path, or its position."""
    source = item.source if isinstance(item, Segment) else item
    return str(source) if isinstance(source, (str, os.PathLike)) else f"audio[{position}]"
