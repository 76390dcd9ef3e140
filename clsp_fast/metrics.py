"""Metrics of retrieval and classification, correlation with human ratings, and confidence intervals.

Intervals are percentiles over bootstrap resamples (Efron, 1979). A resample is given by counts: how often
each item was drawn. Each metric is computed from such counts, for many resamples at once.
Shape suffixes: N items, R resamples, G groups of equal values, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Interval = tuple[float, float]

_BLOCK = 256
_COUNTS_AT_ONCE = 2**22


def retrieval(ranks: Tensor) -> dict[str, float]:
    """Recall and mean reciprocal rank of one retrieval direction.

    MRR@10 is the mean of 1 / (rank + 1) over all queries; ranks above 9 count as 0. With one relevant item a
    query, it is the "mAP@10" of the literature on this task.

    Args:
        ranks: integer (Q,), 0-based rank of each query's best positive. A negative rank means that the query
            has none; it is left out.

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
            f"predicted and labels must have the same length > 0, got {len(predicted)}, {len(labels)}"
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
        right = [p == t for p, t in zip(predicted, labels, strict=True) if t == label]
        recalls.append(sum(right) / len(right))
    return sum(recalls) / len(recalls)


def confusion(predicted: Sequence[str], labels: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Counts (len(names), len(names)): rows are labels, columns are predictions."""
    index = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, ([index[label] for label in labels], [index[name] for name in predicted]), 1)
    return counts


def bootstrap(
    figures: Callable[[Array], dict[str, Array]],
    groups: NDArray[np.int64],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % confidence intervals of metrics.

    Args:
        figures: computes metrics from counts (R, N), the number of times that each item was drawn. It returns
            {name: value for each resample (R,)}, NaN where a metric is not defined. It is called with a few
            resamples at a time, so that memory does not grow with their number.
        groups: int64 (N,); items of one group are drawn together. Several captions of a clip form a group.
            `arange(N)` draws each item independently.
        resamples: number of resamples.
        seed: seed of the draws.
    """
    values: dict[str, list[Array]] = {}
    for counts_RN in draws(groups, resamples=resamples, seed=seed):
        for name, values_R in figures(counts_RN).items():
            values.setdefault(name, []).append(values_R)
    return {name: interval(np.concatenate(parts)) for name, parts in values.items()}


def draws(groups: NDArray[np.int64], *, resamples: int, seed: int) -> Iterator[Array]:
    """Yields the counts of some resamples at a time: how often each item was drawn, float64 (R, N)."""
    names, group_N = np.unique(groups, return_inverse=True)
    share, random = np.full(len(names), 1 / len(names)), np.random.default_rng(seed)
    at_once = max(1, _COUNTS_AT_ONCE // len(groups))
    for start in range(0, resamples, at_once):
        counts = random.multinomial(len(names), share, size=min(at_once, resamples - start))
        yield counts[:, group_N].astype(np.float64)


def interval(figures_R: Array) -> Interval:
    """Bounds of the middle 95 % of the resamples in which the metric is defined; NaN if there is none."""
    defined = figures_R[~np.isnan(figures_R)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def resampled_retrieval(ranks: Tensor, counts_RN: Array) -> dict[str, Array]:
    """The metrics of `retrieval` for each resample; column i of the counts is query i."""
    valid = (ranks >= 0).numpy()
    rank_N, counts_RN = ranks.numpy()[valid].astype(np.float64), counts_RN[:, valid]
    # A resample may have drawn no query that has a positive.
    total_R = np.where(counts_RN.any(1), counts_RN.sum(1), np.nan)
    figures = {f"R@{k}": counts_RN @ (rank_N < k) / total_R for k in (1, 5, 10)}
    figures["MRR@10"] = counts_RN @ np.where(rank_N < 10, 1 / (rank_N + 1), 0.0) / total_R
    order_N = rank_N.argsort(kind="stable")
    middle_R = (counts_RN[:, order_N].cumsum(1) > ((total_R - 1) // 2)[:, None]).argmax(1)
    return figures | {"median_rank": np.where(np.isnan(total_R), np.nan, rank_N[order_N][middle_R] + 1)}


def resampled_classification(
    predicted: Sequence[str], labels: Sequence[str], counts_RN: Array
) -> dict[str, Array]:
    """`accuracy` and `unweighted_average_recall` ("uar") for each resample; column i is item i."""
    accuracy(predicted, labels)
    label_N = np.array(labels)
    right_N = label_N == np.array(predicted)
    recalls = []
    for label in np.unique(label_N):
        class_RN = counts_RN[:, label_N == label]
        with np.errstate(invalid="ignore"):  # a class that was not drawn has no recall
            recalls.append(class_RN @ right_N[label_N == label] / class_RN.sum(1))
    return {
        "accuracy": counts_RN @ right_N / counts_RN.sum(1),
        "uar": np.nanmean(np.stack(recalls), axis=0),
    }


def pearson(x_N: Array, y_N: Array, counts_RN: Array | None = None) -> Array:
    """Pearson's correlation of each resample (R,); without counts, of the data (1,). NaN: x or y is constant.

    Raises:
        ValueError: lengths differ, are below 2, or a value is not finite.
    """
    x_N, y_N, counts_RN = _checked(x_N, y_N, counts_RN)
    return _pearson(x_N[None] - x_N.mean(), y_N[None] - y_N.mean(), counts_RN)


def spearman(x_N: Array, y_N: Array, counts_RN: Array | None = None) -> Array:
    """Spearman's correlation, which is Pearson's of the ranks; equal values have their mean rank."""
    x_N, y_N, counts_RN = _checked(x_N, y_N, counts_RN)
    return _pearson(_ranks(x_N, counts_RN), _ranks(y_N, counts_RN), counts_RN)


def kendall(x_N: Array, y_N: Array, counts_RN: Array | None = None) -> Array:
    """Kendall's tau-b: (concordant - discordant pairs) / sqrt(pairs untied in x * pairs untied in y).
    Otherwise as `pearson`. Time grows with N^2."""
    x_N, y_N, counts_RN = _checked(x_N, y_N, counts_RN)
    sums = np.zeros((3, len(counts_RN)))
    for start in range(0, len(x_N), _BLOCK):
        rows = slice(start, start + _BLOCK)
        x_BN, y_BN = np.sign(x_N[rows, None] - x_N), np.sign(y_N[rows, None] - y_N)
        for i, pairs_BN in enumerate((x_BN * y_BN, np.abs(x_BN), np.abs(y_BN))):
            sums[i] += ((counts_RN @ pairs_BN.T) * counts_RN[:, rows]).sum(1)
    with np.errstate(invalid="ignore"):
        tau_R: Array = np.clip(sums[0] / np.sqrt(sums[1] * sums[2]), -1.0, 1.0)
    return tau_R


CORRELATIONS: dict[str, Callable[..., Array]] = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def _checked(x_N: Array, y_N: Array, counts_RN: Array | None) -> tuple[Array, Array, Array]:
    x_N, y_N = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    if x_N.shape != y_N.shape or x_N.ndim != 1 or len(x_N) < 2:
        raise ValueError(
            f"x_N and y_N must be vectors of the same length >= 2, got {x_N.shape} and {y_N.shape}"
        )
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise ValueError("x_N and y_N must be finite")
    return x_N, y_N, np.ones((1, len(x_N))) if counts_RN is None else counts_RN


def _pearson(x_RN: Array, y_RN: Array, counts_RN: Array) -> Array:
    """Correlation of each resample; `x_RN` and `y_RN` may have one row for all resamples."""
    total_R = counts_RN.sum(1, keepdims=True)
    x_RN, y_RN = (v - (counts_RN * v).sum(1, keepdims=True) / total_R for v in (x_RN, y_RN))
    xy_R, xx_R, yy_R = ((counts_RN * v).sum(1) for v in (x_RN * y_RN, x_RN * x_RN, y_RN * y_RN))
    # Because of rounding, a constant x or y can have a tiny variance. It counts as 0.
    tiny = 1e-24 * total_R[:, 0] * np.maximum(1.0, max(np.square(x_RN).max(), np.square(y_RN).max()))
    scale_R = np.sqrt(xx_R * yy_R)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((xx_R > tiny) & (yy_R > tiny), np.clip(xy_R / scale_R, -1.0, 1.0), np.nan)


def _ranks(x_N: Array, counts_RN: Array) -> Array:
    """Rank (R, N) of each item in each resample. Equal values have their mean rank."""
    values_G, group_N = np.unique(x_N, return_inverse=True)
    starts_G = np.searchsorted(np.sort(x_N), values_G)
    drawn_RG = np.add.reduceat(counts_RN[:, x_N.argsort(kind="stable")], starts_G, axis=1)
    rank_RG = drawn_RG.cumsum(1) - drawn_RG + (drawn_RG + 1) / 2
    return rank_RG[:, group_N]
