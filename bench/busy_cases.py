"""Times training steps, feature extraction and the loss while other processes keep the same two CPUs busy.

All providers are clsp_fast: its time beside busy processes is compared with its time alone. OpenMP reads the
settings of its threads' waits only once, when torch is loaded. Therefore each provider runs in a separate
process, `python -m bench.busy_cases WORK`. For each number on standard input, the process does the work that
many times.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import loss_cases
from bench.frontend_inputs import recordings
from bench.measure import Case, Provider, relative
from clsp_fast import contention, features
from clsp_fast.config import TRAIN_PRESETS
from clsp_fast.data import Batch
from clsp_fast.model import CLSP
from clsp_fast.storage.ranks import Ranks
from clsp_fast.training import optim
from clsp_fast.training.step import (
    average_and_clip_gradients,
    flag_bad_step,
    forward,
    update_running_statistics,
)

CPUS = 2
CLIPS = 128
ROOT = Path(__file__).parent.parent
LIBGOMP = {"GOMP_SPINCOUNT": "300000"}
"""The default of libgomp. If the variable is set, clsp_fast does not change the waits."""
BUSY = """
import os, select
while os.read(0, 1):  # start
    while not select.select([0], [], [], 0)[0]:
        for _ in range(20_000):
            pass
    os.read(0, 1)  # stop
"""
"""A busy process. It ends with the process that started it, because the pipe between them is then closed."""
Work = Callable[[], list[float]]


# The work that is timed.


def training() -> Work:
    """The trainer's step with the tiny preset, on a batch that is in memory; returns the loss."""
    config = TRAIN_PRESETS["tiny"]
    torch.manual_seed(0)
    model = CLSP(config.model)
    optimizer = optim.build(model, config.optim)
    optim.set_learning_rate(optimizer, 1e-4)
    batch, ranks = training_batch(config.model.text.vocab_size), Ranks(0, 1, torch.device("cpu"), None)

    def call() -> list[float]:
        torch.manual_seed(1)
        _, loss = forward(model, batch, ranks, config)
        torch.autograd.backward(loss)
        bad = flag_bad_step(loss, average_and_clip_gradients(model, ranks, config.optim), ranks)
        optim.step_unless(optimizer, bad)
        update_running_statistics(model, ranks, bad)
        optimizer.zero_grad()
        contention.adapt_waits()
        return [loss.item()]

    return call


def training_batch(vocabulary: int, tokens: int = 40) -> Batch:
    """Noise in the shapes of the demo corpus: clips of 2 to 3 s, captions of 8 to 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes_B1 = torch.linspace(8, tokens, CLIPS).long()[:, None]
    mask_BL = (torch.arange(tokens) < sizes_B1).long()
    return Batch(
        step=0,
        ids=[str(i) for i in range(CLIPS)],
        features=torch.randn(CLIPS, 300, 128, generator=generator) * 3 - 8,
        lengths=torch.linspace(200, 300, CLIPS).long(),
        token_ids=torch.randint(5, vocabulary, (CLIPS, tokens), generator=generator).where(mask_BL > 0, 1),
        attention_mask=mask_BL,
        text_owner=torch.arange(CLIPS),
        seconds=2.5 * CLIPS,
    )


def extraction() -> Work:
    """Features of a batch of files; returns the sum over the first frames, which is quick."""
    made = recordings(CLIPS, 2.0, 3.0)
    return lambda: [float(features.extract_files(made.paths, num_threads=CPUS).values[:, 0].double().sum())]


def contrast() -> Work:
    """The loss of 1,024 clips, forward and backward; returns its value and the norms of the gradients."""
    call = loss_cases.fused(loss_cases.batch(1024, 1))

    def norms() -> list[float]:
        result = [float(x.norm()) for x in call()]
        contention.adapt_waits()
        return result

    return norms


WORK = {"training": training, "extraction": extraction, "contrast": contrast}


def serve(name: str) -> None:
    """For each number on standard input, does the work that many times and prints the last result."""
    torch.set_num_threads(CPUS)
    call = WORK[name]()
    for line in sys.stdin:
        for _ in range(int(line)):
            result = call()
        print(json.dumps(result), flush=True)


# The processes.


@contextlib.contextmanager
def on_two_cpus() -> Iterator[None]:
    """Processes that are started in this context may use only two CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:CPUS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(words: list[str], settings: Mapping[str, str]) -> subprocess.Popen[str]:
    waits = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in waits} | settings
    command, pipe = [sys.executable, *words], subprocess.PIPE
    with on_two_cpus():
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate()


class Neighbours:
    """Three processes. `keep_busy(count)` makes `count` of them keep one CPU busy each."""

    def __init__(self) -> None:
        self._processes = [start(["-c", BUSY], {}) for _ in range(3)]
        self._busy = 0
        weakref.finalize(self, end, self._processes)

    def keep_busy(self, count: int) -> None:
        for process in self._processes[count : self._busy] or self._processes[self._busy : count]:
            assert process.stdin is not None
            process.stdin.write(".")  # stops a busy process, or starts an idle one
            process.stdin.flush()
        self._busy = count


@dataclass
class Beside:
    """The timed call: `calls` pieces of work beside `count` busy processes."""

    neighbours: Neighbours
    count: int
    work: str
    calls: int
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process = start(["-m", "bench.busy_cases", self.work], self.settings)
        weakref.finalize(self, end, [self._process])

    def __call__(self) -> list[float]:
        self.neighbours.keep_busy(self.count)
        result = self._run(self.calls)
        self.neighbours.keep_busy(0)
        return result

    def settle(self) -> None:
        """Runs once, untimed, so that clsp_fast adapts to the busy processes."""
        self.neighbours.keep_busy(self.count)
        self._run(self.calls)

    def _run(self, calls: int) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        result: list[float] = json.loads(self._process.stdout.readline())
        return result


def expected(work: str, calls: int) -> list[float]:
    """The result of the same work in this process, with the same number of threads."""
    call = WORK[work]()
    return [call() for _ in range(calls)][-1]


def busy_case(work: str, what: str, calls: int) -> Case:
    def beside(name: str, count: int, **settings: str) -> Provider:
        def prepare(neighbours: Neighbours) -> Beside:
            return Beside(neighbours, count, work, calls, settings)

        return Provider(name, prepare)

    return Case(
        name=f"busy-{work}",
        area="busy",
        what=f"{what}, alone and beside processes that keep a CPU busy each; two CPUs",
        inputs=Neighbours,
        expected=lambda _: expected(work, calls),
        gate=relative(1e-5),
        providers=(
            beside("clsp_fast", 0),
            beside("beside 1", 1),
            beside("beside 3", 3),
            beside("libgomp's waits", 0, **LIBGOMP),
            beside("libgomp's waits, beside 1", 1, **LIBGOMP),
        ),
        goals={"libgomp's waits": 1 / 1.1},
        limits={"beside 1": 1.7, "beside 3": 4.0},
        before=Beside.settle,
        amount=calls,
        threads=CPUS,
        optional=True,
    )


CASES = (
    busy_case("training", f"steps of the tiny preset, {CLIPS} clips of 2 to 3 s", 4),
    busy_case("extraction", f"features of {CLIPS} WAV files of 2 to 3 s", 120),
    busy_case("contrast", "the loss of 1024 clips, D = 512, forward and backward", 30),
)

if __name__ == "__main__":
    serve(sys.argv[1])
