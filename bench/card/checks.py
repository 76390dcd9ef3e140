"""The tests of the library on the card: those marked `gpu`, then those of kernels, loss and model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from bench.card.record import Record
from bench.machine import ROOT

WORKERS = 8
# Files whose other tests use the card if there is one, or what runs on it.
WHOLE_FILES = (
    "tests/test_kernel_contrastive.py",
    "tests/test_kernel_rank.py",
    "tests/test_loss.py",
    "tests/test_similarity.py",
    "tests/test_model.py",
    "tests/training/test_step.py",
)
DRY_FILES = ("tests/test_model.py",)
DRY_WORDS = "both_devices and bf16"
FOR_A_CARD = re.compile(r"mark\.gpu|each_device")
"""What a file contains if it has tests for a card. The other files need not be imported."""
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def run(record: Record) -> None:
    """Runs both sets of tests. A test that fails is an error of the stage."""
    marked = [path for path in test_files() if FOR_A_CARD.search((ROOT / path).read_text())]
    if record.dry_run:
        add_tests(record, "tests/gpu", ["-k", DRY_WORDS, *DRY_FILES])
        return
    add_tests(record, "tests/gpu", ["-m", "gpu", *marked])
    files = [path for path in WHOLE_FILES if (ROOT / path).exists()]
    add_tests(record, "tests/kernels, loss, model", ["-m", "not gpu and not slow and not multiproc", *files])


def test_files() -> list[str]:
    """All test files, as paths from the root."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def add_tests(record: Record, case: str, arguments: list[str]) -> None:
    """Runs pytest and adds its counts, and the names of the tests that failed."""
    workers = [] if record.dry_run else ["-n", str(WORKERS)]
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout", "60", "-rfE"]
    environment = dict(os.environ)
    # Tests set this variable themselves, for the interpreter only.
    environment.pop("TRITON_INTERPRET", None)
    if not record.dry_run:
        environment["CLSP_REQUIRE_GPU"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *workers, *options, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    print(done.stdout[-100_000:])
    lines = done.stdout.splitlines()
    counts = {name.rstrip("s"): int(count) for count, name in COUNT.findall(lines[-1] if lines else "")}
    bad = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    values: dict[str, object] = {"exit_code": done.returncode, **counts}
    if done.returncode:
        values |= {"error": f"{len(bad)} tests failed: {', '.join(bad[:3])}", "failures": bad}
    record.add(case, values)
