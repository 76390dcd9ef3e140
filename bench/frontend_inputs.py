"""Inputs of the frontend cases, made from a seed, and a reference of the resampler."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000
SUBTYPES = {"s16": "PCM_16", "s24": "PCM_24", "s32": "PCM_32", "f32": "FLOAT"}


def speech(seconds: float, rate_hz: int = RATE_HZ, seed: int = 0) -> np.ndarray:
    """Mono float32 that resembles speech: voiced syllables with a moving pitch, unvoiced ones, pauses."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    pitch_hz = 120 + 30 * np.sin(2 * np.pi * 0.4 * time_s + seed)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    voiced = sum(np.sin(k * phase) / k for k in range(1, 30) if k * 150 < rate_hz / 2)
    syllable = np.sin(2 * np.pi * 2.2 * time_s)
    spoken = np.sin(2 * np.pi * 0.15 * time_s) > -0.8
    noise = rng.standard_normal((2, len(time_s)))
    wave = spoken * syllable.clip(0) * 0.12 * voiced + (-syllable).clip(0) * 0.02 * noise[0] + 1e-4 * noise[1]
    return wave.astype(np.float32)


@dataclass
class Recording:
    """A file in a folder that is deleted with this object."""

    path: str
    rate_hz: int
    folder: tempfile.TemporaryDirectory = field(repr=False)  # type: ignore[type-arg]


def recording(kind: str, rate_hz: int, seconds: float = 10.0) -> Recording:
    """Writes `speech` as "s16", "s24", "s32", "f32" (WAV), "flac", "mp3" or "ogg"."""
    folder = tempfile.TemporaryDirectory(prefix="clsp-bench-")
    path = Path(folder.name) / f"speech.{'wav' if kind in SUBTYPES else kind}"
    soundfile.write(path, speech(seconds, rate_hz), rate_hz, subtype=SUBTYPES.get(kind))
    return Recording(str(path), rate_hz, folder)


@dataclass
class Recordings:
    """Files in a folder that is deleted with this object."""

    paths: list[str]
    folder: tempfile.TemporaryDirectory = field(repr=False)  # type: ignore[type-arg]


def recordings(count: int, shortest_s: float, longest_s: float) -> Recordings:
    """WAV files of 16 bits at 16 kHz, of different lengths."""
    folder = tempfile.TemporaryDirectory(prefix="clsp-bench-")
    paths = [str(Path(folder.name) / f"{i}.wav") for i in range(count)]
    for i, (path, seconds) in enumerate(zip(paths, np.linspace(shortest_s, longest_s, count), strict=True)):
        soundfile.write(path, speech(float(seconds), seed=i), RATE_HZ, subtype="PCM_16")
    return Recordings(paths, folder)


@dataclass
class Waveform:
    samples: np.ndarray
    rate_hz: int


def resampled(waveform: Waveform) -> np.ndarray:
    """The definition of `audio.resample` in float64, phase by phase: all taps, and zeros beyond both ends."""
    divisor = np.gcd(waveform.rate_hz, RATE_HZ)
    step, phases = waveform.rate_hz // divisor, RATE_HZ // divisor
    base = min(step, phases) * 0.99
    reach = int(np.ceil(6 * step / base))
    count = round(len(waveform.samples) * RATE_HZ / waveform.rate_hz)
    tap = np.arange(-reach, reach + step)
    padded = np.pad(waveform.samples.astype(np.float64), (reach, reach + step))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(tap))[::step]
    output = np.empty(count)
    for phase in range(phases):
        t = np.clip((tap / step - phase / phases) * base, -6, 6)
        filter_ = base / step * np.sinc(t) * np.cos(np.pi * t / 12) ** 2
        phase_output = output[phase::phases]
        phase_output[:] = windows[: len(phase_output)] @ filter_
    return output
