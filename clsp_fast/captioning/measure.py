"""Measures recordings: F0, level, speaking rate, pauses, voice quality, formants, and how they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clsp_fast import _C, audio
from clsp_fast.captioning.measure_reference import measure_reference
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
    "measure_rows",
    "measurement_of",
    "sex_score",
    "speaker_sex",
    "track",
    "voice_quality",
]


_PARTS = 6  # the whole, two halves, three thirds


def _check(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not isinstance(waveform, np.ndarray) or waveform.dtype != np.float32 or waveform.ndim != 1:
        kind = f"{getattr(waveform, 'dtype', type(waveform).__name__)} {getattr(waveform, 'shape', '')}"
        raise ValueError(f"a waveform must be a float32 array of shape (samples,) at 16 kHz, got {kind}")
    return np.require(waveform, requirements=["C", "A"])


def track(waveform: npt.NDArray[np.float32]) -> Track:
    """F0, strength and level of each frame of a mono waveform at 16 kHz.

    Raises:
        ValueError: the waveform is not a float32 array of one dimension, or a sample is not finite.
    """
    f0_hz, strength, level_db = _C.track_voice(_check(waveform))
    return Track(f0_hz=f0_hz, strength=strength, level_db=level_db)


def measure(
    waveforms: Sequence[npt.NDArray[np.float32]], *, num_threads: int | None = None
) -> list[Measurement]:
    """Measures mono waveforms at 16 kHz. The result does not depend on the threads or on other waveforms.

    Args:
        waveforms: float32 (samples,) each.
        num_threads: threads of the engine; None: one for each usable core.

    Raises:
        ValueError: a waveform is not a float32 array of one dimension, or a sample is not finite.
    """
    return [measurement_of(row) for row in measure_rows(waveforms, num_threads=num_threads)]


def measure_rows(
    waveforms: Sequence[npt.NDArray[np.float32]], *, num_threads: int | None = None
) -> npt.NDArray[np.float64]:
    """Measurements as an array, which takes little room: one row for each waveform.

    Args, Raises: as `measure`.
    """
    threads = audio.check_num_threads(num_threads)
    values = _C.measure_voices([_check(waveform) for waveform in waveforms], num_threads=threads)
    durations_s = [[len(waveform) / SAMPLE_RATE_HZ] for waveform in waveforms]
    return np.hstack([np.array(durations_s).reshape(-1, 1), values])


def measurement_of(row: npt.NDArray[np.float64]) -> Measurement:
    """The measurement in a row of `measure_rows`."""
    duration_s, *values = row.tolist()
    width = len(_C.VOICE_PART_FIELDS)
    whole, *parts = (_part(values[i * width : (i + 1) * width]) for i in range(_PARTS))
    f1, f2, f3, f4, bandwidth_hz, snr_db = values[_PARTS * width :]
    return Measurement(
        duration_s=duration_s,
        whole=whole,
        halves=tuple(parts[:2]),
        thirds=tuple(parts[2:]),
        formants_hz=(f1, f2, f3, f4),
        bandwidth_hz=bandwidth_hz,
        snr_db=snr_db,
    )


def _part(values: list[float]) -> Part:
    named: dict[str, Any] = dict(zip(_C.VOICE_PART_FIELDS, values, strict=True))
    return Part(**named | {name: int(named[name]) for name in ("nuclei", "voiced_nuclei", "pauses")})
