"""What text is that holds neither paths nor a manifest, so that an error can name it and say what to do."""

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
"""What the index of a folder of embeddings says in its first line."""
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


def kind_of_text(head: str) -> str:
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
    if len(begun) > 1 and begun[-1] and len(head) >= HEAD_BYTES // 4:
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
