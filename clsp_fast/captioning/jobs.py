"""Runs many requests: sends them to servers, or writes them as job files that other programs run.

A job's folder is described in clsp_fast/captioning/answers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clsp_fast.audio import AudioError
from clsp_fast.captioning.answers import (
    ANSWERS,
    Answer,
    AnswerFile,
    SparseIntegers,
    answer_line,
    begin,
    parse_answer,
    row_and_part,
)
from clsp_fast.captioning.client import Client, Reply, ServerConfig, ServerError, describe
from clsp_fast.captioning.ids import digest
from clsp_fast.captioning.rows import ALL_ROWS, RowRange
from clsp_fast.console import Progress
from clsp_fast.storage import files

_FSYNC_S = 5.0
_SHOWN_REASONS = 5
_SHOWN_FILES = 10
_FIRST_FAILURES, _FIRST_REQUESTS = 20, 10_000
_LINES_HINT = "correct these lines of the manifest, or leave them out"
_AUDIO_REASON = re.compile(r"\[[a-z_]+\]$")  # the end of the text of an AudioError
Body = Mapping[str, Any]


class Stopped(Exception):
    """A signal ended the run. What was answered is kept.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; the same command continues the work")


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
        lines = [f"{self.answered} requests answered in {self.seconds:.1f} s, {rate:.1f} a second"]
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


class _FirstClips:
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


@dataclass(slots=True)
class Written:
    """What `write_pending` did.

    Attributes:
        files: each job file and its number of requests.
        counts: "failed" requests, whose body cannot be made, and "skipped" ones are in no file.
    """

    files: dict[Path, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def describe(self) -> str:
        """A few lines of text."""
        shown = list(itertools.islice(self.files.items(), _SHOWN_FILES))
        lines = [f"{path}: {count} requests" for path, count in shown]
        if len(shown) < len(self.files):
            rest = sum(self.files.values()) - sum(count for _, count in shown)
            lines.append(f"and {len(self.files) - len(shown)} more files with {rest} requests")
        if self.counts.failed:
            reasons = self.counts.reasons()
            lines.append(f"left out: {self.counts.failed} requests that cannot be made ({reasons})")
        return "\n".join(lines or ["no request is left to write"])


def write_pending(
    requests: Iterable[Request],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    asked: Sequence[RowRange] = (),
    shard_rows: int | None = None,
) -> Written:
    """Writes the requests of a job that are not answered yet as job files in its folder.

    They are OpenAI batch JSONL, which `vllm run-batch` and hosted batches run. A file appears only when it is
    complete: jobs.jsonl, or jobs-00000.jsonl and so on. Job files of earlier calls are deleted, so `requests`
    must include those for the rows of earlier calls. A shard without requests has no file.

    Args:
        requests: as for `run_jobs`, like the arguments that are not listed here.
        shard_rows: rows of the manifest in a file; None: one file for all.

    Raises:
        ValueError: the folder was begun with other settings. ServerError: no request of the first clips can
        be made. FolderInUse, DiskFull.
    """
    written = Written()
    with files.lock_folder(folder):
        begin(folder, settings, parts=parts, notes=notes or {}, asked=asked)
        for path in (*folder.glob("jobs*.jsonl"), *folder.glob(".*.tmp")):  # of earlier and killed calls
            path.unlink()
        with contextlib.closing(AnswerFile(folder, parts)) as answers:
            pending = (request for request in requests if not answers.is_done(request.custom_id))
            jobs = _built(pending, written.counts, _FirstClips(answers.count > 0))

            def name_of_file(job: tuple[str, Body]) -> str:
                if shard_rows is None:
                    return "jobs.jsonl"
                return f"jobs-{row_and_part(job[0])[0] // shard_rows:05d}.jsonl"

            for name, group in itertools.groupby(jobs, name_of_file):
                written.files[folder / name] = _write_jobs(group, folder / name)
    return written


def _built(requests: Iterable[Request], counts: Counts, first: _FirstClips) -> Iterator[tuple[str, Body]]:
    """The ids and bodies of requests; those that fail or are skipped are counted and left out."""
    for place, request in enumerate(requests):
        try:
            body = request.build()
        except (AudioError, OSError, ValueError) as error:
            counts.add(Answer(request.custom_id, (), (), {}, "", describe(error)))
            first.note_failure(place, request.custom_id, describe(error), _LINES_HINT)
            continue
        if body is None:
            counts.skipped += 1
            first.note_skip(place)
        else:
            first.note_answer()
            yield request.custom_id, body


def _write_jobs(jobs: Iterable[tuple[str, Body]], path: Path) -> int:
    """Writes a job file. Returns its number of requests."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("wb") as file:
            for name, body in jobs:
                row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(row).encode() + b"\n")
                count += 1

    files.replace_file(path, write)
    return count


@dataclass(slots=True)
class Imported:
    """What `import_answers` did with the lines of the files.

    Attributes:
        added: answers that the folder has now, and did not have before.
        repeated: answers to requests that were already answered.
        failed: lines that say that a request failed.
        unknown: answers whose custom_id is not one of the job's.
        damaged: lines that are not answers.
        missing: requests that still have no answer.
    """

    added: int = 0
    repeated: int = 0
    failed: int = 0
    unknown: int = 0
    damaged: int = 0
    missing: int = 0

    def describe(self) -> str:
        """One line of text."""
        others = {
            "already answered": self.repeated,
            "failed": self.failed,
            "with an id that is not one of this job's": self.unknown,
            "damaged": self.damaged,
        }
        rest = [f"{count} {text}" for text, count in others.items() if count]
        return ", ".join([f"{self.added} answers added", *rest])


def import_answers(
    sources: Iterable[Path],
    names: Iterable[str],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    asked: Sequence[RowRange] = (),
) -> Imported:
    """Adds answers that another program collected, such as the output of `vllm run-batch`.

    An answer is added if its custom_id is that of a request of this job, clip id included. Thus answers that
    belong to another manifest, or to this one with shifted rows, are noticed.

    Args:
        sources: files in the format of the OpenAI batch output.
        names: the custom_id of every request of the job. Eight bytes are held for each.
        folder: as for `run_jobs`, like the other arguments.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the folder was begun with other settings.
        FolderInUse, DiskFull.
    """
    digests, result = SparseIntegers(), Imported()
    with files.lock_folder(folder):
        begin(folder, settings, parts=parts, notes=notes or {}, asked=asked)
        with contextlib.closing(AnswerFile(folder, parts)) as answers:
            for name in names:
                row, part = row_and_part(name)
                digests[row * parts + part] = digest(name)
                result.missing += not answers.is_done(name)
            for path in sources:
                with path.open("rb") as file:
                    for line in file:
                        _import_line(line, digests, answers, parts, result)
    result.missing -= result.added
    return result


class Exchange(NamedTuple):
    """What `exchange_files` did.

    Attributes:
        missing: requests without an answer after the import; 0 without an import.
        failed: requests that cannot be made and are in no job file.
    """

    missing: int
    failed: int


def exchange_files(
    requests: Callable[[], Iterable[Request]],
    folder: Path,
    *,
    sources: Sequence[Path],
    write: bool,
    names: Callable[[], Iterable[str]] | None = None,
    shard_rows: int | None = None,
    **job: Any,
) -> Exchange:
    """Does and prints what a command is asked for with --answers and --jobs-only: both run without servers.

    Args:
        requests: gives all requests of the job.
        folder: the job's folder.
        sources: files for `import_answers`, if any.
        write: whether `write_pending` is called, after the import.
        names: gives the names for `import_answers`; None: those of `requests`.
        shard_rows: for `write_pending`.
        job: settings, parts and so on, for both.
    """
    missing = failed = 0
    if sources:
        known = (request.custom_id for request in requests()) if names is None else names()
        imported = import_answers(sources, known, folder, **job)
        missing = imported.missing
        print(f"{folder}: {imported.describe()}")
    if write:
        written = write_pending(requests(), folder, shard_rows=shard_rows, **job)
        failed = written.counts.failed
        print(written.describe())
    return Exchange(missing, failed)


def _import_line(
    line: bytes, digests: SparseIntegers, answers: AnswerFile, parts: int, result: Imported
) -> None:
    if not line.strip():
        return
    try:
        answer = parse_answer(line)
    except ValueError:
        result.damaged += 1
        return
    try:
        row, part = row_and_part(answer.custom_id)
    except ValueError:
        row, part = 0, parts
    number = row * parts + part
    if part >= parts or digests[number] != digest(answer.custom_id):
        result.unknown += 1
    elif answer.error is not None:
        result.failed += 1
    elif answers.is_done(answer.custom_id):
        result.repeated += 1
    else:
        body = json.loads(line)["response"]["body"]
        answers.append(answer.custom_id, answer_line(answer.custom_id, Reply(200, body)), good=True)
        result.added += 1


def run_jobs(
    requests: Iterable[Request],
    folder: Path,
    servers: ServerConfig,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    asked: Sequence[RowRange] = (),
    total: int | None = None,
    noun: str = "requests",
    on_answer: Callable[[Answer], None] | None = None,
    threads: int = 4,
) -> Counts:
    """Sends the requests that are not answered yet, and appends the answers to the folder.

    Memory does not grow with the number of requests: it holds at most twice as many bodies as the servers
    work on. If a run is killed at any moment, another call continues it. No answer is lost, and none is
    recorded twice. If everything is answered, no server is needed.

    Args:
        requests: all requests of the job, answered or not.
        folder: the job's folder; it is created.
        servers: who is asked.
        settings: what the answers depend on, for job.json.
        parts: the largest number of requests of a row.
        notes: what job.json also records, without comparing it.
        asked: the rows of the manifest that `requests` come from, for job.json; empty: it names no rows.
        total: number of requests, for the progress line; None: not known.
        noun: what the progress line calls the requests.
        on_answer: called with each answer and failure of this run.
        threads: threads that call the functions of the requests' bodies.

    Raises:
        ValueError: the folder was begun with other settings. FolderInUse: another process writes it.
        ServerError: no request can succeed. DiskFull. Stopped: SIGINT or SIGTERM ended the run.
    """
    client = Client(servers)
    with files.lock_folder(folder):
        begin(folder, settings, parts=parts, notes=notes or {}, asked=asked)
        answers = AnswerFile(folder, parts, asked or [ALL_ROWS])
        with contextlib.closing(answers):
            progress = Progress(None if total is None else max(0, total - answers.count), noun)
            run = _Run(client, answers, progress, on_answer, threads)
            run.counts.damaged = answers.damaged
            started = time.perf_counter()
            try:
                asyncio.run(run.run(requests))
                progress.end()
            finally:
                run.counts.seconds = time.perf_counter() - started
                run.counts.repeated = client.repeated
    return run.counts


@dataclass(frozen=True, slots=True)
class _Built:
    """A request whose body is being made.

    Attributes:
        place: its number among the requests of this run.
        custom_id: its id.
        payload: the JSON, None to skip it, or a failed future.
    """

    place: int
    custom_id: str
    payload: Future[bytes | None]


class _Run:
    """One call of `run_jobs`: a thread reads requests, tasks send them, and the event loop writes answers."""

    def __init__(
        self,
        client: Client,
        answers: AnswerFile,
        progress: Progress,
        on_answer: Callable[[Answer], None] | None,
        threads: int,
    ) -> None:
        self._client, self._answers, self._progress = client, answers, progress
        self._on_answer, self._threads = on_answer, threads
        self._queue: asyncio.Queue[_Built | None] = asyncio.Queue()
        self._room = threading.Semaphore(2 * client.concurrency)
        self._ended = threading.Event()
        self._check: asyncio.Future[None] | None = None
        self._sync_error: OSError | None = None
        self._first = _FirstClips(answers.count > 0)
        self.counts = Counts()

    async def run(self, requests: Iterable[Request]) -> None:
        """Sends all requests, or raises what stopped it."""
        task = asyncio.current_task()
        assert task is not None
        received: list[int] = []

        def stop(number: int) -> None:
            received.append(number)
            task.cancel()

        with _signals(stop):
            try:
                await self._send_all(requests)
            except asyncio.CancelledError:
                if not received:
                    raise
                raise Stopped(received[0]) from None

    async def _send_all(self, requests: Iterable[Request]) -> None:
        loop = asyncio.get_running_loop()
        async with self._client as client:
            with ThreadPoolExecutor(self._threads, "build") as pool:
                feeder = loop.run_in_executor(None, self._feed, requests, pool, loop)
                tasks = [loop.create_task(self._work()) for _ in range(client.concurrency)]
                tasks.append(loop.create_task(self._sync()))
                try:
                    await asyncio.gather(feeder, *tasks[:-1])
                finally:
                    self._ended.set()
                    await _cancel(tasks)
                    pool.shutdown(cancel_futures=True)
        if self._sync_error is not None:
            raise self._sync_error

    def _feed(
        self, requests: Iterable[Request], pool: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop
    ) -> None:
        """In a thread: puts the requests that are not done into the queue, as long as there is room."""
        place = 0
        for request in requests:
            if self._answers.is_done(request.custom_id):
                self.counts.done_before += 1
                if self._ended.is_set():
                    return
                continue
            while not self._room.acquire(timeout=0.2):
                if self._ended.is_set():
                    return
            if self._ended.is_set():
                return
            payload: Future[bytes | None] = Future()
            if callable(request.body):
                payload = pool.submit(_encode, request)
            else:
                payload.set_result(_encode(request))
            loop.call_soon_threadsafe(self._queue.put_nowait, _Built(place, request.custom_id, payload))
            place += 1
        for _ in range(self._client.concurrency):
            loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def _work(self) -> None:
        while not self._ended.is_set() and (built := await self._queue.get()) is not None:
            try:
                await self._send(built)
            finally:
                self._room.release()

    async def _send(self, built: _Built) -> None:
        """Sends one request and writes its answer or failure."""
        future = built.payload
        try:
            payload = future.result() if future.done() else await asyncio.wrap_future(future)
        except (AudioError, OSError, ValueError) as error:
            self._write(built, Reply(0, None, describe(error)))
            self._first.note_failure(built.place, built.custom_id, describe(error), _LINES_HINT)
            return
        if payload is None:
            self.counts.skipped += 1
            self._progress.add(1)
            self._first.note_skip(built.place)
            return
        if self._check is None:
            self._check = asyncio.ensure_future(self._client.check())
        await self._check
        reply = await self._client.complete(payload)
        self._write(built, reply)
        if reply.body is not None:
            self._first.note_answer()
            return
        try:
            self._first.note_failure(built.place, built.custom_id, reply.error)
        except ServerError as error:
            hint = await self._client.hint_at_model()
            raise ServerError(f"{error}; {hint}" if hint else str(error)) from None

    def _write(self, built: _Built, reply: Reply) -> None:
        if self._sync_error is not None:
            raise self._sync_error
        line = answer_line(built.custom_id, reply)
        good = reply.body is not None
        self._answers.append(built.custom_id, line, good=good)
        answer = parse_answer(line)
        self.counts.add(answer)
        self._progress.add(1, 0 if good else 1)
        if self._on_answer is not None:
            self._on_answer(answer)

    async def _sync(self) -> None:
        """From time to time: writes the answers to the disk."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_FSYNC_S)
            try:
                await loop.run_in_executor(None, self._answers.sync)
            except OSError as error:
                # The system reports it only once, so that a later attempt would seem to succeed.
                self._sync_error = error
                return


async def _cancel(tasks: Collection[asyncio.Task[None]]) -> None:
    """Ends the tasks. A library may swallow a cancellation, so it is repeated."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
    await asyncio.gather(*tasks, return_exceptions=True)  # so that no exception counts as unnoticed


def _encode(request: Request) -> bytes | None:
    body = request.build()
    return None if body is None else json.dumps(body).encode()


@contextlib.contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls `stop` for the first SIGINT or SIGTERM. Only the main thread can receive them.

    The second one ends the process at once. The event loop cannot notice it while the thread pool waits for a
    recording that is being decoded, so it has a handler of its own. A line that it cuts is removed by the
    next run.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = [signal.getsignal(number) for number in numbers]

    def stop_once(number: int) -> None:
        for each in numbers:
            loop.remove_signal_handler(each)
            signal.signal(each, lambda second, _: os._exit(128 + second))
        stop(number)

    for number in numbers:
        loop.add_signal_handler(number, stop_once, number)
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
