"""Averages of a judge's scores and comparisons, with bootstrap intervals over clips.

Shape suffixes: N clips, S systems (sources of captions), A aspects, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORES = range(1, 6)
"""The scores that a judge may give."""
ASPECTS = ("correctness", "coverage", "naturalness")
"""What a judge scores from 1 to 5."""
PREFERENCES = {"caption_1": 1, "tie": 0, "caption_2": -1}
"""What a judge can answer to a comparison, as a number: 1 if the first caption is better."""

Array = NDArray[np.float64]


class Scores:
    """The scores of several systems, added up for each clip.

    Args:
        systems: number of systems whose captions are scored.
    """

    def __init__(self, systems: int) -> None:
        self._shape = (systems, len(ASPECTS))
        self._sums: dict[int, Array] = {}
        self._rounds: dict[int, int] = {}

    def add(self, clip: int, scores_SA: NDArray[np.int64]) -> None:
        """Adds the scores of one round for a clip, with the systems and aspects in their fixed order."""
        self._sums[clip] = self._sums.get(clip, np.zeros(self._shape)) + scores_SA
        self._rounds[clip] = self._rounds.get(clip, 0) + 1

    def by_clip(self) -> dict[int, Array]:
        """Number of a clip -> means over its rounds, (S, A)."""
        return {clip: sums / self._rounds[clip] for clip, sums in sorted(self._sums.items())}

    def means(self) -> Array:
        """Mean over the rounds of each clip that has one, (N, S, A), in the order of the clips' numbers."""
        rows = list(self.by_clip().values())
        return np.stack(rows) if rows else np.zeros((0, *self._shape))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A judge's preference between two systems for one clip, asked in both orders.

    Attributes:
        straight: the answer with the first system's caption first: 1 (the first caption is better), 0 or -1.
        reversed: the answer with the second system's caption first: 1 (the first caption is better), 0 or -1.
    """

    straight: int
    reversed: int

    @property
    def preference(self) -> float:
        """Preference for the first system, in [-1, 1]; 0 for a judge who always prefers the same position."""
        return (self.straight - self.reversed) / 2

    @property
    def position(self) -> float:
        """Preference for the caption that stands first, in [-1, 1]; 0 for a judge without position bias."""
        return (self.straight + self.reversed) / 2


def summarise_scores(means_NSA: Array, names: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval of each system and aspect, and the differences between two systems.

    Args:
        means_NSA: `Scores.means`.
        names: names of the S systems.
        resamples: number of bootstrap resamples of the clips.
        seed: seed of the resamples.

    Returns:
        {"clips": N, "systems": {name: {aspect: figure}}}, where aspect can also be "mean" and a figure is
        {"mean", "interval"}. With two systems also "difference": {aspect: figure}, the first minus the
        second for the same clips.
    """
    if not len(means_NSA):
        return {"clips": 0, "systems": {}}
    # The last column is the mean of the aspects.
    values_NSA = np.concatenate([means_NSA, means_NSA.mean(2, keepdims=True)], axis=2)
    labels = (*ASPECTS, "mean")
    columns = {
        f"{system}/{label}": values_NSA[:, s, a]
        for s, system in enumerate(names)
        for a, label in enumerate(labels)
    }
    if len(names) == 2:
        differences_NA = values_NSA[:, 0] - values_NSA[:, 1]
        columns |= {f"-/{label}": differences_NA[:, a] for a, label in enumerate(labels)}
    figures = _figures(columns, resamples=resamples, seed=seed)
    summary: dict[str, Any] = {"clips": len(means_NSA), "systems": {}}
    for system in names:
        summary["systems"][system] = {label: figures[f"{system}/{label}"] for label in labels}
    if len(names) == 2:
        summary["difference"] = {label: figures[f"-/{label}"] for label in labels}
    return summary


def summarise_comparisons(
    comparisons: Mapping[int, Comparison], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Shares of clips for which the first system is better, tied or worse, and the judge's position bias.

    The first system is better for a clip if it is preferred on the average of both orders. If the judge
    contradicts itself, the clip is a tie.

    Args:
        comparisons: number of the clip -> its comparison.
        resamples: number of bootstrap resamples of the clips.
        seed: seed of the resamples.

    Returns:
        "clips", and as {"mean", "interval"}: "better", "tie" and "worse" (shares of the clips), "preference"
        (mean preference for the first system, in [-1, 1]), "position" (mean preference for the caption that
        stands first, in [-1, 1]) and "agreement" (share of clips with the same preference in both orders).
    """
    if not comparisons:
        return {"clips": 0}
    rows = [comparisons[clip] for clip in sorted(comparisons)]
    preference_N = np.array([row.preference for row in rows])
    columns = {
        "better": (preference_N > 0).astype(np.float64),
        "tie": (preference_N == 0).astype(np.float64),
        "worse": (preference_N < 0).astype(np.float64),
        "preference": preference_N,
        "position": np.array([row.position for row in rows]),
        "agreement": np.array([float(row.straight == -row.reversed) for row in rows]),
    }
    return {"clips": len(rows), **_figures(columns, resamples=resamples, seed=seed)}


def _figures(columns: Mapping[str, Array], *, resamples: int, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval of each column over clips. All columns use the same resamples."""
    from clsp_fast import metrics  # imports torch, which no other step of captioning needs

    names, values_NC = list(columns), np.stack(list(columns.values()), axis=1)

    def resampled(counts_RN: Array) -> dict[str, Array]:
        means_RC = counts_RN @ values_NC / counts_RN.sum(1, keepdims=True)
        return {name: means_RC[:, column] for column, name in enumerate(names)}

    intervals = metrics.bootstrap(resampled, np.arange(len(values_NC)), resamples=resamples, seed=seed)
    means_C = values_NC.mean(0)
    return {
        name: {"mean": float(means_C[column]), "interval": list(intervals[name])}
        for column, name in enumerate(names)
    }


def table(results: Mapping[str, Any]) -> str:
    """The content of judge.json as text.

    Args:
        results: "scores" as `summarise_scores` returns it, and possibly "pairs" as `summarise_comparisons`.
    """
    scores = results["scores"]
    lines = [f"{scores['clips']} clips with scores"]
    if scores["clips"]:
        lines.append(f"{'':<24}" + "".join(f"{label:>22}" for label in (*ASPECTS, "mean")))
    rows = dict(scores["systems"])
    if "difference" in scores:
        rows["difference"] = scores["difference"]
    for name, figures in rows.items():
        lines.append(f"{name[-24:]:<24}" + "".join(f"{_figure(figure):>22}" for figure in figures.values()))
    pairs = results.get("pairs")
    if pairs is not None:
        lines += ["", f"{pairs['clips']} clips compared in both orders"]
        for name, figure in pairs.items():
            if name != "clips":
                lines.append(f"{name:<24}{_figure(figure):>22}")
    return "\n".join(lines)


def _figure(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.2f} [{low:.2f}, {high:.2f}]"
