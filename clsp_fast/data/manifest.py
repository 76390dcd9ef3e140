"""Manifests: JSONL lines or lhotse cuts -> clips, and `python -m clsp_fast.data validate`'s findings.

A file of its own because reading a manifest must not need torch, audio or a tokenizer.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, TextIO, TypeGuard

from clsp_fast.data.captions import Captions
from clsp_fast.storage import folders, paths, text_kinds, textfile
from clsp_fast.storage.text_kinds import KEY_SYNONYMS
from clsp_fast.storage.textfile import Text, is_text, shown

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
    "short_captions",
    "speaker",
    "start_s",
    "tags",
}
_MOST_SHOWN = 20
_LONGEST_LINE = 2**24
_LONGEST_NAME = 2**15
"""Characters of a path; a line of an index must hold it twice, as escapes."""
_JUDGED_LINES = 1000
_EXPECTED = 'a manifest (a JSON object a line: {"audio": "a.wav", "captions": ["A man speaks."]})'
_EXPECTED_SOURCE = 'a list of recordings (a path a line) or a manifest (lines such as {"audio": "a.wav"})'
_A_LIST = (
    "a list of paths: embed takes it if its name does not end in .jsonl; training needs captions, in a JSON "
    "object a line"
)
_MODEL_RATE_HZ = 16_000
_GLOBAL_KEYS = ("global_captions", "short_captions")
_FINE_KEYS = ("finegrained_captions", "long_captions", "captions")


@dataclass(frozen=True, slots=True)
class Clip:
    """One stretch of speech and what is known about it.

    Attributes:
        id: unique within a manifest.
        audio: path of the file.
        start_s: offset in the file, seconds.
        duration_s: length in seconds; None: to the end of the file.
        channel: channel to take; None: the mean of all.
        captions: global and fine-grained captions.
        tags: labels such as speaker and gender; what zero-shot tasks compare with.
        claims: per caption kind ("global", "fine"), what each caption asserts (tag -> value), aligned with
            `captions`; empty where unknown. Lets evaluation count every clip that a caption is true of.
    """

    id: str
    audio: str
    start_s: float
    duration_s: float | None
    channel: int | None
    captions: Captions
    tags: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, tuple[Mapping[str, str], ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that gave no clip: 1-based line number and what is wrong with it."""

    line: int
    message: str


@dataclass(frozen=True)
class Manifest:
    """The clips of a file, in its order, and what was not taken from it.

    Attributes:
        path: the file.
        clips: of the good lines.
        problems: the other lines.
        unknown: keys that are not read, and in how many lines they are. They may be the user's own. Those of
            lhotse's cuts are not counted: most of them have a purpose of their own.
    """

    path: Path
    clips: list[Clip]
    problems: list[Problem]
    unknown: Mapping[str, int] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """A line for each unknown key that looks like one that is read."""
        return [
            f'warning: {_counted(key, count)} is ignored; is it meant to be "{_meant(key)}"?'
            for key, count in self.unknown.items()
            if _meant(key)
        ][:_MOST_SHOWN]

    def warn(self) -> None:
        """Prints the warnings on standard error."""
        for line in self.warnings():
            print(f"{self.path}: {line}", file=sys.stderr)


def read(path: Path | str, *, need_captions: bool = True) -> Manifest:
    """Reads a manifest: JSON lines of clips, or of lhotse MonoCuts, plain or gzipped.

    A bad line becomes a `Problem` and costs nothing but itself. Relative audio paths are relative to the
    manifest (those of lhotse cuts to the working directory, as lhotse has it, where no such file is beside
    the manifest). Names of files may hold bytes that are not UTF-8, as they are or as Python writes them to
    JSON (\\udc80 to \\udcff); captions may not.

    Args:
        path: the file.
        need_captions: whether a line without captions is a problem.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no text, or cannot be decompressed, or no line gives a clip.
    """
    path = Path(path)
    with _open(path, _EXPECTED) as text:
        return _read(text, path, need_captions)


@contextlib.contextmanager
def _open(source: Path | IO[bytes], expected: str) -> Iterator[Text]:
    try:
        with textfile.open_text(source, expected) as text:
            yield text
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def _read(text: Text, path: Path, need_captions: bool) -> Manifest:
    clips: list[Clip] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    unknown: Counter[str] = Counter()
    kind = text_kinds.kind_of_text(text.head)
    if kind.startswith("the index"):
        raise ValueError(f"{path} is {kind}; expected {_EXPECTED}")
    for number, line in textfile.lines(text.file, _LONGEST_LINE):
        try:
            if not textfile.is_whole(line, _LONGEST_LINE):
                raise ValueError(f"a line must be shorter than {_LONGEST_LINE} characters")
            clip = _clip(line, path.parent, f"{path.stem}-{number}", need_captions, unknown)
            if clip.id in seen:
                raise ValueError(f"id {shown(clip.id)} was used in line {seen[clip.id]} already")
        except (ValueError, RecursionError) as error:
            problems.append(Problem(number, str(error)))
            continue
        except (KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
            problems.append(Problem(number, f"not of a manifest's form: {type(error).__name__}: {error}"))
            continue
        seen[clip.id] = number
        clips.append(clip)
    if not clips:
        if not kind and text_kinds.looks_like_paths(text.head):
            kind = _A_LIST
        why = f"; line {problems[0].line}: {problems[0].message}" if problems else ": the file is empty"
        looks = f"; it looks like {kind}; expected {_EXPECTED}" if kind else ""
        raise ValueError(f"{path} holds no usable clip{why}{looks}")
    return Manifest(path, clips, problems, dict(unknown.most_common()))


def sources(source: str, stream: TextIO | None = None) -> tuple[list[Clip], list[Problem]]:
    """Clips of whatever names recordings; captions are not needed.

    Args:
        source: a manifest (JSON lines); a folder, searched for recordings at any depth, in order of their
            paths; a recording; any other file: a list with one path a line; "-": a list or manifest from
            `stream`. Paths of a list are relative to the working directory, those of a manifest to it. What
            is left out of a folder is told on standard error.
        stream: None: standard input.

    Returns:
        The clips, and the lines of a manifest that gave none.

    Raises:
        FileNotFoundError: there is no such file or folder. ValueError: it names no recording, or is neither
        list nor manifest.
    """
    path = Path(source)
    if source == "-":
        stream = sys.stdin if stream is None else stream
        return _from_text(getattr(stream, "buffer", None) or _encoded(stream), "stdin")
    if paths.is_dir(path):
        scan = folders.scan(path)
        for line in scan.warnings():
            print(f"{source}: {line}", file=sys.stderr)
        names = scan.recordings
    elif path.suffix.lower() in folders.AUDIO_SUFFIXES:
        names = [source]
    elif paths.exists(path):
        return _from_text(path, source)
    else:
        why = paths.problem(path)
        raise FileNotFoundError(
            f"{source}: no such file or folder" if "missing" in why else f"{source} {why}"
        )
    if not names:
        raise ValueError(f"{source} names no recording")
    return _named(names), []


def _encoded(stream: TextIO) -> IO[bytes]:
    return io.BytesIO(stream.read().encode("utf-8", "surrogateescape"))


def _from_text(source: Path | IO[bytes], name: str) -> tuple[list[Clip], list[Problem]]:
    """Clips of a manifest or a list, whichever the text looks like."""
    with _open(source, _EXPECTED_SOURCE) as text:
        if name.endswith((".jsonl", ".jsonl.gz")) or text.head.lstrip().startswith("{"):
            found = _read(text, Path(name), need_captions=False)
            found.warn()
            return found.clips, found.problems
        kind = text_kinds.kind_of_text(text.head)
        first = paths.from_text(text.head.strip().splitlines()[0]) if kind else ""
        if kind and (paths.is_dir(first) or not paths.exists(first)):
            raise ValueError(f"{name} is {kind}; expected {_EXPECTED_SOURCE}")
        names = [paths.from_text(line.rstrip("\n")) for _, line in textfile.lines(text.file, _LONGEST_NAME)]
    if not names:
        raise ValueError(f"{name} names no recording")
    if len(names) == 1 and "\0" in names[0]:
        raise ValueError(f"{name} holds NUL characters; a list has one path a line (find without -print0)")
    if not any(_may_be_a_recording(path) for path in names[:_JUDGED_LINES]):
        raise ValueError(
            f"{name} is no list of recordings: {shown(names[0])} is no file, nor does it end like a recording"
        )
    return _named(names), []


def _may_be_a_recording(name: str) -> bool:
    suffix = PurePath(name).suffix.lower()
    return suffix in folders.AUDIO_SUFFIXES or suffix in folders.CONVERT_SUFFIXES or paths.exists(name)


def _named(names: list[str]) -> list[Clip]:
    return [Clip(name, name, 0.0, None, None, Captions((), ())) for name in names]


def _clip(text: str, folder: Path, default_id: str, need_captions: bool, unknown: Counter[str]) -> Clip:
    """The clip of one line, whose unknown keys are counted; ValueError says what is wrong with it."""
    try:
        row = json.loads(text, parse_int=textfile.integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold one JSON object, got {type(row).__name__}")
    if "recording" in row or str(row.get("type", "")).endswith("Cut"):
        return _lhotse_clip(row, folder, default_id, need_captions)
    unknown.update(row.keys() - _KEYS)
    audio = row.get("audio")
    audio = paths.from_text(audio) if isinstance(audio, str) else audio
    if not _is_path(audio):
        raise ValueError(f'"audio" must be a path{_got_audio(row)}')
    captions = _captions(row)
    if need_captions and not any(captions):
        raise ValueError(f"no captions{_nearest(row, 'captions') or _nearest(row, 'finegrained_captions')}")
    tags = _tags(row.get("tags", {}))
    tags |= {key: str(row[key]) for key in ("speaker", "gender") if row.get(key) is not None}
    return Clip(
        id=_id(row.get("id"), default_id),
        audio=str(folder / audio),
        start_s=_seconds(row, "start_s", 0.0),
        duration_s=_seconds(row, "duration_s", None),
        channel=_channel(row.get("channel")),
        captions=captions,
        tags=tags,
        claims=_claims(row.get("claims", {}), captions),
    )


def _lhotse_clip(row: Mapping[str, Any], folder: Path, default_id: str, need_captions: bool) -> Clip:
    """A MonoCut line: the recording's source of the cut's channel, start, duration, captions in the
    supervision's custom."""
    kind = row.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        raise ValueError(
            f"a lhotse {shown(kind)} has no single recording; save the cuts as MonoCuts (cuts.trim_to_...)"
        )
    recording = row.get("recording") or {}
    name, channel = _lhotse_source(recording.get("sources") or [{}], row.get("channel"))
    supervisions = row.get("supervisions") or [{}]
    _refuse_transforms(recording.get("transforms") or [])
    custom = dict(supervisions[0].get("custom") or {})
    captions = _captions(custom)
    text = supervisions[0].get("text")
    # Beside captions, a cut's text is what was said, and not how.
    if not any(captions) and isinstance(text, str) and text.strip():
        captions = Captions((), (text.strip(),))
    if need_captions and not any(captions):
        raise ValueError("no captions in supervisions[0].custom or supervisions[0].text")
    name = paths.from_text(name) if isinstance(name, str) else name
    if not _is_path(name):
        raise ValueError(f"recording.sources[0].source must be a path, got {shown(name)}")
    source = folder / name
    start, duration = _seconds(row, "start", 0.0), _seconds(row, "duration", None)
    total = recording.get("duration")
    # lhotse computes the lengths of a resampled recording from what it was told of it, and the file decides.
    if recording.get("transforms") and start == 0 and _is_as_long(duration, total):
        duration = None
    tags = {key: str(supervisions[0][key]) for key in ("speaker", "gender") if supervisions[0].get(key)}
    tags |= {key: value for key, value in custom.items() if isinstance(value, str)}
    return Clip(
        id=_id(row.get("id"), default_id),
        audio=str(source) if paths.exists(source) else name,
        start_s=start,
        duration_s=duration,
        channel=channel,
        captions=captions,
        tags=tags,
    )


def _is_as_long(duration: float | None, total: object) -> bool:
    """Whether a cut has the whole of its recording's seconds, but for rounding."""
    return duration is not None and isinstance(total, (int, float)) and abs(duration - total) < 1e-3


def _refuse_transforms(transforms: Any) -> None:
    """ValueError unless the recording's transforms only resample, as reading it does anyway."""
    fix = "write the audio out first (CutSet.save_audios)"
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        name = transform.get("name") if isinstance(transform, Mapping) else None
        if not isinstance(transform, Mapping) or name != "Resample":
            raise ValueError(
                f"recording.transforms is not supported but for Resample, got {shown(name)}: {fix}"
            )
        kwargs = transform.get("kwargs")
        rates = kwargs if isinstance(kwargs, Mapping) else {}
        low, source = (rates.get(f"{key}_sampling_rate") for key in ("target", "source"))
        # What a lower rate cut off is still in the file.
        least = min(_MODEL_RATE_HZ, source) if isinstance(source, int) else _MODEL_RATE_HZ
        if isinstance(low, int) and low < least:
            raise ValueError(
                f"recording.transforms: Resample to {shown(low)} Hz, under {least}, is lossy: {fix}"
            )


def _lhotse_source(sources: list[Mapping[str, Any]], wanted: object) -> tuple[Any, int | None]:
    """The file that holds the cut's channel, and the channel's place in it; None: all that the file has.

    lhotse numbers the channels of a recording, which may lie in several files; a MultiCut states a list.
    """
    cut = tuple(wanted) if isinstance(wanted, list) else (_channel(wanted),)
    held = [tuple(source.get("channels") or (0,)) for source in sources]
    for source, own in zip(sources, held, strict=True):
        whole = cut == own or (cut == (None,) and len(sources) == 1)
        if whole or (len(cut) == 1 and cut[0] in own):
            if source.get("type") != "file":
                raise ValueError(f'recording.sources must be of type "file", got {shown(source.get("type"))}')
            return source["source"], None if whole else own.index(cut[0])
    raise ValueError(
        f'"channel" is {shown(wanted)}, and the files of recording.sources hold {shown([*map(list, held)])}: '
        "a clip is one channel, or all of one file (MultiCut.to_mono splits a cut)"
    )


def _captions(row: Mapping[str, Any]) -> Captions:
    return Captions(*(_strings(row, keys) for keys in (_GLOBAL_KEYS, _FINE_KEYS)))


def _strings(row: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The first of `keys` that is there, as non-empty strings; a single string counts as a list of one."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(f'"{key}" must be a list of strings')
        if any(not v.strip() for v in values):
            raise ValueError(f'"{key}" holds an empty caption')
        if not all(is_text(v) for v in values):
            what = "half a surrogate pair, or bytes that are not UTF-8"
            raise ValueError(f'"{key}" holds {what}, which is no text')
        if values:
            return tuple(v.strip() for v in values)
    return ()


def _is_path(value: object) -> TypeGuard[str]:
    """Whether it can be the name of a file, be there one or not. Names need not be UTF-8."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        return False
    if value.isascii():
        return True
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _seconds(row: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = row.get(key)
    if value is None:
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and "duration" in key):
        raise ValueError(
            f'"{key}" must be seconds{" > 0" if "duration" in key else " >= 0"}, got {shown(value)}'
        )
    return float(value)


def _channel(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31):
        return value
    raise ValueError(f'"channel" must be an integer in [0, 2147483648), got {shown(value)}')


def _id(value: object, default: str) -> str:
    if value is not None and not is_text(str(value)):
        raise ValueError(f'"id" must be text, got {shown(value)}')
    return default if value is None else str(value)


def _tags(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError('"tags" must be an object')
    return {str(key): str(item) for key, item in value.items() if item is not None}


def _claims(value: object, captions: Captions) -> dict[str, tuple[Mapping[str, str], ...]]:
    """Claims that are aligned with their captions; ValueError if they are not."""
    if not isinstance(value, Mapping):
        raise ValueError('"claims" must be an object')
    claims: dict[str, tuple[Mapping[str, str], ...]] = {}
    for kind, own in (("global", captions.global_captions), ("fine", captions.fine_captions)):
        rows = value.get(kind, [])
        if not isinstance(rows, list) or len(rows) not in (0, len(own)):
            raise ValueError(f'"claims"."{kind}" must have one object for each of the {len(own)} captions')
        claims[kind] = tuple(_tags(row) for row in rows)
    return claims


def _nearest(row: Mapping[str, Any], wanted: str) -> str:
    """A hint when an unknown key looks like the one that is missing."""
    unknown = [key for key in row if key not in _KEYS]
    near = [key for key in unknown if KEY_SYNONYMS.get(key) == wanted]
    near += difflib.get_close_matches(wanted, unknown, n=1)
    return f'; is "{near[0]}" meant to be "{wanted}"?' if near else ""


def _got_audio(row: Mapping[str, Any]) -> str:
    """What stands in the place of a path, and what to do about it."""
    if "audio" not in row:
        return _nearest(row, "audio")
    audio = row["audio"]
    fix = ""
    if isinstance(audio, Mapping) and isinstance(audio.get("path"), str):
        fix = f"; write \"audio\": {shown(audio['path'])} (jq -c '.audio = .audio.path')"
    return f", got {shown(audio)}{fix}"


def _meant(key: str) -> str:
    """The key that an unknown one looks like; empty if it looks like none."""
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85)
    return KEY_SYNONYMS.get(key.lower(), near[0] if near else "")


def _counted(key: str, count: int) -> str:
    shown = f'"{key[:40]}"' if key.isprintable() else ascii(key[:40])
    return f"{shown} in {count} line{'s' if count > 1 else ''}"


def describe(manifest: Manifest) -> str:
    """A few lines: clips, hours, captions by kind, their lengths, keys that are not read."""
    clips = manifest.clips
    known = [clip.duration_s for clip in clips if clip.duration_s is not None]
    kinds = Counter(
        kind for clip in clips for kind, own in zip(("global", "fine"), clip.captions, strict=True) if own
    )
    words = sorted(len(text.split()) for clip in clips for own in clip.captions for text in own)
    lines = [f"{len(clips)} clips, {len(manifest.problems)} bad lines"]
    if known:
        lines.append(f"{sum(known) / 3600:.2f} h in the {len(known)} clips that state a duration")
    lines.append(f"{kinds['global']} clips with global captions, {kinds['fine']} with fine-grained ones")
    lines.append(f"{len(words)} captions of {words[0]} to {words[-1]} words, median {words[len(words) // 2]}")
    lines += manifest.warnings()
    others = [_counted(key, count) for key, count in manifest.unknown.items() if not _meant(key)]
    if others:
        lines.append(f"not read: {', '.join(others[:_MOST_SHOWN])}{', ...' if others[_MOST_SHOWN:] else ''}")
    return "\n".join(lines)
