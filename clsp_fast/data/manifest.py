"""Reads clips from manifests, lists and folders of recordings."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, TextIO

from clsp_fast.checks import counted
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import (
    LONGEST_NAME,
    Clip,
    captions_of,
    channel_of,
    claims_of,
    id_of,
    is_path,
    provenance_of,
    seconds_of,
    tags_of,
)
from clsp_fast.data.cuts import clip_of_cut
from clsp_fast.storage import folders, paths, text_kinds, textfile
from clsp_fast.storage.text_kinds import KEY_SYNONYMS
from clsp_fast.storage.textfile import Text, shown

_KEYS = {
    "audio",
    "captions",
    "channel",
    "claims",
    "duration_s",
    "finegrained_captions",
    "gender",
    "global_captions",
    "id",
    "long_captions",
    "measured",
    "provenance",
    "short_captions",
    "speaker",
    "start_s",
    "tags",
}
_MOST_SHOWN = 20
_LONGEST_LINE = 2**24
_CHECKED_LINES = 1000
_EXPECTED = 'a manifest (one JSON object per line: {"audio": "a.wav", "captions": ["A man speaks."]})'
_EXPECTED_SOURCE = 'a list of recordings (one path per line) or a manifest (lines such as {"audio": "a.wav"})'
_LIST_OF_PATHS = (
    "a list of paths (embed reads it if its name does not end in .jsonl; training needs captions, in one "
    "JSON object per line)"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A line without a usable clip: its 1-based number, and what is wrong with it."""

    line: int
    message: str


@dataclass(frozen=True)
class Manifest:
    """The clips of a file, in the order of its lines, and the lines and keys that were not read.

    Attributes:
        path: the file.
        clips: clips of the good lines.
        problems: the other lines.
        unknown: unknown key -> number of lines that have it. The keys of lhotse cuts are not counted, because
            most of them serve other purposes.
    """

    path: Path
    clips: list[Clip]
    problems: list[Problem]
    unknown: Mapping[str, int] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """A warning for each unknown key that looks like a known one."""
        return [
            f'warning: {_counted(key, count)} is ignored; is it meant to be "{_similar_key(key)}"?'
            for key, count in self.unknown.items()
            if _similar_key(key)
        ][:_MOST_SHOWN]

    def warn(self) -> None:
        """Prints the warnings to standard error."""
        for line in self.warnings():
            print(f"{self.path}: {line}", file=sys.stderr)

    def describe(self) -> str:
        """A few lines of text: clips, hours, captions by kind, their lengths, keys that are not read."""
        clips = self.clips
        known = [clip.duration_s for clip in clips if clip.duration_s is not None]
        kinds = Counter(
            kind
            for clip in clips
            for kind, texts in zip(("global", "fine"), clip.captions, strict=True)
            if texts
        )
        words = sorted(len(text.split()) for clip in clips for texts in clip.captions for text in texts)
        lines = [f"{counted(len(clips), 'clip')}, {counted(len(self.problems), 'bad line')}"]
        if known:
            lines.append(f"{counted(len(known), 'clip')} with a duration: {sum(known) / 3600:.2f} h in all")
        lines.append(
            f"{counted(kinds['global'], 'clip')} with global captions, {kinds['fine']} with fine-grained ones"
        )
        lines.append(
            f"{counted(len(words), 'caption')} of {words[0]} to {words[-1]} words, "
            f"median {words[len(words) // 2]}"
        )
        lines += self.warnings()
        others = [_counted(key, count) for key, count in self.unknown.items() if not _similar_key(key)]
        if others:
            lines.append(
                f"not read: {', '.join(others[:_MOST_SHOWN])}{', ...' if others[_MOST_SHOWN:] else ''}"
            )
        return "\n".join(lines)


def read_manifest(path: Path | str, *, need_captions: bool = True) -> Manifest:
    """Reads a manifest: JSON lines of clips, or of lhotse MonoCuts, plain or gzipped.

    A bad line becomes a `Problem`, and the other lines are still read. Relative audio paths are relative to
    the manifest's folder. If this folder lacks the file of a lhotse cut, the cut's path is relative to the
    working directory, as in lhotse. Paths need not be UTF-8: the manifest may contain their bytes, or the
    escapes that Python writes to JSON for these (\\udc80 to \\udcff). Captions must be UTF-8.

    Args:
        path: the file.
        need_captions: whether a line without captions is a problem. If so, as in training, the clips have no
            provenance, which would double their size in memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not text, cannot be decompressed, or has no usable clip.
    """
    path = Path(path)
    with _open_text(path, _EXPECTED) as text:
        return _read_lines(text, path, need_captions)


@contextlib.contextmanager
def _open_text(source: Path | IO[bytes], expected: str) -> Iterator[Text]:
    try:
        with textfile.open_text(source, expected) as text:
            yield text
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def iterate_manifest(
    path: Path | str, *, need_captions: bool = True, first_line: int = 1
) -> Iterator[tuple[int, Clip | Problem]]:
    """Reads a manifest of any size line by line. It holds only one line in memory.

    Unlike `read_manifest`, it does not notice ids that several lines share, and raises no error if no line is
    usable.

    Args:
        path: as for `read_manifest`.
        need_captions: as for `read_manifest`.
        first_line: 1-based number of the line to begin with.

    Yields:
        The 1-based number of each line that is not blank, and its clip or what is wrong with it.

    Raises:
        FileNotFoundError, ValueError: as `read_manifest`.
    """
    path = Path(path)
    with _open_text(path, _EXPECTED) as text:
        yield from _clips_of_lines(text, path, need_captions, Counter(), first_line)


def _clips_of_lines(
    text: Text, path: Path, need_captions: bool, unknown: Counter[str], first_line: int = 1
) -> Iterator[tuple[int, Clip | Problem]]:
    kind = text_kinds.kind_of_text(text.head)
    if kind.startswith("the index"):
        raise ValueError(f"{path} is {kind}; expected {_EXPECTED}")
    for number, line in textfile.lines(text.file, _LONGEST_LINE):
        if number < first_line:
            continue
        try:
            if not textfile.is_whole(line, _LONGEST_LINE):
                raise ValueError(f"a line must be shorter than {_LONGEST_LINE} characters")
            yield number, _clip(line, path.parent, f"{path.stem}-{number}", need_captions, unknown)
        except (ValueError, RecursionError) as error:
            yield number, Problem(number, str(error))
        except (KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
            message = f"not a line of a manifest: {type(error).__name__}: {error}"
            yield number, Problem(number, message)


def _read_lines(text: Text, path: Path, need_captions: bool) -> Manifest:
    clips: list[Clip] = []
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    unknown: Counter[str] = Counter()
    for number, clip in _clips_of_lines(text, path, need_captions, unknown):
        if isinstance(clip, Problem):
            problems.append(clip)
        elif clip.id in line_of_id:
            message = f"id {shown(clip.id)} is already used in line {line_of_id[clip.id]}"
            problems.append(Problem(number, message))
        else:
            line_of_id[clip.id] = number
            clips.append(clip)
    if not clips:
        kind = text_kinds.kind_of_text(text.head)
        if not kind and text_kinds.looks_like_paths(text.head):
            kind = _LIST_OF_PATHS
        why = f"; line {problems[0].line}: {problems[0].message}" if problems else ": the file is empty"
        looks = f"; it looks like {kind}; expected {_EXPECTED}" if kind else ""
        raise ValueError(f"{path} holds no usable clip{why}{looks}")
    return Manifest(path, clips, problems, dict(unknown.most_common()))


def read_source(source: str, stream: TextIO | None = None) -> tuple[list[Clip], list[Problem]]:
    """Reads clips from anything that names recordings. Captions are not needed.

    Args:
        source: one of
            - a manifest (JSON lines); its paths are relative to its folder,
            - a folder; it is searched at any depth, the clips are in the order of their paths, and files that
              are left out are counted on standard error,
            - a recording,
            - a list: any other file, with one path per line, relative to the working directory,
            - "-": a list or manifest from `stream`.
        stream: what "-" is read from; None: standard input.

    Returns:
        The clips, and the bad lines of a manifest.

    Raises:
        FileNotFoundError: there is no such file or folder. ValueError: the source names no recording, or is
        neither a list nor a manifest.
    """
    path = Path(source)
    if source == "-":
        stream = sys.stdin if stream is None else stream
        return _clips_from_text(getattr(stream, "buffer", None) or _as_bytes(stream), "stdin")
    if paths.is_dir(path):
        scan = folders.scan(path)
        for line in scan.warnings():
            print(f"{source}: {line}", file=sys.stderr)
        names = scan.recordings
    elif path.suffix.lower() in folders.AUDIO_SUFFIXES:
        names = [source]
    elif paths.exists(path):
        return _clips_from_text(path, source)
    else:
        why = paths.problem(path)
        raise FileNotFoundError(
            f"{source}: no such file or folder" if "missing" in why else f"{source} {why}"
        )
    if not names:
        raise ValueError(f"{source} names no recording")
    return _clips_of_paths(names), []


def _as_bytes(stream: TextIO) -> IO[bytes]:
    return io.BytesIO(stream.read().encode("utf-8", "surrogateescape"))


def _clips_from_text(source: Path | IO[bytes], name: str) -> tuple[list[Clip], list[Problem]]:
    """Clips of a manifest or a list; the name or the beginning of the text tells which it is."""
    with _open_text(source, _EXPECTED_SOURCE) as text:
        if name.endswith((".jsonl", ".jsonl.gz")) or text.head.lstrip().startswith("{"):
            manifest = _read_lines(text, Path(name), need_captions=False)
            manifest.warn()
            return manifest.clips, manifest.problems
        kind = text_kinds.kind_of_text(text.head)
        first = paths.from_text(text.head.strip().splitlines()[0]) if kind else ""
        if kind and (paths.is_dir(first) or not paths.exists(first)):
            raise ValueError(f"{name} is {kind}; expected {_EXPECTED_SOURCE}")
        names = [paths.from_text(line.rstrip("\n")) for _, line in textfile.lines(text.file, LONGEST_NAME)]
    if not names:
        raise ValueError(f"{name} names no recording")
    if len(names) == 1 and "\0" in names[0]:
        raise ValueError(f"{name} holds NUL characters; a list has one path per line (find without -print0)")
    if not any(_may_be_a_recording(path) for path in names[:_CHECKED_LINES]):
        raise ValueError(
            f"{name} is not a list of recordings: {shown(names[0])} is no file and has no audio suffix"
        )
    return _clips_of_paths(names), []


def _may_be_a_recording(name: str) -> bool:
    suffix = PurePath(name).suffix.lower()
    return suffix in folders.AUDIO_SUFFIXES or suffix in folders.CONVERT_SUFFIXES or paths.exists(name)


def _clips_of_paths(names: list[str]) -> list[Clip]:
    return [Clip(name, name, 0.0, None, None, Captions((), ())) for name in names]


def _clip(text: str, folder: Path, default_id: str, need_captions: bool, unknown: Counter[str]) -> Clip:
    """The clip of one line. Counts the line's unknown keys in `unknown`. ValueError says what is wrong."""
    try:
        row = json.loads(text, parse_int=textfile.integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold one JSON object, got {type(row).__name__}")
    if "recording" in row or str(row.get("type", "")).endswith("Cut"):
        return clip_of_cut(row, folder, default_id, need_captions)
    unknown.update(row.keys() - _KEYS)
    audio = row.get("audio")
    audio = paths.from_text(audio) if isinstance(audio, str) else audio
    if not is_path(audio):
        raise ValueError(f'"audio" must be a path{_audio_hint(row)}')
    captions = captions_of(row)
    if need_captions and not any(captions):
        raise ValueError(f"no captions{_key_hint(row, 'captions') or _key_hint(row, 'finegrained_captions')}")
    tags = tags_of(row.get("tags", {}))
    tags |= {key: str(row[key]) for key in ("speaker", "gender") if row.get(key) is not None}
    return Clip(
        id=id_of(row.get("id"), default_id),
        audio=str(folder / audio),
        start_s=seconds_of(row, "start_s", 0.0),
        duration_s=seconds_of(row, "duration_s", None),
        channel=channel_of(row.get("channel")),
        captions=captions,
        tags=tags,
        claims=claims_of(row.get("claims", {}), captions),
        provenance={} if need_captions else provenance_of(row.get("provenance"), captions),
    )


def _key_hint(row: Mapping[str, Any], wanted: str) -> str:
    """A hint if an unknown key looks like the missing key; otherwise empty."""
    unknown = [key for key in row if key not in _KEYS]
    near = [key for key in unknown if KEY_SYNONYMS.get(key) == wanted]
    near += difflib.get_close_matches(wanted, unknown, n=1)
    return f'; is "{near[0]}" meant to be "{wanted}"?' if near else ""


def _audio_hint(row: Mapping[str, Any]) -> str:
    """The end of an error message: what the line has instead of a path, and how to repair it."""
    if "audio" not in row:
        return _key_hint(row, "audio")
    audio = row["audio"]
    fix = ""
    if isinstance(audio, Mapping) and isinstance(audio.get("path"), str):
        fix = f"; write \"audio\": {shown(audio['path'])} (jq -c '.audio = .audio.path')"
    return f", got {shown(audio)}{fix}"


def _similar_key(key: str) -> str:
    """The known key that an unknown one looks like; empty if there is none."""
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85)
    return KEY_SYNONYMS.get(key.lower(), near[0] if near else "")


def _counted(key: str, count: int) -> str:
    shown = f'"{key[:40]}"' if key.isprintable() else ascii(key[:40])
    return f"{shown} in {counted(count, 'line')}"
