"""Measures recordings: F0, level, speaking rate, pauses, voice quality, formants, and how they change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clsp_fast.captioning.measure_reference import measure_reference, track_reference
from clsp_fast.captioning.measurement import (
    HOP_S,
    SAMPLE_RATE_HZ,
    Measurement,
    Part,
    Track,
    sex_score,
    speaker_sex,
    voice_quality,
)

__all__ = [
    "HOP_S",
    "SAMPLE_RATE_HZ",
    "Measurement",
    "Part",
    "Track",
    "measure",
    "measure_reference",
    "sex_score",
    "speaker_sex",
    "track",
    "voice_quality",
]


def _check(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not isinstance(waveform, np.ndarray) or waveform.dtype != np.float32 or waveform.ndim != 1:
        kind = f"{getattr(waveform, 'dtype', type(waveform).__name__)} {getattr(waveform, 'shape', '')}"
        raise ValueError(f"a waveform must be a float32 array of shape (samples,) at 16 kHz, got {kind}")
    if not np.isfinite(waveform).all():
        raise ValueError("a waveform must be finite")
    return waveform


def track(waveform: npt.NDArray[np.float32]) -> Track:
    """F0, strength and level of each frame of a mono waveform at 16 kHz.

    Raises:
        ValueError: the waveform is not a finite float32 array of one dimension.
    """
    return track_reference(_check(waveform))


def measure(
    waveforms: Sequence[npt.NDArray[np.float32]], *, num_threads: int | None = None
) -> list[Measurement]:
    """Measures mono waveforms at 16 kHz, one `Measurement` each.

    Raises:
        ValueError: a waveform is not a finite float32 array of one dimension.
    """
    return [measure_reference(_check(waveform)) for waveform in waveforms]
