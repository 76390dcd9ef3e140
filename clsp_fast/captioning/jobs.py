"""Runs many requests: sends them to servers and keeps the answers.

A job's folder is described in clsp_fast/captioning/answers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsp_fast.audio import AudioError
from clsp_fast.captioning.answers import (
    Answer,
    AnswerFile,
    answer_line,
    begin,
    parse_answer,
)
from clsp_fast.captioning.client import Client, Reply, ServerConfig, ServerError, describe
from clsp_fast.captioning.request import LINES_HINT, Counts, FirstClips, Request
from clsp_fast.captioning.rows import ALL_ROWS, RowRange
from clsp_fast.console import Progress
from clsp_fast.storage import files

_FSYNC_S = 5.0


class Stopped(Exception):
    """A signal ended the run. What was answered is kept.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; the same command continues the work")


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
        self._first = FirstClips(answers.count > 0)
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
            self._first.note_failure(built.place, built.custom_id, describe(error), LINES_HINT)
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
