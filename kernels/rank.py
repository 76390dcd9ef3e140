"""Retrieval ranks in both directions, and the k nearest rows, without M x N memory.

    s_ij = <x_i, y_j>; text j describes audio owner[j]
    target of a query: its best positive; of equally good ones, the first
    rank = #(s > target) + #(s = target, index < target's index), over pairs that are not positive

Shape suffixes: M audio rows, N text or database rows, Q queries, D joint dimension, K neighbours, T tiles.

Ranks, 2 M N D FLOPs: one kernel is launched twice. The first launch writes the scores of positive pairs and
skips tiles that have none. The second compares every other score with them. Both launches run the same
binary, so a pair has the same score, bit by bit, in both. Each tile's counts are integers, and are added
without atomics.

Neighbours, 2 Q N D FLOPs: each program keeps the K best rows of its queries over a run of database tiles. A
tile costs one comparison per element, unless it holds a better score than the worst of those kept.

Memory beyond inputs and results: 64 MB of counts, O(Q K) candidates per run. The same call gives the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    DTYPES,
    GROUP,
    SIZES,
    on_device,
    operand,
    panel_rows,
    score_arguments,
    score_tile,
    tile_grid,
    tile_position,
)

MOST_NEIGHBOURS = 32
"""The largest k of the kernel. For a larger k, plain torch sorts the scores."""

_WORKSPACE_BYTES = 64 << 20
_CHUNK_ROWS = 1 << 20
# Enough programs to fill a large card twice. It is a constant, so that results do not depend on the card.
_PROGRAMS = 264
_SORTED_ROWS = 16_384


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


def topk_reference(queries_QD: Tensor, database_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition of `topk`, by sorting chunks of the database."""
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    index_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for first in range(0, len(database_ND), _SORTED_ROWS):
        chunk_QC = queries_QD @ database_ND[first : first + _SORTED_ROWS].to(queries_QD.dtype).T
        order_C = torch.arange(first, first + chunk_QC.shape[1], device=chunk_QC.device)
        scores_QK, order = torch.cat([scores_QK, chunk_QC], 1).sort(dim=1, descending=True, stable=True)
        index_QK = torch.cat([index_QK, order_C.expand(chunk_QC.shape)], 1).gather(1, order)[:, :k]
        scores_QK = scores_QK[:, :k]
    return scores_QK, index_QK


@triton.jit
def _below(x):
    """The largest float less than x."""
    bits = x.to(tl.int32, bitcast=True)
    step = tl.where(x > 0, bits - 1, tl.where(x < 0, bits + 1, -2147483647))
    return step.to(tl.float32, bitcast=True)


# `phase` must not be specialised on its value, because both launches must run the same binary.
@triton.jit(do_not_specialize=[*SIZES, "phase"])
def _rank_kernel(
    x,
    y,
    owner,
    pair,
    target,
    target_index,
    row_count,
    column_count,
    phase,
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
    """Phase 0: scores of the tile's positives, `pair` (N,). Phase 1: counts of its rows and columns."""
    tile_m, tile_n = tile_position(tiles_m, tiles_n, GROUP)
    row = first_row + tile_m * BM
    column = tile_n * BN
    row_M = tl.arange(0, BM)
    i_M = row + row_M
    j_N = column + tl.arange(0, BN)
    owner_N = tl.load(owner + j_N, mask=j_N < N, other=-1)
    # The row of each text's clip, relative to the tile's first row.
    clip_N = tl.minimum(tl.maximum(owner_N, -1), M).to(tl.int32) - row
    positives = tl.max(((clip_N >= 0) & (clip_N < BM)).to(tl.int32), 0) > 0
    if (phase == 1) | positives:
        s = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
        if phase == 0:
            score_N = tl.sum(tl.where(clip_N[None, :] == row_M[:, None], s, 0.0), 0)
            tl.store(pair + j_N, score_N, mask=(clip_N >= 0) & (clip_N < BM))
        else:
            target_M = tl.load(target + i_M, mask=i_M < M, other=float("inf"))
            target_N = tl.load(pair + j_N, mask=j_N < N, other=float("inf"))
            at_M = tl.load(target_index + i_M, mask=i_M < M, other=0)
            if positives | (row + BM > M) | (column + BN > N):
                s = tl.where((i_M < M)[:, None] & (j_N < N)[None, :], s, float("-inf"))
                s = tl.where(clip_N[None, :] == row_M[:, None], float("-inf"), s)
                bound = tl.where(j_N[None, :] < at_M[:, None], _below(target_M)[:, None], target_M[:, None])
                count_M = tl.sum((s > bound).to(tl.int32), 1)
                ties = (s == target_N[None, :]) & (row_M[:, None] < clip_N[None, :])
                count_N = tl.sum(((s > target_N[None, :]) | ties).to(tl.int32), 0)
            else:
                # No target is in this tile. So of a row or column, either all ties count or none does.
                target_M = tl.where(at_M > column, _below(target_M), target_M)
                target_N = tl.where(clip_N > 0, _below(target_N), target_N)
                count_M = tl.sum((s > target_M[:, None]).to(tl.int32), 1)
                count_N = tl.sum((s > target_N[None, :]).to(tl.int32), 0)
            row_at = tile_n.to(tl.int64) * tiles_m * BM + tile_m * BM + row_M
            tl.store(row_count + row_at, count_M)
            tl.store(column_count + tile_m.to(tl.int64) * N + j_N, count_N, mask=j_N < N)


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _topk_kernel(
    x,
    y,
    best,
    best_index,
    run,
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
    K: tl.constexpr,
):
    """The K best, unordered, of BM queries over a run of `run` database tiles: (runs, padded queries, K)."""
    row = tl.program_id(0) % tiles_m * BM
    part = tl.program_id(0) // tiles_m
    kept = tl.full([BM, K], float("-inf"), tl.float32)
    # Free places have distinct negative indices, so that exactly one place is replaced at a time.
    kept_index = tl.zeros([BM, K], tl.int32) - 1 - tl.arange(0, K)[None, :]
    floor_M = tl.full([BM], float("-inf"), tl.float32)
    for tile in range(part * run, tl.minimum(part * run + run, tiles_n)):
        column = tile * BN
        j_N = column + tl.arange(0, BN)
        s = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
        s = tl.where((j_N < N)[None, :], s, float("-inf"))
        top_M = tl.max(s, 1)
        while tl.max((top_M > floor_M).to(tl.int32), 0) > 0:
            at_M = tl.min(tl.where(s == top_M[:, None], j_N[None, :], 2147483647), 1)
            # Replaces the worst one kept; of equal ones, the last. The index of the new one is the highest.
            worst = kept == floor_M[:, None]
            last_M = tl.max(tl.where(worst, kept_index, -2147483648), 1)
            place = worst & (kept_index == last_M[:, None]) & (top_M > floor_M)[:, None]
            kept = tl.where(place, top_M[:, None], kept)
            kept_index = tl.where(place, at_M[:, None], kept_index)
            floor_M = tl.min(kept, 1)
            s = tl.where(j_N[None, :] == at_M[:, None], float("-inf"), s)
            top_M = tl.max(s, 1)
    at = (part * tiles_m * BM + row + tl.arange(0, BM)).to(tl.int64)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(best + at, kept)
    tl.store(best_index + at, kept_index)


KERNELS = {"rank": _rank_kernel, "topk": _topk_kernel}
"""The kernels that budgets.py compiles."""
CONSTANTS = {"K": MOST_NEIGHBOURS}


@torch.library.custom_op("clsp_fast::rank_counts", mutates_args=())
def _rank_counts(audio: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of rows (M,) and columns (N,), int64; -1 without a positive."""
    m, n = len(audio), len(text)
    rows, columns = owner.new_zeros(m), owner.new_zeros(n)
    if m == 0 or n == 0:
        return rows - 1, columns - 1
    x, y = operand(audio, audio.dtype), operand(text, text.dtype)
    pair = audio.new_full((n,), torch.inf, dtype=torch.float32)
    order = torch.arange(n, dtype=torch.int32, device=owner.device)
    with on_device(audio):
        # The first launch does not read the targets. `pair` and `order` stand in for them, because arguments
        # of other types would select another binary.
        _launch_panels(x, y, owner, pair, 0, rows, columns, pair, order)
        owned = (owner >= 0) & (owner < m)
        # One extra row, for the texts that have no clip.
        clip = torch.where(owned, owner, m)
        target = pair.new_full((m + 1,), -torch.inf).scatter_reduce(0, clip, pair, "amax")
        best = torch.where(pair == target[clip], clip, m)
        at = order.new_full((m + 1,), n).scatter_reduce(0, best, order, "amin")
        captioned = at[:m] < n
        target = torch.where(captioned, target[:m], torch.inf)
        _launch_panels(x, y, owner, pair, 1, rows, columns, target, at)
    return torch.where(captioned, rows, -1), torch.where(owned, columns, -1)


@_rank_counts.register_fake
def _(audio, text, owner):  # type: ignore[no-untyped-def]
    return owner.new_empty(len(audio)), owner.new_empty(len(text))


def _launch_panels(
    x: Tensor,
    y: Tensor,
    owner: Tensor,
    pair: Tensor,
    phase: int,
    rows: Tensor,
    columns: Tensor,
    target: Tensor,
    target_index: Tensor,
) -> None:
    """Launches one phase over panels of rows; phase 1 adds its counts to `rows` and `columns`."""
    arguments = score_arguments("rank", x, y)
    m, n, step = arguments["M"], arguments["N"], arguments["BM"]
    tiles_n = triton.cdiv(n, arguments["BN"])
    panel = panel_rows(m, 4 * tiles_n + 4 * n // step, _WORKSPACE_BYTES, step)
    row_parts = owner.new_empty(tiles_n * panel, dtype=torch.int32)
    column_parts = owner.new_empty(panel // step, n, dtype=torch.int32)
    for first in range(0, m, panel):
        stop = min(first + panel, m)
        grid, position = tile_grid(arguments, first, stop)
        row_count = row_parts[: grid[0] * step].view(tiles_n, -1)
        column_count = column_parts[: position["tiles_m"]]
        _rank_kernel[grid](
            **arguments,
            **position,
            phase=phase,
            owner=owner,
            pair=pair,
            target=target,
            target_index=target_index,
            row_count=row_count,
            column_count=column_count,
        )
        if phase == 1:
            rows[first:stop] = row_count[:, : stop - first].sum(0)
            columns += column_count.sum(0)


@torch.library.custom_op("clsp_fast::topk_chunk", mutates_args=())
def _topk_chunk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (Q, k), float32, and row numbers, int64, of the k best. Needs at least one query and k rows."""
    with on_device(queries):
        x, y = operand(queries, queries.dtype), operand(database, queries.dtype)
        arguments = score_arguments("topk", x, y)
        rows = arguments["BM"]
        tiles_m, tiles_n = triton.cdiv(len(x), rows), triton.cdiv(len(y), arguments["BN"])
        run = triton.cdiv(tiles_n, max(1, _PROGRAMS // tiles_m))
        runs = triton.cdiv(tiles_n, run)
        width = max(2, triton.next_power_of_2(k))
        best = x.new_empty(runs, tiles_m * rows, width, dtype=torch.float32)
        index = torch.empty_like(best, dtype=torch.int32)
        _topk_kernel[(tiles_m * runs,)](
            **arguments, tiles_m=tiles_m, tiles_n=tiles_n, best=best, best_index=index, run=run, K=width
        )
        scores, places = (t[:, : len(x)].transpose(0, 1).flatten(1) for t in (best, index))
        return _merged(scores, places.to(torch.int64), k)


@_topk_chunk.register_fake
def _(queries, database, k):  # type: ignore[no-untyped-def]
    scores = queries.new_empty(len(queries), k, dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _merged(scores: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each row, equal ones in the order of their indices."""
    index, order = index.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), index.gather(1, order[:, :k])


def rank_counts(audio_MD: Tensor, text_ND: Tensor, text_owner_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each audio row, the rank of its best text among all texts; for each text, the rank of its clip.

    Args:
        audio_MD: bfloat16, float16 or float32, (M, D), finite.
        text_ND: (N, D), same dtype and device, finite.
        text_owner_N: int64 (N,): text j describes audio text_owner_N[j], or none if this is outside 0..M-1.

    Returns:
        int64 (M,) and (N,): 0-based ranks, -1 if a query has no positive.

    Raises:
        ValueError: a shape is wrong, or the device is not supported.
        TypeError: a dtype is not supported.
    """
    _check(audio_MD, text_ND)
    if text_owner_N.dtype != torch.int64 or text_owner_N.shape != text_ND.shape[:1]:
        raise ValueError(
            f"text_owner_N must be int64 of shape ({len(text_ND)},), "
            f"got {text_owner_N.dtype} {tuple(text_owner_N.shape)}"
        )
    return _rank_counts(audio_MD.detach(), text_ND.detach(), text_owner_N.contiguous())


def topk(queries_QD: Tensor, database_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k database rows of largest inner product with each query, best first, equal ones by row number.

    Args:
        queries_QD: bfloat16, float16 or float32, (Q, D), finite.
        database_ND: (N, D), in any of these dtypes, same device, finite. Both are converted to the wider of
            their dtypes, the database in chunks.
        k: 1..N; above `MOST_NEIGHBOURS`, plain torch sorts the scores.

    Returns:
        Scores (Q, k), float32, and row numbers (Q, k), int64.

    Raises:
        ValueError: shapes differ, k is out of range, a database row is not finite, scores overflow, or the
            device is not supported.
        TypeError: a dtype is not supported.
    """
    dtype = torch.promote_types(queries_QD.dtype, database_ND.dtype)
    queries_QD, database_ND = queries_QD.detach().to(dtype), database_ND.detach()
    _check(queries_QD, database_ND[:0].to(dtype))
    if not 1 <= k <= len(database_ND):
        raise ValueError(f"k must be in 1..{len(database_ND)}, got {k}")
    if k > MOST_NEIGHBOURS:
        return topk_reference(queries_QD.float(), database_ND, k)
    scores = queries_QD.new_empty(len(queries_QD), 0, dtype=torch.float32)
    index = torch.empty_like(scores, dtype=torch.int64)
    for first in range(0, len(database_ND) if len(queries_QD) else 0, _CHUNK_ROWS):
        chunk = database_ND[first : first + _CHUNK_ROWS]
        # If the sum is finite, so are all values. Unlike a check of each value, a sum needs no memory.
        if not bool(chunk.sum(dtype=torch.float32).isfinite()) and not bool(chunk.isfinite().all()):
            raise ValueError(f"database_ND must be finite, got NaN or infinity in row {first} or later")
        chunk_scores, rows = _topk_chunk(queries_QD, chunk, min(k, len(chunk)))
        rows = torch.where(rows < 0, rows, rows + first)  # free places stay negative
        scores, index = _merged(torch.cat([scores, chunk_scores], 1), torch.cat([index, rows], 1), k)
    if bool((index < 0).any()):  # fewer than k rows have a score above -infinity
        raise ValueError("queries_QD and database_ND are too large: their inner products overflow float32")
    return scores.reshape(-1, k), index.reshape(-1, k)


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            "both sides must be matrices with the same, positive number of columns, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != y.dtype or x.dtype not in DTYPES or x.device != y.device:
        raise TypeError(
            "both sides must share a dtype (bfloat16, float16 or float32) and a device, "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
