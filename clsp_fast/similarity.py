"""Retrieval ranks and nearest neighbours from embeddings, in tiles: the similarity matrix never exists.

Shape suffixes: M audio rows, N text rows or database rows, Q queries, D joint dimension, R rows and C columns
of one tile, K neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Database: TypeAlias = Tensor | NDArray[Any]
MOST_NEIGHBOURS = 1024
"""The largest k of `topk`."""

_TILE_ROWS = 1024
_CHUNK_ROWS = 16_384


class Ranks(NamedTuple):
    """0-based rank of each query's best positive; -1 where a query has none.

    Attributes:
        audio_to_text: int64 (M,).
        text_to_audio: int64 (N,).
    """

    audio_to_text: Tensor
    text_to_audio: Tensor


def ranks(audio_MD: Tensor, text_ND: Tensor, *, text_owner: Tensor | None = None) -> Ranks:
    """Rank of the best positive of every clip among texts, and of every text's clip among clips.

    rank = #(score > target) + #(score = target and index < target's index); a clip's other positives are not
    counted against it. All-equal embeddings therefore give the index order.

    Args:
        audio_MD: floating (M, D).
        text_ND: floating (N, D), same dtype and device.
        text_owner: int64 (N,): text j describes audio text_owner[j]; default arange(N), which needs N <= M.

    Raises:
        ValueError: shapes or owners do not fit together, or a value is not finite.
    """
    m, n = len(audio_MD), len(text_ND)
    if audio_MD.ndim != 2 or text_ND.ndim != 2 or audio_MD.shape[1] != text_ND.shape[1]:
        raise ValueError(
            "audio_MD and text_ND must be matrices with the same number of columns, "
            f"got {tuple(audio_MD.shape)} and {tuple(text_ND.shape)}"
        )
    owner_N = (
        torch.arange(n, device=audio_MD.device) if text_owner is None else text_owner.to(audio_MD.device)
    )
    if owner_N.shape != (n,) or (n and not 0 <= int(owner_N.min()) <= int(owner_N.max()) < m):
        raise ValueError(f"text_owner must hold {n} indices in 0..{m - 1}")
    if not (bool(audio_MD.isfinite().all()) and bool(text_ND.isfinite().all())):
        raise ValueError("audio_MD and text_ND must be finite: NaN compares as neither better nor worse")
    audio_order = torch.arange(m, device=audio_MD.device)
    return Ranks(
        _ranks_one_way(audio_MD, text_ND, audio_order, owner_N),
        _ranks_one_way(text_ND, audio_MD, owner_N, audio_order),
    )


def _ranks_one_way(
    queries_QD: Tensor, items_ND: Tensor, query_label_Q: Tensor, item_label_N: Tensor
) -> Tensor:
    """Ranks of the best item whose label equals the query's."""
    index_N = torch.arange(len(items_ND), device=items_ND.device)
    found = []
    for start in range(0, len(queries_QD), _TILE_ROWS):
        scores_RN = queries_QD[start : start + _TILE_ROWS] @ items_ND.T
        positive_RN = query_label_Q[start : start + _TILE_ROWS, None] == item_label_N
        target_R, target_index_R = scores_RN.masked_fill(~positive_RN, -torch.inf).max(1)
        earlier_RN = (scores_RN == target_R[:, None]) & (index_N < target_index_R[:, None])
        ahead_R = (((scores_RN > target_R[:, None]) | earlier_RN) & ~positive_RN).sum(1)
        found.append(torch.where(positive_RN.any(1), ahead_R, -1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=queries_QD.device)


def topk(queries_QD: Tensor, database_ND: Database, k: int) -> tuple[Tensor, Tensor]:
    """The k database rows with the largest inner product with each query, best first; exact.

    Equal scores come in the order of the database. The database is read once, in chunks, so a memory-mapped
    one may be larger than memory.

    Args:
        queries_QD: floating (Q, D).
        database_ND: (N, D), a floating tensor or a numpy array or memmap; brought to the dtype and device of
            the scores chunk by chunk.
        k: neighbours, at least 1 and at most 1,024 and N.

    Returns:
        scores (Q, k), float32 or wider, and row numbers (Q, k), int64; on the queries' device.

    Raises:
        TypeError: a dtype that is not floating, or k not an integer.
        ValueError: shapes or k do not fit together, or a value is not finite.
    """
    _check_topk(queries_QD, database_ND, k)
    queries_QD = queries_QD.detach().to(torch.promote_types(queries_QD.dtype, torch.float32))
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    index_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for start in range(0, len(database_ND), _CHUNK_ROWS):
        chunk_CD = _as_tensor(database_ND[start : start + _CHUNK_ROWS]).to(queries_QD)
        if not bool(chunk_CD.isfinite().all()):
            row = start + int((~chunk_CD.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"database_ND must be finite, got NaN or infinity in row {row}")
        tiles = [_best(rows_RD @ chunk_CD.T, k) for rows_RD in torch.split(queries_QD, _TILE_ROWS)]
        # The stable sort keeps those found earlier, whose rows come first, before their equals.
        both_QK = torch.cat([scores_QK, torch.cat([values for values, _ in tiles])], dim=1)
        index_QK = torch.cat([index_QK, torch.cat([index for _, index in tiles]) + start], dim=1)
        scores_QK, order_QK = (x[:, :k] for x in both_QK.sort(dim=1, descending=True, stable=True))
        index_QK = index_QK.gather(1, order_QK)
    return scores_QK, index_QK


def _best(scores_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all, if there are fewer), equal ones in the order of their columns."""
    columns = scores_RC.shape[1]
    values_RK, index_RK = scores_RC.topk(min(k + 1, columns), dim=1)
    if columns > k:
        # torch takes any of the equal scores at the border; the sort that decides is needed for few rows.
        (unsure,) = (values_RK[:, k - 1] == values_RK[:, k]).nonzero(as_tuple=True)
        values_RK, index_RK = values_RK[:, :k], index_RK[:, :k]
        index_RK[unsure] = scores_RC[unsure].sort(dim=1, descending=True, stable=True).indices[:, :k]
    index_RK = index_RK.sort(dim=1).values
    values_RK, order_RK = scores_RC.gather(1, index_RK).sort(dim=1, descending=True, stable=True)
    return values_RK, index_RK.gather(1, order_RK)


def _as_tensor(rows: Database) -> Tensor:
    # A copy: torch cannot hold what may not be written to, such as a file that is mapped for reading.
    return torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows.detach()


def _check_topk(queries_QD: Tensor, database_ND: Database, k: int) -> None:
    floating = (
        database_ND.dtype.kind == "f"
        if isinstance(database_ND, np.ndarray)
        else (isinstance(database_ND, Tensor) and database_ND.is_floating_point())
    )
    if not floating or not isinstance(queries_QD, Tensor) or not queries_QD.is_floating_point():
        kinds = [f"{type(x).__name__} of {getattr(x, 'dtype', '?')}" for x in (queries_QD, database_ND)]
        raise TypeError(f"queries_QD and database_ND must be floating, got {kinds[0]} and {kinds[1]}")
    if queries_QD.ndim != 2 or database_ND.ndim != 2 or queries_QD.shape[1] != database_ND.shape[1]:
        raise ValueError(
            "queries_QD and database_ND must be matrices with the same number of columns, "
            f"got {tuple(queries_QD.shape)} and {tuple(database_ND.shape)}"
        )
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    most = min(MOST_NEIGHBOURS, len(database_ND))
    if not 1 <= k <= most:
        raise ValueError(f"k must be in [1, {most}] for {len(database_ND)} rows in database_ND, got {k}")
    if not bool(queries_QD.isfinite().all()):
        raise ValueError("queries_QD must be finite, got NaN or infinity")
