"""Retrieval ranks from embeddings, streamed in tiles: the similarity matrix never exists.

Shape suffixes: M audio rows, N text rows, D joint dimension, R rows of one tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TILE_ROWS = 1024


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
