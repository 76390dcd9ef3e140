"""Jobs: exact counts under faults, resume after any end, bounded memory, job files for other programs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL, StubServer, caption, key_of

from clsp_fast.audio import AudioError, AudioErrorReason
from clsp_fast.captioning.answers import Answer, AnswerFile, AnswerIndex, custom_id, read_answers
from clsp_fast.captioning.client import Client, Reply, ServerConfig, ServerError
from clsp_fast.captioning.job_files import import_answers, write_pending
from clsp_fast.captioning.jobs import Stopped, run_jobs
from clsp_fast.captioning.request import Counts, Request
from clsp_fast.storage.files import DiskFull, FolderInUse

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {"seed": 0}


def body(row: int) -> dict[str, Any]:
    return {"model": MODEL, "seed": row, "n": 2, "messages": [{"role": "user", "content": f"Clip {row}."}]}


def requests(count: int) -> Iterator[Request]:
    return (Request(custom_id("generate", row, f"clip{row}"), body(row)) for row in range(count))


def servers(*urls: str, **options: Any) -> ServerConfig:
    waits: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 5.0, "retries": 6, "concurrency": 8}
    return ServerConfig(**{"servers": urls, "model": MODEL, **waits, **options})


def run(folder: Path, server: StubServer, count: int, **options: Any) -> Counts:
    return run_jobs(requests(count), folder, servers(server.url, **options), settings=SETTINGS)


def result(folder: Path, count: int) -> list[tuple[str, ...]]:
    """The texts of each row, and a check that no request has two answers."""
    names = Counter(answer.custom_id for answer in read_answers(folder) if answer.error is None)
    assert not names or max(names.values()) == 1
    with AnswerIndex(folder) as index:
        assert index.rows <= count
        return [answer.texts for row in range(count) for answer in index.of_row(row)]


def expected(count: int) -> list[tuple[str, ...]]:
    keys = [key_of(body(row)) for row in range(count)]
    return [(caption(key, 0), caption(key, 1)) for key in keys]


def test_every_fault_is_survived_with_exact_counts(tmp_path: Path) -> None:
    passing = ("429", "500", "503", "reset", "no choices", "invalid JSON", "half JSON", "slow")
    staying = ("400", "flat 400", "null content", "truncated")

    def fault(request: dict[str, Any], attempt: int) -> str:
        row = request["seed"]
        if row < 80:  # ten rows with each fault that passes
            return passing[row % 8] if attempt == 0 else ""
        return staying[row % 4] if row < 120 else ""

    with StubServer(fault=fault, slow_s=0.05) as server:
        counts = run(tmp_path, server, 200)
    assert (counts.answered, counts.failed, counts.done_before, counts.skipped) == (180, 20, 0, 0)
    assert (counts.choices, counts.truncated) == (360, 10)
    assert counts.errors == {"HTTP 400: Fault 400.": 10, "HTTP 400: The prompt is too long.": 10}
    reasons = {"HTTP 429": 10, "HTTP 500": 10, "HTTP 503": 10, "connection": 10, "no choices": 10}
    assert counts.repeated == reasons | {"invalid JSON": 20}
    assert (counts.prompt_tokens, counts.completion_tokens) == (18_000, 3_600)
    assert server.sent.total() == 270
    assert server.most_at_once <= 8
    refused = [row for row in range(200) if 80 <= row < 120 and row % 4 < 2]
    spoiled = [row for row in range(200) if 80 <= row < 120 and row % 4 >= 2]
    with AnswerIndex(tmp_path) as index:
        for row, texts in enumerate(expected(200)):
            answers = index.of_row(row)
            if row in refused:
                assert not answers
            elif row in spoiled:
                cut = texts[0][: len(texts[0]) // 2] if row % 4 == 3 else ""
                assert answers[0].texts == (cut, texts[1])
                assert answers[0].finish_reasons == ("length" if row % 4 == 3 else "stop", "stop")
            else:
                assert answers[0].texts == texts
    # The next run sends the failed requests again, and nothing else.
    with StubServer() as server:
        counts = run(tmp_path, server, 200)
        assert server.sent.total() == 20
    assert (counts.answered, counts.failed, counts.done_before) == (20, 0, 180)
    assert len(result(tmp_path, 200)) == 200
    assert "180 were answered before" in counts.describe()


JOB = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
from pathlib import Path
from test_jobs import {source}, servers, SETTINGS
from clsp_fast import console
from clsp_fast.captioning.jobs import Stopped, run_jobs
@console.command
def main(arguments=None):
    try:
        run_jobs({source}({count}), Path({folder!r}), servers({url!r}), settings=SETTINGS)
    except Stopped as stopped:
        print(stopped)
        sys.exit(128 + stopped.signal)
main()
"""


def start(folder: Path, url: str, count: int, source: str = "requests") -> subprocess.Popen[str]:
    here = Path(__file__).parent
    code = JOB.format(
        root=str(ROOT),
        tests=str(here.parent),
        here=str(here),
        source=source,
        count=count,
        folder=str(folder),
        url=url,
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)


def wait_for_lines(folder: Path, more: int, process: subprocess.Popen[str]) -> None:
    """Waits until the job has written so many more lines, or has ended."""
    path = folder / "answers.jsonl"
    before, deadline = None, time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        before = lines if before is None else before
        if lines >= before + more:
            return
        time.sleep(0.002)


@pytest.mark.multiproc
def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    count, folder = 400, tmp_path / "job"
    fault = lambda request, attempt: "500" if request["seed"] % 7 == 0 and not attempt else ""  # noqa: E731
    with StubServer(fault=fault, delay_s=0.02) as server:
        for more in (3, 70, 1, 110):
            process = start(folder, server.url, count)
            wait_for_lines(folder, more, process)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            with (folder / "answers.jsonl").open("ab") as file:  # as if the last write was cut
                file.write(b'{"custom_id": "399.0/generate/clip399", "error": nul')
        done = len(result_of_whole_lines(folder))
        assert 180 <= done < count
        before = server.sent.total()
        process = start(folder, server.url, count)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        # No answered request was sent again, so nothing was paid for twice, except what was under way.
        assert server.sent.total() - before <= (count - done) * 8 / 7 + 8
    assert result(folder, count) == expected(count)


def result_of_whole_lines(folder: Path) -> set[str]:
    lines = (folder / "answers.jsonl").read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["custom_id"] for line in lines}


@pytest.mark.multiproc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    fault = lambda request, attempt: "429" if request["seed"] % 3 == 0 and not attempt else ""  # noqa: E731
    with StubServer(fault=fault, delay_s=0.05) as server:  # some requests wait for the paused server
        process = start(tmp_path, server.url, 300)
        wait_for_lines(tmp_path, 10, process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert output == f"stopped by {number.name}; the same command continues the work\n"
    assert "Traceback" not in errors
    with StubServer() as server:
        counts = run(tmp_path, server, 300)
    assert counts.done_before >= 10
    assert counts.done_before + counts.answered == 300
    assert result(tmp_path, 300) == expected(300)


def sleeping_requests(count: int) -> Iterator[Request]:
    """Requests whose recordings take long to decode."""

    def build() -> dict[str, Any]:
        print("sleeping", flush=True)
        time.sleep(100)
        return body(0)

    return (Request(custom_id("generate", row, "a"), build) for row in range(count))


@pytest.mark.multiproc
def test_a_second_signal_ends_a_run_while_a_recording_is_decoded(tmp_path: Path) -> None:
    process = start(tmp_path, "http://127.0.0.1:9/v1", 1, "sleeping_requests")
    assert process.stdout is not None
    assert process.stdout.readline() == "sleeping\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first signal waits for the recording
    for _ in range(50):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            break
    process.kill()
    output, _ = process.communicate()
    assert (process.returncode, output) == (128 + signal.SIGINT, "")


def test_a_server_that_restarts_loses_nothing(tmp_path: Path) -> None:
    started, ended, ports = threading.Event(), threading.Event(), []

    def serve() -> None:
        with StubServer(delay_s=0.01) as server:
            ports.append(server.port)
            started.set()
            while server.sent.total() < 50:
                time.sleep(0.01)
        time.sleep(0.3)
        with StubServer(port=ports[0]):
            ended.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(30)
    url = f"http://127.0.0.1:{ports[0]}/v1"
    counts = run_jobs(requests(200), tmp_path, servers(url, retries=50), settings=SETTINGS)
    ended.set()
    thread.join()
    assert (counts.answered, counts.failed) == (200, 0)
    assert counts.repeated["connection"] > 0
    assert result(tmp_path, 200) == expected(200)


def test_only_a_few_requests_are_built_ahead(tmp_path: Path) -> None:
    built = [0]
    lock = threading.Lock()
    ahead = []

    def build(row: int) -> dict[str, Any]:
        with lock:
            built[0] += 1
            ahead.append(built[0] - server.sent.total())
        return body(row)

    def lazy() -> Iterator[Request]:
        for row in range(200):
            yield Request(custom_id("generate", row, "a"), lambda row=row: build(row))

    with StubServer(delay_s=0.005) as server:
        run_jobs(lazy(), tmp_path, servers(server.url), settings=SETTINGS)
    assert built[0] == 200
    assert max(ahead) <= 2 * 8 + 1
    with StubServer() as server:  # nothing is built that is done
        counts = run_jobs(lazy(), tmp_path, servers(server.url), settings=SETTINGS)
    assert (built[0], counts.done_before) == (200, 200)


def test_requests_that_cannot_be_built_or_are_skipped(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("a.wav is gone")

    odd = [Request("3.0/generate/a", fail), Request("4.0/generate/a", lambda: None)]
    seen = []
    with StubServer() as server:
        counts = run_jobs(
            [*requests(3), *odd], tmp_path, servers(server.url), settings=SETTINGS, on_answer=seen.append
        )
    assert (counts.answered, counts.failed, counts.skipped) == (3, 1, 1)
    assert counts.errors == {"a.wav is gone": 1}
    assert "failed: 1 (1 x a.wav is gone); the same command sends them again" in counts.describe()
    assert sorted(answer.custom_id for answer in seen if answer.error is None) == [
        f"{row}.0/generate/clip{row}" for row in range(3)
    ]


def test_an_error_of_the_source_ends_the_run_and_keeps_the_answers(tmp_path: Path) -> None:
    def broken() -> Iterator[Request]:
        yield from requests(50)
        time.sleep(0.5)
        raise ValueError("the manifest is damaged")

    with StubServer() as server:
        with pytest.raises(ValueError, match="the manifest is damaged"):
            run_jobs(broken(), tmp_path, servers(server.url), settings=SETTINGS)
        assert len(result(tmp_path, 50)) == 50


def test_a_run_ends_although_a_cancellation_was_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = Client.complete

    async def swallow(client: Client, payload: bytes) -> Reply:
        if json.loads(payload)["seed"] == 0:
            return await complete(client, payload)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return await complete(client, payload)

    def fail(answer: Answer) -> None:
        if answer.custom_id.startswith("0."):
            raise ValueError("the first answer")

    monkeypatch.setattr(Client, "complete", swallow)
    with StubServer() as server, pytest.raises(ValueError, match="the first answer"):
        run_jobs(requests(30), tmp_path, servers(server.url), settings=SETTINGS, on_answer=fail)


def test_a_run_whose_first_requests_all_fail_stops(tmp_path: Path) -> None:
    with (
        StubServer(fault=lambda body, attempt: "400") as server,
        pytest.raises(ServerError, match="first 20 clips all failed, the first one because of: HTTP 400: Fa"),
    ):
        run(tmp_path, server, 500)
    assert server.sent.total() < 60


def unreadable(row: int, part: int = 0) -> Request:
    def fail() -> None:
        raise AudioError(f"{row}.wav", AudioErrorReason.OPEN, "no such file")

    return Request(custom_id("generate", row, "a", part), fail)


def test_a_run_whose_first_recordings_cannot_be_read_stops(tmp_path: Path) -> None:
    def mixed() -> Iterator[Request]:
        yield Request("0.0/generate/a", lambda: None)  # a clip that is left out tells nothing
        for row in range(1, 1000):
            yield from (unreadable(row, part) for part in range(3))

    with StubServer() as server:
        with pytest.raises(ServerError, match=r"first 20 clips all failed, the first .* 1\.wav.*leave them"):
            run_jobs(mixed(), tmp_path, servers(server.url), settings=SETTINGS, parts=3)
        assert server.sent.total() == 0
        lines = len((tmp_path / "answers.jsonl").read_bytes().splitlines())
        assert 58 <= lines < 1000  # of 2,997: the threads decide how many more were under way


def test_a_signal_ends_a_run_that_skips_what_is_done(tmp_path: Path) -> None:
    """The requests never end, and all of them are answered."""
    with StubServer() as server:
        run(tmp_path, server, 1)
    seen = []

    def endless() -> Iterator[Request]:
        while len(seen) < 10**7:
            seen.append(1)
            if len(seen) == 1000:
                os.kill(os.getpid(), signal.SIGINT)
            yield from requests(1)

    with StubServer() as server, pytest.raises(Stopped, match="stopped by SIGINT"):
        run_jobs(endless(), tmp_path, servers(server.url), settings=SETTINGS)
    assert len(seen) < 10**6


def test_fast_failures_after_a_slow_answer_do_not_stop_a_run(tmp_path: Path) -> None:
    bad = (unreadable(row) for row in range(10, 100))
    with StubServer(delay_s=0.3) as server:
        counts = run_jobs([*requests(1), *bad], tmp_path, servers(server.url), settings=SETTINGS)
    assert (counts.answered, counts.failed) == (1, 90)


def test_a_wrong_key_or_model_stops_the_run_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my-secret")
    with StubServer(key="right") as server, pytest.raises(ServerError, match="HTTP 401") as stop:
        run(tmp_path, server, 50)
    assert "my-secret" not in str(stop.value)
    for path in tmp_path.iterdir():
        assert b"my-secret" not in path.read_bytes()
    assert (tmp_path / "answers.jsonl").read_bytes() == b""
    with StubServer() as server, pytest.raises(ServerError, match=f"it serves {MODEL}"):
        run_jobs(
            [Request("0.0/x/a", body(0) | {"model": "other"})],
            tmp_path,
            servers(server.url, model="other"),
            settings=SETTINGS | {"model": "other"},
        )
    # After the correction, the same folder serves.
    with StubServer() as server:
        settings = SETTINGS | {"model": MODEL}
        assert run_jobs(requests(3), tmp_path, servers(server.url), settings=settings).answered == 3


def test_a_folder_has_one_writer_and_one_job(tmp_path: Path) -> None:
    with StubServer(delay_s=0.3) as server:
        thread = threading.Thread(target=run, args=(tmp_path, server, 8))
        thread.start()
        while not (tmp_path / "answers.jsonl").exists():
            time.sleep(0.01)
        with pytest.raises(FolderInUse, match="in use by another process"):
            run(tmp_path, server, 8)
        thread.join()
        with pytest.raises(ValueError, match="was begun with seed 0, not 1; choose another folder"):
            run_jobs(requests(8), tmp_path, servers(server.url), settings={"seed": 1})
    assert len(result(tmp_path, 8)) == 8


def test_damaged_lines_are_counted_and_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with StubServer() as server:
        run(tmp_path, server, 20)
        lines = path.read_bytes().splitlines(keepends=True)
        lines[3], lines[7] = lines[3][:100] + b"\n", lines[7][:100] + lines[8]
        path.write_bytes(b"".join(lines[:8] + lines[9:]))
        with AnswerIndex(tmp_path) as index:
            assert sum(bool(index.of_row(row)) for row in range(20)) == 17
        counts = run(tmp_path, server, 20)
        assert (counts.done_before, counts.answered, counts.damaged) == (17, 3, 2)
        assert "damaged lines in answers.jsonl, left out: 2" in counts.describe()
    with AnswerIndex(tmp_path) as index:
        assert [answer.texts for row in range(20) for answer in index.of_row(row)] == expected(20)


def test_a_full_disk_ends_the_run_and_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, left = AnswerFile.append, iter(range(30))

    def full(answers: AnswerFile, name: str, line: bytes, *, good: bool) -> None:
        if next(left, None) is None:
            raise DiskFull(28, "disk full: answers.jsonl: make room and run the same command again")
        append(answers, name, line, good=good)

    with StubServer() as server:
        with monkeypatch.context() as patch:
            patch.setattr(AnswerFile, "append", full)
            with pytest.raises(DiskFull, match="make room and run the same command again"):
                run(tmp_path, server, 100)
        assert len(result(tmp_path, 100)) == 30
        assert run(tmp_path, server, 100).answered == 70
    assert result(tmp_path, 100) == expected(100)


def test_an_error_while_answers_are_written_to_the_disk_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failures = AnswerFile.sync, iter([1])

    def fail_once(answers: AnswerFile) -> None:
        if next(failures, None):
            raise DiskFull(28, "disk full: answers.jsonl")
        sync(answers)

    monkeypatch.setattr(AnswerFile, "sync", fail_once)
    monkeypatch.setattr("clsp_fast.captioning.jobs._FSYNC_S", 0.05)
    with StubServer(delay_s=0.02) as server, pytest.raises(DiskFull, match=r"disk full: answers\.jsonl"):
        run(tmp_path, server, 100)
    assert 0 < len(result(tmp_path, 100)) < 100


def test_a_job_that_is_done_needs_no_server(tmp_path: Path) -> None:
    with StubServer() as server:
        run(tmp_path, server, 20)
    assert run(tmp_path, server, 20).done_before == 20
    with pytest.raises(ServerError, match="no server answers"):
        run(tmp_path, server, 21)


def as_vllm(path: Path) -> Iterator[str]:
    """Answers to a job file in the form that `vllm run-batch` writes."""
    server = StubServer()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        response = {"status_code": 200, "request_id": "vllm-batch-1", "body": server.answer(row["body"])}
        answer = {"id": "vllm-1", "custom_id": row["custom_id"], "response": response, "error": None}
        yield json.dumps(answer) + "\n"


def test_job_files_run_elsewhere_and_their_answers_come_back(tmp_path: Path) -> None:
    folder, names = tmp_path / "job", [request.custom_id for request in requests(10)]
    written = write_pending(requests(10), folder, settings=SETTINGS, shard_rows=4)
    assert {path.name: count for path, count in written.files.items()} == {
        "jobs-00000.jsonl": 4,
        "jobs-00001.jsonl": 4,
        "jobs-00002.jsonl": 2,
    }
    lines = [line for path in written.files for line in as_vllm(path)]
    other = json.loads(lines[0])
    strange = [
        json.dumps(other | {"custom_id": name}) + "\n"
        for name in ("0.0/generate/clip1", "0.1/generate/clip0", "10.0/generate/clip10", "request-1")
    ]
    failed = json.dumps({"custom_id": names[9], "response": None, "error": {"message": "expired"}}) + "\n"
    (tmp_path / "a.jsonl").write_text("".join([*lines[:6], lines[2], *strange, "\n"]))
    (tmp_path / "b.jsonl").write_text("".join([lines[6], failed, '{"custom_id": "3']))
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    imported = import_answers(sources, names, folder, settings=SETTINGS)
    assert imported.missing == 3
    assert imported.describe() == (
        "7 answers added, 1 already answered, 1 failed, 4 with an id that is not one of this job's, 1 damaged"
    )
    assert result(folder, 10) == expected(10)[:7]
    (folder / ".0123.9.tmp").touch()  # a call that was killed
    # Job files of the rest replace the earlier ones; a server can also answer it.
    written = write_pending(requests(10), folder, settings=SETTINGS)
    assert {path.name: count for path, count in written.files.items()} == {"jobs.jsonl": 3}
    assert not [*folder.glob("jobs-*"), *folder.glob(".*.tmp")]
    with StubServer() as server:
        assert run(folder, server, 10).answered == 3
    assert result(folder, 10) == expected(10)
    assert write_pending(requests(10), folder, settings=SETTINGS).describe() == "no request is left to write"


def test_requests_that_cannot_be_built_are_not_in_a_job_file(tmp_path: Path) -> None:
    odd = [unreadable(row) for row in range(3, 1000)]
    odd[0] = Request("3.0/generate/a", lambda: None)
    written = write_pending([*requests(3), *odd], tmp_path, settings=SETTINGS)
    assert written.files == {tmp_path / "jobs.jsonl": 3}
    assert (written.counts.failed, written.counts.skipped) == (996, 1)
    assert written.describe().splitlines() == [
        f"{tmp_path / 'jobs.jsonl'}: 3 requests",
        "left out: 996 requests that cannot be made (996 x 4.wav: no such file [open])",
    ]
    with pytest.raises(ServerError, match=r"first 20 clips all failed, the first .* 4\.wav: no such file"):
        write_pending(odd, tmp_path, settings=SETTINGS)
    assert not [*tmp_path.glob("jobs*"), *tmp_path.glob(".*.tmp")]


def test_many_job_files_are_not_all_listed(tmp_path: Path) -> None:
    written = write_pending(requests(40), tmp_path, settings=SETTINGS, shard_rows=2)
    lines = written.describe().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 10 more files with 20 requests"
