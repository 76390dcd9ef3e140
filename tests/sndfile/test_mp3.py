"""MP3 files: without a stated length, joined, tagged, cut, and with other bytes between their frames."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from encoded_audio import GAPS, ID3, encode, noise, samples_or_reason

from clsp_fast import audio
from clsp_fast.audio import AudioError, load
from clsp_fast.sndfile import mp3, stream

MP3 = encode("MP3", x=noise(64000))


def without_length(mp3: bytes) -> bytes:
    """The file without the frame that states its length."""
    return mp3[mp3.index(mp3[:2], 40) :]


def test_joined_mp3_files_are_read_whole() -> None:
    a, b = encode("MP3", x=noise(20000)), encode("MP3", x=noise(30000, seed=1))
    expected = np.concatenate([load(a), load(b)])
    big_tag = b"ID3\4\0\0\0\x0c\0\0" + b"\xff\xfb\x90\x64" * (12 << 12)
    for between in (b"", ID3, big_tag, b"TAG" + bytes(125), b"TAG" + bytes(125) + big_tag, bytes(3000)):
        joined = a + between + b
        result = samples_or_reason(joined)
        assert np.array_equal(result, expected), len(between)
        assert np.array_equal(samples_or_reason(joined, start_s=1.0, duration_s=1.0), expected[16000:32000])
    assert len(load(a + without_length(b))) >= 20000 + 30000
    assert len(load(without_length(a) + b)) >= 20000 + 30000
    assert len(load(without_length(a) + without_length(b))) >= 20000 + 30000
    assert samples_or_reason(a + b[: len(b) // 2]) == "truncated"
    assert samples_or_reason(a[: len(a) // 2] + b) == "truncated"
    assert samples_or_reason(a + encode("MP3", x=noise(90000), rate=44100)) == "format"
    assert samples_or_reason(a + encode("MP3", x=noise(30000, 2))) == "format"


@pytest.mark.parametrize("gap", GAPS.values(), ids=list(GAPS))
def test_a_recording_behind_a_long_gap_is_refused(gap: bytes) -> None:
    a, b = encode("MP3", x=noise(20000)), encode("MP3", x=noise(30000, seed=1))
    for joined in (
        a + gap + b,
        a + gap + without_length(b),
        without_length(a) + gap + b,
        without_length(a) + gap + without_length(b),
    ):
        with pytest.raises(AudioError, match=r"a second recording follows after .* bytes that are not MP3"):
            load(joined)
    assert np.array_equal(samples_or_reason(a + gap), load(a))
    frame = without_length(b).index(b[:2], len(b) // 2)
    assert samples_or_reason(without_length(b)[:frame] + gap + without_length(b)[frame:]) == "format"


def test_files_cut_within_a_tag_or_the_first_frame_are_truncated() -> None:
    tag = b"ID3\4\0\0\0\1\0\0" + b"p" * (1 << 14)
    mp3 = encode("MP3")
    for whole in (mp3, encode("FLAC"), encode("WAV")):
        for cut in (5, 10, 11, 200, len(tag) - 1, len(tag)):
            with pytest.raises(AudioError, match=r"the file ends (within|after) its ID3 tag") as caught:
                load((tag + whole)[:cut])
            assert caught.value.reason.value == "truncated"
    size = len(mp3) - len(without_length(mp3))
    for begin in (mp3, tag + mp3, without_length(mp3)):
        for cut in (2, 3, 4, 50, 100, size - 1, *([] if begin == without_length(mp3) else [size])):
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
    assert np.array_equal(samples_or_reason(tag + a + tag + b), np.concatenate([load(a), load(b)]))


def test_bytes_behind_the_frames_of_an_mp3_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    headers_read: list[int] = []
    real = mp3.frame_bytes
    monkeypatch.setattr(mp3, "frame_bytes", lambda head: (headers_read.append(1), real(head))[1])
    alone, frames = load(without_length(MP3)), len(headers_read)
    for junk in (b"\xff" * 2_000_000, b"\xff\xfb\x1c\xc4" * 100_000):
        headers_read.clear()
        started = time.process_time()
        np.testing.assert_array_equal(load(without_length(MP3) + junk)[: len(alone)], alone)
        assert time.process_time() - started < 1
        assert len(headers_read) == frames


def test_frames_are_counted_across_other_bytes() -> None:
    frames_only = without_length(MP3)
    size = mp3.frame_bytes(frames_only[:4])

    def counted(audio: bytes) -> int:
        frame = mp3.length_frame(memoryview(audio))
        return int.from_bytes(frame[frame.index(b"Xing") + 8 :][:4], "big")

    frame = frames_only[:size]
    assert counted(frame * 3) == 3
    assert counted(frame * 3 + frame[:-1]) == 3
    assert counted(frame + b"\xff" * 1000 + frame) == 2
    assert counted(frame + bytes(1 << 17) + frame) == 1
