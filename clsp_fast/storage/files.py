"""Files written whole or not at all, and locks: on full disks, and on file systems that lack a feature.

Other modules write through this one, or within its `naming_full_disk`, so that a full disk has the same name
everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a network file system answers to a request that it does not know."""
DISK_FULL_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk is full, the user's quota is used up, or the file would be larger than is allowed."""
LFS_POINTER = b"version https://git-lfs"
"""What Git puts in place of a large file until it is fetched begins like this."""
LFS_FIX = 'is a Git LFS pointer, not the file itself; fetch it with "git lfs pull"'
_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class DiskFull(OSError):
    """There is no room for a file; the message says for which, and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


class FolderInUse(RuntimeError):
    """Another process holds the folder or file."""


@contextlib.contextmanager
def naming_full_disk(path: Path | str | None, size: int | None = None) -> Iterator[None]:
    """Names a full disk, a used-up quota and a limit of file sizes, whichever library met it.

    Args:
        path: what is written inside; None: standard output. An error that names a file elsewhere keeps that
            file's name.
        size: bytes that it needs; None: not known.

    Raises:
        DiskFull: the block failed for want of room. Its other errors pass.
    """
    try:
        yield
    except DiskFull:
        raise  # the inner one knows better which file it was
    except Exception as error:
        code = _disk_full_code(error)
        if code is None:
            raise
        where, elsewhere = None if path is None else Path(path), _elsewhere(error, path)
        if elsewhere is not None:
            where, size = elsewhere, None
        raise DiskFull(code, _describe(code, where, size), None if where is None else str(where)) from error


def _elsewhere(error: Exception, path: Path | str | None) -> Path | None:
    """The file that the error names, if it is neither `path`, nor in it, nor what will become it: a hidden
    neighbour, as `replace_file` and others write."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, (str, bytes)) or not name:
        return None
    file = Path(os.fsdecode(name))
    if path is None:
        return file
    target = Path(path).absolute()
    for place in (file.absolute(), *file.absolute().parents):
        if place == target or (place.parent == target.parent and place.name.startswith(".")):
            return None
    return file


def _disk_full_code(error: Exception) -> int | None:
    """The code of `DISK_FULL_CODES` that is the error's cause; None: it has another."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_FULL_CODES else None
    # numpy, safetensors, faiss, tokenizers and torch tell it in words only.
    if isinstance(error, (OSError, SafetensorError, RuntimeError)) or type(error) is Exception:
        text = str(error)
        if isinstance(error, OSError) and _NUMPY_SHORT_WRITE.search(text):
            return errno.ENOSPC
        return next((code for code in sorted(DISK_FULL_CODES) if os.strerror(code) in text), None)
    return None


def _describe(code: int, where: Path | None, size: int | None) -> str:
    name = "standard output" if where is None else where
    needed = "" if size is None else f", needed about {_megabytes(size)} MB"
    if code == errno.EFBIG:
        fix = "raise the limit (ulimit -f), or choose a file system for larger files"
        return f"file size limit: {name}{needed}: {os.strerror(code)}; {fix}"
    free = None if where is None or code == errno.EDQUOT else _free_bytes(where)
    left = "" if free is None else f", {_megabytes(free)} MB are free"
    quota = " (quota)" if code == errno.EDQUOT else ""
    fix = "make room and run the same command again"
    return f"disk full{quota}: {name}{needed}{left}: {os.strerror(code)}; {fix}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 10e6 else f"{count / 1e6:,.0f}"


def _free_bytes(where: Path) -> int | None:
    """Of the file system that `where` is on; None if neither it nor the folder that it is in exists, as a
    folder further up may be on another one."""
    for place in (where, where.absolute().parent):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def replace_file(file: Path, write_to: Callable[[Path], None], *, size: int | None = None) -> None:
    """Writes a neighbour and renames it over `file`, so that a crash leaves the old content or the new.

    Args:
        file: what to write; several processes may write the same.
        write_to: writes to the path that it is given.
        size: bytes that will be written, for the message about a full disk; None: not known.

    Raises:
        DiskFull: there is no room; nothing is left behind.
    """
    # Its length does not grow with the file's name, which may be as long as a name can be.
    digest = hashlib.sha256(os.fsencode(file.name)).hexdigest()[:16]
    neighbour = file.with_name(f".{digest}.{os.getpid()}.tmp")
    with naming_full_disk(file, size):
        try:
            write_to(neighbour)
            flush(neighbour)
            neighbour.replace(file)
        finally:
            neighbour.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all; several processes may write the same file."""
    content = text.encode()

    def write_to(path: Path) -> None:
        path.write_bytes(content)

    replace_file(file, write_to, size=len(content))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, durable, as far as its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Calls fsync; ignores file systems that do not support it, as many network file systems for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds the folder for one process.

    Raises:
        FolderInUse: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        lock_file(file, folder)
        yield


def lock_file(file: IO[Any], name: Path) -> None:
    """Locks an open file until it is closed; FolderInUse, with `name`, if another process has it.

    Where the file system has no locks, a warning says so: nothing then stops a second process.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUse(f"{name} is in use by another process; wait for it, or choose another") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        warnings.warn(
            f"{name} cannot be locked, its file system has no locks ({error.strerror}): "
            "make sure that no other process writes it",
            stacklevel=2,
        )


def refuse_pointer(path: Path) -> None:
    """Raises ValueError if the file is a Git LFS pointer; what cannot be read is left to the caller."""
    try:
        if not path.is_file():  # a pipe would block
            return
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError:
        return
    if head == LFS_POINTER:
        raise ValueError(f"{path} {LFS_FIX}")
