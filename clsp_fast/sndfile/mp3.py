"""MP3 files: their ID3 tags, their frames, and the recordings that follow one another in a file.

If no frame states the length, libsndfile estimates it from the first frames, and stops decoding there. The
estimate is far off if the bit rate varies. If several recordings follow one another, libsndfile reads only
the first. Therefore `split_recordings` finds every recording, and puts a frame that states its length in
front of it.
"""

from __future__ import annotations

import os
import re
import struct
from typing import IO, NamedTuple

from clsp_fast.sndfile.errors import DecodeError
from clsp_fast.storage.folders import CONVERT

_RATES_HZ = (44100, 48000, 32000)
_KBPS = (  # MPEG-2 and 2.5, MPEG-1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
# A layer III header with a valid version and sample rate, and with a bit rate other than "free".
_KBPS_AND_RATE = b"".join(rb"\x%x0-\x%xb" % (kbps, kbps) for kbps in range(1, 15))
_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][%s]." % _KBPS_AND_RATE, re.DOTALL)
_LONGEST_GAP = 1 << 16
"""Decoders stop if no frame follows within this many bytes."""
_MANY_FRAMES = 10
_ID3V1_BYTES = 128
_ID3_HEAD_BYTES = 10
_ID3_FOOTER = 0x10


class StatedLength(NamedTuple):
    """What the first frame of a recording states about the frames that follow; 0: not stated."""

    frames: int
    bytes: int


class _Kind(NamedTuple):
    """What all frames of a recording have in common: version and rate as the header's bits, and channels."""

    version: int
    rate: int
    mono: bool


def check_tag(file: IO[bytes], offset: int) -> None:
    """Raises DecodeError if the file ends within an ID3v2 tag, or directly after the tag, at `offset`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if offset > size or (size < _ID3_HEAD_BYTES and file.read(3) == b"ID3"):
        raise DecodeError("the file ends within its ID3 tag", "truncated")
    if offset == size > 0:
        raise DecodeError("the file ends after its ID3 tag, before any sound", "truncated")


def is_tagged_mpeg(file: IO[bytes], offset: int) -> bool:
    """Whether the file is one ID3v2 tag of `offset` bytes, then MPEG audio. libsndfile skips such a tag."""
    file.seek(0)
    head = file.read(_ID3_HEAD_BYTES)
    if id3_bytes(head) != offset or head[5] & _ID3_FOOTER:
        return False
    file.seek(offset)
    return is_mpeg(file.read(4))


def is_mpeg(head: bytes | memoryview) -> bool:
    """Whether `head` begins with the sync bits of an MPEG audio frame."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0


def begins_as_mp3(file: IO[bytes]) -> bool:
    """Whether the file begins with an ID3v2 tag or an MPEG audio frame."""
    file.seek(0)
    head = file.read(4)
    return head.startswith(b"ID3") or is_mpeg(head)


def require_frames(file: IO[bytes], count: int) -> None:
    """Raises DecodeError if an MP3 file ends before `count` frames are complete."""
    size = file.seek(0, os.SEEK_END)
    at = _audio_offset(file)
    for frame in range(count):
        file.seek(at)
        head = file.read(4)
        length = frame_bytes(head)
        if len(head) == 4 and length == 0:
            return  # no frame, but libsndfile may skip it
        at += max(length, 4)
        if at > size:
            raise DecodeError(f"the file ends after {frame} whole MP3 frames", "truncated")


def split_recordings(file: IO[bytes]) -> list[list[bytes | memoryview]] | None:
    """The recordings of an MP3 file, each as the parts of a file whose first frame states its length.

    Returns:
        None if the file has one recording and states its length. libsndfile can read such a file.

    Raises:
        DecodeError: there are so many other bytes before a recording that a decoder would not reach it.
    """
    first = _audio_offset(file)
    file.seek(first)
    head = file.read(2048)
    if not frame_bytes(head):
        return None
    stated = _stated_length(head)
    size = file.seek(0, os.SEEK_END) - first
    # Most files state their length, with at most a short tag after the sound. They need not be read whole.
    if stated and 0 <= size - stated.bytes <= _ID3V1_BYTES:
        return None
    file.seek(first)
    audio = memoryview(file.read())
    spans = _recording_spans(audio)
    if len(spans) == 1 and stated:
        return None
    recordings: list[list[bytes | memoryview]] = []
    for begin, end in spans:
        recording = audio[begin:end]
        states_length = _stated_length(recording[:2048]) is not None
        recordings.append([recording] if states_length else [length_frame(recording), recording])
    return recordings


def _audio_offset(file: IO[bytes]) -> int:
    """Where the first frame should be: after the ID3v2 tag, if there is one."""
    file.seek(0)
    return id3_bytes(file.read(10))


def id3_bytes(head: bytes | memoryview) -> int:
    """Length of the ID3v2 tag at the beginning of `head`; 0 if there is none."""
    if len(head) < _ID3_HEAD_BYTES or head[:3] != b"ID3":
        return 0
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return _ID3_HEAD_BYTES + size + (_ID3_HEAD_BYTES if head[5] & _ID3_FOOTER else 0)


def frame_bytes(head: bytes | memoryview) -> int:
    """Length of the layer III frame at the beginning of `head` (ISO 11172-3, 2.4.2.3); 0 if there is none."""
    if len(head) < 4 or not is_mpeg(head):
        return 0
    version, layer, rate, kbps = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer != 1 or rate == 3 or kbps in (0, 15):
        return 0
    bits_per_s = 1000 * _KBPS[version == 3][kbps]
    rate_hz = _RATES_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * bits_per_s // rate_hz + (head[2] >> 1 & 1)


def length_frame(audio: memoryview) -> bytes:
    """A frame that states how many frames `audio` has, as encoders write it (the Xing header).

    The regular expression skips bytes that are no frame, which is faster than a loop over bytes. The count
    ends at a gap of over `_LONGEST_GAP` bytes, because a decoder stops there.
    """
    frames, at = 0, 0
    while match := _HEADER.search(audio, at, at + _LONGEST_GAP):
        at = match.start() + frame_bytes(audio[match.start() : match.end()])
        frames += at <= len(audio)
    # The first frame's header, without padding and checksum. Bit rate index 9 leaves room for the body.
    head = bytes([0xFF, audio[1] | 1, 9 << 4 | audio[2] & 0x0C, audio[3]])
    body = head + bytes(_side_bytes(head)) + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return body.ljust(frame_bytes(head), b"\0")


def _side_bytes(head: bytes | memoryview) -> int:
    """Length of the side information of a frame with this header."""
    mpeg1, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)


def _stated_length(frame: bytes | memoryview) -> StatedLength | None:
    """What a frame states about the frames that follow; None if it is an ordinary frame."""
    if not frame_bytes(frame):
        return None
    side_bytes = _side_bytes(frame)
    # In a frame with a checksum, some encoders leave room for it before the tag; others do not.
    for at in (4 + side_bytes, 6 + side_bytes):
        tag = bytes(frame[at : at + 16])
        if len(tag) == 16 and tag.startswith((b"Xing", b"Info")):
            flags, *fields = struct.unpack(">3I", tag[4:])
            frames = fields.pop(0) if flags & 1 else 0
            return StatedLength(frames, fields[0] if flags & 2 else 0)
    tag = bytes(frame[36:54])
    if len(tag) == 18 and tag.startswith(b"VBRI"):
        total, frames = struct.unpack(">II", tag[10:])
        return StatedLength(frames, total)
    return None


def _kind(head: bytes | memoryview) -> _Kind:
    return _Kind(head[1] & 0x18, head[2] & 0x0C, head[3] >> 6 == 3)


def _recording_spans(audio: memoryview) -> list[tuple[int, int]]:
    """(begin, end) of each recording in `audio`.

    A recording begins at a frame that states a length, at a frame of another kind, and where many more frames
    follow than were stated.
    """
    begins, at, frames, contiguous = [0], 0, 0, True
    kind, stated = _kind(audio), _stated_length(audio[:64])
    while (begin := _next_frame(audio, at, kind if contiguous else None)) is not None:
        head = audio[begin : begin + 64]
        stated_here = _stated_length(head)
        exceeded = stated is not None and frames == stated.frames > 0 and _many_frames_follow(audio, begin)
        if begin > 0 and (stated_here or exceeded or _kind(head) != kind):
            begins.append(begin)
            frames, kind, stated = 0, _kind(head), stated_here
        frames += stated_here is None
        at = begin + frame_bytes(head)
        # If no frame follows, this frame may be cut, and the next recording may begin within its length.
        contiguous = at >= len(audio) or _HEADER.match(audio, at) is not None
        at = at if contiguous else begin + 4
    return list(zip(begins, [*begins[1:], len(audio)], strict=True))


def _next_frame(audio: memoryview, at: int, kind: _Kind | None) -> int | None:
    """Where the next frame begins, at `at` or later; None if there is none. Tags and other bytes are skipped.

    Other bytes can look like a frame by chance. A frame counts if it is exactly at `at` and of `kind`, or if
    another frame of its kind or the end of the file follows it.

    Raises:
        DecodeError: there are so many other bytes before the frame that a decoder would not reach it.
    """
    gap_at = at
    while at < len(audio):
        match = _HEADER.search(audio, at)
        begin = match.start() if match else len(audio)
        tag = bytes(audio[at:begin]).find(b"ID3") if begin > at else -1
        if tag >= 0 and (tag_bytes := id3_bytes(audio[at + tag : at + tag + _ID3_HEAD_BYTES])):
            at = gap_at = at + tag + tag_bytes
            continue
        if match is None:
            return None
        head = audio[begin : begin + 4]
        candidate = _kind(head)
        if begin == at and candidate == kind:
            return begin
        following = audio[begin + frame_bytes(head) :][:4]
        goes_on = frame_bytes(following) > 0 and _kind(following) == candidate
        gap = begin - gap_at
        if goes_on and gap > _LONGEST_GAP:
            fix = f"split them, or {CONVERT}"
            raise DecodeError(f"a second recording follows after {gap} bytes that are not MP3; {fix}")
        if goes_on or (len(following) < 4 and gap <= _LONGEST_GAP):
            return begin
        at = begin + 1
    return None


def _many_frames_follow(audio: memoryview, at: int) -> bool:
    """Whether at least `_MANY_FRAMES` frames follow. Fewer can belong to a recording that states too few."""
    for _ in range(_MANY_FRAMES):
        size = frame_bytes(audio[at : at + 4])
        if size == 0:
            return False
        at += size
    return True
