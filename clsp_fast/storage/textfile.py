"""Text that users give: manifests, lists, pairs, tables, tasks, from files and from standard input.

One reader for all of them, so that each treats alike what editors and other programs do to text: UTF-8 with
and without a byte order mark, UTF-16 and UTF-32, any end of line, gzip under any name, and names of files
that are not UTF-8. What is no text is refused by what its first bytes say.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple, TextIO

from clsp_fast.storage import files, paths
from clsp_fast.storage.paths import AUDIO_SUFFIXES, CONVERT, CONVERT_SUFFIXES

INDEX_FORMAT = "clsp_fast embeddings"
"""What the index of a folder of embeddings says in its first line."""
_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 4096
"""By which a file is judged; those of most kinds are known by fewer."""
_LONGEST_INTEGER = 1000  # Python refuses to read and write those of over 4300 digits
_HOLD_PATHS = "; a list or manifest holds the paths of recordings"
_UNPACK = "; unpack it first"
_DECOMPRESS = "; decompress it first: gzip alone is read as it is"

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
    (0, _GZIP, "compressed twice with gzip", _DECOMPRESS),
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
"""Where in a file which bytes stand, what it is then, and what to do about it."""
# These kinds may have no control characters among their first bytes, and no path begins like them.
_BEGIN_AS_TEXT = (b"NIST_1A\n", b"#!AMR", b"%PDF-")
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))

_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-16's mark begins UTF-32's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
RENAMED = {
    "audio_file": "audio",
    "audio_filepath": "audio",
    "audio_path": "audio",
    "begin": "start_s",
    "caption": "captions",
    "duration": "duration_s",
    "file": "audio",
    "file_name": "audio",
    "file_path": "audio",
    "filename": "audio",
    "filepath": "audio",
    "offset": "start_s",
    "path": "audio",
    "start": "start_s",
    "text": "captions",
    "wav": "audio",
    "wav_path": "audio",
}
"""What other manifests call our keys."""
_COLUMNS = RENAMED.keys() | {
    "audio",
    "captions",
    "clip",
    "id",
    "recording",
    "sentence",
    "transcript",
    "transcription",
    "utt_id",
}
"""Names of columns by which the first line of a table is known."""
_JUDGED_LINES = 20
_LISTS_OF_A_CUT = ("supervisions", "tracks")
_ONLY_PATHS = "; a list holds the paths alone, one a line"


class Text(NamedTuple):
    """Text that is open for reading, and how it begins: up to a few thousand characters."""

    file: TextIO
    head: str


@contextlib.contextmanager
def open_text(source: Path | str | IO[bytes], expected: str, *, newline: str | None = None) -> Iterator[Text]:
    """Opens a text file, or a binary stream such as `sys.stdin.buffer`, which stays open.

    Bytes that are not UTF-8 become lone surrogates, as `os.fsdecode` has it, so that the names of files
    survive. UTF-16 and UTF-32 are known by their byte order mark, or by their zeros.

    Args:
        source: the file, or the stream.
        expected: what it should be, for errors: "a manifest".
        newline: as for `open`; None: each of \\n, \\r\\n and \\r ends a line.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: it is no text, it cannot be decompressed, or UTF-16 in it is damaged.
        OSError: it cannot be opened.
    """
    name = str(source) if isinstance(source, (str, Path)) else "standard input"
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, Path)):
            _check_path(Path(source), expected)
            source = stack.enter_context(Path(source).open("rb"))
        try:
            reader, head = _with_head(source)
            if head.startswith(_GZIP):
                reader, head = _with_head(gzip.GzipFile(fileobj=reader))
            what = _binary_kind(head)
            if what:
                raise ValueError(f"{name} is {what[0]}, not {expected}{what[1]}")
            encoding = _encoding(head)
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
    """A stream whose first bytes were read already. Closing it leaves the stream open."""

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
    """The stream from its start, and its first bytes. A pipe may give them one by one."""
    head = b""
    while len(head) < _HEAD_BYTES and (part := source.read(_HEAD_BYTES - len(head))):
        head += part
    return io.BufferedReader(_Prepended(head, source), 2**16), head


def _binary_kind(head: bytes) -> tuple[str, str] | None:
    """What a file that begins like this is, if it is no text, and what to do about it."""
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if not controls and not head.startswith(_BEGIN_AS_TEXT):
        return None  # a path may begin like "caffeine/" or "FORMS/"
    for at, magic, what, fix in _KINDS:
        if head.startswith(magic, at):
            return what, fix
    if head.startswith(b"RIFF"):
        wav = head[8:12] == b"WAVE"
        return ("a recording (WAV)", _HOLD_PATHS) if wav else ("a film or recording (RIFF)", f"; {CONVERT}")
    if _is_mpeg(head):
        layered = head[1] & 0x06
        return ("a recording (MP3)", _HOLD_PATHS) if layered else ("a recording (AAC)", f"; {CONVERT}")
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a pickle", "; nothing is unpickled here"
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "a file of tensors (safetensors)", ""
    # Lists from find -print0 hold single NUL bytes. About a tenth of random bytes are control characters, and
    # text has none.
    noise = controls - head.count(0) + 2 * head.count(b"\0\0")
    if _encoding(head) == "utf-8-sig" and noise > 3 and 20 * noise > len(head):
        return "a binary file of an unknown kind", ""
    return None


def _is_mpeg(head: bytes) -> bool:
    """Whether it begins with a frame of MP3 or AAC, and not with the byte order mark of UTF-16."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0 or head.startswith(codecs.BOM_UTF16_LE):
        return False
    known_version, known_rates = head[1] & 0x18 != 0x08, head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C
    return known_version and known_rates


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
    """A value that a user gave, as an error shows it: `repr`, cut to `longest` characters."""
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def is_text(value: str) -> bool:
    """Whether it can be encoded: no half of a surrogate pair, as JSON may hold, and no byte that was not
    UTF-8."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def json_object(text: str) -> dict[str, Any]:
    """The JSON object of a line. What Python writes as NaN or Infinity, and numbers that no float can hold,
    become None: they are not JSON, and may stand in keys that nobody reads.

    Raises:
        ValueError: it is anything else, or nested too deeply.
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
    """For `json.loads`: an integer of more digits than Python converts is infinite, out of any range."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _finite_integer(digits: str) -> int | float | None:
    number = integer(digits)
    return None if number == math.inf else number


def lines(file: TextIO, longest: int) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of each line that is not blank.

    Of a line of over `longest` characters only the first `longest` are given; it then ends without \\n, so
    that `is_whole` is False. No line can fill the memory.
    """
    for number in itertools.count(1):
        text = file.readline(longest)
        if text.startswith("\ufeff"):  # of the second of two files that `cat` joined
            text = text[1:] + ("" if text.endswith("\n") else file.readline(1))
        if not text:
            return
        rest = text
        while rest and not rest.endswith("\n"):
            rest = file.readline(longest)
        if text.strip():
            yield number, text


def is_whole(text: str, longest: int) -> bool:
    """Whether `lines` gave the whole of this line."""
    return text.endswith("\n") or len(text) < longest


def read_text(path: Path, expected: str, *, most_bytes: int = 2**24) -> str:
    """The whole of a small text file, as `open_text` reads it.

    Raises:
        ValueError: it has more characters than `most_bytes`; and what `open_text` raises.
    """
    with open_text(path, expected) as text:
        content = text.file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} must have at most {most_bytes} bytes")
    return content


def kind_of(head: str) -> str:
    """What text is that holds neither paths nor a manifest's JSON lines, with what to do about it; empty if
    its first lines look like either.

    Args:
        head: how the text begins. A list may look like a table: what is there is told from what is not.
    """
    begun = _first_lines(head)
    first = begun[0] if begun else ""
    if first.startswith(files.LFS_POINTER.decode()):
        return files.LFS_FIX.removeprefix("is ")
    if re.match(r"\[\s*($|[\[{\"\d\]-])", first):
        return "a JSON array; write one object a line (jq -c '.[]' in.json > out.jsonl)"
    if re.match(r"<(!doctype|html|head|body|\?xml)", first, re.IGNORECASE):
        return "a page of HTML or XML"
    if first.startswith("{"):
        return _kind_of_objects(begun)
    if any(map(_is_there, begun)):
        return ""
    return _kind_of_lines(begun)


def looks_like_paths(head: str) -> bool:
    """Whether the text seems to be a list of paths.

    Args:
        head: how it begins.
    """
    begun = _first_lines(head)
    return not any(line.startswith(("{", "[")) for line in begun) and any(
        _is_audio(line) or _is_there(line) for line in begun
    )


def _first_lines(head: str) -> list[str]:
    """The first lines that are not blank, stripped; without the last one if it may go on behind the head."""
    begun = re.split(r"[\r\n]+", head)
    if len(begun) > 1 and begun[-1] and len(head) >= _HEAD_BYTES // 4:
        begun.pop()
    return [line.strip() for line in begun if line.strip()][:_JUDGED_LINES]


def _kind_of_objects(begun: list[str]) -> str:
    # An object of simple values and one list of objects, on one line or on several, whole or not.
    simple = r'"\w+"\s*:\s*(?:"[^"]*"|[^\s"{}\[\],]+)\s*,\s*'
    holder = re.match(rf'{{\s*((?:{simple})*)"(\w+)"\s*:\s*\[\s*{{', " ".join(begun))
    if holder and '"audio"' not in holder[1] and holder[2] not in _LISTS_OF_A_CUT:
        fix = f"write one object a line (jq -c '.{holder[2]}[]' in.json > out.jsonl)"
        return f'one JSON object whose "{holder[2]}" is an array; {fix}'
    first, *others = begun
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        goes_on = first.endswith((",", "[", "{")) and others and not others[0].startswith("{")
        spread = first == "{" or goes_on
        return "one JSON object over several lines; write one object a line (jq -c .)" if spread else ""
    if row.get("format") == INDEX_FORMAT:
        return "the index of a folder of embeddings; give what they were made of"
    if "audio_filepath" in row and "audio" not in row:
        return f"a NeMo manifest: {renames(row)}"
    if "audio" not in row and "audio" in map(RENAMED.get, row) and not any('"audio"' in o for o in others):
        return f"another kind of manifest: {renames(row)}"
    return ""


def renames(row: Mapping[str, Any]) -> str:
    """How the keys of a line must be renamed for a manifest of ours; empty if none is known."""
    known = [f'"{key}" to "{RENAMED[key]}"' for key in row if key in RENAMED]
    return f"rename {', '.join(known)}" if known else ""


def _kind_of_lines(begun: list[str]) -> str:
    """What lines are of which none is the path of a file that is there; empty: a list of paths, perhaps."""
    if not begun:
        return ""
    first = begun[0]
    if first.startswith("#EXTM3U") or first.lower() == "[playlist]":
        return f"a playlist{_ONLY_PATHS}, without lines that begin with #"
    if re.match(r"---(\s|$)|-\s+[\"']?\w+[\"']?\s*:\s", first) or all(
        line.startswith("- ") for line in begun
    ):
        return "YAML; write a list with a path a line, or a manifest with a JSON object a line"
    if first.strip("\"'").lower() in _COLUMNS and any(map(_is_audio, begun[1:])):
        return f"a table of one column{_ONLY_PATHS}: remove the first line"
    if len(begun) > 1 and "\t" not in first and all(map(_FAIRSEQ_LINE.fullmatch, begun[1:])):
        return (
            f"a fairseq manifest{_ONLY_PATHS}: "
            """awk -F'\\t' 'NR==1 {d=$1; next} {print d "/" $1}' in.tsv > list.txt"""
        )
    if _is_kaldi(begun):
        return f"a Kaldi wav.scp{_ONLY_PATHS}: sed 's/^[^ \\t]*[ \\t]*//' wav.scp > list.txt"
    for separator in "\t,;|":
        if _is_table(begun, separator):
            name = {"\t": "tab-separated table", ",": "CSV table"}.get(separator, "table")
            return f"a {name}{_ONLY_PATHS}"
    return ""


_FAIRSEQ_LINE = re.compile(r"[^\t]+\t\d+")


def _fields(line: str, separator: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        cells = line.split(separator)
    return [cell.strip().strip("\"'") for cell in cells]


def _is_header(fields: list[str]) -> bool:
    return bool(_COLUMNS & {field.lower() for field in fields}) and not any(map(_is_audio, fields))


def _is_table(begun: list[str], separator: str) -> bool:
    """Whether the lines are a table's. The name of a recording may hold a separator, too."""
    rows = [_fields(line, separator) for line in begun]
    first, count = rows[0], len(rows[0])
    if count < 2:
        return False
    # What stands behind the end of a name is another column.
    if _is_header(first) or (any(map(_is_audio, first[:-1])) and not _is_audio(first[-1])):
        return True
    headed = not any(map(_is_audio, first))
    data = rows[headed:]
    if not data or not all(len(row) == count and any(map(_is_audio, row)) for row in data):
        return False
    # "Smith, John.wav" is one name as long as there is no John.wav; "sad,b.wav" in each line is none.
    in_each = len(data) > 1 and not any(f"{separator} " in line for line in begun)
    return (
        headed
        or separator == "\t"
        or in_each
        or any(_is_audio(cell) and _is_there(cell) for row in data for cell in row)
    )


def _is_kaldi(begun: list[str]) -> bool:
    """Whether the lines have an id, a space and a path or command. Names such as "my file.wav" look similar:
    lines are ids and paths if the path is there, or if something shows that the first word is an id."""
    parts = [line.split(maxsplit=1) for line in begun]
    ids = {part[0] for part in parts}
    if len(ids) < len(parts) or any(len(part) < 2 or _is_audio(part[0]) for part in parts):
        return False
    if any(set("/,;|") & set(word) for word in ids):
        return False
    names = [part[1] for part in parts]
    if all(name.endswith("|") for name in names):  # a command that writes the recording
        return True
    if not all(map(_is_audio, names)):
        return False
    # "utt1", but not the "01" of a track.
    numbered = all(re.fullmatch(r"(?=\S*[A-Za-z])\S*\d\S*\s+\S+", line) for line in begun)
    rooted = all(name.startswith(("/", "./", "../", "~/")) for name in names)
    same = all(PurePath(name).stem == part[0] for name, part in zip(names, parts, strict=True))
    return numbered or rooted or same or "\t" in begun[0] or any(map(_is_there, names))


def _is_there(name: str) -> bool:
    path = paths.from_text(name)
    return paths.exists(path) and not paths.is_dir(path)


def _is_audio(name: str) -> bool:
    return PurePath(name).suffix.lower() in AUDIO_SUFFIXES | CONVERT_SUFFIXES
