"""The compiled engine. Private: `audio`, `features`, `loss` and `similarity` are its public interface."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Float32 = NDArray[np.float32]

__version__: str

class LoadPolicy:
    def __init__(
        self,
        *,
        sample_rate_hz: int,
        min_s: float,
        max_s: float,
        slack_s: float,
        min_rate_hz: int,
        max_rate_hz: int,
        max_channels: int,
        max_amplitude: float,
    ) -> None: ...

# A source is (path or buffer, start_s, duration_s, channel). A duration of None means "up to the end", a
# channel of None "the mean over channels". The result for a source that failed is (reason, message).
def load_batch(
    sources: Sequence[tuple[Any, float, float | None, int | None]],
    *,
    policy: LoadPolicy,
    num_threads: int,
    isa: str = "auto",
) -> list[_Float32 | tuple[str, str]]: ...

# Reads only the header. Returns (offset, channels, rate, frames), where frames is None if a FLAC header does
# not state it; (offset,) if another decoder has to read the recording at this offset; or (reason, message).
def probe(source: Any) -> tuple[int, int, int, int | None] | tuple[int] | tuple[str, str]: ...

# Checks and resamples the output of another decoder.
def finish(waveform: _Float32, *, sample_rate_hz: int, policy: LoadPolicy) -> _Float32 | tuple[str, str]: ...

# (first frame, number of frames) of a part, or (reason, message).
def select_section(
    channels: int,
    sample_rate_hz: int,
    frames: int,
    start_s: float,
    duration_s: float | None,
    channel: int | None,
    policy: LoadPolicy,
) -> tuple[int, int] | tuple[str, str]: ...
def resample_batch(
    waveforms: Sequence[_Float32], *, from_hz: int, to_hz: int, num_threads: int = 1, isa: str = "auto"
) -> list[_Float32]: ...
def fbank_batch(
    waveforms: Sequence[_Float32],
    out: _Float32,
    *,
    padded_size: int = 0,
    num_threads: int = 1,
    isa: str = "auto",
) -> None: ...

# Each score is one chain of multiply-adds, so that equal rows have equal scores, bit for bit.
def rank_targets(
    audio: _Float32, text: _Float32, owner: NDArray[np.int32], *, num_threads: int, isa: str = "auto"
) -> tuple[_Float32, _Float32, NDArray[np.int32]]:
    """Text j describes audio owner[j]. Returns (score of each text with its audio, best score of each audio
    with its texts, index of that text). An audio without text gets infinity and -1."""

def count_ahead(
    audio: _Float32,
    text: _Float32,
    *,
    first_text: int,
    audio_targets: tuple[_Float32, NDArray[np.int32]],
    text_targets: tuple[_Float32, NDArray[np.int32]],
    audio_ahead: NDArray[np.int64],
    text_ahead: NDArray[np.int64],
    num_threads: int,
    isa: str = "auto",
) -> None:
    """Adds to audio_ahead and text_ahead the number of items with a higher score than the target's, or with
    the same score and a smaller index. `text` begins at `first_text` of all texts."""

def update_best(
    queries: _Float32,
    rows: _Float32,
    *,
    first_row: int,
    scores: _Float32,
    index: NDArray[np.int64],
    num_threads: int,
    isa: str = "auto",
) -> int | None:
    """Updates the best scores and indices (Q, K) with rows. Returns the first non-finite row, or None."""

# Rows and columns of a tile; rows and columns of a panel.
LOGIT_TILES: tuple[int, int, int, int]

# `owner` is int64. The other arrays are all float32 or all float64. All are C-contiguous. `out` holds the
# sums (of rows, of columns), and `d_out` their gradients. `kept` is filled with the logits of the first rows
# of tiles; its size limits their number. The results do not depend on the number of threads, bit for bit.
def sum_negatives(
    kind: str,
    audio: NDArray[Any],
    text: NDArray[Any],
    owner: NDArray[Any],
    scale: float,
    bias: float,
    out: tuple[NDArray[Any], ...],
    kept: NDArray[Any],
    *,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
def sum_negatives_backward(
    kind: str,
    audio: NDArray[Any],
    text: NDArray[Any],
    owner: NDArray[Any],
    scale: float,
    bias: float,
    out: tuple[NDArray[Any], ...],
    d_out: tuple[NDArray[Any], ...],
    kept: NDArray[Any],
    d_audio: NDArray[Any],
    d_text: NDArray[Any],
    *,
    num_threads: int,
    isa: str = "auto",
) -> tuple[float, float]:
    """Fills d_audio and d_text; one of them may be empty. Returns the gradients for scale and bias."""

def resampled_size(samples: int, from_hz: int, to_hz: int) -> int: ...
def frame_count(samples: int) -> int: ...
def mel_matrix() -> _Float32: ...
def povey_window() -> _Float32: ...
def instruction_sets() -> list[str]: ...

# Names of the values of a part, in order.
VOICE_PART_FIELDS: tuple[str, ...]

def measure_voices(
    waveforms: Sequence[_Float32], *, num_threads: int, isa: str = "auto"
) -> NDArray[np.float64]:
    """One row for each waveform: the values of the whole, of two halves and of three thirds, then four
    formants, bandwidth and SNR."""

def track_voice(
    waveform: _Float32, *, isa: str = "auto"
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(F0, strength, level) of each frame."""
