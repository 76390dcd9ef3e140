"""Finds the recordings of a folder, at any depth."""

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
"""Suffixes of recordings. In names they may be in upper or lower case."""
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
"""Suffixes of recordings and films that must be converted before they can be read."""
CONVERT = "convert it, for instance with `ffmpeg -i in -ar 16000 out.flac`"
_MOST_SHOWN = 10
_LONGEST_SUFFIX = 12


@dataclass(frozen=True)
class Scan:
    """The result of searching a folder.

    Attributes:
        recordings: sorted paths of recordings. Dead links and unreadable folders are among them, so that the
            decoder reports them.
        left_out: lower-case suffix -> number of files with this suffix that are not recordings.
        unreadable: folders that cannot be read, each with the reason.
    """

    recordings: list[str]
    left_out: Counter[str]
    unreadable: list[str]

    def warnings(self) -> list[str]:
        """Lines about files that were left out and folders that cannot be read."""
        lines = [f"cannot be read: {name}" for name in self.unreadable[:_MOST_SHOWN]]
        if len(self.unreadable) > _MOST_SHOWN:
            lines.append(f"cannot be read: {len(self.unreadable) - _MOST_SHOWN} more folders")
        if self.left_out:
            count = sum(self.left_out.values())
            kinds = [f"{n} {_shown(suffix)}" for suffix, n in self.left_out.most_common(_MOST_SHOWN)]
            more = ", ..." if len(self.left_out) > _MOST_SHOWN else ""
            line = f"left out {count} file{'s' if count > 1 else ''}: {', '.join(kinds)}{more}"
            convert = sorted(self.left_out.keys() & CONVERT_SUFFIXES)
            if convert:
                line += f"; {', '.join(convert)}: {CONVERT}"
            lines.append(f"{line}; to include files of any name, give a list of paths")
        return lines


def _shown(suffix: str) -> str:
    if not suffix:
        return "without a suffix"
    return suffix if suffix.isprintable() else ascii(suffix)[1:-1]


class Entry(NamedTuple):
    """A file, a dead link, or a folder that cannot be read; `why` is the reason."""

    path: Path
    kind: Literal["file", "dead link", "unreadable folder"]
    why: str = ""


def walk(folder: AnyPath, *, once: bool = False) -> Iterator[Entry]:
    """The files in a folder at any depth, in no particular order.

    Links to files and folders are followed, with two exceptions. A link is skipped if its target contains the
    link. Inside a linked folder, a link to a folder is skipped if the target was already searched. Otherwise
    folders that link to each other would be searched again and again.

    Args:
        folder: the folder.
        once: True: search every folder only once, even if several links lead to it.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [_Folder(Path(folder), frozenset(), linked=False, only_once=False)]
    while waiting:
        current = waiting.pop()
        try:
            status = current.path.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in current.ancestors or (current.only_once and identity in entered):
                continue
            with os.scandir(current.path) as opened:
                entries = sorted(opened, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            yield Entry(current.path, "unreadable folder", str(error.strerror))
            continue
        entered.add(identity)
        for entry in entries:
            path, link = current.path / entry.name, entry.is_symlink()
            if _is_folder(entry):
                linked, only_once = link or current.linked, once or (link and current.linked)
                waiting.append(_Folder(path, current.ancestors | {identity}, linked, only_once))
            else:
                yield Entry(path, "dead link" if link and not exists(path) else "file")


def scan(folder: AnyPath) -> Scan:
    """Searches a folder for recordings at any depth; links are followed as in `walk`."""
    result = Scan([], Counter(), [])
    for entry in walk(folder):
        suffix = entry.path.suffix.lower()
        if entry.kind == "unreadable folder":
            result.unreadable.append(f"{entry.path}: {entry.why}")
            result.recordings.append(str(entry.path))
        elif suffix in AUDIO_SUFFIXES or (entry.kind == "dead link" and not suffix):
            # A dead link without a suffix may have pointed to a folder of recordings.
            result.recordings.append(str(entry.path))
        else:
            shown = suffix if len(suffix) <= _LONGEST_SUFFIX else f"{suffix[:_LONGEST_SUFFIX]}..."
            result.left_out[shown] += 1
    result.recordings.sort()
    return result


class _Folder(NamedTuple):
    """A folder to be searched."""

    path: Path
    ancestors: frozenset[tuple[int, int]]
    """Device and inode of each folder above this one."""
    linked: bool
    """Whether this folder, or a folder above it, was reached through a link."""
    only_once: bool
    """Whether to skip this folder if it was already searched."""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # the link is part of a loop, or its target is forbidden
        return False
