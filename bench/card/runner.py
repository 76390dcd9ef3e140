"""The prepared run on a GPU: `python -m bench.card [--stages a,b] [--out DIR] [--dry-run]`.

Each stage is a process with a deadline. If it fails or exceeds the deadline, what it had measured is kept,
and the next stage begins. Every run writes a results file of a new name, which is complete after every
stage; docs/card.md describes it. The exit code is 0 only if every stage held.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.card import needs, provenance, record
from clsp_fast import console
from clsp_fast.kernels import _launch
from clsp_fast.storage import files

ROOT = machine.ROOT
WHEELS = ROOT / ".card"
DRY_RUN_DEADLINE_S = 120.0
"""Deadline of each stage in a dry run."""
KILL_AFTER_S = 2.0
"""Seconds between the two signals that end a stage: SIGTERM and SIGKILL."""


HIDDEN = {
    *("area", "stage", "commit", "dirty", "peer"),
    *("ms", "min_ms", "spread", "n", "peak_mib", "total_mib"),
}
"""Values of a case that are not named in the table: it shows them in columns, or not at all."""
SAME = ("format", "date", "dry_run", "commit", "dirty", "code", "wheel", "machine")
"""What the results of two runs must share before one takes over stages of the other."""
ERROR_LINE = re.compile(r"(?=\S).*?\b(\w*error|\w*exception|fatal)\b|terminate called", re.IGNORECASE)
FRAME = re.compile(r"frame #\d+|Exception raised from ")
"""How a line of a C++ stack trace begins. It may contain the names of errors."""
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
"""Signals that a process seldom sends to itself: earlier errors in its output are not why it ended."""


@dataclass(frozen=True)
class Stage:
    """A part of the run. `run(record)` of its module measures it."""

    name: str
    deadline_s: float
    module: str
    what: str


STAGES = (
    Stage("ceilings", 35, "bench.card.ceilings", "copy, matrix product, versions, noise"),
    Stage("tests", 80, "bench.card.checks", "GPU tests, then the tests of kernels, loss and model"),
    Stage("sanitizer", 45, "bench.card.sanitizer", "memcheck of the loss, ranks and top-k"),
    Stage("loss", 85, "bench.card.loss", "loss and gradients in total and by part, beside peers"),
    Stage("similarity", 35, "bench.card.similarity", "ranks and top-k, beside torch"),
    Stage("model", 95, "bench.card.model", "forward pass and training step of base and xlarge"),
    Stage("train", 40, "bench.card.train", "a short run, resumed bit for bit"),
    Stage("sweep", 85, "bench.card.sweep", "tiles of the loss kernels at 16,384 pairs"),
)


@console.command
def main(arguments: Sequence[str] | None = None, *, stages: Sequence[Stage] = STAGES) -> int:
    """Command line; returns the exit code."""
    options = _parse(arguments, stages)
    if options.module:
        record.run_stage(options.module, options.record, options.dry_run, options.ends_at)
        return 0
    chosen = [stage for stage in stages if stage.name in options.stages]
    if "tests" in options.stages:
        needs.check(needs.FOR_TESTS, "; or leave the stage tests out with --stages")
    if not options.dry_run:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device was found; --dry-run goes through all stages on a CPU")
        check_installed_kernels()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock_folder(options.out))
        except files.FolderInUse as error:
            raise SystemExit(f"bench.card: {error}") from None
        except OSError as error:
            raise SystemExit(
                f"bench.card: cannot write to {options.out}: {error.strerror}; name another folder with --out"
            ) from error
        stack.enter_context(_signals_like_ctrl_c())
        try:
            return run_stages(chosen, options.out, options.dry_run)
        except KeyboardInterrupt:
            return 130
        except files.DiskFull:
            raise
        except OSError as error:
            raise SystemExit(f"bench.card: {error}") from error


def run_stages(stages: Sequence[Stage], out: Path, dry_run: bool) -> int:
    """Runs stages, writes the results and prints them; returns the exit code."""
    computer = describe_card()
    print(machine.line(computer), flush=True)
    document = new_document(computer, dry_run)
    path, earlier = new_results_file(out, document)
    document["run"] = len(earlier) + 1
    for file in earlier:
        kept = keep_stages(document, file)
        print(f"taken over from {file.name}: {', '.join(kept) or 'nothing'}", flush=True)
    files.write_json(path, document)
    held, unwritten = [], ""
    try:
        for stage in stages:
            unwritten = stage.name
            outcome, cases = run_stage(stage, path, dry_run)
            add_stage(document, stage, outcome, cases)
            files.write_json(path, document)
            unwritten = ""
            if cases:
                record_of(stage, path).unlink()
            held.append(outcome["held"])
            print(stage_line(stage.name, outcome), flush=True)
            if outcome["status"] == "interrupted":
                return 130
    finally:
        lacking = f", without the new result of the stage {unwritten}" if unwritten else ""
        print(f"\n{table(document)}\n\nwritten to {path}{lacking}", flush=True)
    return int(not all(held))


@contextlib.contextmanager
def _signals_like_ctrl_c() -> Iterator[None]:
    """In this context, SIGTERM and SIGHUP raise KeyboardInterrupt, unless they are ignored (nohup)."""
    numbers = [x for x in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_card() -> dict[str, Any]:
    """`machine.describe`, with the versions of triton and of the driver."""
    computer = machine.describe()
    computer["versions"] |= {"triton": machine.version("triton"), "driver": _driver()}
    return computer


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def new_document(computer: Mapping[str, Any], dry_run: bool) -> dict[str, Any]:
    """The results without stages."""
    wheel = provenance.read_wheel(WHEELS / "built-from.json")
    return {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "run": 1,
        "dry_run": dry_run,
        **provenance.identify(ROOT, machine.commit(), wheel),
        "machine": computer,
        "stages": {},
        "cases": {},
    }


def new_results_file(out: Path, document: Mapping[str, Any]) -> tuple[Path, list[Path]]:
    """A name that no file has, and the files of earlier runs on the same day, the last run first."""
    name = machine.short_name(document["machine"]) + "-dry-run" * document["dry_run"]
    path, earlier = out / f"{name}-{document['date']}.json", []
    while path.exists():
        earlier.insert(0, path)
        path = out / f"{name}-run-{len(earlier) + 1}-{document['date']}.json"
    return path, earlier


def keep_stages(document: dict[str, Any], earlier: Path) -> list[str]:
    """Adds the stages of an earlier run to the results, except those in the results.

    Returns:
        Names of the added stages: none if the file is damaged, or if it belongs to other code or another
        machine.
    """
    try:
        other = json.loads(earlier.read_text())
        if any(other.get(key) != document.get(key) for key in SAME):
            return []
        names = other["stages"].keys() - document["stages"].keys()
        stages = {name: dict(outcome) for name, outcome in other["stages"].items() if name in names}
        cases = {name: case for name, case in other["cases"].items() if case["stage"] in stages}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    document["stages"] |= stages
    document["cases"] |= cases
    return list(stages)


def add_stage(
    document: dict[str, Any],
    stage: Stage,
    outcome: Mapping[str, Any],
    cases: Mapping[str, Mapping[str, Any]],
) -> None:
    """Adds a stage and its cases to the results, in place of those of an earlier run."""
    document["stages"].pop(stage.name, None)
    document["stages"][stage.name] = dict(outcome)
    document["cases"] = {
        name: case for name, case in document["cases"].items() if case["stage"] != stage.name
    }
    shared = {"area": "card", "stage": stage.name, "commit": document["commit"], "dirty": document["dirty"]}
    document["cases"] |= {name: {**shared, **values} for name, values in cases.items()}


def record_of(stage: Stage, path: Path) -> Path:
    """The file with a stage's cases while it runs, beside the results file `path`."""
    return path.with_name(f"{stage.name}-{path.name}")


def run_stage(stage: Stage, path: Path, dry_run: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Runs a stage in a process and waits for its end, but not beyond its deadline.

    Args:
        stage: the stage.
        path: the results file. The stage writes its record and log.txt beside it.
        dry_run: whether to measure tiny sizes on the CPU.

    Returns:
        The outcome, and the cases that the stage measured. The outcome has "status": "done", "failed",
        "deadline" or "interrupted"; "held": whether it is done and no case of clsp_fast has an error;
        "seconds"; "deadline_s"; and, if it did not end well, "reason".
    """
    deadline_s = max(stage.deadline_s, DRY_RUN_DEADLINE_S) if dry_run else stage.deadline_s
    cases_file, log = record_of(stage, path), path.with_name("log.txt")
    command = [sys.executable, "-m", "bench.card", "--module", stage.module, "--record", str(cases_file)]
    command += ["--ends-at", str(time.time() + deadline_s)]
    started, log_start = time.perf_counter(), log.stat().st_size if log.exists() else 0
    with (
        # What the stage leaves there when it is killed is removed with the folder.
        tempfile.TemporaryDirectory(prefix="clsp-card-", ignore_cleanup_errors=True) as temporary,
        files.naming_full_disk(log),
        log.open("ab") as output,
    ):
        environment = os.environ | {"TMPDIR": temporary}
        if dry_run:
            # With one thread, processes that share the cores with others do not wait for their threads.
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        output.write(f"\n== {stage.name}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run,
            stdout=output,
            stderr=subprocess.STDOUT,
            # The stage ends itself when this pipe is closed, so it does not outlive a runner that was killed.
            stdin=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(deadline_s) else "done"
        except subprocess.TimeoutExpired:
            status = "deadline"
        except KeyboardInterrupt:
            status = "interrupted"
        _end_group(process)
        assert process.stdin is not None
        process.stdin.close()
    outcome = {"status": status, "seconds": round(time.perf_counter() - started, 1), "deadline_s": deadline_s}
    if status == "failed":
        outcome["reason"] = failure(process.returncode, _last_lines(log, log_start))
    try:
        cases = record.read_cases(cases_file)
    except (OSError, ValueError) as error:
        cases = {}
        if status == "done":
            outcome |= {"status": "failed", "reason": f"no readable record: {error}"}
    bad = [name for name, values in cases.items() if "error" in values and not values.get("peer")]
    if bad:
        outcome.setdefault("reason", f"{', '.join(bad[:5])}: {cases[bad[0]]['error']}")
    return outcome | {"held": outcome["status"] == "done" and not bad}, cases


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a stage: its process, and the processes that it started."""
    for number, wait_s in ((signal.SIGTERM, KILL_AFTER_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
    process.wait()


def _last_lines(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").split("\n")
    return [line.rstrip()[:300] for line in lines if line.strip()]


def failure(exit_code: int, lines: Sequence[str]) -> str:
    """Why a process failed: its exit code or signal, and the last line of its output, if that is a reason.

    The last line of a warning is its source code, which is indented. If a signal killed the process, only an
    error is a reason; if the process crashed, it is the last error, which a stack trace may follow.
    """
    last = lines[-1] if lines else ""
    if exit_code < 0:
        what = f"killed by signal {-exit_code}"
        reason = last_error(lines[-1:] if -exit_code in FROM_OUTSIDE else lines)
    else:
        what, reason = f"exit code {exit_code}", last
        if last[:1].isspace() or "Warning:" in last:
            reason = last_error(lines)
    return f"{what}: {reason}" if reason else what


def last_error(lines: Sequence[str]) -> str:
    """The last line that names an error, with what a C++ exception says in the line after it; else ""."""
    for i in reversed(range(len(lines))):
        if is_error(lines[i]):
            message = "".join(lines[i + 1 : i + 2]).split()
            return f"{lines[i]}; {' '.join(message)}" if message[:1] == ["what():"] else lines[i]
    return ""


def is_error(line: str) -> bool:
    """Whether a line of a log names an error."""
    return bool(ERROR_LINE.match(line)) and not FRAME.match(line) and "Warning:" not in line


def stage_line(name: str, outcome: Mapping[str, Any]) -> str:
    """One line about a stage, for the terminal."""
    status = outcome["status"] if outcome["held"] or outcome["status"] != "done" else "errors"
    time_s = f"{outcome['seconds']:.1f} of {outcome['deadline_s']:.0f} s"
    return f"{name:11s} {status:11s} {time_s:16s} {outcome.get('reason', '')}".rstrip()


def table(document: Mapping[str, Any]) -> str:
    """The cases of all stages, then the stages, as aligned lines. Lists of kernels are left out."""
    lines = []
    for name, case in document["cases"].items():
        if "error" in case or "missing" in case:
            lines.append(f"{name:50s} " + (case.get("error") or f"missing: {case['missing']}")[:100])
            continue
        time_ms = f"{case['ms']:9.3f} ms" if "ms" in case else " " * 12
        spread = f"{case['spread']:4.0%}" if "spread" in case else " " * 4
        memory = f"{case['peak_mib']:6.0f} MiB" if "peak_mib" in case else " " * 10
        hidden = HIDDEN | ({"agreement"} if "ms" in case else set())
        rest = [
            f"{key} {_short(value)}"
            for key, value in case.items()
            if key not in hidden and not isinstance(value, (dict, list))
        ]
        lines.append(f"{name:50s} {time_ms} {spread} {memory} {', '.join(rest)}".rstrip())
    return "\n".join(
        [*lines, "", *(stage_line(name, outcome) for name, outcome in document["stages"].items())]
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


def check_installed_kernels() -> None:
    """Refuses to measure kernels that are not those of this folder: they come from the installed wheel."""
    folder = Path(_launch.__file__).parent
    differing = [
        path.name
        for path in sorted((ROOT / "kernels").glob("*.py"))
        if not (folder / path.name).is_file() or (folder / path.name).read_bytes() != path.read_bytes()
    ]
    if differing:
        names = ", ".join(differing)
        raise SystemExit(
            f"the installed clsp_fast.kernels differ from kernels/ ({names}): "
            "make the wheels again and install them"
        )


def _parse(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    names = [stage.name for stage in stages]
    parser = argparse.ArgumentParser(prog="python -m bench.card", description=__doc__)
    parser.add_argument("--stages", default=",".join(names), help=f"default: {','.join(names)}")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/card", help="folder of the results, default runs/card"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU, with kernels in Triton's interpreter"
    )
    parser.add_argument("--module", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ends-at", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    unknown = [name for name in options.stages if name not in names]
    if unknown or not options.stages:
        problem = f"unknown stage {', '.join(unknown)}" if unknown else "--stages names no stage"
        parser.error(f"{problem}; the stages are {', '.join(names)}")
    options.out = options.out.absolute()
    return options
