"""Retrieval ranks and nearest neighbours from embeddings, in tiles: the similarity matrix never exists.

On CUDA, the kernels of `clsp_fast.kernels.rank` and `.neighbours` compute and compare scores. On the CPU,
the C++ extension does so for float32 and 16-bit embeddings. All other cases run in plain torch:
`ranks_reference` and `topk_reference`. The extension adds the D products of a score in one fixed order. So
equal rows have equal scores, and no result depends on the number of threads.

Shape suffixes: M audio rows, N text rows or database rows, Q queries, D joint dimension, R rows and C columns
of one tile, K neighbours.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsp_fast import _C, copies
from clsp_fast.arguments import as_integer, owner_of_texts, require_floating, require_same_kind
from clsp_fast.row_stream import device_chunks

Database: TypeAlias = Tensor | NDArray[Any]
LARGEST_K = 1024
"""The largest k of `topk`."""

_TILE_ROWS = 1024
_CHUNK_ROWS = 16_384
# Multiply-adds in one call of the extension: some seconds of work. Ctrl-C has an effect only between calls.
_WORK_AT_ONCE = 2**37


class RowError(ValueError):
    """A row of the database is not finite; `row` is its number."""

    def __init__(self, row: int) -> None:
        super().__init__(f"database_ND must be finite, got NaN or infinity in row {row}")
        self.row = row


class Ranks(NamedTuple):
    """0-based rank of each query's best positive; -1 if a query has no positive.

    Attributes:
        audio_to_text: int64 (M,).
        text_to_audio: int64 (N,).
    """

    audio_to_text: Tensor
    text_to_audio: Tensor


def ranks(audio_MD: Tensor, text_ND: Tensor, *, text_owner: Tensor | None = None) -> Ranks:
    """For each clip, the rank of its best text among all texts; for each text, the rank of its clip.

    The target is the score of a query's best positive. rank = #(score > target) + #(score = target and
    index < target's index), without the clip's other positives. So items of equal score rank in the order of
    their index. Scores are float32 (float64 for float64 embeddings).

    Args:
        audio_MD: floating (M, D).
        text_ND: floating (N, D), same dtype and device. Inner products must not overflow.
        text_owner: int64 (N,): text j describes audio text_owner[j]; default arange(N), which needs N <= M.

    Raises:
        TypeError: embeddings are not floating or differ in dtype or device, or text_owner is not an int64
            tensor.
        ValueError: shapes differ, an owner is out of range, or a value is not finite.
    """
    owner_N = _check_ranks(audio_MD, text_ND, text_owner)
    kernels = _kernels("rank", audio_MD, text_ND)
    if kernels is not None:
        return Ranks(*kernels.rank_counts(audio_MD, text_ND, owner_N))
    audio_MD, text_ND = (_widened(x) for x in (audio_MD, text_ND))
    if _fits_engine(audio_MD, text_ND):
        return _engine_ranks(audio_MD, text_ND, owner_N)
    return ranks_reference(audio_MD, text_ND, text_owner=owner_N)


def ranks_reference(audio_MD: Tensor, text_ND: Tensor, *, text_owner: Tensor) -> Ranks:
    """`ranks` in plain torch, for checked arguments: the tests' oracle, and the fallback."""
    audio_order = torch.arange(len(audio_MD), device=audio_MD.device)
    return Ranks(
        _ranks_one_way(audio_MD, text_ND, audio_order, text_owner),
        _ranks_one_way(text_ND, audio_MD, text_owner, audio_order),
    )


def _ranks_one_way(
    queries_QD: Tensor, items_ND: Tensor, query_label_Q: Tensor, item_label_N: Tensor
) -> Tensor:
    """Rank of each query's best positive. A positive is an item whose label equals the query's."""
    if not len(items_ND):
        return torch.full((len(queries_QD),), -1, device=queries_QD.device)
    index_N = torch.arange(len(items_ND), device=items_ND.device)
    tiles = []
    for start in range(0, len(queries_QD), _TILE_ROWS):
        scores_RN = queries_QD[start : start + _TILE_ROWS] @ items_ND.T
        positive_RN = query_label_Q[start : start + _TILE_ROWS, None] == item_label_N
        target_R, target_index_R = scores_RN.masked_fill(~positive_RN, -torch.inf).max(1)
        earlier_RN = (scores_RN == target_R[:, None]) & (index_N < target_index_R[:, None])
        ahead_R = (((scores_RN > target_R[:, None]) | earlier_RN) & ~positive_RN).sum(1)
        tiles.append(torch.where(positive_RN.any(1), ahead_R, -1))
    return torch.cat(tiles) if tiles else torch.empty(0, dtype=torch.int64, device=queries_QD.device)


def _engine_ranks(audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor) -> Ranks:
    """`ranks` by the extension. It finds the best positive of each query first. No other positive can be
    ahead of it, so one pass over the tiles counts both directions and need not exclude positives."""
    audio, text, threads = _numpy_rows(audio_MD), _numpy_rows(text_ND), torch.get_num_threads()
    owner = owner_N.numpy().astype(np.int32)
    text_score, audio_score, audio_index = _C.rank_targets(audio, text, owner, num_threads=threads)
    ahead_M, ahead_N = np.zeros(len(audio), np.int64), np.zeros(len(text), np.int64)
    step = max(1, _WORK_AT_ONCE // max(1, audio.size))
    for start in range(0, len(text), step):
        part = slice(start, start + step)
        _C.count_ahead(
            audio,
            text[part],
            first_text=start,
            audio_targets=(audio_score, audio_index),
            text_targets=(text_score[part], owner[part]),
            audio_ahead=ahead_M,
            text_ahead=ahead_N[part],
            num_threads=threads,
        )
    ahead_M[audio_index < 0] = -1
    return Ranks(torch.from_numpy(ahead_M), torch.from_numpy(ahead_N))


def topk(queries_QD: Tensor, database_ND: Database, k: SupportsIndex) -> tuple[Tensor, Tensor]:
    """The k database rows that have the largest inner products with each query, best first.

    The search is exact: no row is left out. A score has the rounding error of a float32 sum of D products,
    about 1e-6 |x| |y|, so rows whose scores differ by less may come in another order.

    Equal scores come in the order of the database. The database is read in chunks, so that a memory-mapped
    file may be larger than memory. It is read once, and on CUDA a second time if many scores are almost
    equal.

    Args:
        queries_QD: floating (Q, D).
        database_ND: (N, D), a floating tensor on any device, or a numpy array or memmap of 16, 32 or 64 bits,
            with N >= 1. The search runs on the device of the queries.
        k: number of neighbours, from 1 to min(1024, N).

    Returns:
        scores (Q, k), float32 or wider, and row numbers (Q, k), int64; on the queries' device.

    Raises:
        TypeError: a dtype is not floating, or k is not an integer.
        ValueError: shapes differ, the database is empty, k is out of range, a value is not finite, or inner
            products overflow.
    """
    k = _check_topk(queries_QD, database_ND, k)
    kernels = _topk_kernels(queries_QD, [database_ND], k)
    if kernels is not None:
        return _kernel_topk(kernels, queries_QD, [(0, database_ND)], k)
    if not _is_finite(queries_QD):
        raise ValueError("queries_QD must be finite, got NaN or infinity")
    queries_QD = _widened(queries_QD)
    if _fits_engine(queries_QD):
        return _engine_topk(queries_QD, database_ND, k)
    return topk_reference(queries_QD, database_ND, k)


def topk_of_parts(
    queries_QD: Tensor, parts: Sequence[tuple[int, Database]], k: int
) -> tuple[Tensor, Tensor] | None:
    """`topk` by the kernels in a database of several matrices; None if the kernels do not support it.

    Args:
        queries_QD: floating (Q, D).
        parts: the number of the first row, ascending, and the rows of each matrix.
        k: number of neighbours, from 1 to the number of all rows.
    """
    for _, rows in parts:
        _check_topk(queries_QD, rows, 1)
    kernels = _topk_kernels(queries_QD, [rows for _, rows in parts], k)
    return None if kernels is None or not parts else _kernel_topk(kernels, queries_QD, parts, k)


def _topk_kernels(queries_QD: Tensor, databases: Sequence[Database], k: int) -> Any:
    """The module of GPU kernels if it can search these databases, otherwise None."""
    supported = all(rows.dtype.itemsize <= 4 and rows.shape[1] > 0 for rows in databases)
    kernels = _kernels("neighbours", queries_QD) if supported else None
    return kernels if kernels is not None and k <= kernels.LARGEST_K else None


def _kernel_topk(
    kernels: Any, queries_QD: Tensor, parts: Sequence[tuple[int, Database]], k: int
) -> tuple[Tensor, Tensor]:
    """`topk` by the kernels. Rows that are not on the device are copied there in chunks."""
    neighbours = kernels.Neighbours(queries_QD, k)
    for first, chunk_CD in device_chunks(parts, queries_QD.device):
        neighbours.add(first, chunk_CD)
    scores_QK, index_QK = neighbours.result(lambda: device_chunks(parts, queries_QD.device), RowError)
    return scores_QK, index_QK


def topk_reference(queries_QD: Tensor, database_ND: Database, k: int) -> tuple[Tensor, Tensor]:
    """`topk` in plain torch, for checked arguments: the tests' oracle, and the fallback."""
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    index_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for start in range(0, len(database_ND), _CHUNK_ROWS):
        chunk_CD = _as_tensor(database_ND[start : start + _CHUNK_ROWS]).to(queries_QD)
        if not _is_finite(chunk_CD):
            raise RowError(start + int((~chunk_CD.isfinite().all(1)).nonzero()[0]))
        tiles = [_best(rows_RD @ chunk_CD.T, k) for rows_RD in torch.split(queries_QD, _TILE_ROWS)]
        # The stable sort keeps equal scores in their order, and rows of earlier chunks come first.
        both_QK = torch.cat([scores_QK, torch.cat([values for values, _ in tiles])], dim=1)
        index_QK = torch.cat([index_QK, torch.cat([index for _, index in tiles]) + start], dim=1)
        scores_QK, order_QK = (x[:, :k] for x in both_QK.sort(dim=1, descending=True, stable=True))
        index_QK = index_QK.gather(1, order_QK)
    if not _is_finite(scores_QK):
        raise ValueError(
            f"queries_QD and database_ND are too large: their inner products overflow {scores_QK.dtype}"
        )
    return scores_QK, index_QK


def _best(scores_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all if there are fewer), equal ones in the order of their columns."""
    columns = scores_RC.shape[1]
    values_RK, index_RK = scores_RC.topk(min(k + 1, columns), dim=1)
    if columns > k:
        # If several scores equal the k-th, torch may return any of them. Only these few rows are sorted.
        (tied,) = (values_RK[:, k - 1] == values_RK[:, k]).nonzero(as_tuple=True)
        values_RK, index_RK = values_RK[:, :k], index_RK[:, :k]
        index_RK[tied] = scores_RC[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    index_RK = index_RK.sort(dim=1).values
    values_RK, order_RK = scores_RC.gather(1, index_RK).sort(dim=1, descending=True, stable=True)
    return values_RK, index_RK.gather(1, order_RK)


def _engine_topk(queries_QD: Tensor, database_ND: Database, k: int) -> tuple[Tensor, Tensor]:
    queries, threads = _numpy_rows(queries_QD), torch.get_num_threads()
    scores = np.full((len(queries), k), -np.inf, np.float32)
    index = np.full((len(queries), k), -1, np.int64)
    step = max(1, min(_CHUNK_ROWS, _WORK_AT_ONCE // max(1, queries.size)))
    for start in range(0, len(database_ND), step):
        chunk = _float32_rows(database_ND[start : start + step])
        bad = _C.update_best(queries, chunk, first_row=start, scores=scores, index=index, num_threads=threads)
        if bad is not None:
            raise RowError(start + bad)
    if not np.isfinite(scores).all():  # -infinity: fewer than k rows have a score above it
        raise ValueError("queries_QD and database_ND are too large: their inner products overflow float32")
    return torch.from_numpy(scores), torch.from_numpy(index)


def _float32_rows(rows: Database) -> NDArray[np.float32]:
    """Contiguous float32 rows. If the rows are so already, even in a mapped file, they are not copied."""
    if isinstance(rows, np.ndarray) and rows.dtype == np.float32:
        return _aligned(rows)
    return _numpy_rows(_as_tensor(rows).to("cpu", torch.float32))


def _numpy_rows(x: Tensor) -> NDArray[np.float32]:
    return _aligned(x.numpy())


def _aligned(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.require(rows, requirements=["C", "A"])


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _fits_engine(*tensors: Tensor) -> bool:
    """Whether the extension supports these tensors: float32 on the CPU, with at least one column."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] > 0 for x in tensors)


def _kernels(module: str, *tensors: Tensor) -> Any:
    """A module of GPU kernels; None if it does not support the tensors or Triton is not installed."""
    if not all(x.is_cuda and x.dtype != torch.float64 for x in tensors):
        return None
    try:
        launch = importlib.import_module("clsp_fast.kernels._launch")
    except ImportError:
        return None
    if not all(launch.supports(x.device) for x in tensors):
        return None
    return importlib.import_module(f"clsp_fast.kernels.{module}")


def _as_tensor(rows: Database) -> Tensor:
    # A copy, because torch does not support read-only memory, such as a file that is mapped for reading.
    return torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows.detach()


def _check_ranks(audio_MD: Tensor, text_ND: Tensor, text_owner: Tensor | None) -> Tensor:
    """Checks the arguments of `ranks` and returns the owners, given or default."""
    require_same_kind("audio_MD", audio_MD, "text_ND", text_ND)
    _check_columns("audio_MD", audio_MD, "text_ND", text_ND)
    m, n = len(audio_MD), len(text_ND)
    if n and not m:
        raise ValueError(f"audio_MD must have a row or more, because text_ND has {n}; got none")
    owner_N = copies.to_device(owner_of_texts(text_owner, m, n, audio_MD.device), audio_MD.device)
    # All facts are read at once, because each reading waits for the device. If a sum is finite, so are all
    # values, and a sum is several times cheaper than a check of each value.
    facts = [_sum(x).isfinite() for x in (audio_MD, text_ND)]
    if n:
        facts.append((owner_N >= 0).all() & (owner_N < m).all())
    audio_is_finite, text_is_finite, *owners_fit = torch.stack(facts).tolist()
    if not all(owners_fit):
        raise ValueError(f"text_owner must lie in 0..{m - 1}")
    if not (audio_is_finite or _is_finite(audio_MD)) or not (text_is_finite or _is_finite(text_ND)):
        raise ValueError("audio_MD and text_ND must be finite, got NaN or infinity")
    return owner_N


def _sum(x: Tensor) -> Tensor:
    return x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _is_finite(x: Tensor) -> bool:
    return bool(_sum(x).isfinite()) or bool(x.isfinite().all())


def _check_columns(first: str, a: Database, second: str, b: Database) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{first} and {second} must be matrices with the same number of columns, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _check_topk(queries_QD: Tensor, database_ND: Database, k: SupportsIndex) -> int:
    """Checks the arguments of `topk` and returns k."""
    require_floating("queries_QD", queries_QD)
    if not isinstance(database_ND, np.ndarray):
        require_floating("database_ND", database_ND, "a torch.Tensor or numpy array")
    elif database_ND.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(
            "database_ND must be float16, float32 or float64 in this machine's byte order, "
            f"got {database_ND.dtype}"
        )
    _check_columns("queries_QD", queries_QD, "database_ND", database_ND)
    k, rows = as_integer("k", k), len(database_ND)
    if rows == 0:
        raise ValueError("database_ND must have a row or more, got none")
    largest = min(LARGEST_K, rows)
    if not 1 <= k <= largest:
        raise ValueError(f"k must be in [1, {largest}] for {rows} rows in database_ND, got {k}")
    return k
