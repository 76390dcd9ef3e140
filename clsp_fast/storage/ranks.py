"""The processes (ranks) of a run and their collective operations, which also work in a single process."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from clsp_fast.storage import files

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of a run.

    Attributes:
        rank: 0 .. world-1.
        world: number of processes.
        device: device of the model in this process.
        group: the process group; None for a single process.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str = "auto", *, wait_hours: float = 2.0) -> Iterator[Ranks]:
        """Joins the processes that torchrun started; without torchrun, the process is alone.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            wait_hours: how long a process waits for the others, at the start and in collective operations.

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
        # The other ranks wait while the first one makes a corpus or validates, which can take longer than
        # torch's default timeout of ten minutes.
        timeout = timedelta(hours=wait_hours)
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            # With gloo for tensors on the CPU, the processes exchange flags and objects without their GPUs.
            "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
            store=_fresh_store(store, rank, world),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        try:
            yield cls(rank, world, where, dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def exclusive(self, folder: Path) -> Iterator[None]:
        """Locks the folder on the first rank, for all ranks; files.FolderInUse if another process has it."""
        with files.lock_folder(folder) if self.first else contextlib.nullcontext():
            yield

    def first_then_all(self, make: Callable[[], T]) -> T:
        """Runs `make` on the first rank, and then on the others, which can read what the first one wrote."""
        made = make() if self.first else None
        if self.group is not None:
            dist.barrier(self.group)
        return make() if made is None else made

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is True on any rank."""
        if self.group is None:
            return list(flags)
        return [bool(flag) for flag in self.largest(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def largest(self, x: Tensor) -> Tensor:
        """Replaces each element of x by its largest value on any rank, and returns x."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order. A value is anything that can be pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the ranks, with one collective operation for each dtype."""
        if self.group is None:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            dist.all_reduce(flat, group=self.group)
            flat /= self.world
            means = torch.split(flat, [tensor.numel() for tensor in same_dtype])
            for tensor, mean in zip(same_dtype, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def peak_memory_mib(self) -> float:
        """Peak of the CUDA allocator, or of the process on a CPU, in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if platform.system() == "Darwin" else 2**10)

    def describe(self) -> str:
        """The device and the number of processes, as text."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"CPU, {torch.get_num_threads()} threads"
        return name if self.world == 1 else f"{self.world} processes, {name}"


def _fresh_store(store: Store, rank: int, world: int) -> Store:
    """A part of the store that is used only by the processes that were started together.

    torchrun keeps the store when it restarts processes, so it still holds the addresses of dead processes. A
    process that reads such an address waits for a dead peer (pytorch/pytorch#135712). Therefore the processes
    agree on a session, a new prefix for keys. Each rank except the first writes a new random name into the
    store. The first rank writes the session under every name that it finds, until all other ranks have joined
    the session. Names of dead processes do no harm: dead processes cannot join.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"clsp_fast/{rank}", name)
        session = store.get(f"clsp_fast/{name}").decode()
        store.add(f"{session}/joined", 1)
    else:
        session, answered = f"clsp_fast/{name}", set[bytes]()
        while store.add(f"{session}/joined", 0) < world - 1:
            keys = [f"clsp_fast/{other_rank}" for other_rank in range(1, world)]
            names = {store.get(key) for key in keys if store.check([key])}
            for other_name in names - answered:
                store.set(f"clsp_fast/{other_name.decode()}", session)
            answered |= names
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
