"""The FLAC decoder: bit-equal to libsndfile and to streams written bit by bit, wherever it starts."""

from __future__ import annotations

import io
import time
from pathlib import Path

import flac_writer as w
import numpy as np
import pytest
import soundfile
from encoded_audio import RATE, encode_samples
from flac_writer import Rice
from numpy.typing import NDArray

from clsp_fast import sndfile
from clsp_fast.audio import AudioError, AudioLimits, Segment, load, load_batch


def encode(x: NDArray[np.float64], subtype: str = "PCM_16", level: float = 0.625, rate: int = RATE) -> bytes:
    return encode_samples(x, "FLAC", subtype, rate, compression_level=level)


def by_libsndfile(data: bytes) -> NDArray[np.float32]:
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return np.asarray(samples)


def tones(samples: int, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """Loud, quiet, silent and clipping parts: encoders predict some of them well and others not at all."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples)[:, None] / RATE
    x = 0.4 * np.sin(2 * np.pi * rng.uniform(80, 4000, channels) * t) * np.sin(2 * np.pi * 0.9 * t)
    x += np.exp(rng.uniform(-9, -1)) * rng.standard_normal((samples, channels))
    x[samples // 3 : samples // 2] = 0
    x[samples // 2 : samples // 2 + 99] *= 4
    return np.asarray(x.clip(-1, 0.9999))


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("level", [0.0, 0.25, 0.625, 1.0])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_equals_libsndfile(subtype: str, level: float, channels: int, tmp_path: Path) -> None:
    data = encode(tones(21011, channels), subtype, level)
    expected = by_libsndfile(data)
    path = tmp_path / "recording"
    path.write_bytes(data)
    for source in (data, path):
        mean = load(source, limits=AudioLimits(max_channels=8))
        if channels <= 2:
            assert np.array_equal(mean, expected.mean(axis=1))
        assert np.allclose(mean, expected.mean(axis=1), rtol=0, atol=np.finfo(np.float32).eps)
    for channel in range(channels):
        assert np.array_equal(load(data, channel=channel), expected[:, channel])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000, 12345])
@pytest.mark.parametrize("samples", [81, 4096, 4097, 30000])
def test_rates_and_lengths(rate: int, samples: int) -> None:
    data = encode(tones(max(samples, rate // 200 + 1), 2), rate=rate)
    limits = AudioLimits(max_rate_hz=192000)
    assert np.array_equal(load(data, sample_rate=rate, limits=limits), by_libsndfile(data).mean(axis=1))


def random_coding(rng: np.random.Generator, largest: int, block: int, order: int) -> Rice:
    parts = [p for p in range(5) if block % (1 << p) == 0 and block >> p > order]
    part = int(rng.choice(parts))
    bits = largest.bit_length() + 1
    if rng.random() < 0.25 and bits < 32:
        return Rice(order=part, raw=bits, wide=bool(rng.random() < 0.5))
    wide = bool(rng.random() < 0.5) or bits > 18
    lowest = max(0, bits - 7)  # large quotients, so that some codes are long
    return Rice(int(rng.integers(lowest, min(30 if wide else 14, lowest + 8) + 1)), part, wide)


def random_subframe(rng: np.random.Generator, x: list[int], width: int) -> str:
    wasted = min((v & -v).bit_length() - 1 if v else 40 for v in x)
    wasted = min(wasted, width - 1) if rng.random() < 0.8 else 0
    if len(set(x)) == 1 and rng.random() < 0.8:
        return w.constant(x, width, wasted)
    kept = [v >> wasted for v in x]
    shift, precision = int(rng.integers(0, 15)), int(rng.integers(2, 16))
    order = int(rng.choice([1, 2, 4, 5, 8, 12, 13, 16, 20, 27, 32]))
    order = min(order, len(x) - 1)
    weights = [int(v) for v in rng.integers(-(1 << precision - 1), 1 << precision - 1, order)]
    for taps in ([weights] if order and rng.random() < 0.7 else []) + [int(rng.integers(min(5, len(x))))]:
        order = taps if isinstance(taps, int) else len(taps)
        scale = 0 if isinstance(taps, int) else shift
        residuals = w.residuals_of(kept, w.FIXED[taps] if isinstance(taps, int) else taps, scale)
        largest = max((abs(r) for r in residuals), default=0)
        if largest < 1 << 30:
            coding = random_coding(rng, largest, len(x), order)
            return w.predicted(x, width, taps, coding, shift=scale, precision=precision, wasted=wasted)
    return w.verbatim(x, width, wasted)


def random_samples(rng: np.random.Generator, block: int, bits: int) -> list[int]:
    full = 1 << bits - 1
    kind = rng.integers(5)
    if kind == 0:
        return [int(rng.integers(-full, full))] * block
    if kind == 1:
        return [int(v) for v in rng.choice([-full, full - 1, 0, -1], block)]
    size = full * 2.0 ** -rng.integers(1, bits)
    noise = rng.standard_normal(block) * max(size, 1) / 8
    if kind == 2:
        noise = np.cumsum(noise) / 4
    step = 1 << int(rng.integers(0, bits // 2)) if kind == 3 else 1
    return [int(v) // step * step for v in noise.clip(-full, full - 1)]


def random_stream(seed: int) -> tuple[bytes, NDArray[np.float64], int]:
    """A file with random features of the format, its samples (channels, n) as integers, and their bits."""
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([4, 8, 12, 16, 20, 24, 31, 32]))
    channels = int(rng.choice([1, 1, 2, 2, 2, 3, 8]))
    variable = bool(rng.random() < 0.5)
    first = int(rng.choice([0, 0, 100, 5000, 70000, 1 << 30]))  # cut from a longer stream
    fixed = int(rng.choice([16, 96, 192, 333]))
    rates = [(0, ""), (5, ""), (12, w.number(16, 8)), (13, w.number(RATE, 16)), (14, w.number(1600, 16))]
    frames, pieces, position = [], [], 0
    for i in range(5):
        block = int(rng.choice([1, 17, 96, 192, 256, 512])) if variable else fixed
        x = [random_samples(rng, block, bits) for _ in range(channels)]
        stereo = str(rng.choice(list(w.STEREO))) if channels == 2 and rng.random() < 0.75 else None
        side = [a - b for a, b in zip(x[0], x[-1], strict=True)]
        mid = [a + b >> 1 for a, b in zip(x[0], x[-1], strict=True)]
        held = {"left/side": [x[0], side], "side/right": [side, x[-1]], "mid/side": [mid, side]}
        coded = held.get(stereo or "", x)
        subframes = [random_subframe(rng, c, bits + (c is side)) for c in coded]
        index = first + (position if variable else i)
        size_code = {8: 1, 12: 2, 16: 4, 20: 5, 24: 6, 32: 7}.get(bits, 0) if rng.random() < 0.7 else 0
        frames.append(
            w.frame(
                subframes,
                block,
                index,
                stereo=stereo,
                variable=variable,
                size_code=size_code,
                rate_bits=rates[rng.integers(5)],
            )
        )
        pieces.append(np.array(x, np.float64))
        position += block
    total = position if rng.random() < 0.7 else 0
    kinds = [(int(k), rng.bytes(int(rng.integers(0, 300)))) for k in rng.integers(1, 127, rng.integers(0, 4))]
    data = w.stream(frames, channels=channels, bits=bits, total=total, metadata=kinds)
    return data, np.concatenate(pieces, axis=1), bits


@pytest.mark.parametrize("part", range(4))
def test_every_feature_of_the_format(part: int) -> None:
    limits = AudioLimits(min_s=0.0, max_channels=8)
    for seed in range(part * 40, part * 40 + 40):
        data, truth, bits = random_stream(seed)
        scaled = truth.astype(np.float32) / np.float32(2.0 ** (bits - 1))
        for channel, expected in enumerate(scaled):
            assert np.array_equal(load(data, channel=channel, limits=limits), expected), seed
        mean = load(data, limits=limits)
        assert np.allclose(
            mean, scaled.mean(axis=0, dtype=np.float64), rtol=0, atol=np.finfo(np.float32).eps
        ), seed


def test_libsndfile_reads_what_the_tests_write() -> None:
    checked = 0
    for seed in range(60):
        data, truth, bits = random_stream(seed)
        if bits not in (8, 16, 24):
            continue
        checked += 1
        for channel, x in enumerate(truth):
            with sndfile.open_stream(data) as stream:
                samples, _, problem = sndfile.read_mono(stream, 0, len(x), channel)
            assert problem == "", seed
            assert np.array_equal(samples, x / 2 ** (bits - 1)), seed
    assert checked > 10


def long_stream(variable: bool, total: bool, frames: int = 150) -> tuple[bytes, NDArray[np.float32]]:
    """Verbatim noise that contains false headers, far longer than the decoder searches at once."""
    rng = np.random.default_rng(3)
    out, values, position = [], [], 0
    for i in range(frames):
        block = int(rng.integers(200, 1500)) if variable else 1152
        x = rng.integers(-(1 << 15), 1 << 15, block)
        bait = w.frame(["0"], 1152, int(rng.integers(frames)) * (1152 if variable else 1), variable=variable)
        bait = bait[: -4 + len(bait) % 2]
        x[5 : 5 + len(bait) // 2] = np.frombuffer(bait[: len(bait) // 2 * 2], ">i2")
        coded = [w.verbatim([int(v) for v in x], 16)]
        out.append(w.frame(coded, block, position if variable else i, variable=variable))
        values.append(x)
        position += block
    sizes = (16, 65535) if variable else (1152, 1152)
    data = w.stream(out, total=position if total else 0, blocks=sizes)
    return data, (np.concatenate(values) / 32768).astype(np.float32)


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_starts_are_exact_wherever_they_are(variable: bool, total: bool, tmp_path: Path) -> None:
    data, truth = long_stream(variable, total)
    path = tmp_path / "long.flac"
    path.write_bytes(data)
    assert np.array_equal(load(path), truth)
    rng = np.random.default_rng(0)
    for first in [0, 1, 1151, 1152, len(truth) - 400, *rng.integers(len(truth) - 400, size=40).tolist()]:
        part = load(path, start_s=first / RATE, duration_s=400 / RATE)
        assert np.array_equal(part, truth[first : first + 400]), first
    assert np.array_equal(load(data, start_s=5.0), truth[5 * RATE :])


def test_a_part_is_found_without_reading_what_precedes_it() -> None:
    x = tones(60 * RATE)
    data = bytearray(encode(x))
    expected = load(bytes(data), start_s=50.0, duration_s=2.0)
    data[len(data) // 10 : len(data) // 5] = bytes(len(data) // 5 - len(data) // 10)
    assert np.array_equal(load(bytes(data), start_s=50.0, duration_s=2.0), expected)
    with pytest.raises(AudioError, match="decoding stopped after"):
        load(bytes(data))


def id3(size: int, footer: bool = False) -> bytes:
    head = bytes([4, 0, 0x10 if footer else 0, *(size >> s & 0x7F for s in (21, 14, 7, 0))])
    return b"ID3" + head + b"\xff" * size + (b"3DI" + head if footer else b"")


def test_tags_and_metadata_are_skipped() -> None:
    data = encode(tones(8000))
    expected = load(data)
    big = w.frame([w.verbatim([i % 99 for i in range(2000)], 16)], 2000, 0)
    for decorated in (id3(300) + data, id3(70000, footer=True) + id3(5) + data, data + b"TAG" + bytes(125)):
        assert np.array_equal(load(decorated), expected)
    whole = w.stream([big], total=2000, metadata=[(6, bytes(1 << 24)[:-1])] * 2 + [(1, b""), (126, b"x")])
    assert np.array_equal(load(whole), load(w.stream([big])))
    assert np.array_equal(load(w.stream([big]) + b"TAG" + bytes(125)), load(w.stream([big])))


def test_any_flipped_bit_of_a_frame_is_noticed() -> None:
    frames = [
        w.frame([w.predicted([i * 37 % 211 for i in range(96)], 16, 2, Rice())], 96, n) for n in range(3)
    ]
    data = w.stream(frames, total=288)
    assert len(load(data)) == 288
    start = len(data) - sum(map(len, frames))
    for at in range(8 * start, 8 * len(data)):
        broken = bytearray(data)
        broken[at // 8] ^= 1 << at % 8
        (result,) = load_batch([bytes(broken)], num_threads=1)
        assert isinstance(result, AudioError), at


def frame_of(subframe: str, block: int = 192) -> bytes:
    return w.frame([subframe], block, 0)


BROKEN: dict[str, str] = {
    "reserved type": w.number(2, 7) + "0" * 500,
    "reserved fixed order": w.number(13, 7) + "0" * 500,
    "padding bit": "1" * 500,
    "all bits wasted": w.number(1, 7) + "1" + "0" * 15 + "1" + "0" * 500,
    "endless waste": w.number(1, 7) + "1" + "0" * 9000,
    "reserved residual coding": w.number(8, 7) + "0" + "10" + "0" * 500,
    "too many partitions": w.number(8, 7) + "0" + "00" + "1111" + "0" * 500,
    "partitions below the order": w.number(12, 7) + "0" + "0" * 64 + "00" + "0110" + "0" * 500,
    "invalid precision": w.number(32, 7) + "0" + "0" * 16 + "1111" + "0" * 500,
    "negative shift": w.number(32, 7) + "0" + "0" * 16 + "0010" + "11111" + "0" * 500,
    "residual of 33 bits": w.number(8, 7) + "0" + "01" + "0000" + w.number(30, 5) + "0" * 4 + "1" * 9000,
    "endless quotient": w.number(8, 7) + "0" + "00" + "0000" + "0000" + "0" * 9000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_frames_that_no_encoder_writes_are_refused(name: str) -> None:
    (result,) = load_batch([w.stream([frame_of(BROKEN[name]), bytes(300)], total=192)])
    assert isinstance(result, AudioError)
    assert result.reason.value == "truncated"
    assert "damaged" in result.detail


def test_streams_that_contradict_themselves_are_refused() -> None:
    x = [i % 50 for i in range(192)]
    frames = [w.frame([w.verbatim(x, 16)], 192, n) for n in range(4)]
    twin = frames[1]
    for data, reason in (
        (w.stream([frames[0], twin, twin]), "truncated"),  # a frame twice
        (w.stream([frames[0], frames[2]], total=384), "truncated"),  # one is missing
        (w.stream(frames, bits=12), "truncated"),  # read with 12 bits, the checksums fail
        (w.stream(frames, channels=2), "truncated"),
        (w.stream(frames, total=3 * 192), "format"),
        (w.stream(frames, total=3 * 192 + 5), "format"),
        (w.stream(frames, total=4 * 192 + 1), "truncated"),
        (w.stream([*frames[:2], b"\0"]), "truncated"),
        (w.stream([w.frame([w.verbatim(x, 16)], 192, 0, size_code=6)]), "truncated"),
        (w.stream([w.frame([w.verbatim(x, 16)], 192, 0, rate_bits=(4, ""))]), "truncated"),
        (w.stream([w.frame([w.verbatim(x, 16)], 192, 0, rate_bits=(15, ""))]), "truncated"),
        (w.stream([], total=100), "truncated"),
        (w.stream([]), "empty"),
        (w.stream(frames, bits=3), "format"),
    ):
        (result,) = load_batch([data], num_threads=1)
        assert isinstance(result, AudioError)
        assert result.reason.value == reason, result


def test_a_frame_may_not_exceed_its_own_range() -> None:
    """The checksum is right, but no samples of eight bits have so large a residual."""
    x = [0, 1 << 20] * 96
    (result,) = load_batch([w.stream([w.frame([w.predicted(x, 8, 0, Rice(20, wide=True))], 192, 0)], bits=8)])
    assert isinstance(result, AudioError)
    assert result.reason.value == "amplitude"


def test_neither_silence_nor_headers_without_end_take_time_or_memory() -> None:
    loud = w.frame(["0" * 8 + w.number(99, 16)] * 8, 65535, 0)
    quiet = w.stream([loud], channels=8, total=(1 << 36) - 1)
    blocks = b"fLaC" + b"\0\0\0\x22" + w.stream([])[8:42] + b"\1\0\0\0" * 500_000
    fake = w.frame(["0"], 1152, 77)[:-3]
    headers = w.stream([w.frame([w.verbatim([0] * 192, 16)], 192, 0), fake * 200_000])
    start = time.thread_time()
    for data, reason in (
        (Segment(quiet), "too_long"),
        (Segment(quiet, duration_s=3000.0), "truncated"),
        (Segment(blocks), "format"),
        (Segment(headers, start_s=40.0), "truncated"),
        (Segment(w.stream([], blocks=(16, 16)) + b"\xff\xf8" * 1_000_000, start_s=40.0), "truncated"),
    ):
        (result,) = load_batch([data], num_threads=1, limits=AudioLimits(max_channels=8))
        assert isinstance(result, AudioError)
        assert result.reason.value == reason, result
    assert time.thread_time() - start < 1
