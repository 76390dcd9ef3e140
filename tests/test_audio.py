"""Loading of recordings: formats, parts, kinds of sources, limits."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from encoded_audio import RATE, by_soundfile, chunk, encode_samples
from numpy.typing import NDArray

from clsp_fast import _C, audio
from clsp_fast.audio import AudioError, AudioErrorReason, AudioLimits, Segment, load, load_batch

Wave = NDArray[np.float32]


def noise(samples: int, channels: int = 1, seed: int = 0) -> Wave:
    x = 0.2 * np.random.default_rng(seed).standard_normal((samples, channels))
    return x.astype(np.float32).clip(-0.99, 0.99).squeeze(1) if channels == 1 else x.astype(np.float32)


def wav(body: bytes, *extra: bytes, size: int | None = None, tag: int = 1, bits: int = 16) -> bytes:
    """A mono WAV file at 16 kHz, written byte by byte, with `extra` chunks before its data."""
    width = bits // 8
    header = chunk(b"fmt ", struct.pack("<HHIIHH", tag, 1, RATE, RATE * width, width, bits))
    rest = b"WAVE" + header + b"".join(extra) + chunk(b"data", body, size)
    return b"RIFF" + struct.pack("<I", len(rest)) + rest


def reason_of(work: Callable[[], object]) -> str:
    with pytest.raises(AudioError) as caught:
        work()
    return caught.value.reason.value


SUBTYPES = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW"]


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", SUBTYPES)
def test_wav_is_bit_equal_to_soundfile(subtype: str, kind: str) -> None:
    data = encode_samples(noise(30011), kind, subtype)
    assert np.array_equal(load(data), by_soundfile(data))
    stereo = encode_samples(noise(7001, 2), kind, subtype)
    both = by_soundfile(stereo)
    assert np.array_equal(load(stereo, channel=0), both[:, 0])
    assert np.array_equal(load(stereo, channel=1), both[:, 1])
    assert np.array_equal(load(stereo), (both[:, 0] + both[:, 1]) / 2)


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("subtype", SUBTYPES)
def test_wav_of_every_short_length_is_bit_equal_to_soundfile(subtype: str, isa: str) -> None:
    """Lengths with and without whole vectors of samples. No byte after the last sample is read."""
    policy = audio._policy(AudioLimits(min_s=0), RATE)
    for channels in (1, 2, 3):
        frames = noise(64 * channels, seed=channels).reshape(64, channels)
        files = [encode_samples(frames[:n], subtype=subtype) for n in range(1, 65)]
        decoded = _C.load_batch([(f, 0.0, None, None) for f in files], policy=policy, num_threads=1, isa=isa)
        for file, result in zip(files, decoded, strict=True):
            expected = by_soundfile(file).reshape(-1, channels)
            total = sum(expected[:, c] for c in range(channels))
            assert np.array_equal(result, total / np.float32(channels))


@pytest.mark.parametrize(("tag", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (6, 8), (7, 8)])
def test_every_code_of_integer_wav_is_bit_equal_to_soundfile(tag: int, bits: int) -> None:
    width = bits // 8
    codes = np.arange(1 << min(bits, 16), dtype=np.uint64)
    values = codes << np.uint64(bits - min(bits, 16))
    if bits > 16:
        values |= np.random.default_rng(0).integers(0, 1 << (bits - 16), len(codes), np.uint64)
    body = values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    data = wav(body, tag=tag, bits=bits)
    assert np.array_equal(load(data), by_soundfile(data))


def test_five_channels_are_averaged() -> None:
    data = encode_samples(noise(4001, 5), subtype="FLOAT")
    assert np.allclose(load(data), by_soundfile(data).mean(axis=1), rtol=0, atol=np.finfo(np.float32).eps)
    assert np.array_equal(load(data, channel=4), by_soundfile(data)[:, 4])


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"),
        ("MP3", None),
        ("AIFF", "PCM_16"),
        ("AU", "FLOAT"),
        ("CAF", "PCM_24"),  # codespell:ignore caf
        ("W64", "PCM_16"),
        ("RF64", "PCM_16"),
    ],
)
def test_other_formats_are_what_soundfile_decodes(kind: str, subtype: str | None, tmp_path: Path) -> None:
    data = encode_samples(noise(20011), kind, subtype)
    path = tmp_path / "recording without a suffix"
    path.write_bytes(data)
    # soundfile seeks between its reads. After a seek the decoder starts its synthesis again, and rounds
    # differently.
    tolerance = 8 * np.finfo(np.float32).eps if kind == "MP3" else 0.0
    stereo = encode_samples(noise(20011, 2), kind, subtype)
    for result, expected in (
        (load(data), by_soundfile(data)),
        (load(path), by_soundfile(data)),
        (load(stereo), by_soundfile(stereo).mean(axis=1)),
        (load(stereo, channel=1), by_soundfile(stereo)[:, 1]),
    ):
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() <= tolerance


def test_opus_and_rates_are_resampled() -> None:
    data = encode_samples(noise(48000), "OGG", "OPUS", rate=48000)
    expected = audio.resample(by_soundfile(data), from_hz=48000, to_hz=16000)
    assert np.array_equal(load(data), expected)
    data = encode_samples(noise(44100), rate=44100)
    assert np.array_equal(load(data), audio.resample(by_soundfile(data), from_hz=44100, to_hz=16000))
    assert np.array_equal(load(data, sample_rate=44100), by_soundfile(data))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("start_s", [0.0, 0.3, 1.00003])
@pytest.mark.parametrize("duration_s", [None, 0.25, 0.77])
def test_a_part_is_the_same_as_in_the_whole(kind: str, start_s: float, duration_s: float | None) -> None:
    data = encode_samples(noise(32000, seed=3), kind)
    whole = load(data)
    first = round(start_s * RATE)
    last = len(whole) if duration_s is None else first + round(duration_s * RATE)
    part = load(data, start_s=start_s, duration_s=duration_s)
    assert np.array_equal(part, whole[first:last])
    assert np.array_equal(load(Segment(data, start_s, duration_s)), part)


def test_a_part_that_reaches_a_little_beyond_the_end_is_cut() -> None:
    data = encode_samples(noise(16000))
    assert len(load(data, start_s=0.5, duration_s=0.55)) == 8000
    assert reason_of(lambda: load(data, start_s=0.5, duration_s=0.65)) == "truncated"
    assert reason_of(lambda: load(data, start_s=1.0)) == "segment"


def test_a_part_of_a_long_recording_reads_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(wav(b"", size=0xFFFFFFFF))
        file.seek(2 * RATE * 30000, os.SEEK_CUR)
        file.write(np.arange(-8000, 8000, dtype="<i2").tobytes())
    start = time.process_time()
    result = load(path, start_s=30000.0, duration_s=1.0)
    assert np.array_equal(result, np.arange(-8000, 8000) / np.float32(32768))
    assert time.process_time() - start < 0.2
    assert reason_of(lambda: load(path)) == "too_long"


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFF00, 4001])
def test_the_data_size_of_a_stream_means_the_rest_of_the_file(size: int) -> None:
    samples = np.arange(2000, dtype="<i2")
    result = load(wav(samples.tobytes(), size=size))
    assert np.array_equal(result, samples / np.float32(32768))


def test_unknown_chunks_and_incomplete_frames_are_skipped() -> None:
    samples = np.arange(1000, dtype="<i2")
    data = wav(
        samples.tobytes() + b"\7", chunk(b"LIST", b"odd"), chunk(b"junk", b""), chunk(b"fact", b"1234")
    )
    assert np.array_equal(load(data + chunk(b"id3 ", b"tail")), samples / np.float32(32768))


def test_what_the_standard_library_writes_is_read() -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(np.arange(500, dtype="<i2").tobytes())
    assert np.array_equal(load(file.getvalue()), np.arange(500) / np.float32(32768))


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    x = noise(8000)
    data = encode_samples(x, subtype="FLOAT")
    path = tmp_path / "ä b.wav"
    path.write_bytes(data)
    with path.open("rb") as file:
        from_file = load(file)
    sources = [str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data)]
    for result in [
        from_file,
        *map(load, sources),
        load(x),
        load(x.astype(np.float64)),
        load(torch.from_numpy(x)),
    ]:
        assert result.dtype == np.float32
        assert result.flags.c_contiguous
        assert np.array_equal(result, x)


def test_waveforms_have_a_rate_and_parts() -> None:
    x = noise(48000)
    assert np.array_equal(load(x, source_rate=48000), audio.resample(x, from_hz=48000, to_hz=16000))
    assert np.array_equal(load(x, start_s=1.0, duration_s=0.5), x[16000:24000])
    with pytest.raises(ValueError, match="source_rate is for waveforms"):
        load(encode_samples(x), source_rate=48000)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            np.zeros(900, np.int16),
            TypeError,
            "source must be floating point in .* got int16; divide integers",
        ),
        (
            np.zeros((900, 2), np.float32),
            ValueError,
            r"source must have shape \(samples,\), got \(900, 2\)",
        ),
        ([0.0] * 900, TypeError, "source must be a numpy array or torch tensor, got list"),
        (io.StringIO("text"), TypeError, "must be opened in binary mode"),
        ("", ValueError, "source must not be an empty path"),
    ],
)
def test_wrong_sources_are_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_s": -1.0}, "start_s must be finite and >= 0"),
        ({"start_s": float("nan")}, "start_s must be finite and >= 0"),
        ({"duration_s": 0.0}, "duration_s must be None or finite and > 0"),
        ({"duration_s": float("inf")}, "duration_s must be None or finite and > 0"),
        ({"channel": -1}, "channel must be None or >= 0"),
        ({"sample_rate": 0}, "sample_rate must be 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(noise(900), **arguments)


def test_segments_are_complete() -> None:
    segment = Segment(noise(16000), start_s=0.5)
    with pytest.raises(ValueError, match="must be left out: the Segment has them"):
        load(segment, start_s=0.1)
    with pytest.raises(ValueError, match="must not be a Segment itself"):
        Segment(segment)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_s": 2.0, "max_s": 1.0},
        {"max_s": float("inf")},
        {"min_rate_hz": 0},
        {"max_rate_hz": 10**7},
        {"max_channels": 0},
        {"max_amplitude": 0.0},
        {"max_amplitude": 1e39},
        {"slack_s": -1.0},
    ],
)
def test_impossible_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need "):
        AudioLimits(**wrong)


def test_the_largest_amplitude_still_refuses_infinity() -> None:
    limits = AudioLimits(max_amplitude=3.4e38)
    x = noise(1000)
    x[7] = np.inf
    assert reason_of(lambda: load(x, limits=limits)) == "non_finite"


def test_views_that_are_not_aligned_are_copied() -> None:
    x = noise(1000)
    view = np.frombuffer(b"x" + x.tobytes(), np.float32, offset=1)
    assert not view.flags.aligned
    result = audio.as_waveform(view, "x")
    assert result.flags.aligned
    assert np.array_equal(result, x)
    assert audio.as_waveform(x, "x") is x


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "ARRAY"])
def test_limits_have_reasons(kind: str) -> None:
    def source(x: Wave, rate: int = RATE) -> Any:
        return x if kind == "ARRAY" else encode_samples(x, kind, rate=rate)

    assert reason_of(lambda: load(source(noise(16000)), limits=AudioLimits(max_s=0.9))) == "too_long"
    assert reason_of(lambda: load(source(noise(16000)), limits=AudioLimits(min_s=1.1))) == "too_short"
    assert reason_of(lambda: load(source(noise(79)))) == "too_short"
    assert len(load(source(noise(80)))) == 80
    assert len(load(source(noise(16000)), duration_s=0.5, limits=AudioLimits(max_s=0.6))) == 8000
    assert reason_of(lambda: load(source(noise(900)), channel=1)) == "channels"
    limits = AudioLimits(min_rate_hz=22050)
    assert reason_of(lambda: load(source(noise(900)), limits=limits)) == "rate"
    if kind != "ARRAY":
        assert (
            reason_of(lambda: load(source(noise(900, 3)), limits=AudioLimits(max_channels=2))) == "channels"
        )


def test_errors_name_file_reason_and_fix_and_survive_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(900, 20.0), RATE, subtype="FLOAT")
    with pytest.raises(AudioError) as caught:
        load(path)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.reason) == (str(path), AudioErrorReason.AMPLITUDE)
    assert str(error) == str(caught.value)
    assert "holds 20.000000 at sample 0; samples are in [-1, 1] and up to 16 is accepted: rescale it" in str(
        error
    )


def test_a_batch_returns_errors_in_place() -> None:
    x = noise(900)
    items = [
        encode_samples(x, subtype="FLOAT"),
        b"",
        encode_samples(x, "FLAC"),
        x,
        b"nothing",
        Segment(x, channel=2),
    ]
    for threads in (1, 4):
        result = load_batch(items, num_threads=threads)
        assert [isinstance(item, AudioError) for item in result] == [False, True, False, False, True, True]
        assert [item.reason.value for item in result if isinstance(item, AudioError)] == [
            "empty",
            "format",
            "channels",
        ]
        assert np.array_equal(result[0], x)
        assert np.array_equal(result[3], x)


def test_workers_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= audio.default_num_threads() <= 16
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert audio.default_num_threads() == 1


def test_ranks_of_a_machine_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert audio.default_num_threads() == 16
    for ranks, threads in ((2, 16), (8, 8), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert audio.default_num_threads() == threads


def test_files_are_closed() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        for data in (b"RIFF", encode_samples(noise(900), "FLAC")[:500]):
            reason_of(lambda data=data: load(data))
        reason_of(lambda: load(__file__))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
