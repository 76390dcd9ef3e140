"""Writes files atomically, locks files and folders, and reports full disks.

Other modules write files with these functions, or within `naming_full_disk`, so that every command reports a
full disk in the same words.
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
"""Error codes of a request that the file system does not support. They are common on network file systems."""
DISK_FULL_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk is full, the user's quota is used up, or the file would be larger than the limit."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, the small file that replaces a large one until it is fetched."""
LFS_FIX = 'is a Git LFS pointer, not the file itself; fetch it with "git lfs pull"'
_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class DiskFull(OSError):
    """A file does not fit on the disk. The message names the file and says what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


class FolderInUse(RuntimeError):
    """Another process has locked the folder or file."""


@contextlib.contextmanager
def naming_full_disk(path: Path | str | None, size: int | None = None) -> Iterator[None]:
    """Turns any library's error about a full disk, quota or file-size limit into `DiskFull`.

    Args:
        path: the file or folder that the block writes; None: standard output. If the error names a file
            elsewhere, the message names that file instead.
        size: bytes that the block writes; None: not known.

    Raises:
        DiskFull: the block failed because there was no room. Other errors pass unchanged.
    """
    try:
        yield
    except DiskFull:
        raise  # an inner block has named the file more precisely
    except Exception as error:
        code = _disk_full_code(error)
        if code is None:
            raise
        file, file_elsewhere = None if path is None else Path(path), _file_elsewhere(error, path)
        if file_elsewhere is not None:
            file, size = file_elsewhere, None
        raise DiskFull(code, _describe(code, file, size), None if file is None else str(file)) from error


def _file_elsewhere(error: Exception, path: Path | str | None) -> Path | None:
    """The file that the error names, unless it belongs to `path`; then None.

    A file belongs to `path` if it is `path` or lies in it. The same holds for hidden files and folders beside
    `path`, because `replace_file` and others write these first and then rename them to `path`.
    """
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, (str, bytes)) or not name:
        return None
    file = Path(os.fsdecode(name))
    if path is None:
        return file
    target = Path(path).absolute()
    for folder in (file.absolute(), *file.absolute().parents):
        if folder == target or (folder.parent == target.parent and folder.name.startswith(".")):
            return None
    return file


def _disk_full_code(error: Exception) -> int | None:
    """Which of `DISK_FULL_CODES` caused the error; None if none did."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_FULL_CODES else None
    # Errors of numpy, safetensors, faiss, tokenizers and torch have no code, only a message.
    if isinstance(error, (OSError, SafetensorError, RuntimeError)) or type(error) is Exception:
        text = str(error)
        if isinstance(error, OSError) and _NUMPY_SHORT_WRITE.search(text):
            return errno.ENOSPC
        return next((code for code in sorted(DISK_FULL_CODES) if os.strerror(code) in text), None)
    return None


def _describe(code: int, file: Path | None, size: int | None) -> str:
    name = "standard output" if file is None else file
    needed = "" if size is None else f", needed about {_megabytes(size)} MB"
    if code == errno.EFBIG:
        fix = "raise the limit (ulimit -f), or choose a file system for larger files"
        return f"file size limit: {name}{needed}: {os.strerror(code)}; {fix}"
    free = None if file is None or code == errno.EDQUOT else _free_bytes(file)
    left = "" if free is None else f", {_megabytes(free)} MB are free"
    quota = " (quota)" if code == errno.EDQUOT else ""
    fix = "make room and run the same command again"
    return f"disk full{quota}: {name}{needed}{left}: {os.strerror(code)}; {fix}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 10e6 else f"{count / 1e6:,.0f}"


def _free_bytes(file: Path) -> int | None:
    """Free space of the file's file system; None if neither the file nor its folder exists.

    A folder further up would not help, because it may be on another file system.
    """
    for path in (file, file.absolute().parent):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
    return None


def replace_file(file: Path, write_to: Callable[[Path], None], *, size: int | None = None) -> None:
    """Writes a temporary file and renames it to `file`, so that a crash leaves the old content or the new.

    Args:
        file: the file to write; several processes may write the same file.
        write_to: writes the content to the temporary path that it receives.
        size: bytes that `write_to` writes, for the message about a full disk; None: not known.

    Raises:
        DiskFull: there is no room; nothing is left behind.
    """
    # A digest is short. The file's own name with a suffix could be too long for the file system.
    digest = hashlib.sha256(os.fsencode(file.name)).hexdigest()[:16]
    temporary = file.with_name(f".{digest}.{os.getpid()}.tmp")
    with naming_full_disk(file, size):
        try:
            write_to(temporary)
            flush(temporary)
            temporary.replace(file)
        except OSError as error:
            if error.filename == str(temporary):
                error.filename, error.filename2 = str(file), None
            raise
        finally:
            temporary.unlink(missing_ok=True)


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
    """Writes a file's content, or a folder's list of names, to the disk, if its file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Calls fsync, except where the file system does not support it. Many network file systems do not support
    it for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks the folder for this process. A folder that does not exist is created.

    Raises:
        FolderInUse: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        lock_file(file, folder)
        yield


def lock_file(file: IO[Any], name: Path) -> None:
    """Locks an open file until it is closed. If the file system has no locks, a warning says so.

    Raises:
        FolderInUse: another process has locked it; the message calls it `name`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUse(f"{name} is in use by another process; wait for it, or use another path") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        warnings.warn(
            f"{name} cannot be locked because its file system has no locks ({error.strerror}): "
            "make sure that no other process writes it",
            stacklevel=2,
        )


def refuse_pointer(path: Path) -> None:
    """Raises ValueError if the file is a Git LFS pointer. A file that cannot be read raises nothing here: the
    caller reports it."""
    try:
        if not path.is_file():  # a pipe would block
            return
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError:
        return
    if head == LFS_POINTER:
        raise ValueError(f"{path} {LFS_FIX}")
