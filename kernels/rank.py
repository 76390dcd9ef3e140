"""Retrieval ranks in both directions, without M x N memory.

    s_ij = <x_i, y_j>; text j describes audio owner[j]
    target of a query: its best positive; of equally good ones, the first
    rank = #(s > target) + #(s = target, index < target's index), over pairs that are not positive

Shape suffixes: M audio rows, N text rows, D joint dimension, C texts of a chunk.

No positive is ahead of the target, because the target is the best positive and the first of the best. So the
kernel compares all pairs and excludes none. It has three phases, which cost 2 M N D FLOPs and little more:

- PAIRS: each text with its clip. The clips are copied in the order of their texts. So only tiles on the
  diagonal are computed, whatever the owners are. They hold the scores of the pairs, and the ties with a pair
  among the texts of the same tile.
- TIES: the ties with a pair among the clips of the same tile. The texts are copied in the order of clips.
- COUNTS: all scores. A program keeps a column tile and runs over row tiles. It holds the counts of its
  columns in registers. In a tile that lies wholly before a target, all ties count; in any other tile, none
  do. The other phases add the ties in the target's own tile.

The phases compare scores for equality, so a pair must have the same score in each of them, bit by bit. It
has, because they run the same binary, and a tensor core computes each element of a tile by the same
operations. Counts are integers and are added without atomics.

Memory beyond inputs and results: two workspaces of 64 MB. The same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    SIZES,
    check_argument,
    check_operands,
    on_device,
    operand,
    panel_rows,
    score_arguments,
    score_tile,
    split_rows,
)

_WORKSPACE_BYTES = 64 << 20
_LONGEST_RUN = 127
"""Row tiles of a program. In packed counts, a byte holds at most two matches a tile: 2 * 127 <= 255."""

_PAIRS = tl.constexpr(0)
_TIES = tl.constexpr(1)
_COUNTS = tl.constexpr(2)


def rank_counts_reference(audio_MD: Tensor, text_ND: Tensor, text_owner_N: Tensor) -> tuple[Tensor, Tensor]:
    """The dense definition of `rank_counts`."""
    s_MN = audio_MD @ text_ND.T
    positive_MN = text_owner_N == torch.arange(len(audio_MD), device=s_MN.device)[:, None]

    def one_way(s: Tensor, positive: Tensor) -> Tensor:
        index = torch.arange(s.shape[1], device=s.device)
        target = s.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        at = torch.where(positive & (s == target), index, s.shape[1]).amin(1, keepdim=True)
        ahead = ((s > target) | ((s == target) & (index < at))) & ~positive
        return torch.where(positive.any(1), ahead.sum(1), -1)

    return one_way(s_MN, positive_MN), one_way(s_MN.T, positive_MN.T)


@triton.jit
def _below(x):
    """The largest float less than x. Below 0, it is a denormal, which comparisons must not take for 0."""
    bits = x.to(tl.int32, bitcast=True)
    step = tl.where(x > 0, bits - 1, tl.where(x < 0, bits + 1, -2147483647))
    return step.to(tl.float32, bitcast=True)


# A thread of sm_90 holds rows r and r + 8, and columns c, c + 1, c + 8 and c + 9 for many c. PACKED counts
# keep the four columns in the bytes of one integer, and add the two rows. So they need 16 registers instead
# of 64, and the threads exchange nothing before the end.
@triton.jit
def _no_counts(BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    return tl.zeros([BM // 16, 8, BN // 16, 4], tl.int32) if PACKED else tl.zeros([BN], tl.int32)


@triton.jit
def _count_columns(match_MN, BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """Number of matches in each column."""
    if PACKED:
        column_N = tl.arange(0, BN)
        byte_N = column_N // 8 % 2 * 2 + column_N % 2
        count = tl.where(match_MN, (1 << byte_N * 8)[None, :], 0)
        count = tl.reshape(count, [BM // 16, 2, 8, BN // 16, 2, 4, 2])
        count = tl.sum(tl.sum(tl.sum(count, 6), 4), 1)
    else:
        count = tl.sum(match_MN.to(tl.int32), 0)
    return count


@triton.jit
def _store_counts(count, to, clip, column, N, low, high, BN: tl.constexpr, PACKED: tl.constexpr):
    """Stores the counts of the columns whose clip is in [low, high)."""
    if PACKED:
        first = column + (tl.arange(0, BN // 16) * 16)[:, None] + (tl.arange(0, 4) * 2)[None, :]
        for byte in tl.static_range(4):
            at = first + byte // 2 * 8 + byte % 2
            clip_at = tl.load(clip + at, mask=at < N, other=-2)
            total = tl.sum(tl.sum((count >> (8 * byte)) & 255, 0), 0)
            tl.store(to + at, total, mask=(clip_at >= low) & (clip_at < high))
    else:
        j_N = column + tl.arange(0, BN)
        clip_N = tl.load(clip + j_N, mask=j_N < N, other=-2)
        tl.store(to + j_N, count, mask=(clip_N >= low) & (clip_N < high))


# `phase` must not be specialised on its value, because all launches must run the same binary.
@triton.jit(do_not_specialize=[*SIZES, "phase", "run"])
def _rank_kernel(
    x,
    y,
    clip,
    pair,
    target,
    target_index,
    block,
    row_count,
    column_count,
    phase,
    run,
    first_row,
    M,
    N,
    tiles_m,
    tiles_n,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """PAIRS: scores `block` (N, BN) of the column tile that has the row's number.
    TIES: per column, ties with `pair` before its clip, in the row tile of the clip: `column_count` (N,).
    COUNTS: comparisons with `target` and `pair` by column tile and by run: `row_count`, `column_count`."""
    PACKED: tl.constexpr = DESCRIPTORS and DOTS != "tf32x3"  # where it needs fewer registers
    tile_n = tl.program_id(0) % tiles_n
    part = tl.program_id(0) // tiles_n
    column = tile_n * BN
    row_M = tl.arange(0, BM)
    column_N = tl.arange(0, BN)
    if phase == _PAIRS:
        for tile in range(column // BM, tl.cdiv(tl.minimum(column + BN, N), BM)):
            i_M = tile * BM + row_M
            s = score_tile(
                x, y, tile * BM, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
            )
            inside_M = (i_M >= column) & (i_M < column + BN) & (i_M < M)
            at = i_M.to(tl.int64)[:, None] * BN + column_N[None, :]
            tl.store(block + at, s, mask=inside_M[:, None])
    # In these loops, `row >> 31` is 0. It makes the columns' values depend on the loop's variable. Otherwise
    # the compiler would load them before the loop, and they would occupy the registers that the tile needs.
    if phase == _TIES:
        clip_N = tl.load(clip + column + column_N, mask=column + column_N < N, other=-1)
        last = tl.max(clip_N, 0)
        first_tile = tl.where(last < 0, 1, tl.min(tl.where(clip_N < 0, M, clip_N), 0) // BM)
        for tile in range(first_tile, last // BM + 1):
            row = tile * BM
            s = score_tile(
                x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
            )
            j_N = column + (row >> 31) + column_N
            clip_N = tl.load(clip + j_N, mask=j_N < N, other=-1)
            pair_N = tl.load(pair + j_N, mask=j_N < N, other=float("inf"))
            s = tl.where(clip_N[None, :] > (row + row_M)[:, None], s, float("nan"))
            ties = _count_columns(s == pair_N[None, :], BM, BN, PACKED)
            _store_counts(ties, column_count, clip, column, N, row, row + BM, BN, PACKED)
    if phase == _COUNTS:
        count = _no_counts(BM, BN, PACKED)
        for tile in range(part * run, tl.minimum(part * run + run, tiles_m)):
            row = first_row + tile * BM
            i_M = row + row_M
            target_M = tl.load(target + i_M, mask=i_M < M, other=float("inf"))
            target_at_M = tl.load(target_index + i_M, mask=i_M < M, other=0)
            s = score_tile(
                x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
            )
            j_N = column + (row >> 31) + column_N
            if (row + BM > M) | (column + BN > N):
                s = tl.where((i_M < M)[:, None] & (j_N < N)[None, :], s, float("-inf"))
            clip_N = tl.load(clip + j_N, mask=j_N < N, other=-1)
            pair_N = tl.load(pair + j_N, mask=j_N < N, other=float("inf"))
            target_M = tl.where(target_at_M >= column + BN, _below(target_M), target_M)
            pair_N = tl.where(clip_N >= row + BM, _below(pair_N), pair_N)
            count_M = tl.sum((s > target_M[:, None]).to(tl.int32), 1)
            count += _count_columns(s > pair_N[None, :], BM, BN, PACKED)
            tl.store(row_count + tile_n.to(tl.int64) * tiles_m * BM + tile * BM + row_M, count_M)
        _store_counts(count, column_count + part.to(tl.int64) * N, clip, column, N, -1, M, BN, PACKED)


KERNELS = {"rank": _rank_kernel}
"""The kernels that budgets.py compiles."""


@torch.library.custom_op("clsp_fast::rank_counts", mutates_args=())
def _rank_counts(audio: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of rows (M,) and columns (N,), int64; -1 without a positive."""
    m, n = len(audio), len(text)
    if m == 0 or n == 0:
        return owner.new_full((m,), -1), owner.new_full((n,), -1)
    x, y = operand(audio, audio.dtype), operand(text, text.dtype)
    owned = (owner >= 0) & (owner < m)
    clip = torch.where(owned, owner, -1).to(torch.int32)
    with on_device(audio):
        pair, row_ties = _pairs(x, y, clip)
        # One extra row, for the texts that have no clip.
        row = torch.where(owned, owner, m)
        order = torch.arange(n, device=owner.device)
        target = pair.new_full((m + 1,), -torch.inf).scatter_reduce(0, row, pair, "amax")
        best = torch.where(pair == target[row], row, m)
        at = order.new_full((m + 1,), n).scatter_reduce(0, best, order, "amin")[:m]
        captioned = at < n
        target = torch.where(captioned, target[:m], torch.inf)
        pair = torch.where(owned, pair, torch.inf)
        rows, columns = _counts(x, y, clip, pair, target, at.to(torch.int32))
        rows += row_ties[at.clamp(max=n - 1)]
        columns += _column_ties(x, y, clip, pair)
    return torch.where(captioned, rows, -1), torch.where(owned, columns, -1)


@_rank_counts.register_fake
def _(audio, text, owner):  # type: ignore[no-untyped-def]
    return owner.new_empty(len(audio)), owner.new_empty(len(text))


def _pairs(x: Tensor, y: Tensor, clip_N: Tensor) -> tuple[Tensor, Tensor]:
    """Per text, the score with its clip, and the number of earlier texts of the same column tile that have
    the same score with this clip. Without a clip, both are meaningless."""
    n, width = len(y), score_arguments("rank", x, y)["BN"]
    pair_N = x.new_empty(n, dtype=torch.float32)
    ties_N = clip_N.new_empty(n, dtype=torch.int64)
    column = torch.arange(width, device=x.device)
    chunk = panel_rows(n, 4 * width + x.stride(0) * x.itemsize, _WORKSPACE_BYTES, _chunk_step(x, y))
    block = pair_N.new_empty(chunk, width)
    for first in range(0, n, chunk):
        part = slice(first, min(first + chunk, n))
        size = part.stop - first
        rows = _select_rows(x, clip_N[part].clamp(min=0))
        _launch(rows, y[part], _PAIRS, {"block": block})
        at = torch.arange(size, device=x.device)[:, None] % width
        score = block[:size].gather(1, at)
        pair_N[part] = score[:, 0]
        ties_N[part] = ((block[:size] == score) & (column < at)).sum(1)
    return pair_N, ties_N


def _column_ties(x: Tensor, y: Tensor, clip_N: Tensor, pair_N: Tensor) -> Tensor:
    """Per text, the number of earlier clips in the row tile of its clip that have the same score."""
    n = len(y)
    clip_N, order_N = clip_N.sort(stable=True)
    pair_N = pair_N[order_N]
    ties_N = torch.zeros_like(clip_N)
    chunk = panel_rows(n, y.stride(0) * y.itemsize, _WORKSPACE_BYTES, _chunk_step(x, y))
    for first in range(0, n, chunk):
        part = slice(first, first + chunk)
        columns = _select_rows(y, order_N[part])
        _launch(x, columns, _TIES, {"clip": clip_N[part], "pair": pair_N[part], "column_count": ties_N[part]})
    return torch.empty_like(ties_N).index_copy(0, order_N, ties_N)


def _counts(
    x: Tensor, y: Tensor, clip_N: Tensor, pair_N: Tensor, target_M: Tensor, target_index_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Per row and per column, the number of scores ahead of the target, without ties in the target's tile."""
    arguments = score_arguments("rank", x, y)
    m, n, step = arguments["M"], arguments["N"], arguments["BM"]
    tiles_n = triton.cdiv(n, arguments["BN"])
    panel = panel_rows(m, 4 * tiles_n, _WORKSPACE_BYTES, step)
    run, parts = split_rows(panel // step, tiles_n, _LONGEST_RUN)
    row_parts = clip_N.new_empty(tiles_n * panel)
    column_parts = clip_N.new_empty(parts, n)
    rows, columns = (torch.zeros(size, dtype=torch.int64, device=x.device) for size in (m, n))
    for first in range(0, m, panel):
        stop = min(first + panel, m)
        tiles_m = triton.cdiv(stop - first, step)
        row_count = row_parts[: tiles_n * tiles_m * step].view(tiles_n, -1)
        column_count = column_parts[: triton.cdiv(tiles_m, run)]
        tensors = {
            "clip": clip_N,
            "pair": pair_N,
            "target": target_M,
            "target_index": target_index_M,
            "row_count": row_count,
            "column_count": column_count,
        }
        _launch(x, y, _COUNTS, tensors, first_row=first, tiles_m=tiles_m, run=run)
        rows[first:stop] = row_count[:, : stop - first].sum(0)
        columns += column_count.sum(0)
    return rows, columns


def _launch(
    x: Tensor,
    y: Tensor,
    phase: tl.constexpr,
    tensors: dict[str, Tensor],
    *,
    first_row: int = 0,
    tiles_m: int = 1,
    run: int = 1,
) -> None:
    """Launches a phase. Tensors that the phase does not use are replaced by others of the same type, because
    other types would select another binary."""
    arguments: dict[str, Any] = score_arguments("rank", x, y)
    tiles_n = triton.cdiv(arguments["N"], arguments["BN"])
    integer = torch.empty(1, dtype=torch.int32, device=x.device)
    real = torch.empty(1, dtype=torch.float32, device=x.device)
    unused = dict.fromkeys(("clip", "target_index", "row_count", "column_count"), integer)
    unused |= dict.fromkeys(("pair", "target", "block"), real)
    _rank_kernel[(triton.cdiv(tiles_m, run) * tiles_n,)](
        **arguments,
        **unused | tensors,
        phase=phase.value,
        run=run,
        first_row=first_row,
        tiles_m=tiles_m,
        tiles_n=tiles_n,
    )


def _chunk_step(x: Tensor, y: Tensor) -> int:
    """Chunks of texts are multiples of this number, so that their tiles are those of the whole."""
    arguments = score_arguments("rank", x, y)
    return max(int(arguments["BM"]), int(arguments["BN"]))


def _select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copies of rows, with the stride of x, because another stride could select another binary."""
    buffer = x.new_empty(len(rows), x.stride(0))[:, : x.shape[1]]
    return torch.index_select(x, 0, rows, out=buffer)


def rank_counts(audio_MD: Tensor, text_ND: Tensor, text_owner_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each audio row, the rank of its best text among all texts; for each text, the rank of its clip.

    Args:
        audio_MD: bfloat16, float16 or float32, (M, D), finite.
        text_ND: (N, D), same dtype and device, finite. The products must not overflow float32.
        text_owner_N: int64 (N,); text j describes audio text_owner_N[j]; if out of range, it describes none.

    Returns:
        int64 (M,) and (N,): 0-based ranks, -1 if a query has no positive.

    Raises:
        ValueError: a shape is wrong, or the device is not supported.
        TypeError: an argument is no tensor, or its dtype is not supported.
    """
    check_operands(audio_MD, text_ND)
    check_argument("text_owner_N", text_owner_N, torch.int64, (len(text_ND),), text_ND.device)
    return _rank_counts(audio_MD.detach(), text_ND.detach(), text_owner_N.contiguous())
