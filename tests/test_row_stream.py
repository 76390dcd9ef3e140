"""Rows in chunks on a device: their values, for any dtype and source. The CPU copies like a card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clsp_fast import row_stream
from clsp_fast.row_stream import Rows, device_chunks


def all_rows(
    parts: list[tuple[int, Rows]], device: torch.device, buffer_bytes: int
) -> list[tuple[int, Tensor]]:
    """Copies of the chunks, because a chunk is overwritten by a later one."""
    chunks = device_chunks(parts, device, buffer_bytes=buffer_bytes)
    return [(first, chunk.to("cpu", copy=True)) for first, chunk in chunks]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_mapped_file_arrives_in_chunks(kernel_device: torch.device, tmp_path: Path, dtype: str) -> None:
    rows = np.random.default_rng(0).standard_normal((103, 8)).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    chunks = all_rows([(5, mapped)], kernel_device, 20 * rows[0].nbytes)
    assert [first for first, _ in chunks] == [5, 25, 45, 65, 85, 105]
    assert [len(chunk) for _, chunk in chunks] == [20] * 5 + [3]
    assert torch.equal(torch.cat([chunk for _, chunk in chunks]), torch.from_numpy(rows))


def test_parts_of_several_dtypes_and_widths(kernel_device: torch.device) -> None:
    parts: list[tuple[int, Rows]] = [
        (0, np.ones((7, 4), np.float16)),
        (7, 2 * np.ones((9, 4), np.float16)),
        (100, 3 * np.ones((5, 6), np.float32)),
        (200, np.ones((0, 6), np.float32)),
    ]
    chunks = all_rows(parts, kernel_device, 3 * 4 * 2)
    assert [first for first, _ in chunks] == [0, 3, 6, 7, 10, 13, 100, 101, 102, 103, 104]
    for first, chunk in chunks:
        value = 1 if first < 7 else 2 if first < 100 else 3
        assert (chunk == value).all()
        assert chunk.dtype == (torch.float32 if first >= 100 else torch.float16)


def test_buffers_are_no_larger_than_the_longest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    class Recorded(row_stream._Buffers):
        def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
            sizes.append((rows, columns))
            super().__init__(rows, columns, dtype, device)

    monkeypatch.setattr(row_stream, "_Buffers", Recorded)
    lengths = [3, 0, 10, 7]
    parts: list[tuple[int, Rows]] = [(100 * i, np.ones((n, 4), np.float32)) for i, n in enumerate(lengths)]
    parts.append((400, np.ones((200, 6), np.float32)))
    chunks = all_rows(parts, torch.device("cpu"), 50 * 6 * 4)
    assert sizes == [(10, 4), (50, 6)]
    assert [len(chunk) for _, chunk in chunks] == [3, 10, 7, 50, 50, 50, 50]


def test_two_buffers_take_turns() -> None:
    """The chunk before the last one is intact while the next one is copied."""
    buffers = row_stream._Buffers(2, 3, torch.float32, torch.device("cpu"))
    first = buffers.copy(np.ones((2, 3), np.float32))
    buffers.used()
    second = buffers.copy(torch.full((1, 3), 2.0))
    assert (first == 1).all()
    assert (second == 2).all()
    buffers.used()
    assert buffers.copy(np.zeros((2, 3), np.float32)).data_ptr() == first.data_ptr()


def test_rows_on_the_device_are_not_copied(kernel_device: torch.device) -> None:
    rows = torch.randn(50, 4, dtype=torch.bfloat16, device=kernel_device)
    ((first, chunk),) = device_chunks([(3, rows)], kernel_device, buffer_bytes=8)
    assert first == 3
    assert chunk is rows


def test_rows_that_require_gradients_are_copied_without_them() -> None:
    rows = torch.randn(5, 3, requires_grad=True)
    buffers = row_stream._Buffers(5, 3, torch.float32, torch.device("cpu"))
    chunk = buffers.copy(rows)
    assert torch.equal(chunk, rows)
    assert not chunk.requires_grad
    assert not buffers._host.requires_grad


@pytest.mark.gpu
def test_bfloat16_rows_of_the_host_are_copied(cuda: torch.device) -> None:
    rows = torch.randn(50, 4, dtype=torch.bfloat16)
    chunks = all_rows([(0, rows)], cuda, 80)
    assert len(chunks) == 5
    assert torch.equal(torch.cat([chunk for _, chunk in chunks]), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["copies", "uses"])
def test_copies_and_uses_wait_for_each_other(cuda: torch.device, late: str) -> None:
    """Delays one of the two streams. If the code waited for one event too few, a chunk would have the values
    of another one."""
    cycles = 20_000_000  # some 10 ms, in which the host launches the work on many chunks
    buffers = row_stream._Buffers(2, 1024, torch.float32, cuda)
    results = []
    for i in range(8):
        if late == "copies":
            with torch.cuda.stream(buffers._stream):
                torch.cuda._sleep(cycles)
        chunk = buffers.copy(np.full((2, 1024), float(i + 1), np.float32))
        if late == "uses":
            torch.cuda._sleep(cycles)
        results.append(chunk.clone())
        buffers.used()
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert (result == i + 1).all()
