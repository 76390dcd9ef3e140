"""Writes the seed corpus of the fuzz target: python tests/fuzz/seeds.py FOLDER wav|flac|all."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_flac import encode, random_stream, tones

SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW")
REQUESTS = (bytes(4), bytes([0, 0, 1, 0]), bytes([133, 0, 0, 1]), bytes([128, 135, 5, 2]))


def wav(container: str, subtype: str, channels: int, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tones(900, channels), rate, format=container, subtype=subtype)
    return file.getvalue()


def main(folder: Path, kind: str) -> None:
    files = []
    if kind != "flac":
        files += [
            wav(container, subtype, channels, rate)
            for container in ("WAV", "WAVEX")
            for subtype in SUBTYPES
            for channels, rate in ((1, 16000), (3, 22050))
        ]
    if kind != "wav":
        files += [random_stream(seed)[0] for seed in range(100)]
        files += [
            encode(tones(2000, channels), subtype, level)
            for subtype in ("PCM_16", "PCM_24")
            for channels in (1, 2)
            for level in (0.0, 0.625, 1.0)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, data in enumerate(files):
        (folder / f"seed-{i}").write_bytes(REQUESTS[rng.integers(len(REQUESTS))] + data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
