"""Files written whole or not at all, on disks that are full and on file systems that lack a feature.

Every other module writes through this one, so that a full disk has the same name everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a network file system answers to a request that it does not know."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk is full, the user's quota is used up, or the file would be larger than is allowed."""
LFS_POINTER = b"version https://git-lfs"
"""What Git puts in place of a large file until it is fetched begins like this."""
LFS_FIX = 'is a Git LFS pointer, not the file itself; fetch it with "git lfs pull"'
_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class DiskFull(OSError):
    """There is no room for a file; the message says for which, and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def room_for(path: Path | str, size: int | None = None) -> Iterator[None]:
    """Names a full disk, a used-up quota and a limit of file sizes, whichever library met it.

    Args:
        path: what is written inside.
        size: bytes that it needs; None: not known.

    Raises:
        DiskFull: the block failed for want of room. Its other errors pass.
    """
    try:
        yield
    except DiskFull:
        raise  # the inner one knows better which file it was
    except Exception as error:
        code = _no_room(error)
        if code is None:
            raise
        raise DiskFull(code, _describe(code, Path(path), size), str(path)) from error


def _no_room(error: Exception) -> int | None:
    """The code of `NO_ROOM` that is the error's cause; None: it has another."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in NO_ROOM else None
    # numpy, safetensors, faiss, tokenizers and torch tell it in words only.
    if isinstance(error, (OSError, SafetensorError, RuntimeError)) or type(error) is Exception:
        text = str(error)
        if isinstance(error, OSError) and _NUMPY_SHORT_WRITE.search(text):
            return errno.ENOSPC
        return next((code for code in sorted(NO_ROOM) if os.strerror(code) in text), None)
    return None


def _describe(code: int, where: Path, size: int | None) -> str:
    needed = "" if size is None else f", needed about {_megabytes(size)} MB"
    if code == errno.EFBIG:
        fix = "raise the limit (ulimit -f), or choose a file system for larger files"
        return f"file size limit: {where}{needed}: {os.strerror(code)}; {fix}"
    free = _free_bytes(where)
    left = "" if free is None or code == errno.EDQUOT else f", {_megabytes(free)} MB are free"
    quota = " (quota)" if code == errno.EDQUOT else ""
    fix = "make room and run the same command again"
    return f"disk full{quota}: {where}{needed}{left}: {os.strerror(code)}; {fix}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 10e6 else f"{count / 1e6:,.0f}"


def _free_bytes(where: Path) -> int | None:
    for folder in (where, *where.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
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
    neighbour = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with room_for(file, size):
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


def flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, durable, as far as its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """fsync, unless there is none: many network file systems refuse it for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


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
