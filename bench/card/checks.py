"""The tests of the library on the card: those marked `gpu`, then those of kernels, loss and model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple, TextIO

from bench.card.record import Record
from bench.machine import ROOT
from bench.measure import one_line

WORKERS = 8
MARGIN_S = 5.0
"""Seconds of the stage that no test may use: for the end of pytest, and for the record."""
GPU_SHARE = 0.55
"""Part of the stage's time for the first set of tests. The second set has what is left."""
INTERRUPT_S = 3.0
"""Seconds between an interrupt, after which pytest ends its workers, and its death."""
FOR_A_CARD = re.compile(r"mark\.gpu|each_device")
"""What a file contains if it has tests for a card. The other files need not be imported."""
FOR_KERNELS = re.compile(r"\bkernel_device\b")
"""What a file contains if its tests launch kernels. All its tests run."""
ALSO_WHOLE = ("tests/test_model.py", "tests/training/test_step.py")
"""Files without such tests that use the card all the same."""
DRY_FILES = ("tests/test_model.py",)
DRY_WORDS = "both_devices and bf16"
EXIT_CODES = {
    2: "interrupted, or a file could not be imported",
    3: "an internal error",
    4: "wrong usage",
    5: "no test was selected",
}
"""What pytest's exit codes mean."""
ERROR = re.compile(r"E +(?=\S)|INTERNALERROR> (?=\w*Error\b)|ERROR: |(?=.*: error: )|(?=.*No module named)")
"""How a line of pytest's output begins if it names an error."""
DETAIL = re.compile(r"E( |$)")
"""How a line begins that belongs to the report of an exception."""
EXCEPTION = re.compile(r"E +[\w.]*(Error|Exception)\b")
SUMMARY = re.compile(r"(FAILED|ERROR) \S")
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped"}
WORDS = "|".join(OUTCOMES)
# With pytest-xdist, and without.
OUTCOME = re.compile(
    rf"\[gw\d+\] \[ *\d+%\] (?P<word>{WORDS}) (?P<name>\S.*)|(?P<alone>\S+::.*\S) (?P<last>{WORDS})\b"
)


class Tests(NamedTuple):
    """Outcome -> number of tests, and the tests that failed."""

    counts: dict[str, int]
    bad: list[str]


def run(record: Record) -> None:
    """Runs both sets of tests. A test that fails is an error of the stage, and so is a set without an end."""
    if record.dry_run:
        add_tests(record, "tests/gpu", ["-k", DRY_WORDS, *DRY_FILES], record.left_s - MARGIN_S)
        return
    budget_s = GPU_SHARE * record.left_s
    add_tests(record, "tests/gpu", ["-m", "gpu", *files_with(FOR_A_CARD)], budget_s)
    words = ["-m", "not gpu and not slow and not multiproc", *whole_files()]
    add_tests(record, "tests/kernels, loss, model", words, record.left_s - MARGIN_S)


def files_with(pattern: re.Pattern[str]) -> list[str]:
    """The test files that contain a pattern, as paths from the root."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if pattern.search(path.read_text())]


def whole_files() -> list[str]:
    """The files of which all tests run: those of kernels, and of what runs on them."""
    return [*files_with(FOR_KERNELS), *ALSO_WHOLE]


def add_tests(record: Record, case: str, arguments: list[str], budget_s: float) -> None:
    """Runs pytest for at most `budget_s`, and adds its counts and the names of the tests that failed."""
    workers = [] if record.dry_run else ["-n", str(WORKERS)]
    plugins = ["-p", "no:cacheprovider", "-p", "bench.card.failures"]
    options = ["-v", *plugins, "-o", "filterwarnings=default", "--timeout", "30", "--tb", "short", "-rfE"]
    # torch reads the first variable when it first calls cuBLAS, and only if it stands there by then.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    # Tests set this variable themselves, for the interpreter only.
    environment.pop("TRITON_INTERPRET", None)
    if not record.dry_run:
        environment["CLSP_REQUIRE_GPU"] = "1"
    record.replace(case, {"error": "not finished"})
    command = [sys.executable, "-m", "pytest", *workers, *options, *arguments]
    exit_code, text = run_for(command, budget_s, environment)
    tests = read_tests(text)
    values: dict[str, object] = {"exit_code": exit_code, **tests.counts}
    if exit_code is None:
        so_far = ", ".join(f"{count} {name}" for name, count in tests.counts.items()) or "no test"
        values |= {"error": f"not finished after {budget_s:.0f} s: {so_far}", "failures": tests.bad}
    elif exit_code == 1 and tests.bad:
        names = ", ".join(tests.bad[:3])
        values |= {"error": f"{len(tests.bad)} tests failed: {names}", "failures": tests.bad}
    elif exit_code:
        values |= {"error": without_tests(exit_code, text), "failures": tests.bad}
    record.replace(case, values)


def without_tests(exit_code: int, text: str) -> str:
    """What pytest's exit code means, and the last error of its output, without the details below it."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    last = ERROR.sub("", reported_error(lines), count=1)
    if exit_code < 0:
        what = f"pytest was killed by signal {-exit_code}"
    else:
        meaning = f" ({EXIT_CODES[exit_code]})" if exit_code in EXIT_CODES else ""
        what = f"pytest ended with exit code {exit_code}{meaning}"
    return one_line(f"{what}: {last.strip()}")


def reported_error(lines: list[str]) -> str:
    """The last line that names an error, else the last line.

    The last line of an exception's report may be a detail. In a report, the line that names the exception
    counts instead, or, if none does, the first line.
    """
    end = next((i for i in reversed(range(len(lines))) if ERROR.match(lines[i])), len(lines) - 1)
    start = end
    while start > 0 and DETAIL.match(lines[start]) and DETAIL.match(lines[start - 1]):
        start -= 1
    report = lines[start : end + 1]
    return next(filter(EXCEPTION.match, report), report[0])


def run_for(command: list[str], budget_s: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Runs a command for at most `budget_s`, and prints its output as it comes.

    Returns:
        The exit code, or None if the command had to be ended; and the output.
    """
    ends_at = time.monotonic() + budget_s
    # A file, not a pipe: processes that outlive the command would keep a pipe open.
    with tempfile.NamedTemporaryFile() as output, Path(output.name).open(errors="replace") as reader:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        text = ""
        while process.poll() is None and time.monotonic() < ends_at:
            text += _echo(reader)
            time.sleep(0.1)
        exit_code = process.poll()
        if exit_code is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(INTERRUPT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return exit_code, text + _echo(reader)


def _echo(reader: TextIO) -> str:
    text = reader.read()
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def read_tests(text: str) -> Tests:
    """Reads the output of `pytest -v -rfE`, which may end anywhere."""
    reported: dict[str, str] = {}
    for line in text.splitlines():
        if match := OUTCOME.match(line):
            reported[match["name"] or match["alone"]] = OUTCOMES[match["word"] or match["last"]]
    last = (text.splitlines() or [""])[-1]
    counts = {name.rstrip("s"): int(count) for count, name in COUNT.findall(last)}
    bad = [name for name, outcome in reported.items() if outcome in ("failed", "error")]
    summary = [line.split(" - ")[0] for line in text.splitlines() if SUMMARY.match(line)]
    return Tests(counts or dict(Counter(reported.values())), summary or bad)
