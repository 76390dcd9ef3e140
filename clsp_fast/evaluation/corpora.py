"""Reads clips from the published corpora, in the layouts in which they are distributed."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clsp_fast.checks import listed
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import read_manifest
from clsp_fast.storage import files, folders, paths, textfile

_LONGEST_LINE = 2**20


class LeftOut(NamedTuple):
    """A file or line that gives no clip, or no clip for some tasks, and the reason."""

    name: str
    reason: str


def read_corpus(source: Path, layout: str, fields: Iterable[str] = ()) -> list[Clip]:
    """The clips of a corpus. Prints to standard error what is left out, counted by reason.

    Links to files and folders are followed; each folder is searched once.

    Args:
        source: folder of the corpus; for the layouts manifest and paraspeechcaps, a file.
        layout: key of `LAYOUTS`.
        fields: tags that are needed. Some of them are in a table that many copies of the corpus lack.

    Raises:
        FileNotFoundError: there is no such source, or no table with the fields. ValueError: the source holds
        nothing of that layout, or its table cannot be read.
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
            # Some copies of RAVDESS have each recording twice, in two folders.
            left_out["duplicates"].append(Path(item.audio).name)
    if left_out:
        counts = [
            f"{len(names):,} {reason} ({listed(names, width=60)})" for reason, names in left_out.items()
        ]
        print(f"{source}: left out: {'; '.join(counts)}", file=sys.stderr)
    if not clips:
        raise ValueError(f"{source} holds no recording of the layout {layout!r}")
    return list(clips.values())


class _Corpus(NamedTuple):
    """The files of a corpus in the order of their paths, and the links and folders that cannot be read."""

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
    """The WAV files of a corpus, and what is left out."""
    yield from corpus.left_out
    for path in corpus.files:
        suffix = path.suffix.lower()
        if suffix == ".wav":
            yield path
        elif suffix in folders.AUDIO_SUFFIXES | folders.CONVERT_SUFFIXES:
            yield LeftOut(path.name, "not WAV")


def _manifest(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    manifest = read_manifest(source, need_captions=False)
    manifest.warn()
    yield from (LeftOut(f"line {problem.line}", "bad lines") for problem in manifest.problems)
    yield from manifest.clips


_DEAD_LINKS = "dead links"
_OTHER_NAME = "with an unexpected form of name"
_RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprised")


def _ravdess(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """Actor_NN/MM-VV-EE-II-SS-RR-AA.wav: modality 03 is audio only, vocal channel 01 is speech; actors with
    odd numbers are men (Livingstone & Russo, 2018)."""
    for path in _recordings(_corpus(source)):
        if isinstance(path, LeftOut):
            yield path
            continue
        codes = re.fullmatch(r"(0[123]-0[12])-(0[1-8])-0[12]-0[12]-0[12]-(\d\d)", path.stem)
        if codes is None:
            yield LeftOut(path.name, _OTHER_NAME)
        elif codes[1] != "03-01":
            yield LeftOut(path.name, "sung or with video")
        else:
            gender = "male" if int(codes[3]) % 2 else "female"
            yield _clip(path, emotion=_RAVDESS[int(codes[2]) - 1], gender=gender, speaker=codes[3])


_CREMA_D = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}


def _crema_d(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """AudioWAV/NNNN_SSS_EEE_LL.wav and VideoDemographics.csv (Cao et al., 2014).

    Age and gender are in the table, which many copies of the corpus lack. A missing table is an error only if
    age or gender is needed. Otherwise the clips have neither tag, like those of actors missing in the table.
    """
    corpus = _corpus(source)
    need_table = bool(fields & {"age", "gender"})
    try:
        actors = _actors(source, corpus)
    except (OSError, ValueError):
        if need_table:
            raise
        actors = {}
    for path in _recordings(corpus):
        if isinstance(path, LeftOut):
            yield path
            continue
        # One recording has a single letter for its intensity.
        codes = re.fullmatch(r"(\d{4})_[A-Z]{3}_([A-Z]{3})_[A-Z]{1,2}", path.stem.upper())
        if codes is None:
            yield LeftOut(path.name, _OTHER_NAME)
        elif codes[2] not in _CREMA_D:
            yield LeftOut(path.name, "of an unknown emotion")
        else:
            if need_table and codes[1] not in actors:
                yield LeftOut(
                    path.name, "from tasks of age and gender, because VideoDemographics.csv lacks the actor"
                )
            yield _clip(path, emotion=_CREMA_D[codes[2]], **actors.get(codes[1], {}), speaker=codes[1])


def _actors(source: Path, corpus: _Corpus) -> dict[str, dict[str, str]]:
    """Number of an actor -> gender and age, from a table in the corpus or in the folder above it."""
    name = "VideoDemographics.csv"
    tables = [path for path in corpus.files if path.name.lower() == name.lower()]
    above = source.absolute().parent / name
    if not tables and not paths.is_file(above):
        raise FileNotFoundError(
            f"{source} holds no {name}, the table of the actors' age and sex: download it from "
            "https://github.com/CheyneyComputerScience/CREMA-D into this folder"
        )
    table = tables[0] if tables else above
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
    wav_of_turn = {p.stem: p for p in corpus.files if p.suffix.lower() == ".wav" and "sentences" in p.parts}
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
                expected = session / "sentences" / "wav" / table.stem / f"{turn[1]}.wav"
                path = wav_of_turn.pop(turn[1], expected)
                gender = "female" if turn[2] == "F" else "male"
                speaker = f"{table.stem[:5]}{turn[2]}"
                yield _clip(path, emotion=_IEMOCAP.get(turn[3], turn[3]), gender=gender, speaker=speaker)
            elif line.startswith("["):
                yield LeftOut(table.name, "lines of an unexpected form")
    yield from (LeftOut(path.name, "in no table of emotions") for path in wav_of_turn.values())


def _paraspeechcaps(source: Path, fields: frozenset[str]) -> Iterator[Clip | LeftOut]:
    """The dataset's rows as JSON lines (Diwan et al., 2025). Recordings are in the folder of the file, or in
    the subfolder that the row's "source" names. Descriptions become global captions."""
    files.refuse_pointer(source)
    good_rows, first_problem = 0, ""
    with textfile.open_text(source, "a file with one row of ParaSpeechCaps per line") as text:
        for number, line in textfile.lines(text.file, _LONGEST_LINE):
            try:
                clip = _paraspeechcaps_clip(json.loads(line), source, number)
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                first_problem = first_problem or f"line {number}: {type(error).__name__}: {error}"
                yield LeftOut(f"line {number}", "bad rows")
                continue
            good_rows += 1
            yield clip
    if first_problem and not good_rows:
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
"""Name of a layout -> reader, whose arguments are the source and the tags that are needed."""
