"""Runs many requests, and keeps their answers in a folder that a later run continues.

The folder holds job.json, the settings, and answers.jsonl, one line for each answer or failure in the format
of OpenAI's batch output: {"custom_id", "error", "response": {"status_code", "body"}, "id"}. The output of
`vllm run-batch` or of a hosted batch has the same format. Lines are in the order in which answers arrived, so
readers find the answers of a row with `AnswerIndex`.

A custom_id begins with the row of the manifest and the part of the row: "12.3/generate/clip-id" is the fourth
request of the thirteenth line. Which requests are done is therefore one bit each.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clsp_fast.audio import AudioError
from clsp_fast.captioning.client import Client, Reply, ServerConfig, ServerError, describe
from clsp_fast.checks import listed
from clsp_fast.console import Progress
from clsp_fast.storage import files
from clsp_fast.storage.textfile import shown

ANSWERS, RECORD = "answers.jsonl", "job.json"
_LONGEST_ID = 40
_FSYNC_S = 5.0
_FIRST_FAILURES = 20
_CUSTOM_ID = re.compile(r"(\d{1,18})\.(\d{1,9})/")
_DONE = re.compile(rb'\{"custom_id": "(\d{1,18})\.(\d{1,9})/[^"\\]*", "error": null, ')
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


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of an answer file.

    Attributes:
        custom_id: that of the request.
        texts: the content of each choice; empty where a choice has no content. No text: the request failed.
        finish_reasons: why each text ended: "stop"; "length" if it was cut.
        usage: "prompt_tokens" and "completion_tokens", as far as the server states them.
        model: the model that the server names.
        error: what went wrong; None: nothing.
    """

    custom_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    usage: Mapping[str, int]
    model: str
    error: str | None


@dataclass(slots=True)
class Counts:
    """What a run did.

    Attributes:
        done_before: requests that earlier runs had answered.
        answered: requests that this run answered.
        failed: requests that failed in this run. The next run sends them again.
        skipped: requests that were not sent because their body function returned None.
        choices: texts that this run received.
        truncated: those of them that were cut, with finish_reason "length".
        prompt_tokens: as the servers counted them.
        completion_tokens: as the servers counted them.
        errors: the beginning of a failure's message -> how many requests failed with it.
        repeated: reason -> how many requests were sent again for it.
        seconds: duration of this run.
    """

    done_before: int = 0
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    choices: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        """Counts an answer or a failure of this run."""
        if answer.error is not None:
            self.failed += 1
            key = answer.error[:80]
            if key in self.errors or len(self.errors) < 100:
                self.errors[key] += 1
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
        if self.choices:
            tokens = f"{self.prompt_tokens} tokens in, {self.completion_tokens} out"
            lines.append(f"{self.choices} texts, {self.truncated} cut at the token limit; {tokens}")
        if self.repeated:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.repeated.most_common())
            lines.append(f"sent again: {reasons}")
        if self.failed:
            reasons = "; ".join(f"{count} x {text}" for text, count in self.errors.most_common(5))
            lines.append(f"failed: {self.failed} ({reasons}); the same command sends them again")
        return "\n".join(lines)


def custom_id(step: str, row: int, clip_id: str, part: int = 0) -> str:
    """The id of a request: "row.part/step/clip id".

    Row and part make it unique, even where clips share an id. Of the clip's id, ASCII letters, digits and a
    few signs are kept, and at most the last 40 characters. If that changes the id, a digest follows.
    """
    name = re.sub(r"[^A-Za-z0-9_.:-]", "_", clip_id)[-_LONGEST_ID:]
    if name != clip_id:
        name += "~" + hashlib.sha256(clip_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{row}.{part}/{step}/{name}"


def row_and_part(custom_id: str) -> tuple[int, int]:
    """The row and part of a request's id. ValueError if the id does not begin with them."""
    match = _CUSTOM_ID.match(custom_id)
    if match is None:
        raise ValueError(f'custom_id must begin like "12.0/", got {shown(custom_id)}')
    return int(match[1]), int(match[2])


def parse_answer(line: bytes | str) -> Answer:
    """The answer of a line, as this module, `vllm run-batch` or a hosted batch writes it.

    Raises:
        ValueError: the line is not an answer.
    """
    try:
        row = json.loads(line)
        name, error, response = str(row["custom_id"]), row.get("error"), row.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if isinstance(body, dict) and status == 200 and not error and body.get("choices"):
            choices = sorted(body["choices"], key=lambda choice: int(choice.get("index") or 0))
            return Answer(
                name,
                tuple(_content(choice) for choice in choices),
                tuple(str(choice.get("finish_reason") or "") for choice in choices),
                {k: int(v) for k, v in (body.get("usage") or {}).items() if isinstance(v, int)},
                str(body.get("model") or ""),
                None,
            )
        nested = body.get("error", body) if isinstance(body, dict) else body
        what = error or nested or "no answer"
        message = what.get("message") if isinstance(what, dict) else what
        return Answer(name, (), (), {}, "", str(message or what)[:1000])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an answer: {describe(error)}") from error


def _content(choice: Mapping[str, Any]) -> str:
    """The text of a choice. Servers give a string, null, or a list of parts."""
    content = (choice.get("message") or {}).get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def answer_line(name: str, reply: Reply) -> bytes:
    """The line of a request's outcome. Of a choice only the content is kept, not its reasoning."""
    response: dict[str, Any] | None = None
    error = {"code": f"http_{reply.status}" if reply.status else "failed", "message": reply.error}
    if reply.status:
        response = {"status_code": reply.status, "body": None}
    if response is not None and reply.body is not None:
        choices = [
            {
                "index": choice.get("index", number),
                "message": {"role": "assistant", "content": _content(choice)},
                "finish_reason": choice.get("finish_reason"),
            }
            for number, choice in enumerate(reply.body["choices"])
        ]
        kept = {key: reply.body.get(key) for key in ("id", "model", "usage")}
        response["body"] = {"object": "chat.completion", "choices": choices} | kept
    row = {"custom_id": name, "error": error if reply.body is None else None, "response": response}
    return json.dumps(row | {"id": f"answer-{name.partition('/')[0]}"}).encode() + b"\n"


class Bits:
    """A set of integers >= 0, one bit each."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, number: int) -> None:
        """Adds an integer."""
        byte = number >> 3
        if byte >= len(self._bytes):
            self._bytes.extend(bytes(byte + 1 + len(self._bytes) // 8 - len(self._bytes)))
        self._bytes[byte] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bytes) and bool(self._bytes[byte] >> (number & 7) & 1)


def _scan(file: Any, parts: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, number, whether it succeeded) of each whole line; the number is row * parts + part.

    Lines that are no answers of this job are left out: their requests count as not answered.
    """
    offset = 0
    for line in file:
        match = _DONE.match(line)
        try:
            if match is not None:
                row, part, good = int(match[1]), int(match[2]), True
            else:
                answer = parse_answer(line)
                (row, part), good = row_and_part(answer.custom_id), answer.error is None
        except ValueError:
            part = parts
        if part < parts and line.endswith(b"\n"):
            yield offset, row * parts + part, good
        offset += len(line)


class AnswerIndex:
    """Finds the answers of a row. It holds eight bytes for each request, not the answers.

    If a request has several answers, the first one counts.

    Args:
        folder: folder of a finished or running job.
    """

    def __init__(self, folder: Path) -> None:
        self._parts = int(read_record(folder)["parts"])
        self._file = (folder / ANSWERS).open("rb")
        self._offsets = array("q")
        for offset, number, good in _scan(self._file, self._parts):
            if good:
                missing = number + 1 - len(self._offsets)
                self._offsets.extend([-1] * missing)
                if self._offsets[number] < 0:
                    self._offsets[number] = offset

    def __enter__(self) -> AnswerIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def rows(self) -> int:
        """One more than the last row with an answer."""
        return -(-len(self._offsets) // self._parts)

    def of_row(self, row: int) -> tuple[Answer, ...]:
        """The answers of a row in the order of its parts. Failed requests are left out."""
        answers = []
        for offset in self._offsets[row * self._parts : (row + 1) * self._parts]:
            if offset >= 0:
                self._file.seek(offset)
                answers.append(parse_answer(self._file.readline()))
        return tuple(answers)


def read_answers(source: Path) -> Iterator[Answer]:
    """The answers and failures of a job's folder or of a file, in the order of the lines.

    Raises:
        FileNotFoundError: there are none. ValueError: a line is not an answer; an incomplete last line, which
        a killed run leaves, is left out instead.
    """
    path = source / ANSWERS if source.is_dir() else source
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_answer(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: {error}") from error


def write_jobs(requests: Iterable[Request], path: Path) -> int:
    """Writes requests as OpenAI batch JSONL, which `vllm run-batch` and hosted batches run.

    The file appears only when it is complete. Requests that are skipped or whose body cannot be made are left
    out, the latter with a line on standard error. Returns the number of requests written.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("wb") as file:
            for request in requests:
                try:
                    body = request.build()
                except (AudioError, OSError, ValueError) as error:
                    print(f"{request.custom_id}: {error}", file=sys.stderr)
                    continue
                if body is not None:
                    row = {"custom_id": request.custom_id, "method": "POST", "url": "/v1/chat/completions"}
                    file.write(json.dumps(row | {"body": body}).encode() + b"\n")
                    count += 1

    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_file(path, write)
    return count


def read_record(folder: Path) -> dict[str, Any]:
    """The settings of the job in a folder.

    Raises:
        FileNotFoundError: the folder holds no job. ValueError: its record is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise ValueError('expected an object with "settings"')
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no job: it has no {RECORD}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return record


def begin(folder: Path, settings: Mapping[str, Any], *, parts: int, notes: Mapping[str, Any]) -> None:
    """Records the settings of a job, or compares them with those of the job that the folder holds.

    Args:
        folder: the job's folder; the caller has locked it.
        settings: what the answers depend on.
        parts: the largest number of requests of a row.
        notes: what a later run may change, such as the version.

    Raises:
        ValueError: the folder was begun with other settings; the message says which.
    """
    settings = dict(json.loads(json.dumps(settings)))  # as a later run reads them
    if (folder / RECORD).exists():
        record = read_record(folder)
        earlier = record["settings"] | {"parts": record["parts"]}
        now: dict[str, Any] = {**settings, "parts": parts}
        changed = [
            f"{key} {shown(earlier.get(key))}, not {shown(now.get(key))}"
            for key in {**earlier, **now}
            if earlier.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"{folder} was begun with {listed(changed)}; choose another folder")
    elif (folder / ANSWERS).exists():
        raise ValueError(f"{folder} holds {ANSWERS} without {RECORD}; choose another folder")
    else:
        files.write_json(folder / RECORD, {"settings": settings, "parts": parts} | dict(notes))


class AnswerFile:
    """The answers of a job, open for appending. Opening it cuts off an incomplete last line.

    Attributes:
        done: numbers (row * parts + part) of the requests that are answered.
        count: how many they are.
    """

    def __init__(self, folder: Path, parts: int) -> None:
        self._path = folder / ANSWERS
        self._parts = parts
        self.done = Bits()
        self.count = 0
        with files.naming_full_disk(self._path):
            self._file = self._path.open("a+b", buffering=0)
        self._size = self._cut()
        self._synced = self._size
        with self._path.open("rb") as file:
            for _, number, good in _scan(file, parts):
                if good:
                    self._note_done(number)

    def _note_done(self, number: int) -> None:
        self.count += number not in self.done
        self.done.add(number)

    def _cut(self) -> int:
        """Cuts off what follows the last line ending. Returns the size of the file."""
        end = size = self._file.seek(0, 2)
        while end:
            start = max(0, end - 2**16)
            self._file.seek(start)
            place = self._file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        return end

    def is_done(self, name: str) -> bool:
        """Whether the request is answered. ValueError if its id does not belong to this job."""
        return self._number(name) in self.done

    def _number(self, name: str) -> int:
        row, part = row_and_part(name)
        if part >= self._parts:
            raise ValueError(f"{name}: a row has at most {self._parts} requests")
        return row * self._parts + part

    def append(self, name: str, line: bytes, *, good: bool) -> None:
        """Appends a line. It is whole, or after a failure not there at all."""
        with files.naming_full_disk(self._path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(line)
        if good:
            self._note_done(self._number(name))

    def sync(self) -> None:
        """Writes the answers to the disk."""
        size = self._size
        if size != self._synced:
            with files.naming_full_disk(self._path):
                files.sync(self._file.fileno())
            self._synced = size

    def close(self) -> None:
        """Writes the answers to the disk and closes the file."""
        try:
            self.sync()
        finally:
            self._file.close()


def run_jobs(
    requests: Iterable[Request],
    folder: Path,
    servers: ServerConfig,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    total: int | None = None,
    noun: str = "requests",
    on_answer: Callable[[Answer], None] | None = None,
    threads: int = 4,
) -> Counts:
    """Sends the requests that are not answered yet, and appends the answers to the folder.

    Memory does not grow with the number of requests: at most twice as many as the servers work on are built.
    A run that was killed at any moment is continued by another call: it loses and repeats no answer.

    Args:
        requests: all requests of the job, answered or not.
        folder: the job's folder; it is created.
        servers: who is asked.
        settings: what the answers depend on, for job.json.
        parts: the largest number of requests of a row.
        notes: what job.json also records, without comparing it.
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
        begin(folder, settings, parts=parts, notes=notes or {})
        answers = AnswerFile(folder, parts)
        with contextlib.closing(answers):
            left = None if total is None else total - answers.count
            run = _Run(client, answers, Progress(left, noun), on_answer, threads)
            started = time.perf_counter()
            try:
                asyncio.run(run.run(requests))
            finally:
                run.counts.seconds = time.perf_counter() - started
                run.counts.repeated = client.repeated
    return run.counts


@dataclass(frozen=True, slots=True)
class _Built:
    """A request whose body is being made: the JSON, None to skip it, or a failed future."""

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
        self._refusals = 0
        self._continued = answers.count > 0
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
            await client.check()
            with ThreadPoolExecutor(self._threads, "build") as pool:
                feeder = loop.run_in_executor(None, self._feed, requests, pool, loop)
                tasks = [loop.create_task(self._work()) for _ in range(client.concurrency)]
                tasks.append(loop.create_task(self._sync()))
                try:
                    await asyncio.gather(feeder, *tasks[:-1])
                finally:
                    self._ended.set()
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    pool.shutdown(cancel_futures=True)

    def _feed(
        self, requests: Iterable[Request], pool: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop
    ) -> None:
        """In a thread: puts the requests that are not done into the queue, as long as there is room."""
        for request in requests:
            if self._answers.is_done(request.custom_id):
                self.counts.done_before += 1
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
            loop.call_soon_threadsafe(self._queue.put_nowait, _Built(request.custom_id, payload))
        for _ in range(self._client.concurrency):
            loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def _work(self) -> None:
        while (built := await self._queue.get()) is not None:
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
            self._write(built.custom_id, Reply(0, None, describe(error)))
            return
        if payload is None:
            self.counts.skipped += 1
            self._progress.add(1)
            return
        reply = await self._client.complete(payload)
        self._write(built.custom_id, reply)
        if reply.body is None:
            self._refusals += 1
            if self._refusals >= _FIRST_FAILURES and not (self.counts.answered or self._continued):
                hint = await self._client.hint_at_model()
                raise ServerError(
                    f"the first {_FIRST_FAILURES} requests all failed, the last one because of: "
                    f"{reply.error}{'; ' if hint else ''}{hint}"
                )

    def _write(self, name: str, reply: Reply) -> None:
        line = answer_line(name, reply)
        good = reply.body is not None
        self._answers.append(name, line, good=good)
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
            await loop.run_in_executor(None, self._answers.sync)


def _encode(request: Request) -> bytes | None:
    body = request.build()
    return None if body is None else json.dumps(body).encode()


@contextlib.contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls `stop` for SIGINT and SIGTERM. Only the main thread can receive them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
