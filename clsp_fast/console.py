"""What every command does alike on a terminal, in a file and in a pipe: it says how far it is, prints any
name, names a full disk behind its output, runs without standard streams, and ends quietly when its reader has
gone away.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar, cast

from clsp_fast.storage import files

Result = TypeVar("Result")
INCOMPLETE = 3
"""Exit code of a command that did its work, but for recordings that could not be used."""
_NEVER_FAIL = ("backslashreplace", "namereplace", "xmlcharrefreplace", "replace", "ignore")


class Progress:
    """A line on standard error that says how far a long job is.

    On a terminal the line is rewritten in place. Anywhere else (a file, a pipe, a log) it is written as a new
    line, at most once in ten seconds and at the end.

    Args:
        total: how many there are; None: not known. what: what they are. lead: what stands before the numbers.
        active: False: nothing is written.
    """

    def __init__(self, total: int | None, what: str, *, lead: str = "", active: bool = True) -> None:
        self._total, self._what, self._lead, self._active = total, what, lead, active
        self._started, self._written = time.perf_counter(), -math.inf
        self._done = self._bad = 0

    def add(self, count: int, bad: int = 0) -> None:
        """`count` more are done, `bad` of them failed."""
        self._done += count
        self._bad += bad
        now, last = time.perf_counter(), self._done == self._total
        if sys.stderr is None or not count or not self._active:
            return
        live = sys.stderr.isatty()
        if not (last or now - self._written > (0.2 if live else 10.0)):
            return
        self._written = now
        rate = self._done / max(1e-9, now - self._started)
        of = "" if self._total is None else f" of {self._total}"
        text = f"{self._lead}{self._done}{of} {self._what}, {rate:.0f} a second"
        if self._bad:
            text += f", {self._bad} failed"
        if self._total is not None and not last:
            text += f", {(self._total - self._done) / max(1e-9, rate):.0f} s left"
        sys.stderr.write(f"\r{text}\x1b[K" + ("\n" if last else "") if live else text + "\n")
        sys.stderr.flush()

    def update(self, done: int) -> None:
        """`done` are done in all."""
        self.add(done - self._done)


def command(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator of a command's `main`: it can print any name (`robust_streams`), and when the reader of its
    output has gone away (`... | head`), it ends quietly with exit code 1. When standard output is a file on a
    full disk, it ends with one line and exit code 1; what standard error cannot take is lost.

    The error of such a write may come from any print, or only when Python writes out its buffer at exit,
    where nothing can catch it any more: the buffer is written out here.
    """
    spec = main.__globals__.get("__spec__")
    prefix = "" if spec is None else f"{spec.name.removesuffix('.__main__')}: "

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, **options: Any) -> Result:
        _reserve_descriptors()
        robust_streams()
        with _naming_full_disks():
            try:
                try:
                    return main(arguments, **options)
                finally:
                    if sys.stdout is not None:
                        sys.stdout.flush()
            except files.DiskFull as error:
                sys.exit(f"{prefix}{error}")
            except (BrokenPipeError, SystemExit) as error:
                # A command turns an OSError into a message and exits: it is then the context of the exit.
                cause = error.__context__ if isinstance(error, SystemExit) else error
                if not isinstance(cause, BrokenPipeError):
                    raise
                broken = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
                if not broken:  # a pipe of something else
                    raise
                for stream in broken:
                    _discard(stream)
                sys.exit(1)

    return run


class _Stream:
    """A standard stream, but for a full disk: standard output raises `files.DiskFull`, whatever it is that
    prints, and what standard error cannot take is lost, since no work should end for a line about it."""

    def __init__(self, stream: TextIO, *, optional: bool) -> None:
        self._stream, self._optional = stream, optional

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            with files.naming_full_disk(None):
                yield
        except files.DiskFull:
            if not self._optional:
                raise


@contextlib.contextmanager
def _naming_full_disks() -> Iterator[None]:
    """Puts a `_Stream` in place of each standard stream. What cannot be written at the end is given up, so
    that Python does not try it again at exit."""
    out, err = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(contextlib.redirect_stdout(cast(TextIO, _Stream(out, optional=False))))
        if err is not None:
            stack.enter_context(contextlib.redirect_stderr(cast(TextIO, _Stream(err, optional=True))))
        try:
            yield
        finally:
            for stream in (out, err):
                if stream is None:
                    continue
                try:
                    stream.flush()
                except OSError as error:
                    if error.errno in files.DISK_FULL_CODES:
                        _discard(stream)


def _reserve_descriptors() -> None:
    """Opens the null device as each of the descriptors 0 to 2 that is closed: otherwise the next file that is
    opened gets its number, and what a library writes to standard error goes into that file."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _discard(stream: TextIO) -> None:
    """What is left in the stream's buffer, and whatever is written later, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def robust_streams() -> None:
    """Lets standard output and standard error write what their encoding lacks as an escape, such as \\xe9.

    The names of recordings hold what they hold; a terminal or a pipe that takes only ASCII must not end the
    command that prints them. In the C locale Python writes bytes of names as they are ("surrogateescape"),
    which is kept for UTF-8; ASCII still lacks every other letter.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure, errors = getattr(stream, "reconfigure", None), getattr(stream, "errors", None)
        if reconfigure is None or errors in _NEVER_FAIL:
            continue
        if errors != "surrogateescape" or codecs.lookup(stream.encoding).name != "utf-8":
            reconfigure(errors="backslashreplace")


def _reader_is_gone(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    with contextlib.suppress(OSError, ValueError):  # closed, or no file
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
