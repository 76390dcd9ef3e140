"""Calls leave neither memory nor file handles behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from peak_memory import release_freed_memory, status_bytes

from clsp_fast.audio import AudioError, load, resample
from clsp_fast.features import extract, extract_files

CALLS = 10_000
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WAVE = (0.1 * np.random.default_rng(0).standard_normal(1600)).astype(np.float32)


def resident_bytes() -> int:
    release_freed_memory()
    return status_bytes("VmRSS")


def open_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def growth(call: Callable[[], object], calls: int) -> tuple[int, int]:
    """How many bytes and handles the process gains in `calls` calls, after `calls` / 10 calls to warm up."""
    for _ in range(calls // 10):
        call()
    before = resident_bytes(), open_handles()
    for _ in range(calls):
        call()
    return resident_bytes() - before[0], open_handles() - before[1]


def refused(path: Path) -> None:
    with pytest.raises(AudioError):
        load(path)


@pytest.fixture
def calls(tmp_path: Path) -> dict[str, Callable[[], object]]:
    good, flac, ogg = tmp_path / "a.wav", tmp_path / "a.flac", tmp_path / "a.ogg"
    bad, missing = tmp_path / "b.wav", tmp_path / "none.wav"
    for path in (good, flac, ogg):
        soundfile.write(path, WAVE, 24000)
    bad.write_bytes(good.read_bytes()[:40])
    data = good.read_bytes()
    return {
        "extract": lambda: extract([WAVE, WAVE[:800]], num_threads=1),
        "threads": lambda: extract([WAVE] * 2, num_threads=2, sample_rate=8000),
        "files": lambda: extract_files([good, data, flac, bad, missing], num_threads=2, on_error="skip"),
        "refused": lambda: refused(bad),
        "resample": lambda: resample(WAVE, from_hz=44100, to_hz=16000),
        "ogg": lambda: load(ogg),
    }


@pytest.mark.parametrize("name", ["extract", "threads", "files", "refused", "resample", "ogg"])
def test_no_call_leaves_memory_or_handles(name: str, calls: dict[str, Callable[[], object]]) -> None:
    # libsndfile takes a hundred times as long as the engine for this clip.
    grown_bytes, grown_handles = growth(calls[name], CALLS // 10 if name == "ogg" else CALLS)
    assert grown_bytes < 5e6
    assert grown_handles == 0


def test_a_leak_would_be_seen() -> None:
    leaked: list[object] = []
    assert growth(lambda: leaked.append(bytes(1000)), CALLS)[0] > 5e6
    files: list[object] = []
    assert growth(lambda: files.append(Path(os.devnull).open()), 50)[1] == 50  # noqa: SIM115
    for file in files:
        file.close()  # type: ignore[attr-defined]
