"""A run's place among processes, and its checkpoints that survive a crash at any instant.

A checkpoint is a folder `step-<N>` with model.safetensors, optim.safetensors and state.json, which holds the
SHA-256 of the other two. It is written as `.step-<N>.tmp`, flushed to the disk and renamed, so a folder of
that name is either complete or recognisably damaged. `Place` says which of the processes writes; every method
of it is a no-op for a single process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from clsp_fast.storage import files

T = TypeVar("T")
_TENSOR_FILES = ("model.safetensors", "optim.safetensors")


class FolderInUse(RuntimeError):
    """Another process holds the folder or file."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state.

    Attributes:
        step: steps done.
        model: parameters and buffers by name.
        optim: optimiser state by "<parameter>/<key>".
        state: everything else; plain JSON values.
    """

    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes `folder/step-<N>` atomically and removes all but the newest `keep` checkpoints.

    Raises:
        OSError: the disk is full (`disk.DiskFull`) or the folder is not writable; older checkpoints are
        untouched.
    """
    final, temporary = folder / f"step-{checkpoint.step:08d}", folder / f".step-{checkpoint.step:08d}.tmp"
    size = sum(x.nbytes for tensors in (checkpoint.model, checkpoint.optim) for x in tensors.values())
    with files.room_for(final, size):
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
    # Later steps than this one are damaged, or of a run that was taken up again before them.
    for old in [path for path in _folders(folder) if _step(path) > checkpoint.step]:
        shutil.rmtree(old)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """The three files, on the disk when this returns."""
    for name, tensors in zip(_TENSOR_FILES, (checkpoint.model, checkpoint.optim), strict=True):
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / name)
    hashes = {name: _sha256(folder / name) for name in _TENSOR_FILES}
    record = {"step": checkpoint.step, "sha256": hashes, "state": checkpoint.state}
    (folder / "state.json").write_text(json.dumps(record, indent=1))
    for path in (*folder.iterdir(), folder):
        files.flush(path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning. None: there is
    none."""
    for candidate in _folders(folder):
        try:
            return _load(candidate)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {candidate} is damaged and was passed over: {error}", stacklevel=2)
    return None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder for one process.

    Raises:
        FolderInUse: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        hold(file, folder)
        yield


def hold(file: IO[Any], name: Path) -> None:
    """Locks an open file until it is closed; FolderInUse, with `name`, if another process has it.

    Where the file system has no locks, a warning says so: nothing then stops a second process.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUse(f"{name} is in use by another process; wait for it, or choose another") from None
    except OSError as error:
        if error.errno not in files.UNSUPPORTED | {errno.ENOLCK}:
            raise
        warnings.warn(
            f"{name} cannot be locked, its file system has no locks ({error.strerror}): "
            "make sure that no other process writes it",
            stacklevel=2,
        )


def exists(folder: Path) -> bool:
    """Whether there is any checkpoint, damaged or not."""
    return bool(_folders(folder))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


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


@dataclass(frozen=True)
class Place:
    """One of `world` processes.

    Attributes:
        rank: 0 .. world-1.
        world: number of processes.
        device: where the model of this process lives.
        group: the process group; None for a single process.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str = "auto", *, wait_hours: float = 2.0) -> Iterator[Place]:
        """The place of this process: torchrun's environment if there is one, otherwise a world of one.

        Args:
            device: as in the configurations.
            wait_hours: what a process waits for the others at most, wherever they meet.

        Raises:
            ValueError: the device does not exist.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        where = _device(device, world)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if world == 1:
            yield cls(0, 1, where, None)
            return
        # Others wait while the first rank makes a corpus or validates: torch's ten minutes are too short.
        patience = timedelta(hours=wait_hours)
        store, rank, world = next(rendezvous("env://", timeout=patience))
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=_own_store(store, rank, world),
            rank=rank,
            world_size=world,
            timeout=patience,
        )
        try:
            yield cls(rank, world, where, dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def exclusive(self, folder: Path) -> Iterator[None]:
        """The first rank holds the folder for this run; RuntimeError if another run has it."""
        with exclusive(folder) if self.first else contextlib.nullcontext():
            yield

    def first_then_all(self, make: Callable[[], T]) -> T:
        """Runs `make` on the first rank, then on all others, which find what the first one wrote."""
        made = make() if self.first else None
        if self.group is not None:
            dist.barrier(self.group)
        return make() if made is None else made

    def any(self, *here: bool) -> list[bool]:
        """Of each flag, whether it holds on any rank."""
        if self.group is None:
            return list(here)
        flags = torch.tensor(here, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order; anything that can be pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the ranks: one collective for all of one dtype."""
        if self.group is None:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            dist.all_reduce(flat, group=self.group)
            flat /= self.world
            for tensor, mean in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def peak_memory_mib(self) -> float:
        """Peak of the CUDA allocator, or of the process on a CPU, in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if platform.system() == "Darwin" else 2**10)

    def describe(self) -> str:
        """For people."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"CPU, {torch.get_num_threads()} threads"
        return name if self.world == 1 else f"{self.world} processes, {name}"


def _own_store(store: Store, rank: int, world: int) -> Store:
    """The part of a store that only the processes started together write to.

    torchrun restarts processes with the store of those before, where the dead ones' addresses still are: who
    reads these instead of the new ones waits for a dead peer (pytorch/pytorch#135712). So every process gives
    itself a name, and the first one tells each of the names that it finds where to meet; it goes on when all
    have come, which only living ones do.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"clsp_fast/{rank}", own)
        session = store.get(f"clsp_fast/{own}").decode()
        store.add(f"{session}/come", 1)
    else:
        session, told = f"clsp_fast/{own}", set[bytes]()
        while store.add(f"{session}/come", 0) < world - 1:
            keys = [f"clsp_fast/{other}" for other in range(1, world)]
            names = {store.get(key) for key in keys if store.check([key])}
            for name in names - told:
                store.set(f"clsp_fast/{name.decode()}", session)
            told |= names
            time.sleep(0.01)
    return PrefixStore(session, store)


def _device(name: str, world: int) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto", "cpu" or "cuda[:N]", got {name!r}') from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f'device is {name!r}, but no CUDA device was found; use --device cpu or "auto"')
    if device.index is not None and world > 1:
        raise ValueError(f'device must be "auto", "cpu" or "cuda" with several processes, got {name!r}')
    return torch.device("cuda", local) if device.index is None else device
