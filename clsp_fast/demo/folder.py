"""A corpus in a folder: made beside it by child processes, and moved there when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsp_fast.demo.signal import SAMPLE_RATE_HZ
from clsp_fast.storage import files

_STALE_S = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class CorpusFolder:
    """Where a corpus is kept, and what it must hold.

    The summary is a JSON object with at least "fingerprint" and "manifests" (split: SHA-256 of SPLIT.jsonl).
    """

    path: Path
    kind: str
    """Names the corpus in messages."""
    summary: str
    """File name of the summary."""
    splits: tuple[str, ...]
    """Splits that the corpus may have."""
    fingerprint: str
    """Hash of the configuration: a corpus with another one is replaced."""

    def read(self) -> dict[str, Any] | None:
        """The summary; None if the corpus is incomplete or has another fingerprint."""
        try:
            summary: dict[str, Any] = json.loads((self.path / self.summary).read_text())
            if summary["fingerprint"] != self.fingerprint:
                return None
            for split, digest in summary["manifests"].items():
                raw = (self.path / f"{split}.jsonl").read_bytes()
                if hashlib.sha256(raw).hexdigest() != digest:
                    return None
                for line in raw.splitlines():
                    clip = json.loads(line)
                    if (self.path / clip["audio"]).stat().st_size != wav_bytes(clip["duration_s"]):
                        return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return summary

    def refuse_other_files(self) -> None:
        """Raises ValueError if the folder holds anything but a corpus of this kind."""
        known = {self.summary, "audio", *(f"{split}.jsonl" for split in self.splits)}
        if not self.path.exists():
            return
        if not self.path.is_dir() or not {entry.name for entry in self.path.iterdir()} <= known:
            raise ValueError(
                f"{self.path} holds files that are no {self.kind}; name another folder or empty it"
            )

    def make(self, size_bytes: int, fill: Callable[[Path], None]) -> dict[str, Any]:
        """Makes the corpus beside the folder, and moves it there. A corpus in the folder is replaced.

        Args:
            size_bytes: about how much room the corpus needs.
            fill: writes the corpus to the folder that it is given.

        Returns:
            The summary.

        Raises:
            files.DiskFull: there is no room; nothing of the corpus is left behind.
        """
        with files.naming_full_disk(self.path, size_bytes):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale_folders()
            making = self.path.parent / f".{self.path.name}.making-{os.getpid()}"
            making.mkdir()
            try:
                fill(making)
                # Another process may have made the same corpus in the meantime.
                if self.read() is None:
                    if self.path.exists():
                        shutil.rmtree(self.path)
                    making.replace(self.path)
            finally:
                shutil.rmtree(making, ignore_errors=True)
        summary = self.read()
        if summary is None:
            raise RuntimeError(f"the corpus in {self.path} was changed while it was made")
        return summary

    def _remove_stale_folders(self) -> None:
        """Removes folders that killed runs left behind. Newer ones may belong to a running process."""
        for making in self.path.parent.glob(f".{self.path.name}.making-*"):
            if time.time() - making.stat().st_mtime > _STALE_S:
                shutil.rmtree(making, ignore_errors=True)


def _child_environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.curdir for entry in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # SVOX Pico reads memory that it has not written. With this setting, glibc fills new memory with 0.
        "MALLOC_PERTURB_": "255",
    }


class Child:
    """A process that runs `run_job` of a module of this room."""

    def __init__(self, job: dict[str, Any], stem: Path, *, module: str = "clips") -> None:
        self.lines = stem.with_suffix(".jsonl")
        self._log = stem.with_suffix(".log")
        self.job = job
        job_file = stem.with_suffix(".job")
        job_file.write_text(json.dumps({**job, "lines": str(self.lines)}))
        code = f"import sys; from clsp_fast.demo import {module}; {module}.run_job(sys.argv[1])"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(job_file)],
                env=_child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def made(self) -> int:
        """Number of clips finished so far."""
        return self.lines.read_bytes().count(b"\n") if self.lines.exists() else 0

    def failure(self) -> str:
        """The exit code and the last line of output.

        Raises:
            OSError: the process ended because the disk is full.
        """
        if self.process.returncode in files.DISK_FULL_CODES:
            raise OSError(self.process.returncode, os.strerror(self.process.returncode))
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.returncode}" + (f", {lines[-1]}" if lines else "")


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_children(
    jobs: list[dict[str, Any]],
    start: Callable[[dict[str, Any]], Child],
    end: Callable[[Child], dict[str, Any] | None],
    *,
    workers: int,
    pause_s: float,
    progress: Callable[[int], None],
) -> None:
    """Runs a child for each job, `workers` at a time. If this raises, no child is left running.

    Args:
        jobs: the last comes first; the list is emptied.
        start: starts the child of a job.
        end: called with each child that ended. Returns None, or the job that is to run in its place.
        workers: number of children that run together.
        pause_s: time between two looks at the children.
        progress: called after each look with the number of clips made.
    """
    running: list[Child] = []
    done = 0
    try:
        while jobs or running:
            while jobs and len(running) < workers:
                running.append(start(jobs.pop()))
            time.sleep(pause_s)
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                replacement = end(child)
                if replacement is None:
                    done += child.made()
                else:
                    jobs.append(replacement)
            progress(done + sum(child.made() for child in running))
    finally:
        for child in running:
            child.process.kill()
            child.process.wait()


def wav_bytes(duration_s: float) -> int:
    """Size of a file that `clips.write_wav` writes."""
    return 44 + 2 * round(duration_s * SAMPLE_RATE_HZ)
