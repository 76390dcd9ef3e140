"""Ogg files: several recordings one after the other, and FLAC in Ogg."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from encoded_audio import GAPS, SAMPLES, by_soundfile, encode, noise, samples_or_reason

from clsp_fast import audio
from clsp_fast.audio import load


def test_chained_ogg_is_read_whole() -> None:
    for subtype in ("VORBIS", "OPUS"):
        a, b = encode("OGG", subtype, noise(20000)), encode("OGG", subtype, noise(30000, seed=1))
        expected = np.concatenate([load(a), load(b)])
        assert np.array_equal(samples_or_reason(a + b), expected)
        assert np.array_equal(samples_or_reason(a + b, start_s=1.0, duration_s=1.0), expected[16000:32000])
        assert samples_or_reason(a + b[:-1]) == "truncated"
        assert samples_or_reason(a[: a.rindex(b"OggS")] + b) == "truncated"
        assert samples_or_reason(a + encode("OGG", subtype, noise(30000, 2))) == "format"
    # Two streams that begin together, not one after the other.
    assert samples_or_reason(a[: a.index(b"OggS", 9)] + encode("OGG", "VORBIS")) == "format"


@pytest.mark.parametrize("gap", GAPS.values(), ids=list(GAPS))
def test_a_recording_behind_a_long_gap_is_read(gap: bytes) -> None:
    a, b = encode("OGG", x=noise(20000)), encode("OGG", x=noise(30000, seed=1))
    assert np.array_equal(samples_or_reason(a + gap + b), np.concatenate([load(a), load(b)]))
    assert np.array_equal(samples_or_reason(a + gap), load(a))


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
        assert np.array_equal(samples_or_reason(wrapped), by_soundfile(native))
        assert audio.info(wrapped).frames == SAMPLES
        assert np.array_equal(samples_or_reason(wrapped + wrapped), np.tile(by_soundfile(native), 2))
        assert samples_or_reason(wrapped[: len(wrapped) // 2]) == "truncated"
        assert samples_or_reason(ogg_flac(source, ended=False)) == "truncated"
    assert samples_or_reason(unknown + native) == "format"
