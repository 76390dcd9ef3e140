"""Recordings of any kind -> embeddings, in batches of like length and within bounds of memory.

A file of its own because the model is about towers, and every bulk command embeds through this.
Shape suffixes: N recordings, B rows of a batch (a recording, or a window of a long one), W all such rows,
T frames, F mel bins, D joint dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast import contention, features
from clsp_fast.audio import DEFAULT_LIMITS, AudioError, AudioErrorReason, AudioLimits, Segment, as_waveform
from clsp_fast.console import Progress
from clsp_fast.storage import paths

LongAudio: TypeAlias = Literal["whole", "window", "error"]
Errors: TypeAlias = dict[int, AudioError]

MIN_FRAMES = 9
"""Fewest input frames that give one frame after the convolutional front."""
FRAMES_PER_S = 100

_FULL_SIZE = frozenset({".wav", ".flac", ".aif", ".aiff", ".au", ".caf", ".rf64", ".w64"})
# Speech in Opus takes some 16 kbit/s, where 16-bit samples take 256. What is compressed less goes in smaller
# blocks than it might, which costs little; the other way round a block would not fit in memory.
_COMPRESSION = 16


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How recordings become batches."""

    sample_rate: int | None = None
    """Rate of waveforms in Hz; None: 16000. Files carry their own."""
    batch_seconds: float = 120.0
    """Most seconds of audio, padding included, in one batch; a longer recording goes alone."""
    long_audio: LongAudio = "whole"
    """What is done with a recording longer than `window_s`: embed it as one, average its windows, refuse."""
    window_s: float = 30.0
    """Length of a window in seconds."""
    slack_seconds: float = DEFAULT_LIMITS.slack_s
    """How far a segment may reach behind the end of its recording."""

    def __post_init__(self) -> None:
        if not self.batch_seconds > 0:
            raise ValueError(f"batch_seconds must be positive, got {self.batch_seconds}")
        if self.long_audio not in ("whole", "window", "error"):
            raise ValueError(f'long_audio must be "whole", "window" or "error", got {self.long_audio!r}')
        if not self.window_s >= 1:
            raise ValueError(f"window_s must be at least 1 second, got {self.window_s}")
        AudioLimits(slack_s=self.slack_seconds)


class Rows(NamedTuple):
    """One batch: which recording and from which of its frames on, features (B, T, F), lengths (B,)."""

    item_B: Tensor
    start_B: Tensor
    features_BTF: Tensor
    lengths_B: Tensor


def embed_recordings(
    encode: Callable[[Tensor, Tensor], Tensor],
    items: list[Any],
    batching: Batching,
    *,
    errors: Errors | None = None,
    progress: bool | Callable[[int], None] = False,
) -> Tensor:
    """Embeddings (N, D) of recordings or waveforms.

    A long recording in windows has the mean of their embeddings, weighted by length and scaled to unit norm.

    Args:
        encode: features (B, T, F) and lengths (B,) -> (B, D).
        items: what `features.extract_files` takes, or waveforms.
        batching: see there.
        errors: takes the error of each recording that cannot be used, whose row is NaN; None: it is raised.
        progress: True: say on standard error how far it is; a function: called with how many more were
            embedded.

    Raises:
        AudioError, ValueError, TypeError: as `CLSP.encode_audio`.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    if progress is True:
        progress = Progress(len(items), "clips", lead="encoded ").add
    for item_B, start_B, features_BTF, lengths_B in feature_batches(items, batching, errors):
        embedded_BD = encode(features_BTF, lengths_B)
        contention.look()
        bad = item_B[~embedded_BD.isfinite().all(1).cpu()].tolist()
        if bad and errors is None:
            raise ValueError(f"audio must be finite, got NaN or infinity from the clips {bad}")
        for item in bad:
            assert errors is not None
            what = "gives an embedding that is not finite"
            errors[item] = AudioError(_name(items[item], item), AudioErrorReason.NON_FINITE, what)
        parts.append((item_B, start_B, lengths_B, embedded_BD))
        if progress:
            progress(int((start_B == 0).sum()))
    if not parts:
        return torch.full((len(items), 0), torch.nan)
    return _join(*(torch.cat(column) for column in zip(*parts, strict=True)), count=len(items))


def _join(item_W: Tensor, start_W: Tensor, lengths_W: Tensor, embedded_WD: Tensor, *, count: int) -> Tensor:
    """One embedding a recording; windows are added in their order, whatever batches they were in."""
    result_ND = embedded_WD.new_full((count, embedded_WD.shape[1]), torch.nan)
    windows_N = torch.bincount(item_W, minlength=count)
    (single_W,) = (windows_N[item_W] == 1).nonzero(as_tuple=True)
    device = embedded_WD.device
    result_ND[item_W[single_W].to(device)] = embedded_WD[single_W.to(device)]
    for item in (windows_N > 1).nonzero()[:, 0].tolist():
        (own,) = (item_W == item).nonzero(as_tuple=True)
        own = own[start_W[own].argsort()]
        weights = (lengths_W[own] / lengths_W[own].sum()).to(embedded_WD)
        result_ND[item] = F.normalize((weights[:, None] * embedded_WD[own.to(device)]).sum(0), dim=0)
    return result_ND


def feature_batches(items: list[Any], batching: Batching, errors: Errors | None = None) -> Iterator[Rows]:
    """Batches of rows of like length; one block of recordings is decoded while another is used."""
    blocks = _blocks(items)

    def load() -> tuple[list[int], features.Features] | None:
        block = next(blocks, None)
        return None if block is None else _extract(items, block, batching, errors)

    with ThreadPoolExecutor(1, thread_name_prefix="clsp-decode") as pool:
        ahead = pool.submit(load)
        while (loaded := ahead.result()) is not None:
            ahead = pool.submit(load)
            yield from _rows(items, *loaded, batching, errors)


def _extract(
    items: list[Any], block: list[int], batching: Batching, errors: Errors | None
) -> tuple[list[int], features.Features]:
    """(positions, features) of the recordings of a block that can be used."""
    chosen, sample_rate = [items[i] for i in block], batching.sample_rate
    if hasattr(chosen[0], "shape"):
        for i in block:
            if (loud := _amplitude_error(items[i], i)) is not None:
                if errors is None:
                    raise loud
                errors[i] = loud
        if errors is not None:
            least = 80 * (sample_rate or features.SAMPLE_RATE_HZ) / features.SAMPLE_RATE_HZ
            for i in (i for i in block if len(items[i]) < least):
                errors[i] = AudioError(_name(items[i], i), AudioErrorReason.TOO_SHORT, "is shorter than 5 ms")
            block = [i for i in block if i not in errors]
            chosen = [items[i] for i in block]
        return block, features.extract(chosen, sample_rate=sample_rate)
    limits = AudioLimits(slack_s=batching.slack_seconds)
    found = features.extract_files(chosen, on_error="raise" if errors is None else "skip", limits=limits)
    if errors is not None:
        errors.update({block[row]: error for row, error in found.errors})
    return [block[row] for row in found.kept.tolist()], found


def _amplitude_error(item: Any, position: int) -> AudioError | None:
    """Why a waveform is refused that is out of scale, as files and segments are; None: it is not."""
    samples = as_waveform(item, f"audio[{position}]")
    most = DEFAULT_LIMITS.max_amplitude
    if samples.size == 0 or max(samples.max(), -samples.min()) <= most:  # false for NaN
        return None
    samples = np.abs(samples)
    loud = samples[np.isfinite(samples) & (samples > most)]
    if loud.size == 0:
        return None
    what = f"holds {loud[0]:g}; samples are in [-1, 1] and up to {most:g} is accepted: rescale it"
    return AudioError(_name(item, position), AudioErrorReason.AMPLITUDE, what)


def _rows(
    items: list[Any],
    positions: list[int],
    found: features.Features,
    batching: Batching,
    errors: Errors | None,
) -> Iterator[Rows]:
    most_frames = FRAMES_PER_S * batching.batch_seconds
    spans: list[tuple[int, int, int]] = []
    for row, frames in enumerate(found.lengths.tolist()):
        own = _spans(frames, batching)
        if isinstance(own, str):
            reason = AudioErrorReason.TOO_SHORT if frames < MIN_FRAMES else AudioErrorReason.TOO_LONG
            error = AudioError(_name(items[positions[row]], positions[row]), reason, own)
            if errors is None:
                raise error
            errors[positions[row]] = error
        else:
            spans += [(row, start, stop - start) for start, stop in own]
    spans.sort(key=lambda span: -span[2])
    last = found.values.shape[1] - 1
    while spans:
        longest = spans[0][2]
        count = max(1, int(most_frames // longest))
        row_B, start_B, lengths_B = torch.tensor(spans[:count]).unbind(1)
        frame_BT = (start_B[:, None] + torch.arange(longest)).clamp_(max=last)
        yield Rows(torch.tensor(positions)[row_B], start_B, found.values[row_B[:, None], frame_BT], lengths_B)
        spans = spans[count:]


def _spans(frames: int, batching: Batching) -> list[tuple[int, int]] | str:
    """(start, stop) of the windows of a recording, or what is wrong with its length."""
    if frames < MIN_FRAMES:
        return f"has {frames} frames of 10 ms, less than the {MIN_FRAMES} that the model needs"
    window = round(FRAMES_PER_S * batching.window_s)
    if frames <= window or batching.long_audio == "whole":
        return [(0, frames)]
    if batching.long_audio == "error":
        seconds, most = frames / FRAMES_PER_S, batching.window_s
        return f'is {seconds:.1f} s long, over {most:g} s; long_audio="window" splits it'
    # What is too short for a window of its own belongs to the one before.
    starts = [start for start in range(0, frames, window) if frames - start >= MIN_FRAMES]
    return list(zip(starts, [*starts[1:], frames], strict=True))


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
    if isinstance(item, Segment):
        known = item.duration_s is not None
        return int(32_000 * (item.duration_s or 0)) if known else _bytes_of(item.source)
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        factor = 1 if path.suffix.lower() in _FULL_SIZE else _COMPRESSION
        return factor * path.stat().st_size if paths.is_file(path) else 0
    return len(item) if isinstance(item, bytes) else 2**20


def _name(item: Any, position: int) -> str:
    source = item.source if isinstance(item, Segment) else item
    return str(source) if isinstance(source, (str, os.PathLike)) else f"audio[{position}]"
