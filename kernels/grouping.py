"""Captions grouped by the clip that they describe: a stable sort on the device, in two launches.

    order:  texts sorted by owner; texts of the same owner keep their order
    offset: offset_i = number of texts whose owner is less than i
    The texts of clip i are order[offset_i], ..., order[offset_{i+1} - 1].

Shape suffixes: M audio rows, N text rows, L lanes of a program, S texts of one step.

The first kernel sorts blocks of BLOCK texts by counting: the rank of a text is the number of texts of its
block that come before it. The second kernel adds the number of texts of all other blocks that come before it.
A binary search finds this number in each sorted block. All this takes N BLOCK comparisons and at most
(M + N) (N / BLOCK) log2(BLOCK) loads: little beside the M N D products of the loss. A block that lies wholly
before or behind the texts of a program is not searched. The host does not wait for the device. No kernel uses
atomics, and only one result is right, so it has the same bits in every run.

An owner outside 0..M-1 belongs to no clip. The kernels also check owners and weights, because a separate
check would cost up to five launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, OPTIONS, check_argument, check_tensor, on_device

BLOCK, LANES, STEP = 2048, 128, 32
if INTERPRETED:  # a program of the interpreter costs a millisecond, an element next to nothing
    BLOCK = LANES = STEP = 512


def group_by_owner_reference(owner_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The definition of the order and the offsets of `group_by_owner`."""
    sorted_N, order_N = owner_N.clamp(-1, rows).sort(stable=True)
    clip_M = torch.arange(rows + 1, device=owner_N.device)
    return order_N.to(torch.int32), torch.searchsorted(sorted_N, clip_M).to(torch.int32)


def check_groups(groups: tuple[Tensor, Tensor] | None, rows: int, texts: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `groups` fits the numbers of rows and texts."""
    if groups is None:
        if rows != texts:
            raise ValueError(
                f"without groups, each row must have one text, got {rows} rows and {texts} texts"
            )
        return
    for name, x, length in zip(("order", "offset"), groups, (texts, rows + 1), strict=True):
        check_argument(f"{name} of groups", x, torch.int32, (length,), device)


@triton.jit
def to_float64(x):
    """x in float64. The interpreter converts 16-bit numbers correctly only to float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def from_float64(x, dtype: tl.constexpr):
    """A float64 number in another dtype. It is rounded to float32 before it is rounded to 16 bits."""
    return x if dtype == tl.float64 else x.to(tl.float32).to(dtype)


@triton.jit
def captions_of(offset, i_R, inside_R, SINGLE: tl.constexpr):
    """For each row, the place of its first caption in `order`, and the number of its captions.

    SINGLE says that text i is the only caption of row i. Then there are neither `order` nor `offset`.
    """
    if SINGLE:
        first_R = i_R
        count_R = inside_R.to(tl.int32)
    else:
        first_R = tl.load(offset + i_R, mask=inside_R, other=0)
        count_R = tl.load(offset + i_R + 1, mask=inside_R, other=0) - first_R
    return first_R, count_R


@triton.jit
def _clip(owner, M):
    """An owner as int32: -1 or M if it is outside 0..M-1."""
    return tl.minimum(tl.maximum(owner, -1), M).to(tl.int32)


@triton.jit(do_not_specialize=["M", "N"])
def _sort_kernel(
    owner,
    weight,
    sorted_owner,
    sorted_index,
    wrong,
    M,
    N,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Sorts each block of texts, and counts wrong owners and weights: `wrong` (programs, 2)."""
    program = tl.program_id(0)
    j_L = program * LANES + tl.arange(0, LANES)
    inside_L = j_L < N
    owner_L = tl.load(owner + j_L, mask=inside_L, other=0)
    key_L = _clip(owner_L, M)
    first = program * LANES // BLOCK * BLOCK
    rank_L = tl.zeros([LANES], tl.int32)
    for start in range(first, tl.minimum(first + BLOCK, N), STEP):
        j_S = start + tl.arange(0, STEP)
        # Texts beyond the end come behind all others.
        key_S = _clip(tl.load(owner + j_S, mask=j_S < N, other=M), M)
        equal = (key_S[None, :] == key_L[:, None]) & (j_S[None, :] < j_L[:, None])
        rank_L += tl.sum((equal | (key_S[None, :] < key_L[:, None])).to(tl.int32), 1)
    tl.store(sorted_owner + first + rank_L, key_L, mask=inside_L)
    tl.store(sorted_index + first + rank_L, j_L, mask=inside_L)
    wrong_L = (owner_L < 0) | (owner_L >= M)
    tl.store(wrong + 2 * program, tl.sum((wrong_L & inside_L).to(tl.int32), 0))
    count = 0
    if WEIGHTED:
        weight_L = to_float64(tl.load(weight + j_L, mask=inside_L, other=0.0))
        right_L = (weight_L >= 0) & (weight_L < float("inf"))
        count = tl.sum((inside_L & ~right_L).to(tl.int32), 0)
    tl.store(wrong + 2 * program + 1, count)


@triton.jit(do_not_specialize=["M", "N"])
def _group_kernel(
    sorted_owner,
    sorted_index,
    wrong,
    order,
    offset,
    valid,
    M,
    N,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Order (N,), offsets (M + 1,), and whether all owners and all weights are right, (2,)."""
    program = tl.program_id(0)
    programs = (N + LANES - 1) // LANES
    is_text = program < programs
    at_L = tl.where(is_text, program, program - programs) * LANES + tl.arange(0, LANES)
    text_L = at_L < tl.where(is_text, N, 0)
    clip_L = at_L < tl.where(is_text, 0, M + 1)
    key_L = tl.load(sorted_owner + at_L, mask=text_L, other=M)
    key_L = tl.where(is_text, key_L, tl.minimum(at_L, M))
    home = tl.where(is_text, program * LANES // BLOCK, -1)
    place_L = tl.where(is_text, at_L - home * BLOCK, 0)
    lowest, highest = tl.min(key_L, 0), tl.max(key_L, 0)
    for block in range(0, (N + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        size = tl.minimum(BLOCK, N - start)
        # In earlier blocks, texts of the same owner come before, too.
        step = (block < home).to(tl.int32)
        if block != home:
            if tl.load(sorted_owner + start + size - 1) < lowest + step:
                place_L += size
            elif tl.load(sorted_owner + start) < highest + step:
                place_L += _count_below(sorted_owner + start, size, key_L + step, BLOCK, LANES)
    index_L = tl.load(sorted_index + at_L, mask=text_L, other=0)
    tl.store(order + place_L, index_L, mask=text_L)
    tl.store(offset + at_L, place_L, mask=clip_L)
    if program == 0:
        for which in range(0, 2):
            count_L = tl.zeros([LANES], tl.int32)
            for start in range(0, programs, LANES):
                at_L = start + tl.arange(0, LANES)
                count_L += tl.load(wrong + 2 * at_L + which, mask=at_L < programs, other=0)
            tl.store(valid + which, (tl.sum(count_L, 0) == 0).to(tl.int8))


@triton.jit
def _count_below(keys, size, key_L, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """How many of the first `size` sorted keys are less than each of key_L; `size` is at most BLOCK."""
    count_L = tl.zeros([LANES], tl.int32)
    step = BLOCK
    while step > 0:
        next_L = count_L + step
        fits_L = next_L <= size
        below_L = tl.load(keys + next_L - 1, mask=fits_L, other=0) < key_L
        count_L = tl.where(fits_L & below_L, next_L, count_L)
        step = step // 2
    return count_L


KERNELS = {"sort": _sort_kernel, "group": _group_kernel}
"""The kernels that budgets.py compiles. Each operator below launches one of them, and nothing else."""


@torch.library.custom_op("clsp_fast::sort_captions", mutates_args=())
def _sort_captions(owner: Tensor, weights: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Owners (N,) and indices (N,) of texts, sorted in blocks; numbers of wrong owners and weights."""
    n = len(owner)
    sorted_owner, sorted_index = (owner.new_empty(n, dtype=torch.int32) for _ in range(2))
    programs = triton.cdiv(n, LANES)
    wrong = owner.new_empty(programs, 2, dtype=torch.int32)
    with on_device(owner):
        _sort_kernel[(programs,)](
            owner,
            owner if weights is None else weights,
            sorted_owner,
            sorted_index,
            wrong,
            rows,
            n,
            BLOCK=BLOCK,
            LANES=LANES,
            STEP=STEP,
            WEIGHTED=weights is not None,
            **OPTIONS,
        )
    return sorted_owner, sorted_index, wrong


@_sort_captions.register_fake
def _(owner, weights, rows):  # type: ignore[no-untyped-def]
    empty = owner.new_empty(len(owner), dtype=torch.int32)
    programs = triton.cdiv(len(owner), LANES)
    return empty, torch.empty_like(empty), owner.new_empty(programs, 2, dtype=torch.int32)


@torch.library.custom_op("clsp_fast::group_captions", mutates_args=())
def _group_captions(
    sorted_owner: Tensor, sorted_index: Tensor, wrong: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Order (N,), offsets (rows + 1,), and validity (2,)."""
    order, offset = torch.empty_like(sorted_owner), sorted_owner.new_empty(rows + 1)
    valid = sorted_owner.new_empty(2, dtype=torch.int8)
    with on_device(sorted_owner):
        _group_kernel[(len(wrong) + triton.cdiv(rows + 1, LANES),)](
            sorted_owner,
            sorted_index,
            wrong,
            order,
            offset,
            valid,
            rows,
            len(order),
            BLOCK=BLOCK,
            LANES=LANES,
            **OPTIONS,
        )
    return order, offset, valid.view(torch.bool)


@_group_captions.register_fake
def _(sorted_owner, sorted_index, wrong, rows):  # type: ignore[no-untyped-def]
    valid = sorted_owner.new_empty(2, dtype=torch.bool)
    return torch.empty_like(sorted_owner), sorted_owner.new_empty(rows + 1), valid


def group_by_owner(
    owner_N: Tensor, rows: int, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Texts grouped by the clip that they describe, and whether owners and weights are right.

    Args:
        owner_N: int64 (N,), the clip of each text; N >= 1.
        rows: number of clips, M >= 1.
        weights_N: floating (N,), same device.

    Returns:
        order_N: int32, the texts sorted by owner. Texts of the same owner keep their order.
        offset: int32 (M + 1,), number of texts whose owner is less than i.
        valid: bool (2,): whether all owners are in 0..M-1, and whether all weights are finite and not
            negative.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a shape, device or number is wrong. The values on the device are not checked.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    check_tensor("owner_N", owner_N)
    if owner_N.ndim != 1 or not len(owner_N):
        raise ValueError(f"owner_N must be of shape (N,) with N >= 1, got {tuple(owner_N.shape)}")
    check_argument("owner_N", owner_N, torch.int64, (len(owner_N),), owner_N.device)
    check_argument("weights_N", weights_N, None, (len(owner_N),), owner_N.device)
    weights_N = None if weights_N is None else weights_N.contiguous()
    return _group_captions(*_sort_captions(owner_N.contiguous(), weights_N, rows), rows)
