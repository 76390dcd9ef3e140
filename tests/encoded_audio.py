"""Recordings in memory, encoded by soundfile, and what becomes of them."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from numpy.typing import NDArray

from clsp_fast import audio
from clsp_fast.audio import AudioError, load_batch

RATE = 16000
SAMPLES = 8000
ID3 = b"ID3\4\0\0\0\0\1\0" + b"t" * 128
# What may lie between two recordings that are joined: more bytes than decoders search for a frame.
GAPS = {
    f"{count} {kind}": bytes(count) if kind == "zeros" else np.random.default_rng(3).bytes(count)
    for count in (66_000, 100_000, 1_500_000)
    for kind in ("zeros", "random")
}


def noise(samples: int = SAMPLES, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    x = 0.2 * np.random.default_rng(seed).standard_normal((samples, channels))
    return x.clip(-0.9, 0.9)


def encode(
    kind: str, subtype: str | None = None, x: NDArray[np.float64] | None = None, **options: object
) -> bytes:
    file = io.BytesIO()
    x = noise() if x is None else x
    soundfile.write(file, x, options.pop("rate", RATE), format=kind, subtype=subtype, **options)
    return file.getvalue()


def by_soundfile(encoded: bytes) -> NDArray[np.float32]:
    return np.asarray(soundfile.read(io.BytesIO(encoded), dtype="float32")[0])


def samples_or_reason(source: object, **part: float) -> NDArray[np.float32] | str:
    """The samples of a recording, or the reason why it was refused."""
    (got,) = load_batch([audio.Segment(source, **part)], num_threads=1)  # type: ignore[arg-type]
    if isinstance(got, AudioError):
        assert len(got.detail) > 8
        return got.reason.value
    return got
