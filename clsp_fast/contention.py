"""Shorter waits between torch's threads while other processes want the same CPUs.

torch runs an operator on a team of OpenMP threads, one for each CPU. The OpenMP of torch's wheels is GCC's,
libgomp. There a thread that has done its part spins for 300,000 rounds, which takes some milliseconds, before
it sleeps. On a quiet machine this is right: the next operator comes after a twentieth of a millisecond, and
waking a sleeping thread takes longer. Beside a busy process one thread of the team has no CPU, and those that
spin for it keep it from getting one: a training step then takes three to five times as long.

libgomp spins for 100 rounds only while there are more OpenMP threads than CPUs; its manual says so under
GOMP_SPINCOUNT. So while other processes take CPUs from this one, spare teams of threads are kept. They sleep,
and do nothing but be counted. The teams that work stay as large as they were, so no result changes a bit.
GOMP_SPINCOUNT itself is read once, when torch is loaded, and no value of it suits both a quiet and a busy
machine; docs/log.md has the measurements.

Another OpenMP than libgomp is left as it is, and so is a system without Linux's /proc.
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
"""How long the CPUs are observed before the waits are changed."""

CONTENDED = 0.25
"""Waits are short while other processes use so many CPUs, and threads of this process wait for so many.

Beside one busy process both were at least 0.5. The trainer's own loader makes its threads wait as well, for
up to 0.7 CPUs on a quiet machine, but long waits are right then: hence the first condition. The second one
leaves out processes that only take what is idle."""

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_MOST_TEAMS = 64
_PARALLEL_ELEMENTS = 1 << 16
"""So many elements torch gives to several threads."""


@dataclass(frozen=True)
class Usage:
    """What the kernel has counted up to now."""

    others_s: float
    """CPU time that others took from the CPUs that this process may use, in seconds."""
    waited_s: Mapping[str, float]
    """Thread of this process, by its id -> how long it could have run but had no CPU, in seconds."""


def usage(proc: Path = Path("/proc")) -> Usage:
    """What /proc says.

    Args:
        proc: folder in which the kernel tells its counts.

    Raises:
        OSError, ValueError: this system does not say it.
    """
    others_s = _used_s((proc / "stat").read_text(), _cpus()) - time.process_time()
    waited_s = {}
    for thread in (proc / "self/task").iterdir():
        try:
            _, nanoseconds, _ = (thread / "schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended, or the kernel does not count
            continue
        waited_s[thread.name] = int(nanoseconds) * 1e-9
    return Usage(others_s, waited_s)


def _used_s(stat: str, cpus: Set[int]) -> float:
    """CPU time that everybody took from these CPUs, in seconds: processes here, and on a virtual machine its
    neighbours, whose share the kernel calls steal."""
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
        usage: as the function of this name.
        clock: seconds that only grow.
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
        # A thread that comes back from torch after the interpreter has ended aborts the process.
        atexit.register(self.close)

    @property
    def spare(self) -> int:
        """How many spare teams there are now."""
        return len(self._spare)

    def look(self) -> None:
        """Makes waits short or long, depending on how contended the CPUs were since the last look.

        Returns at once if that was less than `PERIOD_S` ago, and does nothing where the user has set how
        threads wait. Where the system allows no more threads, waits stay long for good.
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
                self._keep(_teams_needed(torch.get_num_threads(), len(_cpus())))
            else:
                self._let_go()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the spare teams, and starts no more of them."""
        with self._lock:
            self._no_more_threads = True
            self._let_go()

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

    def _keep(self, teams: int) -> None:
        if self._spare:
            return
        self._release = threading.Event()
        for _ in range(teams):
            thread = threading.Thread(target=_start_spare_team, args=(self._release,), daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # the work itself goes on, only slower
                self._no_more_threads = True
                self._let_go()
                return
            self._spare.append(thread)

    def _let_go(self) -> None:
        self._release.set()
        for thread in self._spare:
            thread.join()
        self._spare = []


def _start_spare_team(release: threading.Event) -> None:
    """Starts an OpenMP team and keeps it until `release`.

    libgomp keeps the team of a thread that has run in parallel for as long as that thread lives.
    """
    torch.zeros(_PARALLEL_ELEMENTS).add_(1)
    release.wait()


def _teams_needed(threads: int, cpus: int) -> int:
    """How many spare teams make more threads than CPUs, beside the team that works; 0 for lone threads, which
    wait for nobody. libgomp does not count the thread that leads a spare team."""
    if threads < 2:
        return 0
    needed = max(1, (cpus - threads) // (threads - 1) + 1)
    return needed if needed <= _MOST_TEAMS else 0


def _cpus() -> Set[int]:
    """Numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


look = Watch().look
"""To be called between pieces of work on the CPU, such as steps or batches. Most calls only read a clock."""
