"""A short training run on the card: resumed bit for bit, with the CPU's losses beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.card.record import Record
from bench.machine import ROOT
from bench.model_cases import recordings
from clsp_fast.config import TRAIN_PRESETS, DataConfig, TrainConfig
from clsp_fast.storage import files
from clsp_fast.train import train

FILES, STEPS, BATCH_CLIPS = 300, 60, 64
DRY_FILES, DRY_STEPS, DRY_BATCH_CLIPS = 12, 4, 4
CPU_WAIT_S = 12.0
"""How long to wait for the run on the CPU after those on the card."""


def run(record: Record) -> None:
    """Trains at full speed, then with a fixed order of additions: without a break, and resumed in the middle.

    Another process trains on the CPU at the same time.
    """
    # torch reads it when it first calls cuBLAS in this process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    made = recordings(DRY_FILES if record.dry_run else FILES)
    steps = DRY_STEPS if record.dry_run else STEPS
    with (
        tempfile.TemporaryDirectory(prefix="clsp-card-") as folder,
        _run_on_the_cpu(settings(made.path, Path(folder) / "cpu", "cpu", steps, record.dry_run)) as cpu,
    ):
        fast = settings(made.path, Path(folder) / "fast", record.device.type, steps, record.dry_run)
        seconds = _train(fast)
        rows = log_rows(fast.run)
        speed = [row["audio_s_per_s"] for row in rows]
        values = {
            "seconds": round(seconds, 1),
            "audio_s_per_s": speed[-1],
            "data_wait": rows[-1]["data_wait"],
        }
        losses = {row["step"]: row["loss"] for row in rows}
        record.add("train/card", {**values, "losses": losses})
        with one_order_of_addition():
            whole = replace(fast, run=Path(folder) / "whole")
            _train(whole)
            record.add("train/resumed", compare_resumed(whole))
        with contextlib.suppress(subprocess.TimeoutExpired):
            cpu.wait(None if record.dry_run else CPU_WAIT_S)
        cpu_losses = {row["step"]: row["loss"] for row in log_rows(Path(folder) / "cpu")}
        both = sorted(losses.keys() & cpu_losses.keys())
        worst = max((abs(losses[step] / cpu_losses[step] - 1) for step in both), default=None)
        record.add(
            "train/CPU", {"losses": cpu_losses, "steps": len(both), "largest_relative_difference": worst}
        )


def settings(corpus: Path, folder: Path, device: str, steps: int, dry_run: bool) -> TrainConfig:
    """The preset tiny without dropout and augmentation, whose random numbers differ between devices."""
    preset = TRAIN_PRESETS["tiny"]
    text = replace(preset.model.text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = DataConfig(
        manifest=corpus / "train.jsonl",
        batch_clips=DRY_BATCH_CLIPS if dry_run else BATCH_CLIPS,
        buckets=2 if dry_run else 4,
        threads=2 if device == "cpu" else 0,
    )
    return replace(
        preset,
        run=folder,
        device=device,
        model=replace(preset.model, dropout=0.0, regularize=False, text=text),
        data=data,
        stage1_steps=steps,
        stage2_steps=0,
        log_every=max(1, steps // 20),
        validate_every=10 * steps,
        save_every=steps // 2,
    )


def compare_resumed(whole: TrainConfig) -> dict[str, Any]:
    """Resumes a copy of a finished run from its first checkpoint, and compares the two final models.

    If they differ, a second run without a break says whether runs differ even without one.
    """
    resumed = replace(whole, run=whole.run.with_name("resumed"))
    first, *later = sorted((whole.run / "checkpoints").iterdir())
    if not later:
        return {"error": f"expected two checkpoints, got {first.name}"}
    copy = shutil.copytree if first.is_dir() else shutil.copy
    (resumed.run / "checkpoints").mkdir(parents=True)
    files.write_json(resumed.run / "config.json", resumed.to_dict())
    copy(first, resumed.run / "checkpoints" / first.name)
    _train(resumed)
    values: dict[str, Any] = {"resumed_after": first.name}
    difference = largest_difference(whole.run, resumed.run)
    if difference == 0:
        return values | {"equal": True}
    repeated = replace(whole, run=whole.run.with_name("repeated"))
    _train(repeated)
    without_break = largest_difference(whole.run, repeated.run)
    values |= {"equal": False, "difference": difference, "difference_without_break": without_break}
    cause = "two runs without a break differ as well" if without_break else "only the resumed run differs"
    return values | {"error": f"the resumed model differs by {difference:.1e}: {cause}"}


@contextlib.contextmanager
def one_order_of_addition() -> Iterator[None]:
    """Makes torch add in the same order in every run. On a card, some of its gradients else do not."""
    # An operator without such an order warns: then the comparison shows whether it matters.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest_difference(first: Path, second: Path) -> float:
    """Largest difference of a weight between the models of two runs; 0.0 if all bits are equal."""
    a, b = (load_file(folder / "model/model.safetensors") for folder in (first, second))
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    return max((float((a[name] - b[name]).abs().max()) for name in differing), default=0.0)


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """The training records of a run's log."""
    path = folder / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "audio_s_per_s" in row]


def _train(config: TrainConfig) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    return time.perf_counter() - started


@contextlib.contextmanager
def _run_on_the_cpu(config: TrainConfig) -> Iterator[subprocess.Popen[bytes]]:
    """Trains in another process, which sees no card. It is ended with the block."""
    path = config.run.with_suffix(".json")
    files.write_json(path, config.to_dict())
    code = (
        "import json, sys; from clsp_fast.config import TrainConfig; from clsp_fast.train import train;"
        "train(TrainConfig.from_dict(json.load(open(sys.argv[1]))))"
    )
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
