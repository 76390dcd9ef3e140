"""Retrieval and classification figures as pure functions of ranks and predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval(ranks: Tensor) -> dict[str, float]:
    """Recall and mean reciprocal rank of one retrieval direction.

    MRR@10 is the mean of 1 / (rank + 1) over all queries, 0 beyond rank 9; with one relevant item it is what
    the literature on this task prints as "mAP@10".

    Args:
        ranks: integer (Q,), 0-based rank of each query's best positive; queries with a negative rank, which
            have none, are left out.

    Returns:
        "R@1", "R@5", "R@10", "MRR@10" in [0, 1] and "median_rank" (1-based).

    Raises:
        ValueError: no query has a positive.
    """
    ranks = ranks[ranks >= 0].double()
    if not len(ranks):
        raise ValueError("ranks must hold at least one query that has a positive")
    figures = {f"R@{k}": float((ranks < k).double().mean()) for k in (1, 5, 10)}
    reciprocal = torch.where(ranks < 10, 1 / (ranks + 1), 0.0)
    return figures | {"MRR@10": float(reciprocal.mean()), "median_rank": float(ranks.median()) + 1}


def accuracy(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """Share of equal entries (WA, weighted accuracy), in [0, 1].

    Raises:
        ValueError: lengths differ or are zero.
    """
    if len(predicted) != len(labels) or not labels:
        raise ValueError(
            f"predicted and labels must be as long and not empty, got {len(predicted)}, {len(labels)}"
        )
    return sum(p == t for p, t in zip(predicted, labels, strict=True)) / len(labels)


def unweighted_average_recall(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """Mean recall over the classes that have items (UAR), in [0, 1].

    Raises:
        ValueError: lengths differ or are zero.
    """
    accuracy(predicted, labels)
    recalls = []
    for label in sorted(set(labels)):
        own = [p == t for p, t in zip(predicted, labels, strict=True) if t == label]
        recalls.append(sum(own) / len(own))
    return sum(recalls) / len(recalls)
