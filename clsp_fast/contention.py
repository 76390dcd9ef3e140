"""Shortens the waits of torch's threads while other processes use the same CPUs.

torch runs an operator on a team of OpenMP threads, one for each CPU. The OpenMP of torch's wheels is GCC's
libgomp. A thread that has finished its part spins for 300,000 rounds, some milliseconds, before it sleeps. On
a quiet machine this is right: the next operator comes after 0.05 ms, and waking a sleeping thread takes
longer. If another process is busy, one thread of the team gets no CPU. The other threads spin while they wait
for it, and so they keep the CPUs from it. A training step then takes three to five times as long.

While there are more OpenMP threads than CPUs, libgomp spins for only 100 rounds (see GOMP_SPINCOUNT in its
manual). Therefore this module keeps spare teams of threads while other processes take CPUs from this one.
Spare threads sleep; they only raise libgomp's count. The working teams keep their size, so no result changes
by a bit. Setting GOMP_SPINCOUNT is no solution: it is read only once, when torch is loaded, and no value
suits both a quiet and a busy machine. docs/log.md has the measurements.

With another OpenMP than libgomp, spare teams have no effect. Without Linux's /proc, none are started.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch

PERIOD_S = 0.5
"""Seconds between two checks of the use of the CPUs."""

CONTENDED = 0.25
"""Waits are short while other processes use at least this many CPUs, and threads of this process lack at
least this many CPUs.

With one other busy process, both numbers were at least 0.5. The first condition is needed because the
trainer's own loader makes threads wait for up to 0.7 CPUs on a quiet machine, where long waits are right. The
second condition is needed because other processes may use only idle CPUs."""

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_MAX_TEAMS = 64
_PARALLEL_ELEMENTS = 1 << 16
"""torch runs an operator on this many elements on several threads."""


@dataclass(frozen=True)
class Usage:
    """CPU times that the kernel has counted so far."""

    others_s: float
    """Seconds that other processes ran on the CPUs that this process may use."""
    waited_s: Mapping[str, float]
    """Id of a thread of this process -> seconds that it was ready to run but had no CPU."""


def usage(proc: Path = Path("/proc")) -> Usage:
    """Reads the CPU times from /proc.

    Args:
        proc: the folder in which the kernel publishes them.

    Raises:
        OSError, ValueError: this system does not publish them.
    """
    others_s = _used_s((proc / "stat").read_text(), _cpus()) - time.process_time()
    waited_s = {}
    for thread in (proc / "self/task").iterdir():
        try:
            _, nanoseconds, _ = (thread / "schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended, or there is no schedstat
        waited_s[thread.name] = int(nanoseconds) * 1e-9
    return Usage(others_s, waited_s)


def _used_s(stat: str, cpus: Set[int]) -> float:
    """Seconds that these CPUs were in use. On a virtual machine this includes the time that other virtual
    machines used them, which the kernel calls steal."""
    ticks, missing = 0, {f"cpu{number}" for number in cpus}
    for line in stat.splitlines():
        name, *counts = line.split()
        if name in missing:
            missing.remove(name)
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + softirq + steal
    if missing:
        raise ValueError(f"/proc/stat must have a line for each CPU, has none for {sorted(missing)}")
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """Keeps spare teams of threads while other processes take CPUs from this one; see the module's docstring.

    Args:
        usage: reads the CPU times, as the function `usage` does.
        clock: a clock in seconds that never goes back.
    """

    def __init__(
        self, usage: Callable[[], Usage] = usage, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._usage, self._clock = usage, clock
        self._lock = threading.Lock()
        self._since = clock()
        self._before: Usage | None = None
        self._release = threading.Event()
        self._spare: list[threading.Thread] = []
        self._no_more_threads = False
        # If a thread returns from torch after the interpreter has ended, it aborts the process.
        atexit.register(self.close)

    @property
    def spare(self) -> int:
        """Number of spare teams now."""
        return len(self._spare)

    def adapt_waits(self) -> None:
        """Makes waits short or long, depending on how contended the CPUs were since the last call.

        Does nothing if the last check was less than `PERIOD_S` ago, or if the user has set how threads
        wait. If the system allows no more threads, waits stay long from then on.
        """
        if self._no_more_threads:
            return
        now = self._clock()
        if now - self._since < PERIOD_S or not self._lock.acquire(blocking=False):
            return
        try:
            elapsed_s, self._since = now - self._since, now
            if any(name in os.environ for name in _SETTINGS):
                return
            if self._contended(elapsed_s):
                self._start_spare_teams(_teams_needed(torch.get_num_threads(), len(_cpus())))
            else:
                self._end_spare_teams()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the spare teams; no more are started."""
        with self._lock:
            self._no_more_threads = True
            self._end_spare_teams()

    def _contended(self, elapsed_s: float) -> bool:
        before = self._before
        try:
            after = self._before = self._usage()
        except (OSError, ValueError):
            return False
        if before is None:
            return False
        others_s = after.others_s - before.others_s
        known = after.waited_s.keys() & before.waited_s.keys()
        waited_s = sum(after.waited_s[thread] - before.waited_s[thread] for thread in known)
        return min(others_s, waited_s) >= CONTENDED * elapsed_s

    def _start_spare_teams(self, teams: int) -> None:
        if self._spare:
            return
        self._release = threading.Event()
        for _ in range(teams):
            thread = threading.Thread(target=_start_spare_team, args=(self._release,), daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # the work goes on, only slower
                self._no_more_threads = True
                self._end_spare_teams()
                return
            self._spare.append(thread)

    def _end_spare_teams(self) -> None:
        self._release.set()
        for thread in self._spare:
            thread.join()
        self._spare = []


def _start_spare_team(release: threading.Event) -> None:
    """Starts an OpenMP team and keeps it until `release`.

    When a thread has run a parallel operator, libgomp keeps its team until the thread ends.
    """
    torch.zeros(_PARALLEL_ELEMENTS).add_(1)
    release.wait()


def _teams_needed(threads: int, cpus: int) -> int:
    """Number of spare teams with which there are more threads than CPUs. The working team counts, too.

    libgomp does not count the thread that leads a spare team. 0 if operators run on one thread, which waits
    for no other, or if more than `_MAX_TEAMS` teams would be needed.
    """
    if threads < 2:
        return 0
    needed = max(1, (cpus - threads) // (threads - 1) + 1)
    return needed if needed <= _MAX_TEAMS else 0


def _cpus() -> Set[int]:
    """Numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


adapt_waits = Watch().adapt_waits
"""Call this between pieces of work on the CPU, such as steps or batches. Most calls only read a clock."""
