"""The benchmark beside busy processes: results stay the same, and limits are compared with the rounds."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import busy_cases, measure, run
from bench.measure import Case, Provider, run_case


@pytest.mark.parametrize(("limit", "printed"), [(3.5, "<= 3.5x reached"), (2.5, "<= 2.5x NOT REACHED")])
def test_limits_are_judged_by_the_median_of_the_rounds(
    monkeypatch: pytest.MonkeyPatch, limit: float, printed: str
) -> None:
    scripts = {"alone": iter([2.0, 1.0, 1.0]), "beside": iter([6.0, 2.0, 4.0])}  # 3, 2 and 4 times as long
    done: list[str] = []
    monkeypatch.setattr(measure, "_time", lambda call, *_: (9.0, next(scripts[call()]), None))
    case = Case(
        name="made-up",
        area="made-up",
        what="a number",
        inputs=lambda: 0,
        expected=lambda _: 0,
        gate=lambda *_: (True, ""),
        providers=[Provider(name, lambda _, name=name: lambda: name) for name in scripts],  # type: ignore[misc]
        limits={"beside": limit},
        before=lambda call: done.append(call()),
        threads=2,
    )
    record = run_case(case, rounds=3)
    assert done == ["alone", "beside"] * 3
    assert record["providers"]["beside"]["reached"] == (limit > 3)
    assert printed in run.table("made-up", record)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the CPUs of a process")
def test_a_block_beside_busy_processes_gives_the_same_result() -> None:
    case = busy_cases.busy_case("contrast", "one call a block", calls=1)
    record = run_case(replace(case, providers=case.providers[:2], limits={}, goals={}), rounds=1)
    assert {row["status"] for row in record["providers"].values()} == {"timed"}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's /proc")
def test_neighbours_are_busy_on_request_and_end_with_their_object() -> None:
    neighbours = busy_cases.Neighbours()
    processes = list(neighbours._processes)

    def used_s() -> list[float]:
        before = [cpu_s(process.pid) for process in processes]
        time.sleep(0.5)
        return [cpu_s(p.pid) - b for p, b in zip(processes, before, strict=True)]

    neighbours.keep_busy(2)
    time.sleep(0.2)
    first, second, third = used_s()
    assert min(first, second) > 0
    assert third < 0.1
    neighbours.keep_busy(0)
    time.sleep(0.2)
    assert max(used_s()) < 0.1
    del neighbours
    assert [process.returncode for process in processes] == [0, 0, 0]
