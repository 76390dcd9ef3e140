"""The recordings of a folder, at any depth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from clsp_fast.storage.paths import AnyPath, exists

AUDIO_SUFFIXES = frozenset(
    {
        ".aif",
        ".aifc",
        ".aiff",
        ".au",
        ".bwf",
        ".caf",
        ".flac",
        ".mp2",
        ".mp3",
        ".mpga",
        ".nist",
        ".oga",
        ".ogg",
        ".opus",
        ".rf64",
        ".snd",
        ".sph",
        ".w64",
        ".wav",
        ".wave",
    }
)
"""Files of a folder whose names end like this, in any case, are taken for recordings."""
CONVERT_SUFFIXES = frozenset(
    {
        ".3gp",
        ".aac",
        ".ac3",
        ".amr",
        ".ape",
        ".avi",
        ".flv",
        ".m4a",
        ".m4b",
        ".mka",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpc",
        ".voc",
        ".weba",
        ".webm",
        ".wma",
        ".wmv",
        ".wv",
    }
)
"""Recordings and films that must be converted before they can be read."""
CONVERT = "convert it, for instance with `ffmpeg -i in -ar 16000 out.flac`"
_MOST_SHOWN = 10
_LONGEST_SUFFIX = 12


@dataclass(frozen=True)
class Scan:
    """What a folder holds.

    Attributes:
        recordings: paths of what is taken for a recording, sorted. Links that lead nowhere and folders that
            cannot be read are among them, for the decoder to name.
        left_out: how many files are not taken, by the lower-case end of their names.
        unreadable: folders that cannot be read, and why.
    """

    recordings: list[str]
    left_out: Counter[str]
    unreadable: list[str]

    def warnings(self) -> list[str]:
        """What there is to say of files that are not taken and folders that cannot be read."""
        lines = [f"cannot be read: {name}" for name in self.unreadable[:_MOST_SHOWN]]
        if len(self.unreadable) > _MOST_SHOWN:
            lines.append(f"cannot be read: {len(self.unreadable) - _MOST_SHOWN} folders more")
        if self.left_out:
            count = sum(self.left_out.values())
            kinds = [f"{n} {_shown(suffix)}" for suffix, n in self.left_out.most_common(_MOST_SHOWN)]
            more = ", ..." if len(self.left_out) > _MOST_SHOWN else ""
            line = f"left out {count} file{'s' if count > 1 else ''}: {', '.join(kinds)}{more}"
            convert = sorted(self.left_out.keys() & CONVERT_SUFFIXES)
            if convert:
                line += f"; {', '.join(convert)}: {CONVERT}"
            lines.append(f"{line}; a list of paths takes files of any name")
        return lines


def _shown(suffix: str) -> str:
    if not suffix:
        return "without a suffix"
    return suffix if suffix.isprintable() else ascii(suffix)[1:-1]


class Entry(NamedTuple):
    """What a folder holds, or why it cannot be told: `why` ends a sentence about an unreadable folder."""

    path: Path
    kind: Literal["file", "dead link", "unreadable folder"]
    why: str = ""


def walk(folder: AnyPath, *, once: bool = False) -> Iterator[Entry]:
    """What lies in a folder, at any depth, in no particular order.

    Links to files and folders are followed. A link to one of its own parent folders is skipped. Inside a
    linked folder, a further link is skipped if its target was already searched, so that folders which link to
    each other do not multiply.

    Args:
        folder: the folder.
        once: whether every folder is searched once only, however many links lead to it.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [_Folder(Path(folder), frozenset(), linked=False, only_once=False)]
    while waiting:
        this = waiting.pop()
        try:
            status = this.path.stat()
            here = (status.st_dev, status.st_ino)
            if here in this.ancestors or (this.only_once and here in entered):
                continue
            with os.scandir(this.path) as opened:
                entries = sorted(opened, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            yield Entry(this.path, "unreadable folder", str(error.strerror))
            continue
        entered.add(here)
        for entry in entries:
            inner, link = this.path / entry.name, entry.is_symlink()
            if _leads_to_a_folder(entry):
                only_once = once or (link and this.linked)
                waiting.append(_Folder(inner, this.ancestors | {here}, link or this.linked, only_once))
            else:
                yield Entry(inner, "dead link" if link and not exists(inner) else "file")


def scan(folder: AnyPath) -> Scan:
    """Searches a folder for recordings, at any depth.

    Links to files and folders are followed. A link to one of its own parent folders is skipped. Inside a
    linked folder, a further link is skipped if its target was already searched.
    """
    result = Scan([], Counter(), [])
    for entry in walk(folder):
        suffix = entry.path.suffix.lower()
        if entry.kind == "unreadable folder":
            result.unreadable.append(f"{entry.path}: {entry.why}")
            result.recordings.append(str(entry.path))
        elif suffix in AUDIO_SUFFIXES or (entry.kind == "dead link" and not suffix):
            # A dead link without a suffix may have led to a folder of recordings.
            result.recordings.append(str(entry.path))
        else:
            shown = suffix if len(suffix) <= _LONGEST_SUFFIX else f"{suffix[:_LONGEST_SUFFIX]}..."
            result.left_out[shown] += 1
    result.recordings.sort()
    return result


class _Folder(NamedTuple):
    """A folder that is to be searched: `ancestors` by device and inode, `linked` if a link led here,
    `only_once` if it is skipped where it was searched already."""

    path: Path
    ancestors: frozenset[tuple[int, int]]
    linked: bool
    only_once: bool


def _leads_to_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, a forbidden target
        return False
