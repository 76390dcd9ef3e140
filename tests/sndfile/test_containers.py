"""Every container, whole, cut, empty, joined, with junk around it: the right samples or a named refusal."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from clsp_fast import audio, data, sndfile
from clsp_fast.audio import AudioError, load, load_batch
from clsp_fast.config import DataConfig
from clsp_fast.data.manifest import Clip
from clsp_fast.sndfile import mp3, stream

RATE = 16000
SAMPLES = 8000
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
# soundfile cannot write the first three, and cannot read the others by itself.
LEFT_OUT = ("DWVW_12", "MPEG_LAYER_I", "MPEG_LAYER_II", "DWVW_16", "DWVW_24")
KINDS = [
    (kind, subtype)
    for kind in READ
    for subtype in soundfile.available_subtypes(kind)
    if subtype not in LEFT_OUT and (kind, subtype) != ("WAV", "MPEG_LAYER_III")
]
JOINABLE = ("OGG", "MP3")
ID3 = b"ID3\4\0\0\0\0\1\0" + b"t" * 128


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


def theirs(encoded: bytes) -> NDArray[np.float32]:
    return np.asarray(soundfile.read(io.BytesIO(encoded), dtype="float32")[0])


def outcome(source: object, **part: float) -> NDArray[np.float32] | str:
    """Samples, or the reason of a refusal."""
    (got,) = load_batch([audio.Segment(source, **part)], num_threads=1)  # type: ignore[arg-type]
    if isinstance(got, AudioError):
        assert len(got.detail) > 8
        return got.reason.value
    return got


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_each_container(kind: str, subtype: str, tmp_path: Path) -> None:
    whole = encode(kind, subtype)
    expected = theirs(whole)
    assert len(expected) >= SAMPLES
    tolerance = 2e-7 if kind == "MP3" else 0.0

    def check(content: bytes, right: NDArray[np.float32] | str, **part: float) -> None:
        path = tmp_path / "recording"
        path.write_bytes(content)
        for source in (content, path):
            got = outcome(source, **part)
            if isinstance(right, str) or isinstance(got, str):
                assert got in ((right,) if isinstance(right, str) else ()), got
            else:
                assert got.shape == right.shape
                # Behind the last block of GSM in WAV, libsndfile decodes another one that is not there.
                sound = SAMPLES if (kind, subtype) == ("WAV", "GSM610") else len(right)
                assert np.abs(got - right)[:sound].max() <= tolerance

    check(whole, expected)
    assert audio.info(whole).frames == len(expected)
    check(whole, expected[1600:4000], start_s=0.1, duration_s=0.15)
    for share in (0.5, 0.9):
        check(whole[: int(len(whole) * share)], "truncated")
    check(whole[: len(whole) * 9 // 10], "truncated", duration_s=SAMPLES / RATE)
    assert outcome(whole[:12]) in ("format", "truncated")
    assert outcome(encode(kind, subtype, noise(0))) in ("empty", "truncated", "format", "too_short")
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


def chunk(tag: bytes, body: bytes, size: int | None = None, pad: bool = True) -> bytes:
    size = len(body) if size is None else size
    return tag + struct.pack("<I", size) + body + b"\0" * (len(body) % 2 if pad else 0)


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
        got = outcome(source)
        if isinstance(right, str):
            assert got == right
            continue
        assert np.array_equal(got, right)
        assert audio.info(source).frames == len(right)
        part = outcome(source, start_s=0.05, duration_s=0.1)
        assert np.array_equal(part, right[800:2400])


def test_what_is_planned_is_what_is_read(tmp_path: Path) -> None:
    """Clips whose header was never completed, beside whole ones: all four train."""
    clips = []
    for i, size in enumerate((0, 0xFFFFFFFF, len(SOUND), len(SOUND))):
        path = tmp_path / f"{i}.wav"
        path.write_bytes(riff(fmt(), chunk(b"data", SOUND, size)))
        clips.append(Clip(str(i), str(path), 0.0, None, None, ("A man speaks.",)))
    kept, seconds, left_out = data.usable(clips, DataConfig(min_seconds=0.4))
    assert [clip.id for clip in kept] == ["0", "1", "2", "3"]
    assert seconds == [SAMPLES / RATE] * 4
    assert not left_out


def test_wav_in_other_encodings_goes_to_libsndfile() -> None:
    adpcm = encode("WAV", "IMA_ADPCM")
    at = adpcm.index(b"data") + 4
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        content = adpcm[:at] + struct.pack("<I", size) + adpcm[at + 4 :]
        assert np.array_equal(load(content), theirs(adpcm))
    big_endian = encode("WAV", "PCM_16", endian="BIG")
    assert big_endian.startswith(b"RIFX")
    assert np.array_equal(load(big_endian), theirs(big_endian))
    assert outcome(big_endian[:-2]) == "truncated"


STREAMS = {
    "AU": (8, ">I", (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    "AIFF": (-1, ">I", (0, 0x7F000000, 0x7FFFFFFF, 0xFFFFFFFF)),
    "CAF": (-1, ">q", (-1, 0, 0x7FFFFF00, 1 << 62)),  # codespell:ignore caf
    "W64": (-2, "<q", (-1, 0, 0x7FFFFF00, (1 << 63) - 1)),
}


def streams(kind: str, whole: bytes) -> Iterator[bytes]:
    """The file with each size that stands for "up to the end" in its header."""
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
        assert np.array_equal(outcome(content), theirs(whole))
        assert audio.info(content).frames == SAMPLES


def test_an_aiff_stream_that_states_its_frames_is_cut_where_they_are_missing() -> None:
    for subtype in ("PCM_16", "PCM_24", "FLOAT", "PCM_U8"):
        whole = encode("AIFF", subtype)
        for content in streams("AIFF", whole):
            assert np.array_equal(outcome(content), theirs(whole))
            for missing in (2, 100, 3001):
                assert outcome(content[:-missing]) == "truncated"
            at = content.index(b"COMM") + 10
            for frames in (0, 0xFFFFFFFF):
                unknown = content[:at] + struct.pack(">I", frames) + content[at + 4 :]
                assert len(load(unknown[:-100])) > SAMPLES // 2


def bare(mp3: bytes) -> bytes:
    """Without the frame that states the length."""
    return mp3[mp3.index(mp3[:2], 40) :]


def test_joined_mp3_files_are_read_whole() -> None:
    a, b = encode("MP3", x=noise(20000)), encode("MP3", x=noise(30000, seed=1))
    expected = np.concatenate([load(a), load(b)])
    big_tag = b"ID3\4\0\0\0\x0c\0\0" + b"\xff\xfb\x90\x64" * (12 << 12)
    for between in (b"", ID3, big_tag, b"TAG" + bytes(125), b"TAG" + bytes(125) + big_tag, bytes(3000)):
        joined = a + between + b
        got = outcome(joined)
        assert np.array_equal(got, expected), len(between)
        assert np.array_equal(outcome(joined, start_s=1.0, duration_s=1.0), expected[16000:32000])
    assert len(load(a + bare(b))) >= 20000 + 30000
    assert len(load(bare(a) + b)) >= 20000 + 30000
    assert len(load(bare(a) + bare(b))) >= 20000 + 30000
    assert outcome(a + b[: len(b) // 2]) == "truncated"
    assert outcome(a[: len(a) // 2] + b) == "truncated"
    assert outcome(a + encode("MP3", x=noise(90000), rate=44100)) == "format"
    assert outcome(a + encode("MP3", x=noise(30000, 2))) == "format"


def test_chained_ogg_is_read_whole() -> None:
    for subtype in ("VORBIS", "OPUS"):
        a, b = encode("OGG", subtype, noise(20000)), encode("OGG", subtype, noise(30000, seed=1))
        expected = np.concatenate([load(a), load(b)])
        assert np.array_equal(outcome(a + b), expected)
        assert np.array_equal(outcome(a + b, start_s=1.0, duration_s=1.0), expected[16000:32000])
        assert outcome(a + b[:-1]) == "truncated"
        assert outcome(a[: a.rindex(b"OggS")] + b) == "truncated"
        assert outcome(a + encode("OGG", subtype, noise(30000, 2))) == "format"
    assert outcome(a[: a.index(b"OggS", 9)] + encode("OGG", "VORBIS")) == "format"  # at the same time


def ogg_page(flags: int, granule: int, number: int, packet: bytes) -> bytes:
    lacing = [255] * (len(packet) // 255) + [len(packet) % 255]
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, 7, number, 0, len(lacing))
    return head + bytes(lacing) + packet


def ogg_flac(native: bytes, ended: bool = True) -> bytes:
    blocks, at = [native[4:42]], 42
    while not blocks[-1][0] & 0x80:
        size = 4 + int.from_bytes(native[at + 1 : at + 4], "big")
        blocks.append(native[at : at + size])
        at += size
    pages = [ogg_page(2, 0, 0, b"\x7fFLAC\1\0\0\1fLaC" + blocks[0])]
    pages += [ogg_page(0, 0, 1 + i, block) for i, block in enumerate(blocks[1:])]
    audio_bytes = native[at:]
    for begin in range(0, len(audio_bytes), 9000):
        last = ended and begin + 9000 >= len(audio_bytes)
        flags = 4 if last else 0
        pages.append(
            ogg_page(flags, SAMPLES if last else -1, 9 + begin // 9000, audio_bytes[begin : begin + 9000])
        )
    return b"".join(pages)


def test_flac_in_ogg_is_read() -> None:
    native = encode("FLAC")
    unknown = native[:21] + bytes([native[21] & 0xF0]) + bytes(4) + native[26:]
    for source in (native, unknown):
        wrapped = ogg_flac(source)
        assert np.array_equal(outcome(wrapped), theirs(native))
        assert audio.info(wrapped).frames == SAMPLES
        assert np.array_equal(outcome(wrapped + wrapped), np.tile(theirs(native), 2))
        assert outcome(wrapped[: len(wrapped) // 2]) == "truncated"
        assert outcome(ogg_flac(source, ended=False)) == "truncated"
    assert outcome(unknown + native) == "format"


def test_waveforms_out_of_scale_are_refused_by_the_model_as_by_load() -> None:
    import torch

    from clsp_fast.config import MODEL_PRESETS
    from clsp_fast.model import CLSP

    torch.manual_seed(0)
    model = CLSP(MODEL_PRESETS["tiny"]).eval()
    good = noise()[:, 0].astype(np.float32)
    for loud in (good * 32768, (good * 32768).astype(np.float64), torch.from_numpy(good * 32768)):
        with pytest.raises(AudioError, match="rescale it") as caught:
            model.encode_audio([good, loud])
        assert caught.value.reason.value == "amplitude"
        errors: dict[int, AudioError] = {}
        found = model.encode_audio([loud, good], errors=errors)
        assert list(errors) == [0]
        assert errors[0].reason.value == "amplitude"
        assert found[0].isnan().all()
        assert torch.allclose(found[1], model.encode_audio([good])[0], atol=1e-5)
        with pytest.raises(AudioError) as caught:
            model.encode_audio([audio.Segment(loud)])
        assert caught.value.reason.value == "amplitude"


GAPS = {
    f"{count} {kind}": bytes(count) if kind == "zeros" else np.random.default_rng(3).bytes(count)
    for count in (66_000, 100_000, 1_500_000)
    for kind in ("zeros", "random")
}


@pytest.mark.parametrize("gap", GAPS.values(), ids=list(GAPS))
def test_what_follows_a_long_gap_is_read_or_refused(gap: bytes) -> None:
    a, b = encode("OGG", x=noise(20000)), encode("OGG", x=noise(30000, seed=1))
    assert np.array_equal(outcome(a + gap + b), np.concatenate([load(a), load(b)]))
    assert np.array_equal(outcome(a + gap), load(a))
    a, b = encode("MP3", x=noise(20000)), encode("MP3", x=noise(30000, seed=1))
    for joined in (a + gap + b, a + gap + bare(b), bare(a) + gap + b, bare(a) + gap + bare(b)):
        with pytest.raises(AudioError, match=r"a second recording follows behind .* bytes of something else"):
            load(joined)
    assert np.array_equal(outcome(a + gap), load(a))
    frame = bare(b).index(b[:2], len(b) // 2)
    assert outcome(bare(b)[:frame] + gap + bare(b)[frame:]) == "format"


def test_a_large_file_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 GiB of zeros that take no room on the disk, behind 8000 samples of sound and before a chunk."""
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
        got = load(path, start_s=0.1, duration_s=0.2)
        assert np.array_equal(got, theirs(encode(kind, "PCM_16"))[1600:4800])
        end = load(path, start_s=size // 2 / RATE - 0.1, duration_s=0.1)
        assert end.shape == (1600,)
        assert not end.any()
    assert not copied


def test_letters_behind_the_sound_are_no_second_file() -> None:
    for kind in ("AU", "CAF", "NIST", "AIFF", "W64"):  # codespell:ignore caf
        whole = encode(kind, "PCM_16")
        magic = whole[:4]
        text = b"a caffeinated title, x.snd, FORM, riff, NIST and RIFF and " + magic + b" again"
        if kind == "CAF":  # codespell:ignore caf
            text = b"info" + struct.pack(">q", len(text)) + text
        assert np.array_equal(outcome(whole + text), theirs(whole)), kind
        assert outcome(whole + whole) == "format"
        assert outcome(whole + b"some bytes between" + whole) == "format"


@pytest.mark.parametrize("kind", STREAMS)
def test_joined_streams_are_refused(kind: str) -> None:
    for content in streams(kind, encode(kind, "PCM_16")):
        assert outcome(content + content) == "format"


def test_two_chunks_of_sound_are_refused() -> None:
    for kind, subtype in (("AIFF", "PCM_16"), ("WAV", "IMA_ADPCM")):
        whole = encode(kind, subtype)
        at = whole.index(b"SSND" if kind == "AIFF" else b"data")
        (size,) = struct.unpack_from(">I" if kind == "AIFF" else "<I", whole, at + 4)
        sound = whole[at : at + 8 + size]
        assert outcome(whole[: at + len(sound)] + sound) == "format"


def test_files_cut_within_a_tag_or_the_first_frame_are_truncated() -> None:
    tag = b"ID3\4\0\0\0\1\0\0" + b"p" * (1 << 14)
    mp3 = encode("MP3")
    for whole in (mp3, encode("FLAC"), encode("WAV")):
        for cut in (5, 10, 11, 200, len(tag) - 1, len(tag)):
            with pytest.raises(AudioError, match=r"the file ends (within|behind) its ID3 tag") as caught:
                load((tag + whole)[:cut])
            assert caught.value.reason.value == "truncated"
    size = len(mp3) - len(bare(mp3))
    for begin in (mp3, tag + mp3, bare(mp3)):
        for cut in (2, 3, 4, 50, 100, size - 1, *([] if begin == bare(mp3) else [size])):
            with pytest.raises(AudioError) as caught:
                load(begin[: len(begin) - len(begin.removeprefix(tag)) + cut])
            assert caught.value.reason.value == "truncated", (cut, caught.value)
            assert "does not exist" not in caught.value.detail, (cut, caught.value)


def test_tagged_mp3_is_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied: list[int] = []
    real = stream._memory_file

    def counted(parts: Iterable[bytes]) -> IO[bytes]:
        parts = list(parts)
        copied.append(sum(map(len, parts)))
        return real(parts)

    path = tmp_path / "a.mp3"
    mp3 = encode("MP3")
    path.write_bytes(ID3 + mp3)
    monkeypatch.setattr(stream, "_memory_file", counted)
    assert audio.info(path) == audio.info(path)
    assert np.array_equal(load(path), load(path))
    assert not copied
    path.write_bytes(bytes(40) + mp3)
    load(path)
    assert copied == [len(mp3)]


def test_tags_with_a_footer_between_mp3_files() -> None:
    a, b = encode("MP3", x=noise(20000)), encode("MP3", x=noise(30000, seed=1))
    body = b"\xff\xfb\x90\x64" * 32
    tag = b"ID3\4\0\x10\0\0\1\0" + body + b"3DI\4\0\x10\0\0\1\0"
    assert mp3.id3_bytes(tag) == len(tag)
    assert np.array_equal(outcome(tag + a + tag + b), np.concatenate([load(a), load(b)]))


def test_bw64_in_other_encodings_is_known() -> None:
    sndfile.check_magic(b"BW64\xff\xff\xff\xffWAVE")
