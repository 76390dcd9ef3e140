"""A request, the counts of many requests, and the watch over the first ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clsp_fast.captioning.answers import ANSWERS, Answer, row_and_part
from clsp_fast.captioning.client import ServerError
from clsp_fast.checks import counted

LINES_HINT = "correct these lines of the manifest, or leave them out"
"""What to do about recordings that cannot be read."""
_SHOWN_REASONS = 5
_FIRST_FAILURES, _FIRST_REQUESTS = 20, 10_000
_AUDIO_REASON = re.compile(r"\[[a-z_]+\]$")  # the end of the text of an AudioError
Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion.

    Attributes:
        custom_id: see `custom_id`.
        body: the body of the request, or a function that makes it. The function is called in a thread shortly
            before the request is sent, and not at all if the request is done. It returns None if the request
            should be skipped. An AudioError, OSError or ValueError that it raises becomes a failed answer.
    """

    custom_id: str
    body: Body | Callable[[], Body | None]

    def build(self) -> Body | None:
        """The body; None: skip the request."""
        return self.body() if callable(self.body) else self.body


@dataclass(slots=True)
class Counts:
    """What a run did.

    Attributes:
        done_before: requests that earlier runs had answered.
        damaged: lines of answers.jsonl that are no answers. Their requests are sent again.
        answered: requests that this run answered.
        failed: requests that failed in this run. The next run sends them again.
        skipped: requests that were not sent because their body function returned None.
        choices: texts that this run received.
        truncated: those of them that were cut, with finish_reason "length".
        prompt_tokens: as the servers counted them.
        completion_tokens: as the servers counted them.
        errors: kind of failure -> how many requests failed so. The kind is the reason of an `AudioError`, as
            in "[open]", or else the beginning of the message.
        examples: kind of failure -> the first message of this kind.
        repeated: reason -> how many requests were sent again for it.
        seconds: duration of this run.
    """

    done_before: int = 0
    damaged: int = 0
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    choices: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    repeated: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        """Counts an answer or a failure of this run."""
        if answer.error is not None:
            self.failed += 1
            reason = _AUDIO_REASON.search(answer.error)
            kind = reason[0] if reason else answer.error[:80]
            if kind in self.errors or len(self.errors) < 100:
                self.errors[kind] += 1
                self.examples.setdefault(kind, answer.error)
            return
        self.answered += 1
        self.choices += len(answer.texts)
        self.truncated += answer.finish_reasons.count("length")
        self.prompt_tokens += answer.usage.get("prompt_tokens", 0)
        self.completion_tokens += answer.usage.get("completion_tokens", 0)

    def describe(self) -> str:
        """A few lines of text."""
        rate = self.answered / max(1e-9, self.seconds)
        lines = [f"{counted(self.answered, 'request')} answered in {self.seconds:.1f} s, {rate:.1f} a second"]
        if self.done_before:
            lines.append(f"{self.done_before} were answered before")
        if self.damaged:
            lines.append(f"damaged lines in {ANSWERS}, left out: {self.damaged}")
        if self.choices:
            tokens = f"{self.prompt_tokens} tokens in, {self.completion_tokens} out"
            lines.append(f"{self.choices} texts, {self.truncated} cut at the token limit; {tokens}")
        if self.repeated:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.repeated.most_common())
            lines.append(f"sent again: {reasons}")
        if self.failed:
            lines.append(f"failed: {self.failed} ({self.reasons()}); the same command sends them again")
        return "\n".join(lines)

    def reasons(self) -> str:
        """The commonest kinds of failure: how many requests failed so, and an example of each."""
        kinds = [
            f"{count} x {self.examples[kind]}" for kind, count in self.errors.most_common(_SHOWN_REASONS)
        ]
        return "; ".join(kinds)


class FirstClips:
    """Notices if the requests of the first clips all fail.

    A recording that cannot be read fails at once, but an answer takes seconds. Therefore a failure counts
    only when all requests before it have failed, too.

    Args:
        answered: whether there is an answer already; then nothing is noticed.
    """

    def __init__(self, answered: bool) -> None:
        self._answered = answered
        self._waiting: dict[int, tuple[int, str, str] | None] = {}
        self._next = 0
        self._rows: set[int] = set()
        self._error = self._hint = ""

    def note_answer(self) -> None:
        """Ends the watch: a request was answered."""
        self._answered = True
        self._waiting.clear()

    def note_skip(self, place: int) -> None:
        """Notes that a request was not sent."""
        self._note(place, None)

    def note_failure(self, place: int, name: str, error: str, hint: str = "") -> None:
        """Notes a failure.

        Args:
            place: number of the request, from 0.
            name: its custom_id.
            error: what went wrong.
            hint: what the user can do.

        Raises:
            ServerError: the requests of the first clips all failed.
        """
        self._note(place, (row_and_part(name)[0], error, hint))

    def _note(self, place: int, failure: tuple[int, str, str] | None) -> None:
        if self._answered or place >= _FIRST_REQUESTS:
            return
        self._waiting[place] = failure
        while self._next in self._waiting:
            failure = self._waiting.pop(self._next)
            self._next += 1
            if failure is None:
                continue
            if not self._rows:
                _, self._error, self._hint = failure
            self._rows.add(failure[0])
            if len(self._rows) == _FIRST_FAILURES:
                text = f"the requests of the first {_FIRST_FAILURES} clips all failed"
                hint = f"; {self._hint}" if self._hint else ""
                raise ServerError(f"{text}, the first one because of: {self._error}{hint}")
