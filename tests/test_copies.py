"""Copies between the host and a GPU."""

from __future__ import annotations

import pytest
import torch

from clsp_fast import copies


def test_on_the_cpu_nothing_is_copied() -> None:
    x, cpu = torch.ones(3), torch.device("cpu")
    assert copies.to_device(x, cpu) is x
    assert copies.read_later(x)() is x
    assert copies.Uploads(cpu).upload(x) is x


@pytest.mark.gpu
def test_copies_arrive_and_memory_is_not_reused_before_they_have(cuda: torch.device) -> None:
    uploads = copies.Uploads(cuda)
    work = torch.randn(4096, 4096, device=cuda)
    reads = []
    for i in range(50):
        x = torch.full((1024, 256), float(i))
        work = work @ work.T.sigmoid()  # the GPU is busy while the host makes the next tensors
        mean = (uploads.upload(x) + copies.to_device(x, cuda)).mean()
        reads.append(copies.read_later(mean[None]))
        del x
    assert [float(read()) for read in reads] == [2.0 * i for i in range(50)]
