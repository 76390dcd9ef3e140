"""What every command does alike on a terminal, in a file and in a pipe: it says how far it is, prints any
name, and ends quietly when its reader has gone away.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar

Result = TypeVar("Result")


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
        live = sys.stderr.isatty()
        if not count or not self._active or not (last or now - self._written > (0.2 if live else 10.0)):
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
    output has gone away (`... | head`), it ends quietly with exit code 1.

    The error of a write to such a pipe may come from any print, or only when Python writes out its buffer at
    exit, where nothing can catch it any more: the buffer is written out here.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, **options: Any) -> Result:
        robust_streams()
        try:
            try:
                return main(arguments, **options)
            finally:
                sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:
            # A command turns an OSError into a message and exits: the error is then the context of the exit.
            cause = error.__context__ if isinstance(error, SystemExit) else error
            if not isinstance(cause, BrokenPipeError):
                raise
            broken = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
            if not broken:  # a pipe of something else
                raise
            for stream in broken:
                # What is left in the buffer goes nowhere, instead of failing again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            sys.exit(1)

    return run


def robust_streams() -> None:
    """Lets standard output and standard error write what their encoding lacks as an escape, such as \\xe9.

    The names of recordings hold what they hold; a terminal or a pipe that takes only ASCII must not end the
    command that prints them.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) == "strict":
            reconfigure(errors="backslashreplace")


def _reader_is_gone(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # closed, or no file
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
