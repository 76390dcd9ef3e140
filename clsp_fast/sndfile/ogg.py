"""The recordings that follow one another in an Ogg file (RFC 3533), and whether each is complete.

libsndfile reads only the first recording, reads one without its end as if it were shorter, and cannot read
FLAC in Ogg.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import IO

_HEAD = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4
LONGEST_HEAD = _HEAD.size + 255
"""The longest that the head of a page can be, in bytes."""
_BLOCK_BYTES = 1 << 20
_FLAC_HEAD = b"\x7fFLAC"
_AUDIO = (b"\x01vorbis", b"OpusHead", b"Speex   ", _FLAC_HEAD)


@dataclass
class Recording:
    """A logical stream.

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
    """The audio streams of a file of `size` bytes, in their order.

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

    Of a page whose head is cut, the end lies behind the end of the file.
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
    """Where the next page begins, at any distance behind `at`; None if there is none."""
    while True:
        file.seek(at)
        block = file.read(_BLOCK_BYTES)
        if (index := block.find(b"OggS\0")) >= 0:  # 0 is the version
            return at + index
        if len(block) < 5:
            return None
        at += len(block) - 4


def copy(file: IO[bytes], recording: Recording) -> bytes:
    """One stream as a file: its pages, or a native FLAC file if it is FLAC."""
    pages = []
    for offset, count in recording.pages:
        file.seek(offset)
        pages.append(file.read(count))
    return _native_flac(pages, recording) if recording.is_flac else b"".join(pages)


def _native_flac(pages: list[bytes], recording: Recording) -> bytes:
    """The native FLAC file: the packets are its blocks and frames. The first 9 bytes belong to Ogg."""
    content = [page[_HEAD.size + page[26] :] for page in pages]
    native = bytearray(b"".join(content)[9:])
    # A writer that cannot go back leaves out the length, 36 bits of these 8 bytes. The pages state it.
    if len(native) >= 26 and recording.ended:
        (fields,) = struct.unpack_from(">Q", native, 18)
        if fields & ((1 << 36) - 1) == 0 and 0 < recording.samples < 1 << 36:
            struct.pack_into(">Q", native, 18, fields | recording.samples)
    return bytes(native)
