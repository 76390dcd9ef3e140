"""Runs benchmark cases: `python -m bench.run [case ...]`; `--list` names them."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, plot
from bench.cases import CASES
from bench.measure import Case, Report, one_line, peak_memory, run_case
from clsp_fast import console

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
WORSE = 1.10
"""clsp_fast counts as slower than before if its time grew by more than this factor relative to its peers'."""


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if clsp_fast disagrees, fails, or became slower."""
    options = _parse(arguments)
    warnings.simplefilter("ignore")  # other libraries warn about how they are used here
    if options.memory_of:
        case, provider = options.memory_of
        print(peak_memory(CASES[case], next(p for p in CASES[case].providers if p.name == provider)))
        return 0
    if options.list:
        for case in CASES.values():
            print(f"{case.name:32s} {case.area:11s} {'(by name) ' * case.optional}{case.what}")
        return 0
    before = _read(options.against) if options.against else None
    computer = machine.describe()
    print(machine.line(computer))
    records: dict[str, Any] = {}
    failed = False
    for case in _chosen(options.case):
        start = time.perf_counter()
        record = measure(case, options.rounds)
        records[case.name] = record
        print(f"\n{table(case.name, record)}\n{time.perf_counter() - start:.0f} s", flush=True)
        subject = next(iter(record.get("providers", {}).values()), {})
        failed |= subject.get("status", "timed") != "timed"
    if options.json:
        path = default_path(computer) if options.json == "default" else Path(options.json)
        write(path, computer, records)
        print(f"\nwritten to {path}")
    if options.plot:
        plot.main([])
    if before is not None:
        worse = regressions(before["cases"], records)
        print(
            "\n" + "\n".join(worse or [f"no case is over {WORSE - 1:.0%} slower than in {options.against}"])
        )
        failed |= bool(worse)
    return int(failed)


def measure(case: Case | Report, rounds: int) -> dict[str, Any]:
    """The record of a case: agreement, times, peak memory, and the commit at which it was measured."""
    commit, dirty = machine.commit()
    if isinstance(case, Report):
        record: dict[str, Any] = {"area": case.area, "what": case.what, "commit": commit, "dirty": dirty}
        try:
            return record | {"rows": case.rows()}
        except FileNotFoundError as error:
            return record | {"not_run": f"no {Path(error.filename).name}: not run"}
    record = run_case(case, rounds) | {"commit": commit, "dirty": dirty}
    for provider in case.providers:
        row = record["providers"].get(provider.name)
        if row is None:
            continue
        if provider.package and row["status"] != "missing":
            row["package"] = f"{provider.package} {machine.version(provider.package)}"
        if case.memory and row["status"] == "timed":
            row |= _peak_in_a_fresh_process(case.name, provider.name)
    subject = record["providers"].get(case.providers[0].name, {})
    if case.memory_goal and subject.get("peak_bytes"):
        subject["memory_goal"] = case.memory_goal
        subject["memory_reached"] = subject["peak_bytes"] <= case.memory_goal
    return record


def table(name: str, record: dict[str, Any]) -> str:
    """A case's record for the terminal."""
    head = f"{name}: {record['what']}"
    if "not_run" in record:
        return f"{head}\n  {record['not_run']}"
    if "rows" in record:
        return "\n".join([head, *_columns(record["rows"])])
    seconds = "CPU time" if record["clock"] == "cpu" else "wall time"
    head += f"; {record['threads']} thread(s), {seconds}, n = {record['rounds']}"
    rows = [("", "min", "median", "spread", "/ ours", "rounds", "goal", "memory", "agreement")]
    rows += [_row(provider, row, record["clock"]) for provider, row in record["providers"].items()]
    return "\n".join([head, *_columns(rows)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; the first and the last column are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return lines


def _row(provider: str, row: dict[str, Any], clock: str) -> tuple[str, ...]:
    if row["status"] in ("missing", "failed"):
        return (provider, *[""] * 7, f"{row['status']}: {row['reason']}")
    if row["status"] == "disagrees":
        return (provider, *[""] * 7, f"DISAGREES, not timed: {row['agreement']}")
    time_s = row[f"{clock}_s"]
    cells = [duration(time_s["min"]), duration(time_s["median"]), f"{time_s['spread']:.0%}"]
    cells += [f"{row['ratio']:.2f}x", f"{row['round_ratio']:.2f}x"] if "ratio" in row else ["", ""]
    wanted = f"{row['goal']:.3g}x" if "goal" in row else f"<= {row['limit']:.3g}x" if "limit" in row else ""
    goal = wanted and f"{wanted} {'reached' if row.get('reached') else 'NOT REACHED'}"
    memory = f"{row['peak_bytes'] / 2**20:.1f} MiB" if row.get("peak_bytes") is not None else ""
    memory = "failed" if "memory_failed" in row else memory
    if "memory_goal" in row:
        allowed = f"{row['memory_goal'] / 2**20:.1f}"
        memory += f" of {allowed} {'reached' if row['memory_reached'] else 'NOT REACHED'}"
    notes = [f"{name} {value:.3g}" for name, value in row.get("figures", {}).items()]
    notes += [f"memory: failed: {row['memory_failed']}"] if "memory_failed" in row else []
    return (provider, *cells, goal, memory, "; ".join([row["agreement"], *notes]))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return (
                f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
            )
    raise AssertionError(seconds)


def regressions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each case of both runs in which clsp_fast became slower relative to its peers."""
    lines = []
    for name in sorted(name for name in before.keys() & after.keys() if "clock" in after[name]):
        old, new = before[name]["providers"], after[name]["providers"]
        key = f"{after[name]['clock']}_s"
        change = {
            p: new[p][key]["min"] / old[p][key]["min"] for p in new if key in new[p] and key in old.get(p, {})
        }
        subject = next(iter(new), "")
        if subject not in change:
            continue
        peers = [math.log(value) for provider, value in change.items() if provider != subject]
        slower = change[subject] / math.exp(sum(peers) / max(len(peers), 1))
        if slower > WORSE:
            lines.append(
                f"{name}: {slower:.2f}x the time of before, relative to {len(peers)} peers "
                f"({duration(old[subject][key]['min'])} -> {duration(new[subject][key]['min'])})"
            )
    return lines


def default_path(computer: dict[str, Any]) -> Path:
    """The file to which results are written by default."""
    return RESULTS / f"{machine.short_name(computer)}-{datetime.date.today().isoformat()}.json"


def write(path: Path, computer: dict[str, Any], records: dict[str, Any]) -> None:
    """Writes results. A file of the same machine and versions keeps its other cases; else it is replaced."""
    if path.exists():
        old = _read(path)
        records = old["cases"] | records if old["machine"] == computer else records
    document = {"format": 1, "date": datetime.date.today().isoformat(), "machine": computer, "cases": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _peak_in_a_fresh_process(case: str, provider: str) -> dict[str, Any]:
    """peak_bytes for a provider's row, or memory_failed with the last line of the error."""
    command = [sys.executable, "-m", "bench.run", "--memory-of", case, provider]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"memory_failed": one_line(last)}
    return {"peak_bytes": int(done.stdout.split()[-1])}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("case", nargs="*", help="case or area; default: every case that is not `by name`")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and exit")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds, default {ROUNDS}")
    parser.add_argument(
        "--json",
        nargs="?",
        const="default",
        help="write results; default bench/results/<machine>-<date>.json",
    )
    parser.add_argument(
        "--against", type=Path, help="older results: print what became slower; exit code 1 if anything did"
    )
    parser.add_argument(
        "--plot", action="store_true", help="redraw the tables and plots of README.md and docs/"
    )
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = {*CASES, *(case.area for case in CASES.values())}
    unknown = [name for name in options.case if name not in known]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; `python -m bench.run --list` names all cases")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.against and not options.against.is_file():
        parser.error(f"--against {options.against}: no such file")
    return options


def _chosen(names: Sequence[str]) -> list[Case | Report]:
    if not names:
        return [case for case in CASES.values() if not case.optional]
    by_area = [case for case in CASES.values() if case.area in names and not case.optional]
    return list({case.name: case for case in [*by_area, *(CASES[n] for n in names if n in CASES)]}.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if document["format"] != 1:
            raise ValueError(f"format {document['format']}, expected 1")
        document["cases"], document["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a results file of bench.run: {error!r}") from error
    return document


if __name__ == "__main__":
    sys.exit(main())
