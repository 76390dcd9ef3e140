"""What all commands share: a progress line, and robust standard streams.

A command can print any name in any encoding, runs without standard streams, reports a full disk in one line,
and ends quietly when the reader of its output has closed the pipe.
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
"""Exit code of a command that did its work, except for recordings that could not be used."""
_NEVER_FAIL = ("backslashreplace", "namereplace", "xmlcharrefreplace", "replace", "ignore")


class Progress:
    """A line on standard error that says how far a long job is.

    On a terminal the line is rewritten in place. Elsewhere (a file, a pipe, a log) a new line is written, at
    most once in ten seconds and at the end.

    Args:
        total: number of items; None: not known.
        noun: name of the items, in the plural.
        lead: text in front of the numbers.
        active: False: nothing is written.
    """

    def __init__(self, total: int | None, noun: str, *, lead: str = "", active: bool = True) -> None:
        self._total, self._noun, self._lead, self._active = total, noun, lead, active
        self._started, self._written = time.perf_counter(), -math.inf
        self._done = self._bad = 0

    def add(self, count: int, bad: int = 0) -> None:
        """Counts `count` more items as done; `bad` of them failed."""
        self._done += count
        self._bad += bad
        if count:
            self._show(last=self._done == self._total)

    def end(self) -> None:
        """Writes the last line if the number of items was not known or they were fewer than expected."""
        if self._done and self._done != self._total:
            self._show(last=True)

    def _show(self, *, last: bool) -> None:
        now = time.perf_counter()
        if sys.stderr is None or not self._active:
            return
        live = sys.stderr.isatty()
        if not (last or now - self._written > (0.2 if live else 10.0)):
            return
        self._written = now
        rate = self._done / max(1e-9, now - self._started)
        of_total = "" if self._total is None else f" of {self._total}"
        noun = self._noun.removesuffix("s") if (self._total or self._done) == 1 else self._noun
        text = f"{self._lead}{self._done}{of_total} {noun}, {rate:.0f} a second"
        if self._bad:
            text += f", {self._bad} failed"
        if self._total is not None and not last:
            text += f", {(self._total - self._done) / max(1e-9, rate):.0f} s left"
        sys.stderr.write(f"\r{text}\x1b[K" + ("\n" if last else "") if live else text + "\n")
        sys.stderr.flush()

    def update(self, done: int) -> None:
        """Sets the number of items that are done."""
        self.add(done - self._done)


def command(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator of a command's `main`.

    The command can print any name (`robust_streams`). If the reader of its output has closed the pipe, as
    in `... | head`, it ends quietly with exit code 1. If standard output is a file on a full disk, it ends
    with one line and exit code 1. If standard error is on a full disk, its output is lost.

    Any print can fail in these ways. When Python flushes its buffer at exit, it can fail too, and nothing can
    catch that error. Therefore the buffer is flushed here.
    """
    spec = main.__globals__.get("__spec__")
    prefix = "" if spec is None else f"{spec.name.removesuffix('.__main__')}: "

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, **options: Any) -> Result:
        _reserve_descriptors()
        robust_streams()
        with _streams_that_name_full_disks():
            try:
                try:
                    return main(arguments, **options)
                finally:
                    if sys.stdout is not None:
                        sys.stdout.flush()
            except files.DiskFull as error:
                sys.exit(f"{prefix}{error}")
            except (BrokenPipeError, SystemExit) as error:
                # A command may turn an OSError into sys.exit(message). Then the OSError is its __context__.
                cause = error.__context__ if isinstance(error, SystemExit) else error
                if not isinstance(cause, BrokenPipeError):
                    raise
                broken = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
                if not broken:  # another pipe is broken
                    raise
                for stream in broken:
                    _discard(stream)
                sys.exit(1)

    return run


class _Stream:
    """A standard stream that handles a full disk.

    When the disk is full, a print to standard output raises `files.DiskFull`. A print to standard error is
    lost, because a message about the work must not end the work.
    """

    def __init__(self, stream: TextIO, *, optional: bool) -> None:
        self._stream, self._optional = stream, optional

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._naming_full_disk():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._naming_full_disk():
            self._stream.flush()

    @contextlib.contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            with files.naming_full_disk(None):
                yield
        except files.DiskFull:
            if not self._optional:
                raise


@contextlib.contextmanager
def _streams_that_name_full_disks() -> Iterator[None]:
    """Replaces each standard stream by a `_Stream`. Output that cannot be written at the end is discarded, so
    that Python does not try to write it at exit."""
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
    """Opens the null device for each of the descriptors 0 to 2 that is closed.

    Otherwise the next file that is opened gets the number of a standard stream, and messages of libraries go
    into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _discard(stream: TextIO) -> None:
    """Discards the stream's buffer and all later output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def robust_streams() -> None:
    """Makes standard output and standard error write escapes, such as \\xe9, for characters that their
    encoding lacks.

    The names of recordings can contain any character, and a terminal or pipe that takes only ASCII must not
    end the command that prints them. In the C locale Python writes the bytes of names unchanged
    ("surrogateescape"). That is kept for UTF-8. With ASCII it is replaced, because other letters would fail.
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
    with contextlib.suppress(OSError, ValueError):  # the stream is closed, or has no descriptor
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
