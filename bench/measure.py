"""What a benchmark case is, how providers are checked against each other, and how they are timed.

A case is data: inputs, their expected result, and providers. The first provider is the subject, clsp_fast;
the others are its peers. A provider is timed only if its result passes the case's gate. Providers take turns
in each round (A B C A B C), so that a slow phase of the machine slows all of them.
"""

from __future__ import annotations

import gc
import importlib
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
# (expected, result) -> (whether they agree, a text that says how closely)
Gate = Callable[[Any, Any], tuple[bool, str]]

LEAST_BLOCK_S = 0.02
"""Short calls are repeated within a round until a block takes this long."""


@dataclass(frozen=True)
class Provider:
    """One way to do what the case does."""

    name: str
    prepare: Callable[[Any], Call]
    """The case's inputs -> the timed call. Imports the library; an ImportError gives the status "missing"."""
    package: str = ""
    """Distribution whose version is reported."""
    gate: Gate | None = None
    """Replaces the case's gate for a provider whose definition differs."""
    note: str = ""
    """How its definition or work differs."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    name: str
    area: str
    """The table that the case belongs to."""
    what: str
    """Inputs and shapes, in words."""
    inputs: Callable[[], Any]
    """Makes the inputs from a seed: equal for every provider and run."""
    expected: Callable[[Any], Any]
    """Inputs -> the result of a reference."""
    gate: Gate
    providers: Sequence[Provider]
    """The subject, clsp_fast, comes first."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """Peer -> goal: the peer's time should be at least this many times the subject's time."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Provider -> limit: its time should be at most this many times the subject's time, in the median of the
    rounds. Such a provider is clsp_fast under other conditions."""
    before: Callable[[Any], None] | None = None
    """Called with a provider's call before each of its rounds; not timed."""
    amount: float = 1.0
    """How many units of work one call does."""
    unit: str = "calls"
    flops: float = 0.0
    """Floating-point operations of one call, by formula."""
    bytes: float = 0.0
    """Fewest bytes that one call reads and writes: each input and output once."""
    threads: int = 1
    device: str = "cpu"
    memory: bool = False
    """Whether to measure peak memory, in a fresh process for each provider."""
    memory_goal: float = 0.0
    """The subject should add at most this many bytes to its process; 0: no goal."""
    figures: Callable[[Any], dict[str, float]] | None = None
    """Result of a call -> named values. The median of each value over the rounds is recorded."""
    optional: bool = False
    """True: runs only when it is named, because it is too slow or too large for the default set."""

    @property
    def clock(self) -> str:
        """CPU time for one thread; wall time for several, because their waits count."""
        return "cpu" if self.threads == 1 and self.device == "cpu" else "wall"


@dataclass(frozen=True)
class Report:
    """A table that needs no timing."""

    name: str
    area: str
    what: str
    rows: Callable[[], list[tuple[str, ...]]]
    """Header and rows; FileNotFoundError names a file that is not there."""
    optional: bool = False


# Gates.


def close(limit: float, rms: float = math.inf) -> Gate:
    """Same shape; largest and root mean square difference within limits."""

    def gate(expected: Any, result: Any) -> tuple[bool, str]:
        worst, worst_rms = 0.0, 0.0
        for a, b in zip(_arrays(expected), _arrays(result), strict=True):
            if a.shape != b.shape:
                return False, f"shape {b.shape}, expected {a.shape}"
            difference = np.abs(b.astype(np.float64) - a)
            # numpy's maximum keeps NaN; Python's may not.
            worst = float(np.maximum(worst, difference.max(initial=0.0)))
            if difference.size:
                worst_rms = float(np.maximum(worst_rms, np.sqrt((difference**2).mean())))
        agrees = worst <= limit and worst_rms <= rms
        limits = f"{limit:.1e}" + (f" / {rms:.1e}" if math.isfinite(rms) else "")
        return agrees, f"max {worst:.1e}, rms {worst_rms:.1e} (at most {limits})"

    return gate


def relative(limit: float) -> Gate:
    """Same shapes; for each array, the norm of the difference divided by the norm of the expected array."""

    def gate(expected: Any, result: Any) -> tuple[bool, str]:
        worst = 0.0
        for a, b in zip(_arrays(expected), _arrays(result), strict=True):
            if a.shape != b.shape:
                return False, f"shape {b.shape}, expected {a.shape}"
            difference = np.linalg.norm(b.astype(np.float64) - a)
            worst = float(np.maximum(worst, difference / max(np.linalg.norm(a.astype(np.float64)), 1e-30)))
        return worst <= limit, f"relative {worst:.1e} (at most {limit:.1e})"

    return gate


def equal(expected: Any, result: Any) -> tuple[bool, str]:
    """The same bits."""
    pairs = list(zip(_arrays(expected), _arrays(result), strict=True))
    same = all(np.array_equal(a, b) for a, b in pairs)
    return same, "equal" if same else "differs"


def correlated(least: float) -> Gate:
    """For peers with another definition: the correlation of two signals of the same length."""

    def gate(expected: Any, result: Any) -> tuple[bool, str]:
        if np.shape(expected) != np.shape(result):
            return False, f"shape {np.shape(result)}, expected {np.shape(expected)}"
        correlation = float(np.corrcoef(np.ravel(expected), np.ravel(result))[0, 1])
        return correlation >= least, f"correlation {correlation:.4f} (at least {least})"

    return gate


def _arrays(value: Any) -> list[np.ndarray]:
    values = value if isinstance(value, tuple | list) else [value]
    return [
        x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in values
    ]


# Running.


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Checks and times every provider of a case; returns the record that is printed and saved."""
    record: dict[str, Any] = {"area": case.area, "what": case.what, "threads": case.threads}
    record |= {"clock": case.clock, "unit": case.unit, "amount": case.amount}
    record |= {"flops": case.flops, "bytes": case.bytes, "rounds": rounds, "providers": {}}
    if case.device == "cuda" and not torch.cuda.is_available():
        return record | {"not_run": "no CUDA device: not run"}
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        inputs = case.inputs()
        calls, first_s = calls_that_agree(case, inputs, record["providers"])
        with _native_threads(case.threads):
            repeats = {name: _repeats(call, first_s[name]) for name, call in calls.items()}
            times, figures = _interleave(calls, repeats, rounds, case)
    finally:
        torch.set_num_threads(before)
    for name, (cpu_s, wall_s) in times.items():
        record["providers"][name] |= {"cpu_s": summary(cpu_s), "wall_s": summary(wall_s)}
        if figures[name]:
            keys = figures[name][0]
            record["providers"][name]["figures"] = {
                key: statistics.median(values[key] for values in figures[name]) for key in keys
            }
    _compare(case, record, times)
    return record


def calls_that_agree(
    case: Case, inputs: Any, results: dict[str, Any]
) -> tuple[dict[str, Call], dict[str, float]]:
    """Calls of the providers that are installed and agree, and the seconds that each first call took.

    The status of every provider is written to `results`.
    """
    expected = case.expected(inputs)
    calls, first_s = {}, {}
    for provider in case.providers:
        row: dict[str, Any] = {}
        results[provider.name] = row
        if provider.note:
            row["note"] = provider.note
        try:
            call = provider.prepare(inputs)
            start = time.perf_counter()
            result = call()
            first_s[provider.name] = time.perf_counter() - start
            agrees, how = (provider.gate or case.gate)(expected, result)
        except ImportError as error:
            row |= {"status": "missing", "reason": one_line(str(error))}
        except Exception as error:  # a peer that fails is reported, and the others are timed
            row |= {"status": "failed", "reason": one_line(repr(error))}
        else:
            row |= {"status": "timed" if agrees else "disagrees", "agreement": how}
            if agrees:
                calls[provider.name] = call
    return calls, first_s


def one_line(text: str) -> str:
    """The first line of an error for the results, without the folders of this machine."""
    first = (text.splitlines() or [""])[0]
    return re.sub(r"(?<![\w.])/[^\s'\"()]*/", "", first)[:200]


def _native_threads(count: int) -> AbstractContextManager[Any]:
    """Limits the threads of BLAS and OpenMP in the libraries that are already loaded."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(count)


def _interleave(
    calls: Mapping[str, Call], repeats: Mapping[str, int], rounds: int, case: Case
) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, list[dict[str, float]]]]:
    """CPU and wall seconds per call, and the case's figures, for every provider and round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                if case.before is not None:
                    case.before(call)
                cpu_s, wall_s, result = _time(call, repeats[name], case.device)
                times[name][0].append(cpu_s)
                times[name][1].append(wall_s)
                if case.figures is not None:
                    figures[name].append(case.figures(result))
                del result
            gc.collect()
    finally:
        gc.enable()
    return times, figures


def _repeats(call: Call, first_s: float) -> int:
    """Number of calls in a block.

    The first call may have loaded libraries, so a second call is timed. After a long first call it is not.
    """
    if first_s > 50 * LEAST_BLOCK_S:
        return 1
    start = time.perf_counter()
    call()
    return max(1, math.ceil(LEAST_BLOCK_S / max(time.perf_counter() - start, 1e-7)))


def _time(call: Call, repeats: int, device: str) -> tuple[float, float, Any]:
    """CPU and wall seconds per call, and the result of the last call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats, result


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum, median, and spread: the distance of the quartiles divided by the median."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {"min": min(seconds), "median": float(middle), "spread": float((high - low) / max(middle, 1e-12))}


def _compare(
    case: Case, record: dict[str, Any], times: Mapping[str, tuple[list[float], list[float]]]
) -> None:
    """Divides every peer's time by the subject's. Goals judge the ratio of the minima, and limits judge the
    median ratio of the rounds."""
    subject = case.providers[0].name
    column = 0 if case.clock == "cpu" else 1
    for name, row in record["providers"].items():
        if name in case.goals:
            row["goal"] = case.goals[name]
        if name in case.limits:
            row["limit"] = case.limits[name]
        if subject not in times or name not in times or name == subject:
            continue
        subject_s, peer_s = times[subject][column], times[name][column]
        row["ratio"] = min(peer_s) / min(subject_s)
        row["round_ratio"] = statistics.median(b / a for a, b in zip(subject_s, peer_s, strict=True))
        if name in case.goals:
            row["reached"] = row["ratio"] >= case.goals[name]
        if name in case.limits:
            row["reached"] = row["round_ratio"] <= case.limits[name]


def peak_memory(case: Case, provider: Provider) -> int:
    """Bytes by which calls raise the peak memory of the process, outputs and caches included.

    Runs in a fresh process: a call could reuse memory that earlier work gave back to the allocator.

    Raises:
        OSError: this system does not report its memory.
    """
    torch.set_num_threads(case.threads)
    importlib.import_module("torch._dynamo")  # 140 MB that the first optimizer or operator would load
    inputs = case.inputs()
    call = provider.prepare(inputs)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - start
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    start = _status_bytes("VmRSS")
    for _ in range(2):
        call()
    return _status_bytes("VmHWM") - start


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
