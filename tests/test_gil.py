"""The engine releases the GIL: other Python code runs meanwhile, and two threads do twice the work of one."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from encoded_audio import encode_samples, mono_noise
from numpy.typing import NDArray

from clsp_fast import _C
from clsp_fast.audio import default_num_threads
from clsp_fast.captioning.measure import measure
from clsp_fast.features import extract, extract_files

MIN_ROUNDS, MAX_ROUNDS = 5, 40
GAIN_OF_TWO = 1.7  # at most 2, if both CPUs are free
Wave = NDArray[np.float32]
Work = Callable[[int], object]  # the argument is the number of the caller
Timer = Callable[[int], float]  # seconds that a number of workers take if each does the work once


def wav(samples: int, rate_hz: int, subtype: str) -> bytes:
    return encode_samples(mono_noise(samples), "WAV", subtype, rate_hz)


def fbank_work() -> Work:
    clips = [mono_noise(160000, i) for i in range(16)]
    outs = [torch.empty(16, 1000, 128) for _ in range(2)]
    return lambda caller: extract(clips, num_threads=1, out=outs[caller])


def file_work() -> Work:
    files = [wav(480000, 48000, "PCM_24")] * 8
    outs = [torch.empty(8, 1000, 128) for _ in range(2)]
    return lambda caller: extract_files(files, num_threads=1, out=outs[caller])


def voice_work() -> Work:
    clips = [mono_noise(160000, i) for i in range(4)]
    return lambda caller: measure(clips, num_threads=1)


class Gain:
    """How many times the work of one worker two workers do in the same time.

    Compares the fastest of several measurements of each: a delay in a single measurement could give any gain.
    """

    def __init__(self, time_s: Timer) -> None:
        self.time_s = time_s
        self.fastest_s = {1: math.inf, 2: math.inf}

    def measure(self) -> float:
        """Times both once more; returns the gain according to all measurements so far."""
        for count, fastest_s in self.fastest_s.items():
            self.fastest_s[count] = min(fastest_s, self.time_s(count))
        return 2 * self.fastest_s[1] / self.fastest_s[2]


def threads_timer(work: Work) -> Timer:
    def time_s(callers: int) -> float:
        ready = threading.Barrier(callers + 1)
        threads = [threading.Thread(target=lambda i=i: (ready.wait(), work(i))) for i in range(callers)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()  # before the barrier: they may finish before this thread wakes
        ready.wait()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    return time_s


WORKER = """
import sys
import numpy as np
from clsp_fast import _C
clips = [np.sin(np.arange(160000, dtype=np.float32))] * 16
out = np.empty((16, 1000, 128), np.float32)
for _ in sys.stdin:
    _C.fbank_batch(clips, out)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def processes_timer() -> Iterator[Timer]:
    """Times processes, which share no GIL. They are the control: the gain that the CPUs allow now."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(2):
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            workers.append(stack.enter_context(subprocess.Popen(command, env=environment, **pipes)))

        def time_s(count: int) -> float:
            start = time.perf_counter()
            for worker in workers[:count]:
                print("go", file=worker.stdin, flush=True)
            for worker in workers[:count]:
                assert worker.stdout.readline() == "done\n"
            return time.perf_counter() - start

        time_s(2)  # so that both have finished their imports
        yield time_s
        for worker in workers:
            worker.stdin.close()


@pytest.mark.skipif(default_num_threads() < 2, reason="needs two CPUs")
@pytest.mark.alone
@pytest.mark.multiproc
@pytest.mark.parametrize("make_work", [fbank_work, file_work, voice_work])
def test_two_threads_do_the_work_of_two(make_work: Callable[[], Work], processes_timer: Timer) -> None:
    """If two processes gain less, because other programs use the CPUs or both share a core, two threads must
    gain as much as two processes."""
    threads, processes = Gain(threads_timer(make_work())), Gain(processes_timer)
    for round_ in range(MAX_ROUNDS):
        gain, control = threads.measure(), processes.measure()
        if round_ >= MIN_ROUNDS and gain >= GAIN_OF_TWO:
            return
    if control < 1.3:
        pytest.skip(f"no second CPU was free: two processes do {control:.2f} times the work of one")
    assert gain >= GAIN_OF_TWO / 2 * control


def test_the_gain_of_work_that_holds_the_gil_is_small() -> None:
    gain = Gain(threads_timer(lambda _: sum(range(10**6))))
    assert [gain.measure() for _ in range(2 * MIN_ROUNDS)][-1] < 1.3


def runs_beside(work: Callable[[], object]) -> bool:
    """Whether another Python thread runs during `work`. The switch interval is a minute, so it runs only if
    `work` releases the GIL."""
    go, ran = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        ran.set()

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        thread.start()
        time.sleep(0.02)  # the other thread now waits for `go`
        go.set()
        work()
        ran_during_work = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    return ran_during_work


def test_the_gil_is_released() -> None:
    waves = [mono_noise(16000 * 60, i) for i in range(8)]
    out = np.empty((8, 6000, 128), np.float32)
    file = wav(16000 * 60, 44100, "PCM_16")
    tries = 20  # on busy CPUs the other thread may wake after the work

    def releases(work: Callable[[], object]) -> bool:
        return any(runs_beside(work) for _ in range(tries))

    assert not releases(lambda: sum(range(10**6)))  # the control: this holds the GIL
    assert releases(lambda: _C.fbank_batch(waves, out, num_threads=1))
    assert releases(lambda: _C.resample_batch(waves, from_hz=44100, to_hz=16000))
    assert releases(lambda: extract_files([file] * 8, num_threads=1))
