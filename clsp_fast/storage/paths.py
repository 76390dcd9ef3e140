"""Checks of paths that never raise an exception.

One path that is too long, forbidden or broken must not end the work on all others. `Path.is_file` and similar
methods raise for some of these paths; for which ones depends on the version of Python.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TypeAlias

AnyPath: TypeAlias = "str | os.PathLike[str]"


def is_file(path: AnyPath) -> bool:
    """Whether the path is a regular file, or a link to one; False if that cannot be known."""
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_dir(path: AnyPath) -> bool:
    """Whether the path is a folder, or a link to one; False if that cannot be known."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def exists(path: AnyPath) -> bool:
    """Whether the path exists; False if that cannot be known."""
    return _status(path) is not None


def from_text(text: str) -> str:
    """Converts the text of a path to a name that Python finds on the disk.

    Text and names on the disk are UTF-8. If the locale has another encoding, Python would encode the text by
    the locale and look for another name.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return text
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a surrogate pair, which no name contains
        return text


def _status(path: AnyPath) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except (OSError, ValueError):  # ValueError: the name contains NUL, or half a surrogate pair
        return None


def problem(path: AnyPath) -> str:
    """Why a file cannot be opened for reading, such as "is missing"; empty if it can be opened."""
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        with Path(path).open("rb"):
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return "is a link that leads nowhere" if _is_link(path) else "is missing"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    except ValueError as error:
        return f"cannot be the name of a file: {error}"


def _is_link(path: AnyPath) -> bool:
    try:
        return stat.S_ISLNK(Path(path).lstat().st_mode)
    except (OSError, ValueError):
        return False
