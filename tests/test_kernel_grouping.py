"""Captions are grouped by their clips as a stable sort does it, in any order of owners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clsp_fast.kernels.grouping import BLOCK, group_by_owner, group_by_owner_reference


def owners(name: str, texts: int, rows: int) -> Tensor:
    shuffled_N = torch.randint(rows, (texts,))
    return {
        "shuffled": shuffled_N,
        "in order": shuffled_N.sort()[0],
        "falling": shuffled_N.sort(descending=True)[0],
        "in turn": torch.arange(texts) % rows,
        "one clip": torch.full((texts,), rows // 2),
        "outside": torch.randint(-3, rows + 3, (texts,)),
    }[name]


@pytest.mark.parametrize("name", ["shuffled", "in order", "falling", "in turn", "one clip", "outside"])
@pytest.mark.parametrize(("texts", "rows"), [(1, 1), (3, 200), (100, 7), (2 * BLOCK + 5, 40)])
def test_the_order_is_that_of_a_stable_sort(
    kernel_device: torch.device, name: str, texts: int, rows: int
) -> None:
    owner_N = owners(name, texts, rows).to(kernel_device)
    order_N, offset, valid_2 = group_by_owner(owner_N, rows)
    expected_N, expected_offset = group_by_owner_reference(owner_N, rows)
    assert torch.equal(order_N, expected_N)
    assert torch.equal(offset, expected_offset)
    assert valid_2.tolist() == [bool(((owner_N >= 0) & (owner_N < rows)).all()), True]


def test_owners_beyond_32_bits_belong_to_no_clip(kernel_device: torch.device) -> None:
    owner_N = torch.tensor([1, 2**40, 0, -(2**40), 2**32], device=kernel_device)
    order_N, offset, valid_2 = group_by_owner(owner_N, 2)
    assert order_N.tolist() == [3, 2, 0, 1, 4]
    assert offset.tolist() == [1, 2, 3]
    assert valid_2.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), -1e-3])
def test_one_wrong_weight_among_many_is_seen(
    kernel_device: torch.device, dtype: torch.dtype, wrong: float
) -> None:
    texts = BLOCK + 100
    owner_N = (torch.arange(texts) % 5).to(kernel_device)
    weights_N = torch.rand(texts).to(kernel_device, dtype)
    weights_N[0] = torch.finfo(dtype).max
    assert group_by_owner(owner_N, 5, weights_N)[2].tolist() == [True, True]
    weights_N[texts - 2] = wrong
    assert group_by_owner(owner_N, 5, weights_N)[2].tolist() == [True, False]


def test_wrong_arguments_are_named(kernel_device: torch.device) -> None:
    owner_N = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    for error, arguments, message in (
        (ValueError, (owner_N, 0), "rows must be at least 1, got 0"),
        (ValueError, (owner_N[:0], 2), r"owner_N must be of shape \(N,\) with N >= 1, got \(0,\)"),
        (ValueError, (owner_N[None], 2), r"owner_N must be of shape \(N,\) with N >= 1, got \(1, 3\)"),
        (TypeError, (owner_N.tolist(), 2), "owner_N must be a torch.Tensor, got list"),
        (TypeError, (owner_N.int(), 2), "owner_N must be torch.int64 .* got torch.int32"),
        (TypeError, (owner_N, 2, [1.0] * 3), "weights_N must be a torch.Tensor, got list"),
        (TypeError, (owner_N, 2, owner_N), r"weights_N must be floating of shape \(3,\) .* got torch.int64"),
        (ValueError, (owner_N, 2, torch.ones(2, device=kernel_device)), r"weights_N .* torch.float32 \(2,\)"),
    ):
        with pytest.raises(error, match=message):
            group_by_owner(*arguments)  # type: ignore[arg-type]
