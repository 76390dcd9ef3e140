"""What a stage measured, in a file that is complete after every case."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clsp_fast.storage import files


@dataclass
class Record:
    """The cases of one stage. Each new case is written at once, so a deadline costs only later cases.

    Attributes:
        path: the JSON file, {case: values}.
        dry_run: whether the stage runs at tiny sizes on the CPU, with kernels in Triton's interpreter.
        ends_at: when the runner ends the stage, as `time.time` counts.
        cases: case -> its values, as docs/card.md describes them.
    """

    path: Path
    dry_run: bool = False
    ends_at: float = math.inf
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def left_s(self) -> float:
        """Seconds until the runner ends the stage."""
        return max(0.0, self.ends_at - time.time())

    def add(self, case: str, values: Mapping[str, Any]) -> None:
        """Adds a case, or more values of a case."""
        self.replace(case, {**self.cases.get(case, {}), **values})

    def replace(self, case: str, values: Mapping[str, Any]) -> None:
        """Adds a case, or replaces all values of a case."""
        self.cases[case] = dict(values)
        files.write_json(self.path, self.cases)

    def add_all(self, prefix: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds cases whose names begin with `prefix`."""
        for case, values in cases.items():
            self.add(f"{prefix}/{case}", values)


def run_stage(module: str, path: Path, dry_run: bool, ends_at: float) -> None:
    """Runs `run(record)` of a module in this process, whose standard input is a pipe of the runner."""
    end_with_the_runner()
    record = Record(path, dry_run, ends_at)
    importlib.import_module(module).run(record)
    if not record.cases:
        raise SystemExit(f"{module} measured nothing")


def end_with_the_runner() -> None:
    """Kills this stage and the processes that it started when the runner's end of the pipe is closed."""
    pipe = os.dup(0)
    # No process that the stage starts may wait for the runner.
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def read_cases(path: Path) -> dict[str, dict[str, Any]]:
    """The cases that a stage has written.

    Raises:
        FileNotFoundError: the stage wrote no file.
        ValueError: the file is not the record of a stage.
    """
    cases = json.loads(path.read_text(errors="replace"))
    if not isinstance(cases, dict) or not all(isinstance(values, dict) for values in cases.values()):
        raise ValueError("expected an object of objects")
    return cases
