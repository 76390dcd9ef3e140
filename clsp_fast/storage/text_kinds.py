"""Recognises text that is neither a list of paths nor a manifest, so that an error can say what to do."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from clsp_fast.storage import files, paths
from clsp_fast.storage.folders import AUDIO_SUFFIXES, CONVERT_SUFFIXES
from clsp_fast.storage.textfile import HEAD_BYTES

INDEX_FORMAT = "clsp_fast embeddings"
"""The value of "format" in the first line of the index of an embedding folder."""
KEY_SYNONYMS = {
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
"""Key of another program's manifest -> key of our manifest."""
_COLUMNS = KEY_SYNONYMS.keys() | {
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
"""Column names that mark a line as the header of a table."""
_JUDGED_LINES = 20
_LISTS_OF_A_CUT = ("supervisions", "tracks")
_ONLY_PATHS = "; a list holds only paths, one a line"


def kind_of_text(head: str) -> str:
    """The kind of a text and how to convert it; empty for a list of paths or a manifest's JSON lines.

    Args:
        head: the beginning of the text. A list of paths can look like a table. It counts as a list if one of
            its lines is an existing path.
    """
    lines = _first_lines(head)
    first = lines[0] if lines else ""
    if first.startswith(files.LFS_POINTER.decode()):
        return files.LFS_FIX.removeprefix("is ")
    if re.match(r"\[\s*($|[\[{\"\d\]-])", first):
        return "a JSON array; write one object a line (jq -c '.[]' in.json > out.jsonl)"
    if re.match(r"<(!doctype|html|head|body|\?xml)", first, re.IGNORECASE):
        return "a page of HTML or XML"
    if first.startswith("{"):
        return _kind_of_objects(lines)
    if any(map(_is_existing_file, lines)):
        return ""
    return _kind_of_lines(lines)


def looks_like_paths(head: str) -> bool:
    """Whether a text that begins with `head` seems to be a list of paths."""
    lines = _first_lines(head)
    return not any(line.startswith(("{", "[")) for line in lines) and any(
        _is_audio(line) or _is_existing_file(line) for line in lines
    )


def _first_lines(head: str) -> list[str]:
    """The first lines that are not blank, stripped. The last line is left out if it may be incomplete."""
    lines = re.split(r"[\r\n]+", head)
    if len(lines) > 1 and lines[-1] and len(head) >= HEAD_BYTES // 4:
        lines.pop()
    return [line.strip() for line in lines if line.strip()][:_JUDGED_LINES]


def _kind_of_objects(lines: list[str]) -> str:
    # Matches an object that begins with simple values and then a list of objects. It may span several lines.
    simple = r'"\w+"\s*:\s*(?:"[^"]*"|[^\s"{}\[\],]+)\s*,\s*'
    wrapper = re.match(rf'{{\s*((?:{simple})*)"(\w+)"\s*:\s*\[\s*{{', " ".join(lines))
    if wrapper and '"audio"' not in wrapper[1] and wrapper[2] not in _LISTS_OF_A_CUT:
        fix = f"write one object a line (jq -c '.{wrapper[2]}[]' in.json > out.jsonl)"
        return f'one JSON object whose "{wrapper[2]}" is an array; {fix}'
    first, *others = lines
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        continues = first.endswith((",", "[", "{")) and others and not others[0].startswith("{")
        several_lines = first == "{" or continues
        kind = "one JSON object over several lines; write one object a line (jq -c .)"
        return kind if several_lines else ""
    if row.get("format") == INDEX_FORMAT:
        return "the index of a folder of embeddings; give the recordings that were embedded"
    if "audio_filepath" in row and "audio" not in row:
        return f"a NeMo manifest: {_rename_fix(row)}"
    if (
        "audio" not in row
        and "audio" in map(KEY_SYNONYMS.get, row)
        and not any('"audio"' in line for line in others)
    ):
        return f"another kind of manifest: {_rename_fix(row)}"
    return ""


def _rename_fix(row: Mapping[str, Any]) -> str:
    """How to rename the keys of a line for our manifest; empty if no key is known."""
    known = [f'"{key}" to "{KEY_SYNONYMS[key]}"' for key in row if key in KEY_SYNONYMS]
    return f"rename {', '.join(known)}" if known else ""


def _kind_of_lines(lines: list[str]) -> str:
    """The kind of a text in which no line is an existing path; empty if it may still be a list of paths."""
    if not lines:
        return ""
    first = lines[0]
    if first.startswith("#EXTM3U") or first.lower() == "[playlist]":
        return f"a playlist{_ONLY_PATHS}, without lines that begin with #"
    if re.match(r"---(\s|$)|-\s+[\"']?\w+[\"']?\s*:\s", first) or all(
        line.startswith("- ") for line in lines
    ):
        return "YAML; write a list with a path a line, or a manifest with a JSON object a line"
    if first.strip("\"'").lower() in _COLUMNS and any(map(_is_audio, lines[1:])):
        return f"a table of one column{_ONLY_PATHS}: remove the first line"
    if len(lines) > 1 and "\t" not in first and all(map(_FAIRSEQ_LINE.fullmatch, lines[1:])):
        return (
            f"a fairseq manifest{_ONLY_PATHS}: "
            """awk -F'\\t' 'NR==1 {d=$1; next} {print d "/" $1}' in.tsv > list.txt"""
        )
    if _is_kaldi(lines):
        return f"a Kaldi wav.scp{_ONLY_PATHS}: sed 's/^[^ \\t]*[ \\t]*//' wav.scp > list.txt"
    for separator in "\t,;|":
        if _is_table(lines, separator):
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


def _is_table(lines: list[str], separator: str) -> bool:
    """Whether the lines are a table, and not names of recordings that contain the separator."""
    rows = [_fields(line, separator) for line in lines]
    first, count = rows[0], len(rows[0])
    if count < 2:
        return False
    # The line names columns, or another column follows the name of a recording.
    if _is_header(first) or (any(map(_is_audio, first[:-1])) and not _is_audio(first[-1])):
        return True
    has_header = not any(map(_is_audio, first))
    data = rows[has_header:]
    if not data or not all(len(row) == count and any(map(_is_audio, row)) for row in data):
        return False
    # "Smith, John.wav" is one name, unless John.wav exists. Several lines like "sad,b.wav" are a table.
    several_rows = len(data) > 1 and not any(f"{separator} " in line for line in lines)
    return (
        has_header
        or separator == "\t"
        or several_rows
        or any(_is_audio(cell) and _is_existing_file(cell) for row in data for cell in row)
    )


def _is_kaldi(lines: list[str]) -> bool:
    """Whether each line is an id, a space and a path or command.

    Names such as "my file.wav" look similar. The first word counts as an id if the rest of the line is an
    existing path, or if the form of all lines shows it.
    """
    parts = [line.split(maxsplit=1) for line in lines]
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
    # "utt1 a.wav", but not "01 Intro.wav".
    numbered = all(re.fullmatch(r"(?=\S*[A-Za-z])\S*\d\S*\s+\S+", line) for line in lines)
    rooted = all(name.startswith(("/", "./", "../", "~/")) for name in names)
    same_stem = all(PurePath(name).stem == part[0] for name, part in zip(names, parts, strict=True))
    return numbered or rooted or same_stem or "\t" in lines[0] or any(map(_is_existing_file, names))


def _is_existing_file(name: str) -> bool:
    path = paths.from_text(name)
    return paths.exists(path) and not paths.is_dir(path)


def _is_audio(name: str) -> bool:
    return PurePath(name).suffix.lower() in AUDIO_SUFFIXES | CONVERT_SUFFIXES
