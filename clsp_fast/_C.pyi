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

# Reads only the header: (offset, channels, rate, frames), where frames is None if a FLAC header does not say;
# (offset,) if another decoder has to read the recording at this offset; or (reason, message).
def probe(source: Any) -> tuple[int, int, int, int | None] | tuple[int] | tuple[str, str]: ...

# Checks and resamples what another decoder has decoded.
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
    """(score of each text, best score of each audio, its text); infinity and -1 for an audio without text."""

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
) -> None: ...
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
    """Updates scores and index (Q, K) with rows; returns the first row that is not finite, or None."""

# Rows and columns of a tile, rows and columns of a panel.
LOGIT_TILES: tuple[int, int, int, int]

# The owners are int64; all other arrays are float32, or all are float64; all are C-contiguous. `out` and
# `d_out` are (rows, columns): the sums and their gradients. `kept` holds the logits of the first rows of
# tiles, as many as fit. The results do not depend on the number of threads, bit for bit.
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
    """Fills d_audio and d_text, one of which may be empty; returns the gradients by scale and bias."""

def resampled_size(samples: int, from_hz: int, to_hz: int) -> int: ...
def frame_count(samples: int) -> int: ...
def mel_matrix() -> _Float32: ...
def povey_window() -> _Float32: ...
def instruction_sets() -> list[str]: ...
