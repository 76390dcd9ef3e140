"""The recordings in an Ogg file (RFC 3533), one after the other, and whether each is whole.

libsndfile reads the first of several, takes a stream that lacks its end for a shorter one, and cannot read
FLAC in Ogg as it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import IO

_HEAD = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4
LONGEST_HEAD = _HEAD.size + 255
"""Bytes of a page before its content, at most."""
_BLOCK_BYTES = 1 << 20
_FLAC_HEAD = b"\x7fFLAC"
_AUDIO = (b"\x01vorbis", b"OpusHead", b"Speex   ", _FLAC_HEAD)


@dataclass
class Recording:
    """A logical stream.

    Attributes:
        head: how its first packet begins.
        pages: (offset, bytes) of each page.
        ended: whether its last page is there.
        samples: number of samples at the end of the last page.
    """

    head: bytes
    pages: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False
    samples: int = 0

    @property
    def is_flac(self) -> bool:
        return self.head.startswith(_FLAC_HEAD)


class MultiplexedError(Exception):
    """Several recordings at the same time."""


def recordings(file: IO[bytes], size: int) -> list[Recording]:
    """The audio streams of a file of `size` bytes in their order; what is not audio is left out.

    Raises:
        MultiplexedError: two of them run at the same time.
    """
    audio: list[Recording] = []
    by_serial: dict[int, Recording] = {}
    at, headers_only = 0, True
    while (page := _next_page(file, size, at)) is not None:
        at, flags, samples, serial, body_at, end = page
        if end > size:  # the page is cut, and its stream with it
            if serial in by_serial:
                by_serial[serial].ended = False
            break
        if flags & _FIRST:
            file.seek(body_at)
            found = Recording(file.read(min(8, end - body_at)))
            by_serial[serial] = found
            if found.head.startswith(_AUDIO):
                if audio and headers_only:
                    raise MultiplexedError
                audio.append(found)
            if not headers_only:
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
    """(offset, flags, granule position, serial number, offset of the content, end) of a page."""
    file.seek(at)
    head = file.read(LONGEST_HEAD)
    if not head.startswith(b"OggS"):
        found = _find_page(file, at)
        if found is None:
            return None
        at = found
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
    """Where the next page begins, however far behind `at`; its version is 0."""
    while True:
        file.seek(at)
        block = file.read(_BLOCK_BYTES)
        if (found := block.find(b"OggS\0")) >= 0:
            return at + found
        if len(block) < 5:
            return None
        at += len(block) - 4


def copy(file: IO[bytes], recording: Recording) -> bytes:
    """The pages of one stream as a file of its own; FLAC as a native FLAC file."""
    pages = []
    for offset, count in recording.pages:
        file.seek(offset)
        pages.append(file.read(count))
    return _native_flac(pages, recording) if recording.is_flac else b"".join(pages)


def _native_flac(pages: list[bytes], recording: Recording) -> bytes:
    """The packets are the blocks and frames of the native format, behind 9 bytes of the first one."""
    content = []
    for page in pages:
        content.append(page[_HEAD.size + page[26] :])
    native = bytearray(b"".join(content)[9:])
    # A writer that cannot go back leaves the length out, 36 bits of these 8 bytes; the pages tell it.
    if len(native) >= 26 and recording.ended:
        (fields,) = struct.unpack_from(">Q", native, 18)
        if fields & ((1 << 36) - 1) == 0 and 0 < recording.samples < 1 << 36:
            struct.pack_into(">Q", native, 18, fields | recording.samples)
    return bytes(native)
