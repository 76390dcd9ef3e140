"""The recordings that follow one another in an Ogg file (RFC 3533), and whether each is complete.

libsndfile reads only the first recording. It reads a truncated one without an error, and cannot read FLAC in
Ogg.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import IO

_HEAD = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4
LONGEST_HEAD = _HEAD.size + 255
"""Largest size of the head of a page, in bytes."""
_BLOCK_BYTES = 1 << 20
_FLAC_HEAD = b"\x7fFLAC"
_AUDIO = (b"\x01vorbis", b"OpusHead", b"Speex   ", _FLAC_HEAD)


@dataclass
class Recording:
    """One logical stream.

    Attributes:
        head: the first 8 bytes of its first packet.
        pages: (offset, bytes) of each page.
        ended: whether its last page is there.
        samples: number of samples up to the end of the last page.
    """

    head: bytes
    pages: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False
    samples: int = 0

    @property
    def is_flac(self) -> bool:
        """Whether the stream is FLAC."""
        return self.head.startswith(_FLAC_HEAD)


class MultiplexedError(Exception):
    """Two recordings run at the same time."""


def recordings(file: IO[bytes], size: int) -> list[Recording]:
    """The audio streams of a file of `size` bytes, in the order of the file.

    Raises:
        MultiplexedError: two streams run at the same time.
    """
    audio: list[Recording] = []
    by_serial: dict[int, Recording] = {}
    at, headers_only = 0, True
    while (page := _next_page(file, size, at)) is not None:
        at, flags, samples, serial, body_at, end = page
        if end > size:  # the page is truncated, and so is its stream
            if serial in by_serial:
                by_serial[serial].ended = False
            break
        if flags & _FIRST:
            file.seek(body_at)
            recording = Recording(file.read(min(8, end - body_at)))
            by_serial[serial] = recording
            if recording.head.startswith(_AUDIO):
                if audio and headers_only:
                    raise MultiplexedError
                audio.append(recording)
            headers_only = True
        else:
            headers_only = False
        if stream := by_serial.get(serial):
            stream.pages.append((at, end - at))
            stream.ended = bool(flags & _LAST)
            stream.samples = max(stream.samples, samples)
        at = end
    return audio


def _next_page(file: IO[bytes], size: int, at: int) -> tuple[int, int, int, int, int, int] | None:
    """(offset, flags, granule position, serial number, offset of the content, end) of the next page.

    If the head of the page is truncated, the returned end is size + 1.
    """
    file.seek(at)
    head = file.read(LONGEST_HEAD)
    if not head.startswith(b"OggS"):
        page_at = _find_page(file, at)
        if page_at is None:
            return None
        at = page_at
        file.seek(at)
        head = file.read(LONGEST_HEAD)
    if len(head) < _HEAD.size:
        return at, 0, 0, -1, at, size + 1
    _, _, flags, samples, serial, _, _, segments = _HEAD.unpack_from(head)
    body_at = at + _HEAD.size + segments
    sizes = head[_HEAD.size : _HEAD.size + segments]
    end = body_at + sum(sizes) if len(sizes) == segments else size + 1
    return at, flags, samples, serial, body_at, end


def _find_page(file: IO[bytes], at: int) -> int | None:
    """Where the next page begins, at `at` or anywhere after it; None if there is none."""
    while True:
        file.seek(at)
        block = file.read(_BLOCK_BYTES)
        if (index := block.find(b"OggS\0")) >= 0:  # 0 is the version
            return at + index
        if len(block) < 5:
            return None
        at += len(block) - 4


def copy(file: IO[bytes], recording: Recording) -> bytes:
    """The content of a file with this stream alone: its pages, or native FLAC if it is FLAC."""
    pages = []
    for offset, count in recording.pages:
        file.seek(offset)
        pages.append(file.read(count))
    return _native_flac(pages, recording) if recording.is_flac else b"".join(pages)


def _native_flac(pages: list[bytes], recording: Recording) -> bytes:
    """The content of a native FLAC file: the joined contents of the pages, without Ogg's first 9 bytes."""
    content = [page[_HEAD.size + page[26] :] for page in pages]
    native = bytearray(b"".join(content)[9:])
    # A writer that cannot seek back leaves the length 0. It is the lowest 36 bits of these 8 bytes. The pages
    # state it, too.
    if len(native) >= 26 and recording.ended:
        (fields,) = struct.unpack_from(">Q", native, 18)
        if fields & ((1 << 36) - 1) == 0 and 0 < recording.samples < 1 << 36:
            struct.pack_into(">Q", native, 18, fields | recording.samples)
    return bytes(native)
