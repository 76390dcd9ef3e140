"""Finds where the sound of a file begins and ends according to the header, and whether the file is truncated.

libsndfile reads a truncated file without an error. In some containers it also decodes the bytes after the
sound. To prevent both, the header is compared with the file first. The extension itself reads FLAC and most
WAV files; only WAV files in other encodings get here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

_LONGEST_SEARCH = 1 << 20
_BLOCK_BYTES = 1 << 20
_LONGEST_HEAD = 64
_MOST_CHUNKS = 65536
# A writer that cannot seek back to the header states a huge size, which means "up to the end of the file".
# These are the smallest sizes that count as huge, in fields of 8 and 4 bytes. SoX writes 0x7FFFF000, or
# 0x7F000000 in AIFF, rounded down to whole frames.
_LEAST_STREAM_SIZE = {8: 0x7FFFFF00, 4: 0x7FFF0000}
_LEAST_AIFF_STREAM_SIZE = 0x7EFF0000
# In these containers libsndfile decodes all bytes after the sound as sound, even a pad byte.
_READ_TOO_FAR = (b"RIFF", b"riff", b"NIST", b".snd", b"FORM")
_AIFF_PCM = (b"NONE", b"twos", b"sowt", b"raw ", b"in24", b"in32", b"fl32", b"FL32", b"fl64", b"FL64")
_NIST_FIELD = re.compile(rb"^(\w+) -[a-z0-9]+ (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Extent:
    """Where the sound of a file is.

    Attributes:
        begin: offset of the first byte of sound.
        end: offset after the last byte of sound, according to the header; None: the end of the file.
        present_end: offset after the last byte of sound in the file.
        size_at: offset of the field that states the size; 0 if there is none.
        size_layout: format of this field, for `struct`.
        size_bias: bytes that this field counts besides the sound.
        extra_end: offset that the file must reach according to other chunks; 0 if they require none.
        several: whether a second chunk of sound follows.
    """

    begin: int
    end: int | None
    present_end: int
    size_at: int = 0
    size_layout: str = "<q"
    size_bias: int = 0
    extra_end: int = 0
    several: bool = False

    @property
    def cut(self) -> bool:
        """Whether the file ends before what its header states."""
        return max(self.end or 0, self.extra_end) > self.present_end


@dataclass(frozen=True)
class _Layout:
    """The format of a container that consists of chunks."""

    first: int
    """Offset of the first chunk."""
    size_at: int
    """Offset of the size within a chunk's head."""
    size_layout: str
    """Format of the size, for `struct`."""
    head_bytes: int
    """Length of a chunk's head."""
    counted_head_bytes: int
    """Bytes of the head that the size counts."""
    align: int
    """Chunks begin at multiples of this."""
    data_tags: tuple[bytes, ...]
    """Tags of chunks that hold sound."""
    data_head_bytes: int = 0
    """Bytes that precede the sound in its chunk."""


_LAYOUTS = {
    b"RIFF": _Layout(12, 4, "<I", 8, 0, 2, (b"data",)),
    b"RIFX": _Layout(12, 4, ">I", 8, 0, 2, (b"data",)),
    b"FORM AIFF": _Layout(12, 4, ">I", 8, 0, 2, (b"SSND",), data_head_bytes=8),
    b"FORM": _Layout(12, 4, ">I", 8, 0, 2, (b"BODY",)),
    b"caff": _Layout(8, 4, ">q", 12, 0, 1, (b"data",), data_head_bytes=4),
    b"riff": _Layout(40, 16, "<q", 24, 24, 8, (b"data",)),
}


def find_extent(file: IO[bytes], size: int) -> Extent | None:
    """Where the sound of a file of `size` bytes is; None if the header does not state it."""
    head = _read(file, 0, 64)
    if head.startswith(b".snd"):
        return _au_extent(head, size)
    if head.startswith(b"NIST"):
        return _nist_extent(_read(file, 0, 1 << 16), size)
    kind = b"FORM AIFF" if head.startswith(b"FORM") and head[8:11] == b"AIF" else head[:4]
    layout = _LAYOUTS.get(kind)
    return _chunk_extent(file, size, layout) if layout else None


def has_second_file(file: IO[bytes], size: int, extent: Extent) -> bool:
    """Whether a second file of the same container follows the first, as after `cat a.au b.au`.

    A whole header is searched for, because text or samples do not look like a whole header by chance. The
    search begins at the end of the sound; if the header does not state the end, at its beginning.
    """
    begin = extent.begin if extent.end is None else extent.end
    end = size if extent.end is None else min(size, begin + _LONGEST_SEARCH)
    head = _read(file, 0, _LONGEST_HEAD)
    pattern = _second_header(head)
    while begin < end:
        block = _read(file, begin, _BLOCK_BYTES + _LONGEST_HEAD)
        if pattern.search(block):
            return True
        begin += _BLOCK_BYTES
    return False


def _second_header(head: bytes) -> re.Pattern[bytes]:
    """A pattern of headers of the same container as that of the file that begins with `head`."""
    magic = head[:4]
    if magic == b".snd":  # sound from byte 24 .. 65535 on, size, encoding 1 .. 27
        return re.compile(rb"\.snd\0\0(?:\0[\x18-\xff]|[^\0].).{4}\0\0\0[\x01-\x1b]", re.DOTALL)
    if magic == b"caff":
        return re.compile(re.escape(b"caff\0\1\0\0desc"))
    if magic == b"NIST":
        return re.compile(rb"NIST_1A\n[ 0-9]{7}\n")
    if magic == b"riff":
        return re.compile(re.escape(head[:16]) + b".{8}" + re.escape(head[24:40]), re.DOTALL)
    return re.compile(re.escape(magic) + b".{4}" + re.escape(head[8:12]), re.DOTALL)


def with_size(file: IO[bytes], extent: Extent) -> Iterator[bytes]:
    """Yields the parts of the file. The size in the header is replaced by the real size of the sound."""
    stated = struct.pack(extent.size_layout, extent.present_end - extent.begin + extent.size_bias)
    yield _read(file, 0, extent.size_at)
    yield stated
    yield from blocks(file, extent.size_at + len(stated))


def blocks(file: IO[bytes], begin: int, end: int | None = None) -> Iterator[bytes]:
    """The bytes [begin, end) of a file in blocks of bounded size. None: up to the end of the file.

    Raises:
        EOFError: the file ends before `end`.
    """
    file.seek(begin)
    while end is None or begin < end:
        block = file.read(_BLOCK_BYTES if end is None else min(end - begin, _BLOCK_BYTES))
        if not block:
            if end is not None:
                raise EOFError
            return
        begin += len(block)
        yield block


def reads_too_far(head: bytes) -> bool:
    """Whether libsndfile also decodes the bytes after the sound of a file that begins with `head`."""
    return head.startswith(_READ_TOO_FAR)


def _read(file: IO[bytes], offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _extent(begin: int, stated: int, size: int, at: int = 0, layout: str = "<q", bias: int = 0) -> Extent:
    """The extent of sound that has `stated` bytes according to the header, in a file of `size` bytes."""
    huge = _LEAST_STREAM_SIZE[struct.calcsize(layout)] if layout != ">I" else _LEAST_AIFF_STREAM_SIZE
    end = None if stated <= 0 or stated >= max(huge - bias, size - begin + 1) else begin + stated
    present = size if end is None else min(end, size)
    return Extent(begin, end, present, at, layout, bias)


def _au_extent(head: bytes, size: int) -> Extent | None:
    if len(head) < 12:
        return None
    begin, stated = struct.unpack_from(">II", head, 4)
    return _extent(begin, stated, size, 8, ">I")


def _nist_extent(head: bytes, size: int) -> Extent | None:
    fields = dict(_NIST_FIELD.findall(head.split(b"end_head")[0]))
    try:
        begin = int(head[8:16])
        samples, width = int(fields[b"sample_count"]), int(fields[b"sample_n_bytes"])
        stated = samples * width * int(fields.get(b"channel_count", b"1"))
    except (KeyError, ValueError):
        return None
    coding = fields.get(b"sample_coding", b"pcm")
    if b"," in coding or stated <= 0:  # compressed, or not stated
        return None
    return _extent(begin, stated, size)


def _chunk_extent(file: IO[bytes], size: int, layout: _Layout) -> Extent | None:
    extent: Extent | None = None
    aiff_bytes = 0
    for tag, at, content, stated in _chunks(file, size, layout):
        if tag == b"COMM" and layout.data_tags == (b"SSND",):
            aiff_bytes = _aiff_sound_bytes(_read(file, content, min(stated, 22)))
        if extent is not None and (extent.end is None or extent.end > extent.begin):
            if tag in layout.data_tags and stated > layout.data_head_bytes:
                return replace(extent, several=True)
            # In CAF, a chunk with the sizes of the packets follows compressed sound.
            if layout.size_layout == ">q" and tag == b"pakt":
                return _extent_with_extra(extent, content + stated, size)
        elif tag in layout.data_tags:
            head_bytes = layout.data_head_bytes
            begin, sound_bytes = content + head_bytes, stated - head_bytes
            empty = (sound_bytes == 0 and head_bytes > 0) or stated == 0
            if empty and _only_chunks_follow(file, size, content + stated, layout):
                extent = Extent(content, content, content)
            else:
                bias = head_bytes + layout.counted_head_bytes
                extent = _extent(begin, sound_bytes, size, at + layout.size_at, layout.size_layout, bias)
                if extent.end is None and begin + aiff_bytes > size:
                    extent = replace(extent, extra_end=begin + aiff_bytes)
    return extent


def _aiff_sound_bytes(comm: bytes) -> int:
    """Size of the sound according to AIFF's COMM chunk; 0 if it is not stated, as in a streamed file."""
    if len(comm) < 18:
        return 0
    channels, frames, bits = struct.unpack_from(">hIh", comm)
    stated: int = channels * frames * (-(-bits // 8))
    is_pcm = comm[18:22] in (b"", *_AIFF_PCM)
    return stated if is_pcm and 0 < stated < _LEAST_AIFF_STREAM_SIZE else 0


def _extent_with_extra(extent: Extent, extra_end: int, size: int) -> Extent:
    present = size if extra_end > size else extent.present_end
    return Extent(extent.begin, extent.end, present, extra_end=extra_end if extra_end > size else 0)


def _chunks(file: IO[bytes], size: int, layout: _Layout) -> Iterator[tuple[bytes, int, int, int]]:
    """(tag, offset, offset of the content, stated size of the content) of each chunk."""
    at = layout.first
    for _ in range(_MOST_CHUNKS):
        if at >= size:
            return
        head = _read(file, at, layout.head_bytes)
        if len(head) < layout.head_bytes:
            return
        (stated,) = struct.unpack_from(layout.size_layout, head, layout.size_at)
        content, stated = at + layout.head_bytes, stated - layout.counted_head_bytes
        yield head[:4], at, content, stated
        if stated < 0:
            return
        at = content + stated
        padding = -at % layout.align if layout.align > 2 else stated % layout.align
        # Some writers leave the pad byte out.
        if (
            padding == 1
            and layout.align == 2
            and _is_tag(_read(file, at, 4))
            and not _is_tag(_read(file, at + 1, 4))
        ):
            padding = 0
        at += padding


def _is_tag(tag: bytes) -> bool:
    return len(tag) == 4 and all(0x20 <= byte < 0x7F for byte in tag)


def _only_chunks_follow(file: IO[bytes], size: int, offset: int, layout: _Layout) -> bool:
    """Whether nothing follows at `offset`, or only whole chunks up to the end of the file."""
    if offset >= size:
        return True
    at = offset
    while at + layout.head_bytes <= size:
        head = _read(file, at, layout.head_bytes)
        (stated,) = struct.unpack_from(layout.size_layout, head, layout.size_at)
        stated -= layout.counted_head_bytes
        if not _is_tag(head[:4]) or stated < 0:
            return False
        at += layout.head_bytes + stated
        if at == size:
            return True
        at += -at % layout.align if layout.align > 2 else stated % layout.align
    return at == size
