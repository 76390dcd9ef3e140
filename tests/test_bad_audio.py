"""Bad recordings: each is refused with its reason, and none crashes, hangs or allocates much memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from encoded_audio import RATE, encode_samples
from peak_memory import peak_memory

from clsp_fast.audio import AudioError, AudioLimits, Segment, load, load_batch
from clsp_fast.features import extract_files


def encode(samples: int = 8000, kind: str = "WAV", subtype: str | None = None, channels: int = 1) -> bytes:
    x = 0.2 * np.random.default_rng(samples).standard_normal((samples, channels))
    return encode_samples(x.clip(-0.9, 0.9), kind, subtype)


def patch(data: bytes, offset: int, layout: str, *values: float) -> bytes:
    """`data` with values written at `offset`."""
    out = bytearray(data)
    struct.pack_into(layout, out, offset, *values)
    return bytes(out)


WAV, FLOAT, FLAC, MP3 = encode(), encode(subtype="FLOAT"), encode(kind="FLAC"), encode(64000, "MP3")
DATA = FLOAT.index(b"data") + 8


def flac_with_total(total: int, rate: int | None = None, channels: int | None = None) -> bytes:
    """FLAC with other values in STREAMINFO: 20 bits of rate, 3 of channels, 5 of width, 36 of length."""
    fields = int.from_bytes(FLAC[18:26], "big")
    fields = fields >> 36 << 36 | total
    if rate is not None:
        fields = fields & ~(0xFFFFF << 44) | rate << 44
    if channels is not None:
        fields = fields & ~(7 << 41) | (channels - 1) << 41
    return FLAC[:18] + fields.to_bytes(8, "big") + FLAC[26:]


CASES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "empty"),
    "no samples": (encode(0), "empty"),
    "no samples in aiff": (encode(0, "AIFF"), "empty"),
    "text": (b"Dear Sir or Madam,\n" * 50, "format"),
    "zeros": (bytes(5000), "format"),
    "pickle": (b"\x80\x04\x95" + bytes(500), "format"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(500), "format"),
    "riff but no wave": (b"RIFF\x10\0\0\0AVI " + bytes(500), "format"),
    "header only": (WAV[:12], "format"),
    "half a format chunk": (WAV[:24], "format"),
    "no data chunk": (WAV[:36], "format"),
    "data before format": (WAV[:12] + WAV[36:] + WAV[12:36], "format"),
    "adpcm": (patch(WAV, 20, "<H", 2), "format"),
    "mp3 in wav": (patch(WAV, 20, "<H", 0x55), "format"),
    "40 bits": (patch(WAV, 34, "<H", 40), "format"),
    "0 bits": (patch(WAV, 34, "<H", 0), "format"),
    "0 channels": (patch(WAV, 22, "<H", 0), "channels"),
    "200 channels": (patch(patch(WAV, 22, "<H", 200), 32, "<H", 400), "channels"),
    "rate 0": (patch(WAV, 24, "<I", 0), "rate"),
    "rate 4 GHz": (patch(WAV, 24, "<I", 0xFFFFFFFF), "rate"),
    "79 samples": (encode(79), "too_short"),
    "79 samples in flac": (encode(79, "FLAC"), "too_short"),
    "nan": (patch(FLOAT, DATA + 400, "<f", float("nan")), "non_finite"),
    "infinite": (patch(FLOAT, DATA + 400, "<f", float("-inf")), "non_finite"),
    "last is nan": (patch(FLOAT, len(FLOAT) - 4, "<f", float("nan")), "non_finite"),
    "nan in au": (patch(encode(kind="AU", subtype="FLOAT"), 64, ">f", float("nan")), "non_finite"),
    "int16 scale": (patch(FLOAT, DATA, "<f", 20000.0), "amplitude"),
    "double beyond float": (patch(encode(subtype="DOUBLE"), DATA, "<d", 1e300), "non_finite"),
    "flac cut": (FLAC[: len(FLAC) // 2], "truncated"),
    "mp3 cut": (MP3[: len(MP3) // 2], "truncated"),
    "flac header only": (FLAC[:42], "truncated"),
    "flac magic only": (FLAC[:4], "format"),
    "ogg cut in its head": (encode(kind="OGG")[:100], "format"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_has_its_reason(name: str, tmp_path: Path) -> None:
    data, reason = CASES[name]
    path = tmp_path / "recording"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(AudioError) as caught:
            load(source)
        assert caught.value.reason.value == reason, caught.value
        assert len(caught.value.detail) > 8


def test_paths_that_are_no_files_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.wav").write_bytes(WAV)
    places = [
        tmp_path / "missing.wav",
        tmp_path,
        tmp_path / "pipe",
        "/dev/null",
        str(tmp_path / "secret.wav") + "\0x",
    ]
    result = load_batch(places, num_threads=1)
    assert [item.reason.value for item in result if isinstance(item, AudioError)] == ["open"] * len(places)
    assert "No such file" in str(result[0])


BOMBS: dict[str, tuple[bytes, str]] = {
    **{f"flac of 2^{bits} samples": (flac_with_total(1 << bits), "too_long") for bits in range(26, 36)},
    "flac of 2^36 - 1 samples": (flac_with_total((1 << 36) - 1), "too_long"),
    "flac just below the limit": (flac_with_total(3600 * RATE), "truncated"),
    "flac at 655 kHz": (flac_with_total(1 << 35, rate=655350), "rate"),
    "flac with 8 channels": (flac_with_total(1 << 35, channels=8), "too_long"),
    "aiff": (patch(encode(kind="AIFF"), encode(kind="AIFF").index(b"COMM") + 10, ">I", 0xFFFFFFFF), ""),
    "au": (patch(encode(kind="AU"), 8, ">I", 0xFFFFFFF0), ""),
    "w64": (patch(encode(kind="W64"), encode(kind="W64").index(b"data") + 16, "<Q", 1 << 62), ""),
    "rf64": (patch(encode(kind="RF64"), 28, "<Q", 1 << 62), ""),
    "wav": (patch(WAV, 40, "<I", 0xFFFFFFF0), ""),
    "wav of empty chunks": (WAV[:12] + b"junk\0\0\0\0" * 100_000 + WAV[12:], "format"),
    "ogg granule": (
        patch(encode(kind="OGG"), encode(kind="OGG").rindex(b"OggS") + 6, "<q", 1 << 60),
        "empty",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_header_bombs_neither_allocate_nor_hang(name: str) -> None:
    data, reason = BOMBS[name]
    load_batch([WAV], num_threads=1)  # the first call also loads libraries and tables
    tracemalloc.start()
    start = time.thread_time()
    try:
        with peak_memory() as resident:
            result = load_batch([data], num_threads=1)[0]
        reserved = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - start < 1
    assert reserved < 16e6  # allocated by numpy, used or not
    assert resident.bytes < 16e6  # used by C++ and Python
    if reason:
        assert isinstance(result, AudioError)
        assert result.reason.value == reason, result
    elif not isinstance(result, AudioError):  # cut to the samples that the file has
        assert 0 < len(result) <= 8000


def test_flac_of_unknown_length_is_accepted(tmp_path: Path) -> None:
    data = flac_with_total(0)
    (tmp_path / "stream.flac").write_bytes(data)
    expected = load(FLAC)
    assert np.array_equal(load(data), expected)
    assert np.array_equal(load(tmp_path / "stream.flac"), expected)
    assert np.array_equal(load(data, start_s=0.2, duration_s=0.1), expected[3200:4800])
    assert np.array_equal(load(data, limits=AudioLimits(max_s=0.5)), expected)
    for segment, limits, reason in (
        (Segment(data), AudioLimits(max_s=0.49), "too_long"),
        (Segment(data, start_s=0.3, duration_s=0.4), AudioLimits(), "truncated"),
        (Segment(data, start_s=9.0), AudioLimits(), "segment"),
        (Segment(data, start_s=1e300), AudioLimits(), "segment"),
    ):
        (result,) = load_batch([segment], limits=limits)
        assert isinstance(result, AudioError)
        assert result.reason.value == reason


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1), (48000, 1), (24000, 2)])
@pytest.mark.parametrize("tagged", [False, True])
def test_mp3_that_does_not_state_its_length_is_decoded_to_its_end(
    rate: int, channels: int, tagged: bool, tmp_path: Path
) -> None:
    """Encoders state the length in the first frame; streams and cut files lack this frame."""
    loud = 0.2 * np.random.default_rng(0).standard_normal((rate * 3, channels)).clip(-4, 4)
    loud[rate:] *= 1e-3  # so that the bit rate varies
    data = encode_samples(loud, "MP3", rate=rate)
    bare = data[data.index(data[:2], 40) :]
    assert b"Xing" not in bare
    assert b"Info" not in bare
    if tagged:
        bare = b"ID3\4\0\0\0\0\x23\1" + b"picture".ljust(0x23 * 128 + 1, b"\xff") + bare
    (tmp_path / "bare.mp3").write_bytes(bare)
    whole = load(bare, sample_rate=rate)
    assert 0 <= len(whole) - 3 * rate <= 4 * 1152
    assert np.array_equal(load(tmp_path / "bare.mp3", sample_rate=rate), whole)
    part = load(bare, sample_rate=rate, start_s=2.0, duration_s=0.5)
    assert np.array_equal(part, whole[2 * rate : 2 * rate + rate // 2])
    cut = load(bare[: len(bare) * 3 // 4], sample_rate=rate)
    assert rate / 2 < len(cut) < len(whole)
    (error,) = load_batch([bare], limits=AudioLimits(max_s=2.9))
    assert isinstance(error, AudioError)
    assert error.reason.value == "too_long"


def test_huge_numbers_cost_only_their_recording() -> None:
    ogg = encode(64000, "OGG")
    endless = ogg[: ogg.rindex(b"OggS")]  # states no length
    cases = [
        (Segment(endless, start_s=1e305), "segment"),
        (Segment(endless, duration_s=1e305), "truncated"),
        (Segment(MP3, start_s=1e305), "segment"),
        (Segment(FLAC, start_s=1e305), "segment"),
        ("half a pair \ud83d.wav", "open"),
    ]
    *bad, good = load_batch([*(source for source, _ in cases), WAV])
    assert [item.reason.value for item in bad if isinstance(item, AudioError)] == [why for _, why in cases]
    assert len(good) == 8000
    cut, good = load_batch([endless, WAV], limits=AudioLimits(max_s=1e300))
    assert isinstance(cut, AudioError)
    assert cut.reason.value == "truncated"
    assert len(good) == 8000


def test_good_recordings_of_a_bad_folder_are_not_lost(tmp_path: Path) -> None:
    for i, (data, _) in enumerate(CASES.values()):
        (tmp_path / f"{i}.bad").write_bytes(data)
    bad = sorted(tmp_path.iterdir())
    paths = [WAV, *bad[:20], FLAC, *bad[20:], tmp_path / "missing", MP3]
    result = extract_files(paths, on_error="skip", num_threads=2)
    assert result.kept.tolist() == [0, 21, len(paths) - 1]
    assert len(result.errors) == len(CASES) + 1
    assert bool(result.values.isfinite().all())


Mutation = Callable[[bytearray, np.random.Generator], None]


def flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def damage_header(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 5))):
        data[rng.integers(min(len(data), 64))] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)]))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[rng.integers(len(data)) :]


def drop_a_part(data: bytearray, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 200))]


def insert_noise(data: bytearray, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(data)))
    data[at:at] = rng.bytes(int(rng.integers(1, 200)))


def overwrite(data: bytearray, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(data)))
    noise = rng.bytes(int(rng.integers(1, 400)))
    data[at : at + len(noise)] = noise


MUTATIONS: list[Mutation] = [flip_bits, damage_header, cut, drop_a_part, insert_noise, overwrite]
SEEDS = [
    *(encode(3000, "WAV", s) for s in ("PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW")),
    encode(3000, "WAVEX", "PCM_32", channels=3),
    encode(3000, "FLAC"),
    encode(9000, "FLAC", "PCM_24", channels=2),
    encode(3000, "FLAC", "PCM_S8"),
    encode(3000, "OGG", "VORBIS"),
    encode(3000, "OGG", "OPUS"),
    encode(3000, "MP3"),
    encode(3000, "AIFF", "FLOAT"),
    encode(3000, "AU", "DOUBLE"),
    encode(3000, "CAF", "PCM_16", channels=2),  # codespell:ignore caf
    encode(3000, "W64", "FLOAT"),
    encode(3000, "RF64", "PCM_16"),
]


def check_mutants(first: int, count: int) -> None:
    """Mutants cause no crash, no hang and no other exception. Loaded samples are finite, in range, not empty.

    FLAC has checksums, so a damaged file is refused or gives exactly the original samples.
    """
    whole = [load(seed) for seed in SEEDS]
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        data = bytearray(SEEDS[number % len(SEEDS)])
        MUTATIONS[number // len(SEEDS) % len(MUTATIONS)](data, rng)
        start = time.thread_time()
        (result,) = load_batch([bytes(data)], num_threads=1)
        assert time.thread_time() - start < 1, number
        if isinstance(result, AudioError):
            assert result.reason.value not in ("open", "memory"), (number, result)
            continue
        assert result.dtype == np.float32
        assert 80 <= len(result) <= 3600 * RATE, number
        assert np.abs(result).max() <= 16, number
        if SEEDS[number % len(SEEDS)].startswith(b"fLaC"):
            assert np.array_equal(result, whole[number % len(SEEDS)]), number


@pytest.mark.parametrize("part", range(4))
def test_mutants(part: int) -> None:
    check_mutants(part * 150, 150)


@pytest.mark.fuzz
@pytest.mark.slow
def test_many_mutants() -> None:
    count = int(os.environ.get("CLSP_FUZZ", "0")) or 600
    check_mutants(10_000, count)
