"""The k nearest rows of a database, by inner product, exactly and without Q x N memory.

    s_ij = <x_i, y_j>; the answer to query i: the k largest s_ij, equal ones by row number

Shape suffixes: Q queries, N database rows, D joint dimension, K neighbours, G groups of rows, C candidates.

1. Preselection, 2 Q N D FLOPs: a kernel computes approximate scores in a 16-bit dtype and keeps only the
   largest score of each group of 32 rows. The groups with the largest maxima are the candidates.
2. Rescoring: the rows of these groups get exact scores: sums in float64, rounded to float32 once.
3. Proof: let floor_i be the least maximum among the candidates of query i. A row of another group has an
   approximate score of at most floor_i, so an exact score of at most floor_i + margin_i. If the k-th exact
   score is larger, then no other row can be in the answer.
4. Queries without a proof, for example because many rows are equal, are searched by `_topk_chunk`. It
   compares all scores in float32 (three TF32 products for float32 operands) and keeps the k best.

The score of a query with a proof is a sum in float64, rounded to float32. The scores of another query have
the error of a float32 sum of D products, about 1e-6 |x| |y|. So rows whose scores differ by less may come in
another order, and the last one may be replaced by a row whose score differs by less than this error. A query
is answered by one of the two kinds of score alone, so equal rows have equal scores.

The margin. Let x~, y~ be the rounded operands, dx = x - x~, dy = y - y~, and s~ the approximate score. Then

    s - <x~, y~> = <dx, y> + <x~, dy>, so |s - s~| <= |dx| |y| + |x~| |dy| + D 2^-22 |x~| |y~|

The last term is for the sum. Products of 16-bit numbers are exact in float32, and D additions that truncate
lose at most D 2^-23 of the sum of magnitudes. Tensor cores add in blocks, so twice this is allowed. It also
covers the error of the float64 sum, which is at most D 2^-53 |x| |y|. The norms are measured: |x|, |dx| of
each query, and the largest |y|, |dy| of the database. Operands that are out of the range of float16 have a
large |dx| or |dy|, and so no proof.

Memory beyond inputs and results: a 16-bit copy of 128 MB, maxima of 64 MB, and candidates. The same call
gives the same bits. Reading the answer takes one host synchronisation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import SupportsIndex, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    OPTIONS,
    SIZES,
    check_operands,
    check_tensor,
    on_device,
    operand,
    score_arguments,
    score_tile,
    split_rows,
)

LARGEST_K = 32
"""The largest k."""
GROUP_ROWS = 32
"""Rows of the database that share one maximum."""
Chunks: TypeAlias = Callable[[], Iterable[tuple[int, Tensor]]]
"""Yields the chunks of the database from the first one on: the number of its first row, and its rows."""

_SPARE_GROUPS = 6
_NARROW_BYTES = 128 << 20
_MAXIMA_BYTES = 64 << 20
_QUERY_ROWS = 4096
_CHUNK_ROWS = 1 << 20
# Enough programs to fill a large card twice. It is a constant, so that results do not depend on the card.
_PROGRAMS = 264
_NORM_ROWS, _NORM_DEPTH = 16, 128
_RESCORE_DEPTH = 64
_OVERFLOW = "queries_QD and database_ND are too large: their inner products overflow float32"


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


@triton.jit(do_not_specialize=["N"])
def _narrow_kernel(
    rows,
    narrow,
    measures,
    N,
    stride,
    narrow_stride,
    D: tl.constexpr,
    NARROW: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Copies of rows in float16 if NARROW, and `measures` (3, N): the squared norm of a row, the squared norm
    of its rounding error, and 1 if it is not finite."""
    i_R = tl.program_id(0) * BR + tl.arange(0, BR)
    norm_R = tl.zeros([BR], tl.float32)
    error_R = tl.zeros([BR], tl.float32)
    infinite_R = tl.zeros([BR], tl.int32)
    for first in range(0, D, BD):
        d_D = first + tl.arange(0, BD)
        inside = (i_R < N)[:, None] & (d_D < D)[None, :]
        at = i_R.to(tl.int64)[:, None]
        value = tl.load(rows + at * stride + d_D[None, :], mask=inside, other=0.0).to(tl.float32)
        infinite_R = tl.maximum(infinite_R, tl.max((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, 1))
        norm_R += tl.sum(value * value, 1)
        if NARROW:
            rounded = value.to(tl.float16)
            tl.store(narrow + at * narrow_stride + d_D[None, :], rounded, mask=inside)
            error = value - rounded.to(tl.float32)
            error_R += tl.sum(error * error, 1)
    at = i_R.to(tl.int64)
    tl.store(measures + at, norm_R, mask=i_R < N)
    tl.store(measures + N.to(tl.int64) + at, error_R, mask=i_R < N)
    tl.store(measures + 2 * N.to(tl.int64) + at, infinite_R.to(tl.float32), mask=i_R < N)


@triton.jit(do_not_specialize=[*SIZES, "groups", "run"])
def _maxima_kernel(
    x,
    y,
    maxima,
    groups,
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
    ROWS: tl.constexpr,
):
    """The largest score of each query and group of ROWS database rows, (M, groups), of `run` row tiles."""
    column = tl.program_id(0) % tiles_n * BN
    part = tl.program_id(0) // tiles_n
    for tile in range(part * run, tl.minimum(part * run + run, tiles_m)):
        row = tile * BM
        s = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
        # `row >> 31` is 0; with it, the compiler does not keep the comparisons in registers during the loop.
        j_N = column + (row >> 31) + tl.arange(0, BN)
        if column + BN > N:
            s = tl.where((j_N < N)[None, :], s, float("-inf"))
        best = tl.max(tl.reshape(s, [BM, BN // ROWS, ROWS]), 2)
        i_M = row + tl.arange(0, BM)
        group_G = column // ROWS + tl.arange(0, BN // ROWS)
        at = i_M.to(tl.int64)[:, None] * groups + group_G[None, :]
        tl.store(maxima + at, best, mask=(i_M < M)[:, None] & (group_G < groups)[None, :])


@triton.jit(do_not_specialize=["candidates", "N"])
def _rescore_kernel(
    queries,
    database,
    group,
    score,
    candidates,
    N,
    query_stride,
    database_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Exact scores of one query and one of its candidate groups: (Q, candidates, ROWS)."""
    program = tl.program_id(0).to(tl.int64)
    query = program // candidates
    row_R = tl.load(group + program) * ROWS + tl.arange(0, ROWS)
    total_R = tl.zeros([ROWS], tl.float64)
    for first in range(0, D, BD):
        d_D = first + tl.arange(0, BD)
        x_D = tl.load(queries + query * query_stride + d_D, mask=d_D < D, other=0.0)
        inside = (row_R < N)[:, None] & (d_D < D)[None, :]
        y_RD = tl.load(database + row_R[:, None] * database_stride + d_D[None, :], mask=inside, other=0.0)
        total_R += tl.sum(x_D.to(tl.float64)[None, :] * y_RD.to(tl.float64), 1)
    total_R = tl.where(row_R < N, total_R, float("-inf"))
    tl.store(score + program * ROWS + tl.arange(0, ROWS), total_R.to(tl.float32))


KERNELS = {
    "topk": _topk_kernel,
    "narrow": _narrow_kernel,
    "maxima": _maxima_kernel,
    "rescore": _rescore_kernel,
}
"""The kernels that budgets.py compiles."""


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


class Neighbours:
    """The k nearest rows of a database that arrives in chunks. Queries: a float dtype of the kernels, (Q, D).

    `add` launches the work on a chunk and does not wait for it. `result` reads the answer.
    """

    def __init__(self, queries_QD: Tensor, k: int) -> None:
        k = _checked_k(k, LARGEST_K)
        check_operands(queries_QD, queries_QD)
        self._queries = operand(queries_QD.detach(), queries_QD.dtype)
        self._k = k
        # More groups than k, so that the k-th score can be clearly above the floor. The more neighbours, the
        # closer are their scores.
        self._candidates = k + max(_SPARE_GROUPS, k // 2)
        self._narrowed: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        count, device = len(queries_QD), queries_QD.device
        self._scores = torch.empty(count, 0, device=device)
        self._index = torch.empty(count, 0, dtype=torch.int64, device=device)
        self._ceiling = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
        # [a query that is not finite, a database row that is not finite]
        self._infinite = torch.zeros(2, device=device)

    def add(self, first_row: int, database_ND: Tensor) -> None:
        """Searches rows of the database; `first_row` is the number of the first one. The caller may overwrite
        the rows after the launched work has ended."""
        check_tensor("database_ND", database_ND)
        if len(database_ND) == 0 or len(self._queries) == 0:
            return
        check_operands(self._queries, database_ND.detach()[:0].to(self._queries.dtype))
        with on_device(self._queries):
            self._add(first_row, operand(database_ND.detach(), database_ND.dtype))

    def _add(self, first_row: int, database: Tensor) -> None:
        work = database.dtype if database.dtype == self._queries.dtype != torch.float32 else torch.float16
        if work not in self._narrowed:
            narrow, measures = _narrowed(self._queries, work)
            self._narrowed[work] = narrow, _norms(measures[:2], self._queries.shape[1])
            self._infinite[0] = measures[2].amax()
        queries, norms_2Q = self._narrowed[work]
        blocks = torch.split(queries, _QUERY_ROWS)
        best = [_no_groups(block) for block in blocks]
        worst = torch.zeros(3, device=queries.device)
        step = _piece_rows(database, len(blocks[0]))
        for start in range(0, len(database), step):
            piece, measures = _narrowed(database[start : start + step], work)
            worst = torch.maximum(worst, measures.amax(1))
            for i, block in enumerate(blocks):
                best[i] = _best_groups(block, piece, start // GROUP_ROWS, best[i], self._candidates)
        self._infinite[1] = torch.maximum(self._infinite[1], worst[2])
        margin_Q = _margins(norms_2Q, _norms(worst[:2], database.shape[1]), database.shape[1])
        whole = -(-len(database) // GROUP_ROWS) <= self._candidates
        scores, index = [], []
        for block, (_, group_QG) in zip(torch.split(self._queries, _QUERY_ROWS), best, strict=True):
            score, row = _rescored(block, database, group_QG, self._k)
            scores.append(score)
            index.append(row + first_row)
        if not whole:  # otherwise every row was rescored
            floor_Q = torch.cat([maxima_QG[:, -1] for maxima_QG, _ in best]).double()
            ceiling_Q = floor_Q + margin_Q + 2.0**-23 * (floor_Q.abs() + margin_Q)
            self._ceiling = torch.maximum(self._ceiling, ceiling_Q)
        self._scores, self._index = _merged(
            torch.cat([self._scores, torch.cat(scores)], 1),
            torch.cat([self._index, torch.cat(index)], 1),
            self._k,
        )

    def result(self, chunks: Chunks, row_error: Callable[[int], Exception]) -> tuple[Tensor, Tensor]:
        """Scores (Q, k), float32, and row numbers (Q, k), int64, best first.

        Args:
            chunks: yields all chunks that `add` was given. It is called only for queries without a proof, and
                to name a row that is not finite.
            row_error: makes the exception for a database row that is not finite, from its number.

        Raises:
            ValueError: a query is not finite, or scores overflow float32.
        """
        if len(self._queries) == 0:
            return self._scores.new_empty(0, self._k), self._index.new_empty(0, self._k)
        proved_Q = self._scores[:, -1] > self._ceiling  # so it is not -infinity
        unproved_Q = ~proved_Q
        overflows_Q = proved_Q & (self._scores[:, 0] == torch.inf)
        counts_2 = torch.stack([unproved_Q, overflows_Q]).sum(1, dtype=torch.float32)
        flags = torch.cat([self._infinite, counts_2])
        query_is_infinite, row_is_infinite, unproved, overflows = flags.tolist()
        if query_is_infinite:
            raise ValueError("queries_QD must be finite, got NaN or infinity")
        if row_is_infinite:
            raise row_error(_infinite_row(chunks))
        if overflows:
            raise ValueError(_OVERFLOW)
        if unproved:
            at_Q = unproved_Q.nonzero()[:, 0]
            self._scores[at_Q], self._index[at_Q] = _scan(self._queries[at_Q], chunks(), self._k)
        return self._scores, self._index


def _narrowed(rows_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in a 16-bit dtype, as operands, and the measures (3, N) of `_narrow_kernel`."""
    n, depth = rows_ND.shape
    measures = torch.empty(3, n, device=rows_ND.device)
    narrow = rows_ND
    if rows_ND.dtype != dtype:
        narrow = rows_ND.new_empty(n, -(-depth // 8) * 8, dtype=dtype)[:, :depth]
    _narrow_kernel[(triton.cdiv(n, _NORM_ROWS),)](
        rows_ND,
        narrow,
        measures,
        n,
        rows_ND.stride(0),
        narrow.stride(0),
        D=depth,
        NARROW=narrow is not rows_ND,
        BR=_NORM_ROWS,
        BD=_RESCORE_DEPTH,
        **OPTIONS,
    )
    return narrow, measures


def _norms(squares: Tensor, depth: int) -> Tensor:
    """Upper bounds of norms, float64. The second term covers squares that underflow in float32, the factor
    covers the rounding of the sums."""
    return (squares.double().sqrt() + depth**0.5 * 2.0**-63) * (1 + depth * 2.0**-23)


def _margins(query_norms_2Q: Tensor, database_norms_2: Tensor, depth: int) -> Tensor:
    """Upper bounds of |score - approximate score| for each query; see the module's docstring."""
    x_Q, dx_Q = query_norms_2Q
    y, dy = database_norms_2
    rounded_Q = x_Q + dx_Q
    underflow = depth * 2.0**-126  # of products, and of partial sums that a card flushes to zero
    return dx_Q * y + rounded_Q * dy + depth * 2.0**-22 * rounded_Q * (y + dy) + underflow


def _piece_rows(database: Tensor, queries: int) -> int:
    """Rows of the database whose 16-bit copy and maxima fit into their workspaces."""
    fits = min(_NARROW_BYTES // (2 * database.shape[1]), _MAXIMA_BYTES // (4 * queries) * GROUP_ROWS)
    return max(256, fits // 256 * 256)


def _no_groups(queries: Tensor) -> tuple[Tensor, Tensor]:
    maxima = torch.empty(len(queries), 0, device=queries.device)
    return maxima, torch.empty_like(maxima, dtype=torch.int64)


def _best_groups(
    queries: Tensor, piece: Tensor, first_group: int, best: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The `count` groups of the largest maxima, best first, among `best` and the groups of a piece."""
    groups = triton.cdiv(len(piece), GROUP_ROWS)
    maxima = torch.empty(len(queries), groups, device=queries.device)
    arguments = score_arguments("maxima", queries, piece)
    tiles_m = triton.cdiv(len(queries), arguments["BM"])
    tiles_n = triton.cdiv(len(piece), arguments["BN"])
    run, parts = split_rows(tiles_m, tiles_n, tiles_m)
    _maxima_kernel[(tiles_n * parts,)](
        **arguments, maxima=maxima, groups=groups, run=run, tiles_m=tiles_m, tiles_n=tiles_n, ROWS=GROUP_ROWS
    )
    maxima, group = maxima.topk(min(count, groups), 1)
    maxima, group = torch.cat([best[0], maxima], 1), torch.cat([best[1], group + first_group], 1)
    maxima, at = maxima.topk(min(count, maxima.shape[1]), 1)
    return maxima, group.gather(1, at)


def _rescored(queries: Tensor, database: Tensor, group_QG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best rows of the candidate groups by exact score (all, if there are fewer)."""
    count, candidates = group_QG.shape
    scores = torch.empty(count, candidates, GROUP_ROWS, device=queries.device)
    _rescore_kernel[(count * candidates,)](
        queries,
        database,
        group_QG.contiguous(),
        scores,
        candidates,
        len(database),
        queries.stride(0),
        database.stride(0),
        D=queries.shape[1],
        ROWS=GROUP_ROWS,
        BD=_RESCORE_DEPTH,
        **OPTIONS,
    )
    rows = group_QG[:, :, None] * GROUP_ROWS + torch.arange(GROUP_ROWS, device=group_QG.device)
    return _merged(scores.flatten(1), rows.flatten(1), min(k, len(database)))


def _scan(queries: Tensor, chunks: Iterable[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of all rows by `_topk_chunk`."""
    scores = torch.empty(len(queries), 0, device=queries.device)
    index = torch.empty_like(scores, dtype=torch.int64)
    for first, chunk in chunks:
        dtype = torch.promote_types(queries.dtype, chunk.dtype)
        for start in range(0, len(chunk), _CHUNK_ROWS):
            part = chunk[start : start + _CHUNK_ROWS].to(dtype)
            part_scores, rows = _topk_chunk(queries.to(dtype), part, min(k, len(part)))
            rows = torch.where(rows < 0, rows, rows + first + start)  # free places stay negative
            scores, index = _merged(torch.cat([scores, part_scores], 1), torch.cat([index, rows], 1), k)
    if not bool(scores.isfinite().all()):  # -infinity: fewer than k rows have a score above it
        raise ValueError(_OVERFLOW)
    return scores, index


def _infinite_row(chunks: Chunks) -> int:
    """The number of the first row that is not finite."""
    for first, chunk in chunks():
        infinite_N = ~chunk.isfinite().all(1)
        if bool(infinite_N.any()):
            return first + int(infinite_N.nonzero()[0])
    raise RuntimeError("the database has changed during the search")


def topk(queries_QD: Tensor, database_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k database rows of largest inner product with each query, best first, equal ones by row number.

    Args:
        queries_QD: bfloat16, float16 or float32, (Q, D), finite.
        database_ND: (N, D), in any of these dtypes, same device, finite.
        k: 1..min(32, N).

    Returns:
        Scores (Q, k), float32, and row numbers (Q, k), int64.

    Raises:
        ValueError: shapes differ, k is out of range, a value is not finite, scores overflow, or the device is
            not supported.
        TypeError: an argument is no tensor, its dtype is not supported, or k is no integer.
    """
    check_tensor("queries_QD", queries_QD)
    check_tensor("database_ND", database_ND)
    dtype = torch.promote_types(queries_QD.dtype, database_ND.dtype)
    database_ND = database_ND.detach()
    check_operands(queries_QD.detach().to(dtype), database_ND[:0].to(dtype))
    k = _checked_k(k, min(LARGEST_K, len(database_ND)))
    neighbours = Neighbours(queries_QD, k)
    neighbours.add(0, database_ND)
    return neighbours.result(lambda: [(0, database_ND)], _row_error)


def _checked_k(k: SupportsIndex, largest: int) -> int:
    if isinstance(k, bool) or not isinstance(k, SupportsIndex):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    k = operator.index(k)
    if not 1 <= k <= largest:
        raise ValueError(f"k must be in 1..{largest}, got {k}")
    return k


def _row_error(row: int) -> ValueError:
    return ValueError(f"row {row} of database_ND is not finite")
