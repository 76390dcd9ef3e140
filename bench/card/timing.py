"""Times on a card: device events, medians of interleaved rounds, inputs that are not in the cache.

Before each timed call a buffer larger than the L2 cache is overwritten, so the call finds none of its inputs
in the cache. The time that the host needs to queue a call is recorded as `host_ms`. If the host queues the
call while the device still overwrites the buffer (FLUSH_MS), the events measure the device alone. If it takes
longer, the device may wait for the host within the call: then `ms` includes these waits, and a call of which
most is the host's time is marked as `host_bound`.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.measure import Call, Case, calls_that_agree, one_line, summary

MIN_ROUNDS, MAX_ROUNDS = 5, 40
"""A comparison has as many rounds between these as fit into its time."""
FLUSHED_BYTES = 2**30
"""Size of the buffer that is overwritten before a call."""
FLUSH_MS = 0.2
"""An H100 or H200 needs about this long to overwrite the buffer, or longer. This is an estimate from the
bandwidth, 1 GiB at 4.8 TB/s or less: 0.22 ms. A B200, at 8 TB/s, needs 0.13 ms."""
HOST_SHARE = 0.8
"""A call is marked as `host_bound` if the host needs more than this part of its time."""
LIBRARY_PRODUCT = re.compile("gemm|cutlass|nvjet|xmma|cublas|wgmma", re.IGNORECASE)


def time_together(
    calls: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float = 2.0
) -> dict[str, dict[str, Any]]:
    """Times providers in turns (A B A B), so that a slow phase of the card slows all of them.

    Args:
        calls: provider -> the same call on several copies of the inputs, which take turns.
        device: the device that the calls use.
        seconds: time for all rounds together, if MIN_ROUNDS do not need more.

    Returns:
        Provider -> "ms", the median; "min_ms"; "spread", the distance of the quartiles divided by the median;
        "n", the number of rounds; "host_ms"; "host_bound", if it is; "peak_mib", the peak of the memory that
        the call allocated, and "total_mib", that peak plus the memory that was in use before the call. A
        provider that fails has "error" instead.
    """
    results: dict[str, dict[str, Any]] = {}
    first_s = {}
    for name, copies in calls.items():
        try:
            for call in copies:
                call()  # compiles kernels and loads libraries
            _wait(device)
            started = time.perf_counter()
            results[name] = _peak_memory(copies[0], device)
            first_s[name] = time.perf_counter() - started
        except Exception as error:  # another provider's time is still worth having
            results[name] = {"error": one_line(repr(error))}
    total_s = max(sum(first_s.values()), 1e-6)
    rounds = 2 if device.type == "cpu" else min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / total_s)))
    flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in first_s}
    gc.collect()
    for i in range(rounds):
        for name in first_s:
            times[name].append(_time_ms(calls[name][i % len(calls[name])], flushed))
    for name, values in times.items():
        device_ms, host_ms = zip(*values, strict=True)
        statistic = summary(device_ms)
        results[name] |= {
            "ms": statistic["median"],
            "min_ms": statistic["min"],
            "spread": statistic["spread"],
            "n": rounds,
            "host_ms": statistics.median(host_ms),
        }
        if device.type == "cuda" and host_bound(results[name]):
            results[name]["host_bound"] = True
    return results


def host_bound(values: Mapping[str, Any]) -> bool:
    """Whether the time of a call on a card is mostly that of the host, which queues it."""
    return bool(values["host_ms"] > max(FLUSH_MS, HOST_SHARE * values["ms"]))


def time_case(
    case: Case, *, seconds: float = 2.0, subjects: Sequence[str] = ("clsp_fast",)
) -> dict[str, dict[str, Any]]:
    """Checks the providers of a case against its reference, and times those that agree.

    A provider that is not installed has "missing", one that fails or disagrees has "error". Providers whose
    names begin with none of `subjects` have "peer": their errors do not count.
    """
    device = torch.device(case.device)
    inputs = case.inputs()
    rows: dict[str, dict[str, Any]] = {}
    calls, _ = calls_that_agree(case, inputs, rows)
    copies = [copy_of(inputs) for _ in range(count_copies(inputs) - 1)]
    providers = {provider.name: provider for provider in case.providers}
    rotated = {
        name: [call, *(providers[name].prepare(copied) for copied in copies)] for name, call in calls.items()
    }
    times = time_together(rotated, device, seconds=seconds)
    results = {}
    for name, row in rows.items():
        result: dict[str, Any] = {} if name.startswith(tuple(subjects)) else {"peer": True}
        if row["status"] == "missing":
            result["missing"] = row["reason"]
        elif row["status"] != "timed":
            result["error"] = f"{row['status']}: {row.get('reason', row.get('agreement'))}"
        else:
            result |= {"agreement": row["agreement"], **times[name]}
        results[name] = result
    return results


def copy_of(inputs: Any) -> Any:
    """A copy of a dataclass of tensors in other memory."""
    tensors = {
        field.name: value.detach().clone().requires_grad_(value.requires_grad)
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    return dataclasses.replace(inputs, **tensors)


def count_copies(inputs: Any) -> int:
    """How many copies of the inputs are twice as large as the L2 cache: at least two, at most eight."""
    tensors = [getattr(inputs, field.name) for field in dataclasses.fields(inputs)]
    size = sum(x.nbytes for x in tensors if isinstance(x, Tensor) and x.is_cuda)
    if not size:
        return 2
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(8, max(2, -(-2 * cache // size)))


def kernel_times(
    call: Call, device: torch.device, *, rounds: int = 5, part_of: Callable[[str], str] = lambda name: name
) -> dict[str, dict[str, Any]]:
    """Device time of a call by kernel, from the profiler, longest first.

    Args:
        call: the call; it must have run before.
        device: the device that it uses. On the CPU, operators take the place of kernels.
        rounds: how many calls are measured.
        part_of: name of a kernel -> name of the part under which its time is counted.

    Returns:
        Part -> "ms", "spread", "n" as in `time_together`, and "launches", the kernels of one call.
    """
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * rounds)
    launches = Counter[str]()
    for i in range(rounds):
        with profile(activities=[activity]) as profiled:
            call()
            _wait(device)
        for event in profiled.events():
            if event.device_type == kind:
                time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
                part = part_of(event.name)
                totals[part][i] += time_us / 1e3
                launches[part] += i == 0
    parts = sorted(totals, key=lambda part: -sum(totals[part]))
    results = {}
    for part in parts:
        statistic = summary(totals[part])
        results[part] = {
            "ms": statistic["median"],
            "spread": statistic["spread"],
            "n": rounds,
            "launches": launches[part],
        }
    return results


def _peak_memory(call: Call, device: torch.device) -> dict[str, float]:
    """Peak of the allocated memory during a call: what it added, and in total."""
    if device.type == "cpu":
        call()
        return {"peak_mib": 0.0, "total_mib": 0.0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    total = torch.cuda.max_memory_allocated()
    del result
    return {"peak_mib": round((total - before) / 2**20, 1), "total_mib": round(total / 2**20, 1)}


def _time_ms(call: Call, flushed: Tensor) -> tuple[float, float]:
    """Milliseconds of the device and of the host for one call."""
    if not flushed.is_cuda:
        started = time.perf_counter()
        call()
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        return elapsed_ms, elapsed_ms
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flushed.zero_()
    first.record()
    started = time.perf_counter()
    result = call()
    host_ms = 1e3 * (time.perf_counter() - started)
    last.record()
    last.synchronize()
    del result
    return first.elapsed_time(last), host_ms


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
