"""Copies of rows that are on the host to a device, in chunks and ahead of their use.

Two buffers of pinned memory and two on the device take turns: while the device works on one chunk, the host
fills the other pinned buffer, and a second stream copies it. So a file may be larger than the memory of the
host and of the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows: TypeAlias = Tensor | NDArray[Any]
_BUFFER_BYTES = 64 << 20


def device_chunks(
    parts: Sequence[tuple[int, Rows]], device: torch.device, *, buffer_bytes: int = _BUFFER_BYTES
) -> Iterator[tuple[int, Tensor]]:
    """Yields the rows of all parts as tensors on the device, with the number of their first row.

    A chunk is valid until the next one is requested. By then the caller must have launched all work on it, on
    the current stream. It need not wait for this work.

    Args:
        parts: the number of the first row, and the rows (N, D), of one or more matrices. A part that is
            already on the device is neither copied nor divided.
        device: where the chunks go.
        buffer_bytes: largest size of each of the four buffers.
    """
    longest: dict[tuple[int, torch.dtype], int] = {}
    for _, rows in parts:
        longest[_kind(rows)] = max(longest.get(_kind(rows), 1), len(rows))
    buffers: _Buffers | None = None
    for first, rows in parts:
        if isinstance(rows, Tensor) and rows.device == device:
            yield first, rows
            continue
        columns, dtype = _kind(rows)
        step = max(1, buffer_bytes // max(1, columns * dtype.itemsize))
        step = min(step, longest[columns, dtype])
        if buffers is None or not buffers.fit(rows):
            buffers = _Buffers(step, columns, dtype, device)
        for start in range(0, len(rows), step):
            yield first + start, buffers.copy(rows[start : start + step])
            buffers.used()


class _Buffers:
    """Two pairs of buffers, and the events that say when they are free. On the CPU there are no events."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        size = (2, rows, columns)
        self._host = torch.empty(size, dtype=dtype, pin_memory=self._cuda)
        self._device = torch.empty(size, dtype=dtype, device=device)
        self._turn = 0
        if self._cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory may have been freed by work that the current stream has not done yet.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._copied = [_event() for _ in range(2)]
            self._used = [_event() for _ in range(2)]

    def fit(self, rows: Rows) -> bool:
        """Whether the buffers have the width and dtype of these rows."""
        return (self._host.shape[2], self._host.dtype) == _kind(rows)

    def copy(self, rows: Rows) -> Tensor:
        """Starts the copy of some rows. Work of the current stream waits for it."""
        turn, count = self._turn, len(rows)
        host, result = self._host[turn, :count], self._device[turn, :count]
        if self._cuda:
            self._copied[turn].synchronize()  # the copy before the last one, which read this pinned buffer
        if isinstance(rows, Tensor):
            host.copy_(rows.detach())
        else:
            np.copyto(host.numpy(), rows)
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            if self._cuda:
                self._stream.wait_event(self._used[turn])
            result.copy_(host, non_blocking=True)
            if self._cuda:
                self._copied[turn].record(self._stream)
        if self._cuda:
            torch.cuda.current_stream(result.device).wait_event(self._copied[turn])
        return result

    def used(self) -> None:
        """Notes that all work on the last copy was launched, and switches to the other buffers."""
        if self._cuda:
            self._used[self._turn].record(torch.cuda.current_stream(self._device.device))
        self._turn = 1 - self._turn


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _kind(rows: Rows) -> tuple[int, torch.dtype]:
    """The number of columns and the dtype."""
    if isinstance(rows, Tensor):
        return rows.shape[1], rows.dtype
    return rows.shape[1], torch.from_numpy(np.empty(0, rows.dtype)).dtype
