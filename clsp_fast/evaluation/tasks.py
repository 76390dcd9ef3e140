"""Zero-shot tasks as data, and readers of the folders that the corpora behind them come in.

A file of its own because a task is a table's line and a layout is a corpus' habit: neither knows of models.
The tasks of the literature are in tasks.json; a user's file has the same form:

    {"my-task": {"field": "mood",                          # the clips' tag that holds the truth
                 "prompts": {"calm": ["A calm voice."], "tense": ["A tense voice.", "Someone tense."]},
                 "merge": {"relaxed": "calm"},             # in labels and in predictions
                 "below": {"young": 30, "old": null},      # the tag is a number: label of its range
                 "layout": "manifest"}}                    # how --source is read, unless --layout says so

"labels" with a "template" that has {} in it may stand for "prompts". {"tag": {"label": ["prompt"]}} is a
short form of a task whose field has its name.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clsp_fast.checks import listed
from clsp_fast.data import manifest
from clsp_fast.data.captions import Captions
from clsp_fast.data.manifest import Clip
from clsp_fast.storage import files, folders, paths, textfile

_LARGEST_FILE = 2**20
_KEYS = {"field", "labels", "template", "prompts", "merge", "below", "layout"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A zero-shot task.

    Attributes:
        name: what it is called.
        field: the tag that holds the truth.
        prompts: label -> descriptions; their mean embedding stands for the label.
        merge: label -> the label that it counts as.
        below: label -> upper bound of its range, in rising order, None for the last; empty: no number.
        layout: key of `LAYOUTS`.
    """

    name: str
    field: str
    prompts: Mapping[str, tuple[str, ...]]
    merge: Mapping[str, str] = dataclasses.field(default_factory=dict)
    below: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    layout: str = "manifest"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"task {self.name!r}: {problem}")

    def _problem(self) -> str:
        if not isinstance(self.field, str) or not self.field:
            return f'"field" must be the name of a tag, got {self.field!r}'
        names = [self.name, self.field, *self.prompts, *self.merge, *self.below]
        unwritable = [name for name in names if not textfile.is_text(name)]
        if unwritable:
            got = f"half a surrogate pair, or bytes that are not UTF-8: {unwritable[0]!r}"
            return f"its names must be text, got {got}"
        texts = [text for own in self.prompts.values() for text in own]
        if not all(self.prompts.values()) or not all(
            isinstance(t, str) and t.strip() and textfile.is_text(t) for t in texts
        ):
            return '"prompts" must have a description or more for each label'
        for label, target in self.merge.items():
            if not isinstance(target, str) or target not in self.prompts or target in self.merge:
                return f'"merge" must lead to a label that has prompts and stays, got {label!r}: {target!r}'
        if len(self.names) < 2:
            return f"two labels at least must be left after merging, got {list(self.names)}"
        bounds = list(self.below.values())
        numbers = [b for b in bounds if isinstance(b, (int, float)) and not isinstance(b, bool)]
        rising = numbers == sorted(set(numbers)) and bounds[:-1] == numbers[: len(bounds) - 1]
        if bounds and (not rising or len(bounds) - len(numbers) > 1 or set(self.below) - set(self.prompts)):
            return '"below" must give labels with prompts rising bounds, null for the last at most'
        if self.layout not in LAYOUTS:
            return f'"layout" must be one of {", ".join(LAYOUTS)}, got {self.layout!r}'
        return ""

    @property
    def names(self) -> list[str]:
        """The labels that are left after merging."""
        return [label for label in self.prompts if label not in self.merge]

    def label_of(self, clip: Clip) -> str | None:
        """The clip's label after merging; None if it takes no part."""
        value = clip.tags.get(self.field)
        if value is not None and self.below:
            value = self._range_of(value)
        value = None if value is None else self.merge.get(value, value)
        return value if value in self.names else None

    def _range_of(self, value: str) -> str | None:
        try:
            number = float(value)
        except ValueError:
            return None
        if math.isnan(number):
            return None
        return next((name for name, bound in self.below.items() if bound is None or number < bound), None)


def read(path: Path | None = None) -> dict[str, Task]:
    """The tasks of a JSON file, by name; None: those of the package.

    Raises:
        ValueError: the file is not of the form; the message says where. FileNotFoundError: there is none.
    """
    path = Path(__file__).with_name("tasks.json") if path is None else path
    text = textfile.read_text(path, "a JSON file of tasks", most_bytes=_LARGEST_FILE)
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not content:
            raise ValueError("expected an object with a task or more")
        return {name: _task(name, value) for name, value in content.items()}
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _task(name: str, value: Any) -> Task:
    if not isinstance(value, dict):
        raise ValueError(f"task {name!r} must be an object, got {type(value).__name__}")
    if not _KEYS & set(value):
        value = {"field": name, "prompts": value}
    unknown = set(value) - _KEYS
    if unknown or "field" not in value or ("prompts" in value) == ("labels" in value):
        known, got = ", ".join(sorted(_KEYS)), listed(sorted(value))
        raise ValueError(f'task {name!r} must have "field" and "prompts" or "labels", of {known}; got {got}')
    prompts = value.get("prompts")
    if prompts is None:
        template, labels = value.get("template"), value["labels"]
        if not isinstance(template, str) or "{}" not in template or not isinstance(labels, list):
            raise ValueError(f'task {name!r}: "labels" must be a list, with a "template" that has {{}} in it')
        prompts = {str(label): [template.replace("{}", str(label))] for label in labels}
    parts = {"prompts": prompts, "merge": value.get("merge", {}), "below": value.get("below", {})}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f'task {name!r}: "{key}" must be an object')
    if not all(isinstance(own, (str, list)) for own in prompts.values()):
        raise ValueError(f'task {name!r}: "prompts" must have lists of descriptions')
    parts["prompts"] = {k: (own,) if isinstance(own, str) else tuple(own) for k, own in prompts.items()}
    return Task(name=name, field=value["field"], layout=value.get("layout", "manifest"), **parts)


class LeftOut(NamedTuple):
    """A file or line of a corpus that gives no clip, and why."""

    name: str
    reason: str


def clips_of(source: Path, layout: str, fields: Iterable[str] = ()) -> list[Clip]:
    """The clips of a corpus; what is left out is counted by reason on standard error.

    Links to files and folders are followed, and each folder is searched once.

    Args:
        source: its folder, or the file of a manifest or of ParaSpeechCaps rows.
        layout: key of `LAYOUTS`.
        fields: tags that are needed; some are in a table of the corpus that not every copy has.

    Raises:
        FileNotFoundError: there is no such thing, or no table with the fields. ValueError: it holds nothing
        of that layout, or its table cannot be read.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not paths.exists(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    clips: dict[str, Clip] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    for item in LAYOUTS[layout](source, frozenset(fields)):
        if isinstance(item, LeftOut):
            left_out[item.reason].append(item.name)
        elif clips.setdefault(item.id, item) is not item:
            # Copies of RAVDESS hold each recording twice, in folders of two names.
            left_out["in a second copy"].append(Path(item.audio).name)
    if left_out:
        counts = [
            f"{len(names):,} {reason} ({listed(names, width=60)})" for reason, names in left_out.items()
        ]
        print(f"{source}: left out: {'; '.join(counts)}", file=sys.stderr)
    if not clips:
        raise ValueError(f"{source} holds no recording of the layout {layout!r}")
    return list(clips.values())


class _Corpus(NamedTuple):
    """The files of a corpus in the order of their paths, and what of it cannot be read."""

    files: list[Path]
    left_out: list[LeftOut]


def _corpus(source: Path) -> _Corpus:
    corpus = _Corpus([], [])
    for entry in folders.walk(source, once=True):
        if entry.kind == "file":
            corpus.files.append(entry.path)
        else:
            reasons = {"dead link": _DEAD_LINKS, "unreadable folder": "folders that cannot be read"}
            name = os.path.relpath(entry.path, source)
            corpus.left_out.append(LeftOut(name, reasons[entry.kind]))
    corpus.files.sort()
    corpus.left_out.sort()
    return corpus


def _recordings(corpus: _Corpus) -> Iterator[Path | LeftOut]:
    """The WAV files of a corpus, and what of it is left out."""
    yield from corpus.left_out
    for path in corpus.files:
        suffix = path.suffix.lower()
        if suffix == ".wav":
            yield path
        elif suffix in folders.AUDIO_SUFFIXES | folders.CONVERT_SUFFIXES:
            yield LeftOut(path.name, "not WAV")


def _manifest(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    found = manifest.read(source, need_captions=False)
    found.warn()
    yield from (LeftOut(f"line {problem.line}", "bad lines") for problem in found.problems)
    yield from found.clips


_DEAD_LINKS = "links that lead nowhere"
_OTHER_NAME = "with a name of another form"
_RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprised")


def _ravdess(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """Actor_NN/MM-VV-EE-II-SS-RR-AA.wav: modality 03 is sound alone, vocal channel 01 is speech; odd actors
    are men (Livingstone & Russo, 2018)."""
    for path in _recordings(_corpus(source)):
        if isinstance(path, LeftOut):
            yield path
            continue
        codes = re.fullmatch(r"(0[123]-0[12])-(0[1-8])-0[12]-0[12]-0[12]-(\d\d)", path.stem)
        if codes is None:
            yield LeftOut(path.name, _OTHER_NAME)
        elif codes[1] != "03-01":
            yield LeftOut(path.name, "sung or with a picture")
        else:
            gender = "male" if int(codes[3]) % 2 else "female"
            yield _clip(path, emotion=_RAVDESS[int(codes[2]) - 1], gender=gender, speaker=codes[3])


_CREMA_D = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}


def _crema_d(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """AudioWAV/NNNN_SSS_EEE_LL.wav and VideoDemographics.csv (Cao et al., 2014).

    One recording has a single letter for its intensity. Only age and gender are in the table, which many
    copies lack: without it clips have neither, and it is an error only if they are needed. Clips of actors
    whom it lacks have neither.
    """
    corpus = _corpus(source)
    in_table = bool(fields & {"age", "gender"})
    try:
        actors = _actors(source, corpus)
    except (OSError, ValueError):
        if in_table:
            raise
        actors = {}
    for path in _recordings(corpus):
        if isinstance(path, LeftOut):
            yield path
            continue
        codes = re.fullmatch(r"(\d{4})_[A-Z]{3}_([A-Z]{3})_[A-Z]{1,2}", path.stem.upper())
        if codes is None:
            yield LeftOut(path.name, _OTHER_NAME)
        elif codes[2] not in _CREMA_D:
            yield LeftOut(path.name, "of an unknown emotion")
        else:
            if in_table and codes[1] not in actors:
                yield LeftOut(
                    path.name, "of tasks of age and gender, by an actor whom VideoDemographics.csv lacks"
                )
            yield _clip(path, emotion=_CREMA_D[codes[2]], **actors.get(codes[1], {}), speaker=codes[1])


def _actors(source: Path, corpus: _Corpus) -> dict[str, dict[str, str]]:
    """Gender and age of each actor by number, from a table that is in the corpus or one folder up."""
    name = "VideoDemographics.csv"
    tables = [path for path in corpus.files if path.name.lower() == name.lower()]
    beside = source.absolute().parent / name
    if not tables and not paths.is_file(beside):
        raise FileNotFoundError(
            f"{source} holds no {name}, which has the actors' age and sex: take it from "
            "https://github.com/CheyneyComputerScience/CREMA-D and put it into this folder"
        )
    table = tables[0] if tables else beside
    files.refuse_pointer(table)
    actors = {}
    with textfile.open_text(table, "a table of actors", newline="") as text:
        try:
            for row in csv.DictReader(text.file):
                cells = {str(key).strip().lower(): str(value or "").strip() for key, value in row.items()}
                tags = {"gender": cells["sex"].lower(), "age": cells["age"]}
                actors[cells["actorid"]] = {key: value for key, value in tags.items() if value}
        except (KeyError, csv.Error) as error:
            raise ValueError(
                f"{table} must have the columns ActorID, Age and Sex, separated by commas: {error}"
            ) from error
    return actors


_IEMOCAP = {
    "ang": "angry", "dis": "disgust", "exc": "excited", "fea": "fear", "fru": "frustrated", "hap": "happy",
    "neu": "neutral", "sad": "sad", "sur": "surprised", "oth": "other", "xxx": "no agreement",
}  # fmt: skip
_TURN = re.compile(r"\[\d+\.\d+ - \d+\.\d+\]\t(Ses\d\d[FM]_\w+_([FM])\d+)\t(\w{3})\t\[.*\]")


def _iemocap(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """Session<N>/dialog/EmoEvaluation/<dialog>.txt and Session<N>/sentences/wav/<dialog>/<turn>.wav (Busso et
    al., 2008)."""
    corpus = _corpus(source)
    yield from corpus.left_out
    sentences = {p.stem: p for p in corpus.files if p.suffix.lower() == ".wav" and "sentences" in p.parts}
    for table in corpus.files:
        place = (table.parent.parent.name, table.parent.name, table.name[:3], table.suffix.lower())
        if place != ("dialog", "EmoEvaluation", "Ses", ".txt"):
            continue
        try:
            files.refuse_pointer(table)
            with textfile.open_text(table, "a table of turns") as text:
                lines = [line.rstrip() for line in text.file]
        except (OSError, ValueError) as error:
            why = str(error).removeprefix(str(table))
            yield LeftOut(f"{table.name}{why}", "tables of turns that cannot be read")
            continue
        session = table.parents[2]
        for line in lines:
            turn = _TURN.fullmatch(line)
            if turn:
                named = session / "sentences" / "wav" / table.stem / f"{turn[1]}.wav"
                path = sentences.pop(turn[1], named)
                gender = "female" if turn[2] == "F" else "male"
                speaker = f"{table.stem[:5]}{turn[2]}"
                yield _clip(path, emotion=_IEMOCAP.get(turn[3], turn[3]), gender=gender, speaker=speaker)
            elif line.startswith("["):
                yield LeftOut(table.name, "lines of another form")
    yield from (LeftOut(path.name, "in no table of emotions") for path in sentences.values())


def _paraspeechcaps(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """The rows of the dataset as JSON lines; recordings under the folder of the file, or under its subfolder
    that is named like the row's "source" (Diwan et al., 2025). Descriptions become global captions."""
    files.refuse_pointer(source)
    good, first_problem = 0, ""
    with textfile.open_text(source, "a file with one row of ParaSpeechCaps a line") as text:
        for number, line in textfile.lines(text.file, _LARGEST_FILE):
            try:
                clip = _paraspeechcaps_clip(json.loads(line), source, number)
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                first_problem = first_problem or f"line {number}: {type(error).__name__}: {error}"
                yield LeftOut(f"line {number}", "bad rows")
                continue
            good += 1
            yield clip
    if first_problem and not good:
        raise ValueError(f"{source} holds no row of ParaSpeechCaps; {first_problem}")


def _paraspeechcaps_clip(row: Mapping[str, Any], source: Path, number: int) -> Clip:
    relative = Path(row["relative_audio_path"])
    inside = source.parent / str(row.get("source", "")) / relative
    path = inside if paths.exists(inside) else source.parent / relative
    descriptions = row["text_description"]
    descriptions = [descriptions] if isinstance(descriptions, str) else descriptions
    if not all(isinstance(text, str) and text.strip() and textfile.is_text(text) for text in descriptions):
        raise ValueError('"text_description" must be text')
    tags = {
        key: str(row[key]) for key in ("gender", "accent", "pitch", "speaking_rate", "source") if row.get(key)
    }
    tags |= {"speaker": str(row["speakerid"])} if row.get("speakerid") else {}
    for key in ("intrinsic_tags", "situational_tags"):
        tags |= {key: ", ".join(map(str, row[key]))} if row.get(key) else {}
    return Clip(f"{relative}-{number}", str(path), 0.0, None, None, Captions(tuple(descriptions), ()), tags)


def _clip(path: Path, **tags: str) -> Clip:
    return Clip(path.stem, str(path), 0.0, None, None, Captions((), ()), tags)


LAYOUTS: dict[str, Callable[[Path, frozenset[str]], Iterator[Clip | LeftOut]]] = {
    "manifest": _manifest,
    "ravdess": _ravdess,
    "crema-d": _crema_d,
    "iemocap": _iemocap,
    "paraspeechcaps": _paraspeechcaps,
}
"""How a corpus lies on the disk: name -> reader of a source, which is told the tags that are needed."""
