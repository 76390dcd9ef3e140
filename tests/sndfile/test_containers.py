"""Every container, complete, cut, empty, joined and with junk around it, gives its samples or an error."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from encoded_audio import ID3, RATE, SAMPLES, by_soundfile, chunk, encode, noise, samples_or_reason
from numpy.typing import NDArray

from clsp_fast import audio, data, sndfile
from clsp_fast.audio import AudioError, load
from clsp_fast.config import DataConfig
from clsp_fast.data.clips import Clip
from clsp_fast.sndfile import stream

READ = (
    "WAV",
    "WAVEX",
    "RF64",
    "W64",
    "AIFF",
    "AU",
    "CAF",
    "SVX",
    "NIST",
    "FLAC",
    "OGG",
    "MP3",
)  # codespell:ignore caf
# soundfile cannot write the first three, and cannot read the others unless it is given the format.
LEFT_OUT = ("DWVW_12", "MPEG_LAYER_I", "MPEG_LAYER_II", "DWVW_16", "DWVW_24")
KINDS = [
    (kind, subtype)
    for kind in READ
    for subtype in soundfile.available_subtypes(kind)
    if subtype not in LEFT_OUT and (kind, subtype) != ("WAV", "MPEG_LAYER_III")
]
JOINABLE = ("OGG", "MP3")


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_each_container(kind: str, subtype: str, tmp_path: Path) -> None:
    whole = encode(kind, subtype)
    expected = by_soundfile(whole)
    assert len(expected) >= SAMPLES
    tolerance = 2e-7 if kind == "MP3" else 0.0

    def check(content: bytes, right: NDArray[np.float32] | str, **part: float) -> None:
        path = tmp_path / "recording"
        path.write_bytes(content)
        for source in (content, path):
            result = samples_or_reason(source, **part)
            if isinstance(right, str) or isinstance(result, str):
                assert result in ((right,) if isinstance(right, str) else ()), result
            else:
                assert result.shape == right.shape
                # libsndfile decodes one block more than a WAV file with GSM has.
                sound = SAMPLES if (kind, subtype) == ("WAV", "GSM610") else len(right)
                assert np.abs(result - right)[:sound].max() <= tolerance

    check(whole, expected)
    assert audio.info(whole).frames == len(expected)
    check(whole, expected[1600:4000], start_s=0.1, duration_s=0.15)
    for share in (0.5, 0.9):
        check(whole[: int(len(whole) * share)], "truncated")
    check(whole[: len(whole) * 9 // 10], "truncated", duration_s=SAMPLES / RATE)
    assert samples_or_reason(whole[:12]) in ("format", "truncated")
    assert samples_or_reason(encode(kind, subtype, noise(0))) in ("empty", "truncated", "format", "too_short")
    for junk in (bytes(417), ID3, b"\xef\xbb\xbf", ID3 + bytes(33)):
        check(junk + whole, expected)
        check(junk + whole, expected[1600:4000], start_s=0.1, duration_s=0.15)
    for junk in (bytes(999), b"TAG" + bytes(125), b"LIST\4\0\0\0abcd", b"\x55\xaa\x07" * 70):
        check(whole + junk, expected)
    check(whole + whole, np.concatenate([expected, expected]) if kind in JOINABLE else "format")


@pytest.mark.parametrize("kind", ["VOC", "AVR", "HTK", "PAF", "IRCAM", "PVF"])
def test_other_containers_are_refused_with_the_fix(kind: str) -> None:
    with pytest.raises(AudioError, match=r"not in a known audio format .*; convert it, for instance with"):
        load(encode(kind, "PCM_16"))


def fmt(tag: int = 1, channels: int = 1, bits: int = 16, align: int = 2, extension: bytes = b"") -> bytes:
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, RATE, 32000, align, bits) + extension)


def riff(*chunks: bytes, form: bytes = b"RIFF") -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return form + struct.pack("<I", len(body)) + body


CODES = (4000 * np.sin(np.arange(SAMPLES) / 9)).astype("<i2")
SOUND = CODES.tobytes()
RIGHT = CODES / np.float32(32768)
GUID = bytes.fromhex("000000001000800000aa00389b71")
LIST = chunk(b"LIST", b"INFOICMT" + bytes([9, 0, 0, 0]) + b"by nobody")


def ds64(size: int) -> bytes:
    return chunk(b"ds64", struct.pack("<QQQI", 0, size, SAMPLES, 0))


WAVS: dict[str, tuple[bytes, NDArray[np.float32] | str]] = {
    "size 0 before samples": (riff(fmt(), chunk(b"data", SOUND, 0)), RIGHT),
    "size 0x7FFFFF00": (riff(fmt(), chunk(b"data", SOUND, 0x7FFFFF00)), RIGHT),
    "size 0x80000000": (riff(fmt(), chunk(b"data", SOUND, 0x80000000)), RIGHT),
    "size 0xFFFFFFFF": (riff(fmt(), chunk(b"data", SOUND, 0xFFFFFFFF)), RIGHT),
    "size of SoX": (riff(fmt(), chunk(b"data", SOUND, 0x7FFFF000)), RIGHT),
    "one sample is missing": (riff(fmt(), chunk(b"data", SOUND, len(SOUND) + 2)), "truncated"),
    "half a sample is missing": (riff(fmt(), chunk(b"data", SOUND, len(SOUND) + 1)), RIGHT),
    "empty": (riff(fmt(), chunk(b"data", b"")), "empty"),
    "empty before metadata": (riff(fmt(), chunk(b"data", b""), LIST), "empty"),
    "empty before unknown chunks": (riff(fmt(), chunk(b"data", b""), chunk(b"xyzw", b"1" * 333)), "empty"),
    "empty before cut metadata": (riff(fmt(), chunk(b"data", b""), LIST)[:-4], "empty"),
    "metadata behind": (riff(fmt(), chunk(b"data", SOUND), LIST, chunk(b"id3 ", b"odd")), RIGHT),
    "odd chunk, padded": (riff(fmt(), chunk(b"LIST", b"abc"), chunk(b"data", SOUND)), RIGHT),
    "odd chunk, not padded": (riff(fmt(), chunk(b"LIST", b"abc", pad=False), chunk(b"data", SOUND)), RIGHT),
    "odd first, not padded": (riff(chunk(b"abcd", b"1", pad=False), fmt(), chunk(b"data", SOUND)), RIGHT),
    "odd data, not padded": (riff(fmt(), chunk(b"data", SOUND + b"x", pad=False), LIST), RIGHT),
    "odd data, padded": (riff(fmt(), chunk(b"data", SOUND + b"x"), LIST), RIGHT),
    "align 2 of stereo": (
        riff(fmt(channels=2, align=2), chunk(b"data", SOUND)),
        RIGHT.reshape(-1, 2).mean(1),
    ),
    "align 4 of mono": (riff(fmt(align=4), chunk(b"data", SOUND)), RIGHT),
    "align 0": (riff(fmt(align=0), chunk(b"data", SOUND)), RIGHT),
    "align 0 of stereo": (
        riff(fmt(channels=2, align=0), chunk(b"data", SOUND)),
        RIGHT.reshape(-1, 2).mean(1),
    ),
    "24 bits of 4 bytes": (riff(fmt(bits=24, align=4), chunk(b"data", SOUND)), "format"),
    "24 in 32": (
        riff(
            fmt(0xFFFE, 1, 32, 4, struct.pack("<HHIH", 22, 24, 0, 1) + GUID),
            chunk(b"data", (CODES.astype("<i4") << 16).tobytes()),
        ),
        RIGHT,
    ),
    "extensible float": (
        riff(
            fmt(0xFFFE, 1, 32, 4, struct.pack("<HHIH", 22, 32, 0, 3) + GUID),
            chunk(b"data", RIGHT.astype("<f4").tobytes()),
        ),
        RIGHT,
    ),
    "RF64": (riff(ds64(len(SOUND)), fmt(), chunk(b"data", SOUND, 0xFFFFFFFF), LIST, form=b"RF64"), RIGHT),
    "BW64": (riff(ds64(len(SOUND)), fmt(), chunk(b"data", SOUND, 0xFFFFFFFF), LIST, form=b"BW64"), RIGHT),
    "RF64 stream": (riff(ds64(0), fmt(), chunk(b"data", SOUND, 0xFFFFFFFF), form=b"RF64"), RIGHT),
    "RF64 cut": (riff(ds64(1 << 33), fmt(), chunk(b"data", SOUND, 0xFFFFFFFF), form=b"RF64"), "truncated"),
    "joined": (2 * riff(fmt(), chunk(b"data", SOUND), LIST), "format"),
    "joined streams of 0xFFFFFFFF": (2 * riff(fmt(), chunk(b"data", SOUND, 0xFFFFFFFF)), "format"),
    "joined streams of 0": (2 * riff(fmt(), chunk(b"data", SOUND, 0)), "format"),
    "two data chunks": (riff(fmt(), chunk(b"data", SOUND), chunk(b"data", SOUND)), "format"),
    "two data chunks, LIST between": (
        riff(fmt(), chunk(b"data", SOUND), LIST, chunk(b"data", SOUND)),
        "format",
    ),
    "two odd data chunks": (riff(fmt(), chunk(b"data", SOUND + b"x"), chunk(b"data", SOUND)), "format"),
    "empty data behind": (riff(fmt(), chunk(b"data", SOUND), chunk(b"data", b"")), RIGHT),
    "empty data before": (riff(fmt(), chunk(b"data", b""), chunk(b"data", SOUND)), RIGHT),
    "empty data before LIST": (riff(fmt(), chunk(b"data", b""), LIST, chunk(b"data", SOUND)), RIGHT),
    "two empty data chunks": (riff(fmt(), chunk(b"data", b""), chunk(b"data", b"")), "empty"),
    "odd chunk, padded with a space": (
        riff(fmt(), chunk(b"LIST", b"abc", pad=False) + b" ", chunk(b"xyzw", b"1234"), chunk(b"data", SOUND)),
        RIGHT,
    ),
    "odd chunk, not padded, before unknown": (
        riff(fmt(), chunk(b"LIST", b"abc", pad=False), chunk(b"xyzw", b"1234"), chunk(b"data", SOUND)),
        RIGHT,
    ),
}


@pytest.mark.parametrize("name", WAVS)
def test_wav_headers_as_writers_leave_them(name: str, tmp_path: Path) -> None:
    content, right = WAVS[name]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    for source in (content, path):
        result = samples_or_reason(source)
        if isinstance(right, str):
            assert result == right
            continue
        assert np.array_equal(result, right)
        assert audio.info(source).frames == len(right)
        part = samples_or_reason(source, start_s=0.05, duration_s=0.1)
        assert np.array_equal(part, right[800:2400])


def test_the_planned_length_is_the_length_that_is_read(tmp_path: Path) -> None:
    """Clips whose header was never completed are used like the others."""
    clips = []
    for i, size in enumerate((0, 0xFFFFFFFF, len(SOUND), len(SOUND))):
        path = tmp_path / f"{i}.wav"
        path.write_bytes(riff(fmt(), chunk(b"data", SOUND, size)))
        clips.append(Clip(str(i), str(path), 0.0, None, None, ("A man speaks.",)))
    usable, seconds, left_out = data.usable(clips, DataConfig(min_seconds=0.4))
    assert [clip.id for clip in usable] == ["0", "1", "2", "3"]
    assert seconds == [SAMPLES / RATE] * 4
    assert not left_out


def test_wav_in_other_encodings_goes_to_libsndfile() -> None:
    adpcm = encode("WAV", "IMA_ADPCM")
    at = adpcm.index(b"data") + 4
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        content = adpcm[:at] + struct.pack("<I", size) + adpcm[at + 4 :]
        assert np.array_equal(load(content), by_soundfile(adpcm))
    big_endian = encode("WAV", "PCM_16", endian="BIG")
    assert big_endian.startswith(b"RIFX")
    assert np.array_equal(load(big_endian), by_soundfile(big_endian))
    assert samples_or_reason(big_endian[:-2]) == "truncated"


STREAMS = {
    "AU": (8, ">I", (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    "AIFF": (-1, ">I", (0, 0x7F000000, 0x7FFFFFFF, 0xFFFFFFFF)),
    "CAF": (-1, ">q", (-1, 0, 0x7FFFFF00, 1 << 62)),  # codespell:ignore caf
    "W64": (-2, "<q", (-1, 0, 0x7FFFFF00, (1 << 63) - 1)),
}


def streams(kind: str, whole: bytes) -> Iterator[bytes]:
    """The file, once with each size that means "up to the end" in its header."""
    where, layout, sizes = STREAMS[kind]
    tag = whole.index(b"SSND" if kind == "AIFF" else b"data") if where < 0 else 0
    at = {-1: tag + 4, -2: tag + 16}.get(where, where)
    for size in sizes:
        content = bytearray(whole)
        struct.pack_into(layout, content, at, size)
        yield bytes(content)


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_are_read_to_their_end(kind: str) -> None:
    whole = encode(kind, "PCM_16")
    for content in streams(kind, whole):
        assert np.array_equal(samples_or_reason(content), by_soundfile(whole))
        assert audio.info(content).frames == SAMPLES


def test_an_aiff_stream_that_states_its_frames_is_cut_where_they_are_missing() -> None:
    for subtype in ("PCM_16", "PCM_24", "FLOAT", "PCM_U8"):
        whole = encode("AIFF", subtype)
        for content in streams("AIFF", whole):
            assert np.array_equal(samples_or_reason(content), by_soundfile(whole))
            for missing in (2, 100, 3001):
                assert samples_or_reason(content[:-missing]) == "truncated"
            at = content.index(b"COMM") + 10
            for frames in (0, 0xFFFFFFFF):
                unknown = content[:at] + struct.pack(">I", frames) + content[at + 4 :]
                assert len(load(unknown[:-100])) > SAMPLES // 2


def test_a_large_file_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file: 8,000 samples of sound, 3 GiB of zeros that take no space on the disk, and a chunk."""
    copied: list[int] = []
    monkeypatch.setattr(stream, "_memory_file", lambda parts: copied.append(1))
    for kind in ("AU", "W64", "AIFF"):
        whole = bytearray(encode(kind, "PCM_16"))
        sound = SAMPLES * 2
        size = sound + (3 << 30 if kind == "W64" else 2_000_000_000)
        at, layout, bias = {
            "AU": (8, ">I", 0),
            "W64": (whole.find(b"data") + 16, "<q", 24),
            "AIFF": (whole.find(b"SSND") + 4, ">I", 8),
        }[kind]
        struct.pack_into(layout, whole, at, size + bias)
        begin = {"AU": 24, "W64": at + 8, "AIFF": at + 12}[kind]
        path = tmp_path / kind
        with path.open("wb") as file:
            file.write(whole[: begin + sound])
            file.truncate(begin + size)
            file.seek(0, 2)
            file.write(b"LIST\4\0\0\0abcd")
        assert audio.info(path).frames == size // 2, kind
        result = load(path, start_s=0.1, duration_s=0.2)
        assert np.array_equal(result, by_soundfile(encode(kind, "PCM_16"))[1600:4800])
        end = load(path, start_s=size // 2 / RATE - 0.1, duration_s=0.1)
        assert end.shape == (1600,)
        assert not end.any()
    assert not copied


def test_text_behind_the_sound_is_no_second_file() -> None:
    for kind in ("AU", "CAF", "NIST", "AIFF", "W64"):  # codespell:ignore caf
        whole = encode(kind, "PCM_16")
        magic = whole[:4]
        text = b"a caffeinated title, x.snd, FORM, riff, NIST and RIFF and " + magic + b" again"
        if kind == "CAF":  # codespell:ignore caf
            text = b"info" + struct.pack(">q", len(text)) + text
        assert np.array_equal(samples_or_reason(whole + text), by_soundfile(whole)), kind
        assert samples_or_reason(whole + whole) == "format"
        assert samples_or_reason(whole + b"some bytes between" + whole) == "format"


@pytest.mark.parametrize("kind", STREAMS)
def test_joined_streams_are_refused(kind: str) -> None:
    for content in streams(kind, encode(kind, "PCM_16")):
        assert samples_or_reason(content + content) == "format"


def test_two_chunks_of_sound_are_refused() -> None:
    for kind, subtype in (("AIFF", "PCM_16"), ("WAV", "IMA_ADPCM")):
        whole = encode(kind, subtype)
        at = whole.index(b"SSND" if kind == "AIFF" else b"data")
        (size,) = struct.unpack_from(">I" if kind == "AIFF" else "<I", whole, at + 4)
        sound = whole[at : at + 8 + size]
        assert samples_or_reason(whole[: at + len(sound)] + sound) == "format"


def test_bw64_in_other_encodings_is_accepted() -> None:
    sndfile.check_magic(b"BW64\xff\xff\xff\xffWAVE")
