"""Checkpoints that survive a crash at any instant.

A checkpoint is a folder `step-<N>` with model.safetensors, optim.safetensors and state.json; state.json holds
the SHA-256 of the other two. The folder is first written as `.step-<N>.tmp`, then flushed to the disk and
renamed. So a folder `step-<N>` is either complete, or the hashes show that it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from clsp_fast.storage import files

T = TypeVar("T")
_TENSOR_FILES = ("model.safetensors", "optim.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A training state.

    Attributes:
        step: number of steps done.
        model: parameters and buffers by name.
        optim: optimiser state by "<parameter>/<key>".
        state: everything else, as plain JSON values.
    """

    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes `folder/step-<N>` atomically. Then keeps the newest `keep` checkpoints and removes the others.

    Raises:
        OSError: the disk is full (`files.DiskFull`) or the folder is not writable; older checkpoints are
        untouched.
    """
    final, temporary = folder / f"step-{checkpoint.step:08d}", folder / f".step-{checkpoint.step:08d}.tmp"
    size = sum(x.nbytes for tensors in (checkpoint.model, checkpoint.optim) for x in tensors.values())
    with files.naming_full_disk(final, size):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write(temporary, checkpoint)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        files.flush(folder)
    # Checkpoints of later steps are damaged, or outdated because the run was resumed from an earlier one.
    for later in [path for path in _folders(folder) if _step(path) > checkpoint.step]:
        shutil.rmtree(later)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the three files and flushes them to the disk."""
    for name, tensors in zip(_TENSOR_FILES, (checkpoint.model, checkpoint.optim), strict=True):
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / name)
    hashes = {name: _sha256(folder / name) for name in _TENSOR_FILES}
    record = {"step": checkpoint.step, "sha256": hashes, "state": checkpoint.state}
    (folder / "state.json").write_text(json.dumps(record, indent=1))
    for path in (*folder.iterdir(), folder):
        files.flush(path)


def newest(folder: Path) -> Checkpoint | None:
    """Loads the newest undamaged checkpoint and warns of damaged newer ones; None if there is none."""
    for candidate in _folders(folder):
        try:
            return _load(candidate)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {candidate} is damaged and was skipped: {error}", stacklevel=2)
    return None


def exists(folder: Path) -> bool:
    """Whether there is any checkpoint, damaged or not."""
    return bool(_folders(folder))


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _load(folder: Path) -> Checkpoint:
    record = json.loads((folder / "state.json").read_text())
    for name in _TENSOR_FILES:
        if _sha256(folder / name) != record["sha256"][name]:
            raise ValueError(f"{name} does not match its SHA-256")
    model, optim = (load_file(folder / name) for name in _TENSOR_FILES)
    return Checkpoint(int(record["step"]), model, optim, record["state"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
