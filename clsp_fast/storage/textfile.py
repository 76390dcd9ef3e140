"""Reads text that users give: manifests, lists, pairs, tables and tasks, from files or standard input.

Editors and other programs write text in many ways. This reader takes UTF-8 with and without a byte order
mark, UTF-16, UTF-32, any line ending, gzip with any suffix, and file names that are not UTF-8. Binary files
are refused: their first bytes show the kind, which the error names.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

from clsp_fast.storage import binary_kinds, paths

HEAD_BYTES = 4096
"""Number of bytes at the beginning of a file from which its kind is recognised."""
_LONGEST_INTEGER = 1000  # Python refuses to convert integers of over 4300 digits

_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Text(NamedTuple):
    """Text that is open for reading."""

    file: TextIO
    head: str
    """Up to a few thousand characters from its beginning."""


@contextlib.contextmanager
def open_text(source: Path | str | IO[bytes], expected: str, *, newline: str | None = None) -> Iterator[Text]:
    """Opens a text file, or a binary stream such as `sys.stdin.buffer`, which stays open.

    Bytes that are not UTF-8 become lone surrogates, as in `os.fsdecode`, so that the names of files survive.
    UTF-16 and UTF-32 are recognised by their byte order mark, or by their zero bytes.

    Args:
        source: the file, or the stream.
        expected: what the text should be, such as "a manifest", for errors.
        newline: as for `open`; None: each of \\n, \\r\\n and \\r ends a line.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: the file is binary, cannot be decompressed, or contains damaged UTF-16.
        OSError: the file cannot be opened.
    """
    name = str(source) if isinstance(source, (str, Path)) else "standard input"
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, Path)):
            _check_path(Path(source), expected)
            source = stack.enter_context(Path(source).open("rb"))
        try:
            reader, head = _with_head(source)
            if head.startswith(binary_kinds.GZIP):
                reader, head = _with_head(gzip.GzipFile(fileobj=reader))
            encoding = _encoding(head)
            binary = binary_kinds.kind_of_binary(head, is_utf8=encoding == "utf-8-sig")
            if binary:
                raise ValueError(f"{name} is {binary.name}, not {expected}{binary.fix}")
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            file = io.TextIOWrapper(reader, encoding, errors, newline)
            stack.callback(file.detach)  # closing it would close standard input
            yield Text(file, head.decode(encoding, "replace"))
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error


def _check_path(path: Path, expected: str) -> None:
    if paths.is_dir(path):
        raise FileNotFoundError(f"{path} is a folder, not {expected}")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} does not exist or is not a file; expected {expected}") from error


class _Prepended(io.RawIOBase):
    """Gives the bytes of `head`, which were already read from `source`, and then the rest of `source`.

    Closing it leaves `source` open.
    """

    def __init__(self, head: bytes, source: Any) -> None:
        self._head = head
        self._read = getattr(source, "read1", source.read)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._head[: len(buffer)] or self._read(len(buffer)) or b""
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def _with_head(source: Any) -> tuple[io.BufferedReader, bytes]:
    """A reader that starts at the beginning of the stream, and the stream's first bytes.

    A pipe may return fewer bytes than requested, so the bytes are read in a loop.
    """
    head = b""
    while len(head) < HEAD_BYTES and (part := source.read(HEAD_BYTES - len(head))):
        head += part
    return io.BufferedReader(_Prepended(head, source), 2**16), head


def _encoding(head: bytes) -> str:
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    count = min(len(head), 256) // 4
    zeros = [head[place : 4 * count : 4].count(0) for place in range(4)]
    if count and zeros[0] == 0 and zeros[2:] == [count, count]:
        return "utf-32-le"
    if count and zeros[3] == 0 and zeros[:2] == [count, count]:
        return "utf-32-be"
    if zeros[0] + zeros[2] == 0 and zeros[1] + zeros[3] > count:
        return "utf-16-le"
    if zeros[1] + zeros[3] == 0 and zeros[0] + zeros[2] > count:
        return "utf-16-be"
    return "utf-8-sig"


def shown(value: object, longest: int = 60) -> str:
    """`repr` of a value, cut to `longest` characters, for an error."""
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def is_text(value: str) -> bool:
    """Whether the string can be encoded in UTF-8. Lone surrogates cannot be encoded: they come from JSON
    escapes, and from file names that are not UTF-8."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def json_object(text: str) -> dict[str, Any]:
    """Parses the JSON object of a line.

    NaN, Infinity and numbers beyond a float's range become None. They are not JSON, but Python writes them,
    and they may be values of keys that are not used.

    Raises:
        ValueError: the line is no JSON object, or nested too deeply.
    """
    try:
        value = json.loads(
            text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_finite_integer
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def integer(digits: str) -> int | float:
    """Parses integers for `json.loads`. An integer with more digits than Python converts becomes infinite."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _finite_integer(digits: str) -> int | float | None:
    number = integer(digits)
    return None if number == math.inf else number


def lines(file: TextIO, longest: int) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of each line that is not blank.

    A line of over `longest` characters is cut to `longest`, so that no line can fill the memory. It then ends
    without \\n, and `is_whole` is False.
    """
    for number in itertools.count(1):
        text = file.readline(longest)
        if text.startswith("\ufeff"):  # `cat` joined two files with byte order marks
            text = text[1:] + ("" if text.endswith("\n") else file.readline(1))
        if not text:
            return
        rest = text
        while rest and not rest.endswith("\n"):
            rest = file.readline(longest)
        if text.strip():
            yield number, text


def is_whole(text: str, longest: int) -> bool:
    """Whether `lines` returned this line uncut."""
    return text.endswith("\n") or len(text) < longest


def read_text(path: Path, expected: str, *, most_bytes: int = 2**24) -> str:
    """Reads a small text file as a whole, in any encoding that `open_text` reads.

    Raises:
        ValueError: it has more characters than `most_bytes`. Also what `open_text` raises.
    """
    with open_text(path, expected) as text:
        content = text.file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} must have at most {most_bytes} bytes")
    return content
