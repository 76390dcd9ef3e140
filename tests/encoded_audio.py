"""Recordings that soundfile encodes in memory, and what soundfile and clsp_fast decode from them."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from clsp_fast import audio
from clsp_fast.audio import AudioError, load_batch

RATE = 16000
SAMPLES = 8000
ID3 = b"ID3\4\0\0\0\0\1\0" + b"t" * 128
# Bytes between two joined recordings: more than decoders search for a frame.
GAPS = {
    f"{count} {kind}": bytes(count) if kind == "zeros" else np.random.default_rng(3).bytes(count)
    for count in (66_000, 100_000, 1_500_000)
    for kind in ("zeros", "random")
}


def noise(samples: int = SAMPLES, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    x = 0.2 * np.random.default_rng(seed).standard_normal((samples, channels))
    return x.clip(-0.9, 0.9)


def mono_noise(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encode_samples(
    x: NDArray[Any], kind: str = "WAV", subtype: str | None = None, rate: int = RATE, **options: Any
) -> bytes:
    """A file of this kind with the samples `x`."""
    file = io.BytesIO()
    soundfile.write(file, x, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


def encode(
    kind: str, subtype: str | None = None, x: NDArray[np.float64] | None = None, **options: Any
) -> bytes:
    """A file of this kind with the samples `x`, or with noise."""
    return encode_samples(noise() if x is None else x, kind, subtype, **options)


def chunk(tag: bytes, body: bytes, size: int | None = None, pad: bool = True) -> bytes:
    """A chunk of RIFF. Its header states the size of the body, or `size`."""
    size = len(body) if size is None else size
    return tag + struct.pack("<I", size) + body + b"\0" * (len(body) % 2 if pad else 0)


def by_soundfile(encoded: bytes) -> NDArray[np.float32]:
    return np.asarray(soundfile.read(io.BytesIO(encoded), dtype="float32")[0])


def samples_or_reason(source: object, **part: float) -> NDArray[np.float32] | str:
    """The samples of a recording, or the reason why it was refused."""
    (result,) = load_batch([audio.Segment(source, **part)], num_threads=1)  # type: ignore[arg-type]
    if isinstance(result, AudioError):
        assert len(result.detail) > 8
        return result.reason.value
    return result
