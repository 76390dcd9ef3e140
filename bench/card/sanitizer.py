"""compute-sanitizer's memcheck on the kernels of loss, ranks and top-k, at sizes that no tile divides."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import torch
import torch.nn.functional as F

from bench.card.record import Record
from bench.measure import one_line
from clsp_fast.kernels import neighbours, rank
from clsp_fast.loss import contrastive_loss

CLIPS, TEXTS, DIM = 300, 701, 512
DRY_CLIPS, DRY_TEXTS, DRY_DIM = 35, 50, 40
MARGIN_S = 3.0
"""Seconds of the stage that the sanitizer may not use: for the record."""


def run(record: Record) -> None:
    """Runs the kernels in a process without the sanitizer, which compiles them, and then in one with it."""
    command = [sys.executable, "-m", "bench.card.sanitizer", *["cpu"] * record.dry_run]
    plain = subprocess.run(command, capture_output=True, text=True)
    if plain.returncode:
        record.add("sanitizer/without the sanitizer", {"error": _reason(plain)})
        return
    record.add("sanitizer/without the sanitizer", {"passed": True})
    if record.dry_run:
        record.add("sanitizer/memcheck", {"missing": "no card"})
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        record.add("sanitizer/memcheck", {"missing": "compute-sanitizer is not on the PATH"})
        return
    # With torch's caching allocator, many tensors lie in one allocation, and overruns would not be seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    # Should the stage end during the check, the record says so.
    time_s = max(0.0, record.left_s - MARGIN_S)
    record.replace("sanitizer/memcheck", {"error": f"not finished after {time_s:.0f} s"})
    try:
        done = subprocess.run(checked, capture_output=True, text=True, env=environment, timeout=time_s)
    except subprocess.TimeoutExpired:
        return
    text = done.stdout + done.stderr
    print(text[-20_000:])
    errors = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if done.returncode or errors is None or errors[1] != "0":
        record.replace("sanitizer/memcheck", {"error": _reason(done)})
    else:
        record.replace("sanitizer/memcheck", {"passed": True, "errors": 0})


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stdout + done.stderr
    lines = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "Invalid" in line]
    last = (text.splitlines() or [""])[-1]
    return one_line(f"exit code {done.returncode}: {lines[-1] if lines else last}")


def launch_kernels(device: torch.device) -> None:
    """Launches every kernel once: both kinds of the loss and their gradients, ranks, and top-k."""
    small = device.type == "cpu"
    clips, texts, dim = (DRY_CLIPS, DRY_TEXTS, DRY_DIM) if small else (CLIPS, TEXTS, DIM)
    torch.manual_seed(0)
    audio_MD, text_ND = (
        F.normalize(torch.randn(rows, dim, device=device), dim=1).bfloat16().requires_grad_()
        for rows in (clips, texts)
    )
    owner_N = torch.randint(clips, (texts,), device=device)
    scale = torch.tensor(14.0, device=device, requires_grad=True)
    settings = {"text_owner": owner_N, "implementation": "triton"}
    loss = contrastive_loss(audio_MD, text_ND, scale, **settings)
    loss = loss + contrastive_loss(audio_MD, text_ND, scale, kind="sigmoid", logit_bias=-10.0, **settings)
    loss.backward()
    # Not by way of clsp_fast.similarity, which would not take the kernels for tensors on the CPU.
    ranks = rank.rank_counts(audio_MD.detach(), text_ND.detach(), owner_N)
    scores, _ = neighbours.topk(audio_MD.detach(), text_ND.detach(), 10)
    values = [loss, audio_MD.grad, text_ND.grad, scale.grad, scores, *(x.float() for x in ranks)]
    if not all(bool(x.isfinite().all()) for x in values if x is not None):
        raise SystemExit("a result is not finite")


if __name__ == "__main__":
    launch_kernels(torch.device(*sys.argv[1:2] or ["cuda"]))
