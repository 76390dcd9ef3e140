"""Shorter waits while other processes use the CPUs: when they are chosen, and that they are shorter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sample_data import write_rows

from clsp_fast import contention, train
from clsp_fast.config import TRAIN_PRESETS, DataConfig
from clsp_fast.contention import CONTENDED, PERIOD_S, Usage, Watch
from clsp_fast.model import CLSP

Observe = Callable[[float, float], int]
QUIET, BUSY = 0.5 * CONTENDED, 2 * CONTENDED


@pytest.fixture
def observe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Observe]:
    """A function that adapts the waits after a period in which other processes used `others` CPUs and threads
    of this process waited for `waited` CPUs. It returns the number of spare teams."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(contention, "_cpus", lambda: {0, 1})
    now = [0.0, 0.0, 0.0]  # time, others' CPU time, waited
    watch = Watch(lambda: Usage(now[1], {"1": now[2]}), lambda: now[0])

    def observe(others: float, waited: float) -> int:
        for i, rate in enumerate((1.0, others, waited)):
            now[i] += PERIOD_S * rate
        watch.adapt_waits()
        return watch.spare

    observe(BUSY, BUSY)  # the first call has nothing to compare with
    yield observe
    observe(0.0, 0.0)


def test_waits_are_short_while_others_take_cpus_from_this_process(observe: Observe) -> None:
    before = threading.active_count()
    assert [observe(BUSY, BUSY), observe(BUSY, BUSY)] == [1, 1]
    assert threading.active_count() == before + 1
    assert observe(QUIET, QUIET) == 0
    assert threading.active_count() == before
    assert observe(BUSY, BUSY) == 1


@pytest.mark.parametrize(("others", "waited"), [(QUIET, BUSY), (BUSY, QUIET)])
def test_threads_of_this_process_and_idle_cpus_are_no_contention(
    observe: Observe, others: float, waited: float
) -> None:
    assert observe(others, waited) == 0
    observe(BUSY, BUSY)
    assert observe(others, waited) == 0


@pytest.mark.parametrize("setting", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_settings_of_the_user_are_kept(
    observe: Observe, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(setting, "active")
    assert observe(BUSY, BUSY) == 0


def test_a_single_thread_needs_no_spare_team(observe: Observe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert observe(BUSY, BUSY) == 0


@pytest.mark.parametrize(("threads", "cpus"), [(2, 2), (3, 2), (2, 16), (8, 16), (16, 16), (16, 8)])
def test_spare_teams_make_more_threads_than_cpus_with_as_few_teams_as_possible(
    threads: int, cpus: int
) -> None:
    teams = contention._teams_needed(threads, cpus)
    counted = threads + teams * (threads - 1)
    assert counted > cpus
    assert teams == 1 or counted - (threads - 1) <= cpus


def test_threads_that_come_and_go_are_not_counted() -> None:
    seconds = iter([0.0, 1.0, 2.0])
    usages = iter([Usage(0.0, {"1": 0.0, "2": 50.0}), Usage(9.0, {"1": 0.0, "3": 50.0})])
    watch = Watch(lambda: next(usages), lambda: next(seconds))
    watch.adapt_waits()
    watch.adapt_waits()
    assert watch.spare == 0


def test_without_counts_of_the_system_nothing_changes() -> None:
    def unknown() -> Usage:
        raise FileNotFoundError("/proc/stat")

    seconds = iter([0.0, 1.0, 2.0])
    watch = Watch(unknown, lambda: next(seconds))
    watch.adapt_waits()
    watch.adapt_waits()
    assert watch.spare == 0


def stat(folder: Path, text: str) -> Path:
    """A folder like /proc, with `text` in its file stat, for a process without threads."""
    (folder / "self/task").mkdir(parents=True)
    (folder / "stat").write_text(text)
    return folder


def test_usage_counts_the_cpus_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = stat(
        tmp_path,
        "cpu  111111 0 0 0 0 0 0 0 0 0\n"
        "cpu0 1 2 4 500 500 8 16 32 500 500\n"
        "cpu1 50000 0 0 0 0 0 0 0 0 0\n"
        "cpu10 64 0 0 500 500 0 0 128 500 500\n"
        "intr 5 6 7\nctxt 8\n",
    )
    monkeypatch.setattr(contention, "_cpus", lambda: {0, 10})
    monkeypatch.setattr(time, "process_time", lambda: 0.25)
    ticks = 1 + 2 + 4 + 8 + 16 + 32 + 64 + 128
    assert contention.usage(proc).others_s == ticks / os.sysconf("SC_CLK_TCK") - 0.25


@pytest.mark.parametrize(
    "text", ["", "cpu 1 2 3 4 5 6 7 8\n", "cpu0 1 2 3 4 5 6 7\n", "cpu0 1 2 3 4 5 6 seven 8\n", "\n", None]
)
def test_counts_that_are_missing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    proc = stat(tmp_path, text or "")
    if text is None:
        (proc / "stat").unlink()
    monkeypatch.setattr(contention, "_cpus", lambda: {0})
    with pytest.raises((OSError, ValueError)):
        contention.usage(proc)
    seconds = iter([0.0, 1.0, 2.0])
    watch = Watch(lambda: contention.usage(proc), lambda: next(seconds))
    watch.adapt_waits()
    watch.adapt_waits()
    assert watch.spare == 0


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_system_that_allows_no_more_threads_is_asked_once(
    observe: Observe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The run goes on, and the teams that did start are ended."""
    monkeypatch.setattr(contention, "_cpus", lambda: set(range(8)))
    before, attempts, start = threading.active_count(), [], threading.Thread.start

    def second_fails(thread: threading.Thread) -> None:
        attempts.append(thread)
        if len(attempts) == 2:
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    assert observe(BUSY, BUSY) == 0
    assert threading.active_count() == before
    assert observe(BUSY, BUSY) == 0
    assert len(attempts) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's /proc")
def test_usage_counts_other_processes_only() -> None:
    started, before = time.perf_counter(), contention.usage()
    while time.perf_counter() < started + 0.3:
        pass
    after, elapsed_s = contention.usage(), time.perf_counter() - started
    assert str(threading.get_native_id()) in after.waited_s
    # The kernel samples one of these times and counts the other; they differ by some ticks.
    assert -0.1 < after.others_s - before.others_s < os.cpu_count() * elapsed_s  # type: ignore[operator]
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            before = contention.usage()
            time.sleep(1.0)
            assert contention.usage().others_s - before.others_s > 0.3
        finally:
            other.kill()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of `adapt_waits`."""
    calls: list[str] = []
    monkeypatch.setattr(contention, "adapt_waits", lambda: calls.append("adapt_waits"))
    return calls


def test_encoding_adapts_waits_after_every_batch(tiny: CLSP, calls: list[str]) -> None:
    tiny.encode_audio([np.ones(16000, np.float32)] * 5, batch_seconds=2.0)
    assert len(calls) == 3
    tiny.encode_text(["She whispers."] * 5, batch_size=2)
    assert len(calls) == 6


def test_training_adapts_waits_at_every_step(calls: list[str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(8000) * 0.1
    soundfile.write(tmp_path / "a.wav", noise, 16000)
    rows = [{"id": f"c{i}", "audio": "a.wav", "captions": ["She whispers."]} for i in range(4)]
    manifest = write_rows(tmp_path / "train.jsonl", rows)
    data = DataConfig(manifest=manifest, batch_clips=2, buckets=1)
    config = replace(TRAIN_PRESETS["tiny"], run=tmp_path / "run", data=data, device="cpu")
    train.train(replace(config, stage1_steps=3, stage2_steps=0))
    assert len(calls) == 3


SPINNING = """
import time, torch
from clsp_fast.contention import Usage, Watch
now = [0.0]
watch = Watch(lambda: Usage(now[0] * share, {"1": now[0] * share}), lambda: now[0])
torch.set_num_threads(2)
x = torch.ones(1 << 16)

def spun_s():
    start = time.process_time()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.02)
    return time.process_time() - start

share = 1.0
spun_s()
long = spun_s()
for now[0] in (1.0, 2.0):
    watch.adapt_waits()
time.sleep(0.1)  # the threads of the working team go to sleep
short = spun_s()
share = 0.0
now[0] = 9.0
watch.adapt_waits()
print(long, short, spun_s(), watch.spare, len(open("/proc/self/maps").read().split("libgomp")) > 1)
"""


def test_threads_of_a_spare_team_end_the_spinning() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: threads never spin for long")
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    cpus = sorted(os.sched_getaffinity(0))[:2]
    code = f"import os; os.sched_setaffinity(0, {cpus})\n" + SPINNING
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    long, short, long_again, spare, is_libgomp = done.stdout.split()
    assert spare == "0"
    if is_libgomp == "False":
        pytest.skip("torch has another OpenMP here")
    assert float(short) < 0.5 * float(long)
    assert float(long_again) > 2 * float(short)


ENDING = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from clsp_fast.contention import Usage, Watch
now = [0.0]
watch = Watch(lambda: Usage(now[0], {"thread": now[0]}), lambda: now[0])
for now[0] in (1.0, 2.0):
    watch.adapt_waits()
print(watch.spare)
"""


def run_to_its_end(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process in which spare teams have just been started."""
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    environment["OMP_NUM_THREADS"] = "2"
    run = [sys.executable, "-c", ENDING + code]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(("code", "status"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_a_process_may_end_while_spare_teams_start(code: str, status: int) -> None:
    for _ in range(3):
        done = run_to_its_end(code)
        assert done.stdout == "1\n"
        assert done.returncode == status, done.stderr
        assert "terminate" not in done.stderr


def test_a_closed_watch_starts_no_more_teams() -> None:
    assert run_to_its_end(
        "watch.close(); print(watch.spare); now[0] = 3.0; watch.adapt_waits(); print(watch.spare)"
    ).stdout == ("1\n0\n0\n")
