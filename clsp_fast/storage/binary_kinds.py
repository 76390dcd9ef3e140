"""Recognises binary files by their first bytes, so that an error can name the kind and say what to do."""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from clsp_fast.storage.folders import CONVERT

GZIP = b"\x1f\x8b"
_HOLD_PATHS = "; a list or manifest holds the paths of recordings"
_UNPACK = "; unpack it first"
_DECOMPRESS = "; decompress it first: text may be compressed only once, with gzip"


class BinaryKind(NamedTuple):
    """Two parts of an error message about a binary file."""

    name: str
    """What the file is."""
    fix: str
    """What the user can do, or empty."""


_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"fLaC", "a recording (FLAC)", _HOLD_PATHS),
    (0, b"OggS", "a recording (Ogg)", _HOLD_PATHS),
    (0, b"FORM", "a recording (AIFF)", _HOLD_PATHS),
    (0, b".snd", "a recording (AU)", _HOLD_PATHS),
    (0, b"caff", "a recording (CAF)", _HOLD_PATHS),
    (0, b"RF64", "a recording (RF64)", _HOLD_PATHS),
    (0, b"RIFX", "a recording (WAV)", _HOLD_PATHS),
    (0, b"riff\x2e\x91\xcf\x11", "a recording (W64)", _HOLD_PATHS),
    (0, b"NIST_1A", "a recording (NIST SPHERE)", _HOLD_PATHS),
    (0, b"Creative Voice File", "a recording (VOC)", f"; {CONVERT}"),
    (0, b"ID3", "a recording (MP3)", _HOLD_PATHS),
    (0, b"\x1aE\xdf\xa3", "a recording or film (WebM or Matroska)", f"; {CONVERT}"),
    (4, b"ftyp", "a recording or film (MP4 or M4A)", f"; {CONVERT}"),
    (0, b"#!AMR", "a recording (AMR)", f"; {CONVERT}"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a recording or film (WMA)", f"; {CONVERT}"),
    (0, b"MAC ", "a recording (APE)", f"; {CONVERT}"),
    (0, b"wvpk", "a recording (WavPack)", f"; {CONVERT}"),
    (0, b"FLV\x01", "a film (FLV)", f"; {CONVERT}"),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive (.zip, .npz, .pt, .xlsx)", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", ""),
    (0, b"7z\xbc\xaf'\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, GZIP, "compressed twice with gzip", _DECOMPRESS),
    (0, b"\xfd7zXZ\0", "compressed with xz", _DECOMPRESS),
    (0, b"BZh", "compressed with bzip2", _DECOMPRESS),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _DECOMPRESS),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", _DECOMPRESS),
    (0, b"\x93NUMPY", "a numpy array", ""),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
    (0, b"PAR1", "a Parquet table", ""),
    (0, b"ARROW1", "an Arrow table", ""),
    (0, b"\xff\xff\xff\xff", "an Arrow table", ""),
    (0, b"SQLite format 3\0", "an SQLite database", ""),
    (0, b"Obj\x01", "an Avro table", ""),
    (0, b"%PDF", "a PDF file", ""),
    (0, b"\x89PNG", "a picture", ""),
    (0, b"\xff\xd8\xff", "a picture", ""),
    (0, b"GIF8", "a picture", ""),
    (0, b"\x7fELF", "a program", ""),
)
"""(offset, bytes at this offset, name, fix) of each kind."""
# A file of these kinds may begin with printable characters only. No path begins with these bytes.
_BEGIN_AS_TEXT = (b"NIST_1A\n", b"#!AMR", b"%PDF-")
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))


def kind_of_binary(head: bytes, *, is_utf8: bool) -> BinaryKind | None:
    """The kind of a binary file; None for text.

    Args:
        head: the file's first bytes.
        is_utf8: False if the bytes look like UTF-16 or UTF-32, in which text contains zero bytes.
    """
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if not controls and not head.startswith(_BEGIN_AS_TEXT):
        return None  # a path such as "caffeine/1.wav" may begin with the magic bytes of a kind
    for at, magic, name, fix in _KINDS:
        if head.startswith(magic, at):
            return BinaryKind(name, fix)
    if head.startswith(b"RIFF"):
        if head[8:12] == b"WAVE":
            return BinaryKind("a recording (WAV)", _HOLD_PATHS)
        return BinaryKind("a film or recording (RIFF)", f"; {CONVERT}")
    if _is_mpeg(head):
        if head[1] & 0x06:  # AAC has layer 0
            return BinaryKind("a recording (MP3)", _HOLD_PATHS)
        return BinaryKind("a recording (AAC)", f"; {CONVERT}")
    if re.match(rb"\x80[\x02-\x05]", head):
        return BinaryKind("a pickle", "; nothing is unpickled here")
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return BinaryKind("a file of tensors (safetensors)", "")
    # `find -print0` writes lists with single NUL bytes, so these do not count. Text contains no other control
    # characters, but a tenth of random bytes are control characters.
    noise = controls - head.count(0) + 2 * head.count(b"\0\0")
    if is_utf8 and noise > 3 and 20 * noise > len(head):
        return BinaryKind("a binary file of an unknown kind", "")
    return None


def _is_mpeg(head: bytes) -> bool:
    """Whether `head` begins with an MP3 or AAC frame, and not with UTF-16's byte order mark."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0 or head.startswith(codecs.BOM_UTF16_LE):
        return False
    known_version, known_rates = head[1] & 0x18 != 0x08, head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C
    return known_version and known_rates
