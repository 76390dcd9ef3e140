"""Means and intervals of a judge's answers: known scores, position bias, coverage of the intervals."""

from __future__ import annotations

import re

import numpy as np

from clsp_fast.captioning import scores
from clsp_fast.captioning.scores import ASPECTS, Comparison, Scores


def test_known_scores_are_recovered() -> None:
    collected = Scores(2)
    truth_NSA = np.array([[[5, 4, 3], [1, 2, 3]], [[3, 3, 3], [2, 2, 2]], [[4, 2, 5], [5, 5, 5]]])
    for noise in (-1, 1, 0):  # over the rounds of a clip the noise has the mean 0
        for clip in (2, 0, 1):
            collected.add(clip, truth_NSA[clip] + noise)
    means_NSA = collected.means()
    assert np.array_equal(means_NSA, truth_NSA)
    summary = scores.summarise_scores(means_NSA, ["first", "second"], resamples=200, seed=0)
    assert summary["clips"] == 3
    for s, name in enumerate(("first", "second")):
        figures = summary["systems"][name]
        assert list(figures) == [*ASPECTS, "mean"]
        for a, aspect in enumerate(ASPECTS):
            assert figures[aspect]["mean"] == truth_NSA[:, s, a].mean()
            low, high = figures[aspect]["interval"]
            assert low <= figures[aspect]["mean"] <= high
        assert abs(figures["mean"]["mean"] - truth_NSA[:, s].mean()) < 1e-12
    difference = (truth_NSA[:, 0] - truth_NSA[:, 1]).mean()
    assert abs(summary["difference"]["mean"]["mean"] - difference) < 1e-12


def test_a_clip_counts_once_however_many_of_its_rounds_were_usable() -> None:
    collected = Scores(1)
    for _ in range(5):
        collected.add(0, np.full((1, 3), 5))
    collected.add(7, np.full((1, 3), 1))
    assert collected.means().mean() == 3


def test_intervals_cover_the_true_mean_and_shrink_with_the_number_of_clips() -> None:
    random = np.random.default_rng(0)
    covered, widths = 0, []
    for clips in (50, 200):
        for trial in range(100):
            means_NSA = np.clip(random.normal(3.0, 0.5, (clips, 1, 3)), 1, 5)
            figures = scores.summarise_scores(means_NSA, ["a"], resamples=300, seed=trial)["systems"]["a"]
            low, high = figures["correctness"]["interval"]
            covered += low <= 3.0 <= high
        widths.append(high - low)
    # 200 trials of an event of probability .95 number 180 to 198 with probability .998.
    assert 180 <= covered <= 198
    assert 1.5 < widths[0] / widths[1] < 2.7


def test_position_bias_cancels_and_is_reported() -> None:
    """This judge prefers the caption that stands first, whatever it says."""
    summary = scores.summarise_comparisons({i: Comparison(1, 1) for i in range(20)}, resamples=50, seed=0)
    assert summary["tie"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert summary["preference"]["mean"] == summary["better"]["mean"] == summary["worse"]["mean"] == 0.0
    assert summary["position"]["mean"] == 1.0
    assert summary["agreement"]["mean"] == 0.0


def test_a_preference_is_recovered_through_position_bias() -> None:
    # 6 clips: better in both orders. 3 clips: better in one, a tie in the other. 1 clip: worse in both.
    rows = [Comparison(1, -1)] * 6 + [Comparison(1, 0)] * 3 + [Comparison(-1, 1)]
    summary = scores.summarise_comparisons(dict(enumerate(rows)), resamples=50, seed=0)
    assert summary["clips"] == 10
    assert [summary[name]["mean"] for name in ("better", "tie", "worse")] == [0.9, 0.0, 0.1]
    assert abs(summary["preference"]["mean"] - (6 + 1.5 - 1) / 10) < 1e-12
    assert abs(summary["position"]["mean"] - 1.5 / 10) < 1e-12
    assert summary["agreement"]["mean"] == 0.7
    ties = scores.summarise_comparisons({0: Comparison(0, 0)}, resamples=50, seed=0)
    assert (ties["tie"]["mean"], ties["agreement"]["mean"]) == (1.0, 1.0)


def test_the_table_names_every_system_and_figure() -> None:
    collected = Scores(2)
    collected.add(0, np.array([[5, 4, 3], [1, 2, 3]]))
    results = {
        "scores": scores.summarise_scores(collected.means(), ["a.jsonl", "b.jsonl"], resamples=20, seed=0),
        "pairs": scores.summarise_comparisons({0: Comparison(1, -1)}, resamples=20, seed=0),
    }
    text = scores.table(results)
    assert re.search(r"^a\.jsonl +5\.00 \[5\.00, 5\.00\] +4\.00", text, re.MULTILINE)
    for word in ("b.jsonl", "difference", *ASPECTS, "better", "tie", "worse", "position", "agreement"):
        assert word in text


def test_without_any_usable_answer_there_are_no_figures() -> None:
    results = {
        "scores": scores.summarise_scores(Scores(1).means(), ["a"], resamples=20, seed=0),
        "pairs": scores.summarise_comparisons({}, resamples=20, seed=0),
    }
    assert scores.table(results) == "0 clips with scores\n\n0 clips compared in both orders"
