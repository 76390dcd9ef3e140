"""Copies between the host and a GPU for which the host does not wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device.

    A GPU copies it in the order of its work, while the host goes on. That needs page-locked memory: a tensor
    of the CPU in other memory, or with gaps, is copied into such memory without gaps first.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    x = x.contiguous()
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


def read_later(x: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a tensor to the CPU. Calling the result waits for the copy, and returns it.

    Work that is given to the GPU between both calls does not delay the copy.
    """
    if x.device.type != "cuda":
        return lambda: x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


class Uploads:
    """Copies tensors to a device. A GPU makes the copies beside the work that it has been given so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, x: Tensor) -> Tensor:
        """The copy. Work that uses it must be given to the current stream."""
        if self._stream is None:
            return to_device(x, self._device)
        with torch.cuda.stream(self._stream):
            copy = to_device(x, self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # The memory belongs to the side stream, which must wait for the current stream before it
        # uses the memory again.
        copy.record_stream(current)
        return copy
