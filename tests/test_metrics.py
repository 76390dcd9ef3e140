"""Retrieval and classification figures against hand-counted values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from clsp_fast import metrics, similarity


def test_retrieval_by_hand() -> None:
    figures = metrics.retrieval(torch.tensor([0, 0, 3, 9, 10, 200, -1]))
    assert figures == {
        "R@1": pytest.approx(2 / 6),
        "R@5": pytest.approx(3 / 6),
        "R@10": pytest.approx(4 / 6),
        "MRR@10": pytest.approx((1 + 1 + 1 / 4 + 1 / 10) / 6),
        "median_rank": 4.0,
    }


def test_retrieval_needs_a_query_with_a_positive() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        metrics.retrieval(torch.tensor([-1, -1]))


@pytest.mark.parametrize("count", [1, 37, 200])
def test_retrieval_equals_the_recipe(golden, count: int) -> None:
    case = {k.split(".", 1)[1]: v for k, v in golden("retrieval").items() if k.startswith(f"N{count}.")}
    ranks = similarity.ranks(case["audio"], case["text"])
    for direction in ("audio_to_text", "text_to_audio"):
        figures = metrics.retrieval(getattr(ranks, direction))
        for name, golden_name in (("R@1", "R@1"), ("R@5", "R@5"), ("R@10", "R@10"), ("MRR@10", "mAP@10")):
            assert figures[name] == pytest.approx(float(case[f"{direction}_{golden_name}"]), abs=1e-7)


def test_accuracies_by_hand() -> None:
    labels, predicted = ["a", "a", "a", "b"], ["a", "a", "b", "c"]
    assert metrics.accuracy(predicted, labels) == 0.5
    assert metrics.unweighted_average_recall(predicted, labels) == pytest.approx((2 / 3 + 0) / 2)
    for wrong in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="must have the same length > 0"):
            metrics.unweighted_average_recall(*wrong)


def each_item_once(count: int) -> np.ndarray:
    return np.ones((1, count))


def test_correlations_by_hand() -> None:
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert metrics.pearson(x, y) == pytest.approx([0.8])
    assert metrics.spearman(x, y) == pytest.approx([0.8])
    assert metrics.kendall(x, y) == pytest.approx([0.6])  # 8 of 10 pairs agree
    tied = np.array([1.0, 2, 2, 3])
    assert metrics.kendall(tied, np.array([1.0, 3, 2, 4])) == pytest.approx([5 / 30**0.5])
    assert metrics.spearman(tied, np.array([1.0, 3, 2, 4])) == pytest.approx([4.5 / (4.5 * 5) ** 0.5])
    for figure in metrics.CORRELATIONS.values():
        assert figure(x, 3 - 2 * x) == pytest.approx([-1.0])
        assert np.isnan(figure(x, np.full(5, 0.1)))
        assert figure(x * 1e-9 + 1e3, y) == pytest.approx(figure(x, y), abs=1e-3)
        for wrong in ((x, y[:4]), (x[:1], y[:1]), (x, y * np.nan), (x[None], y[None])):
            with pytest.raises(ValueError, match="must be"):
                figure(*wrong)


def kendall_by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    untied = [sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)]
    return float(sum(a * b for a, b in signs) / (untied[0] * untied[1]) ** 0.5)


def spearman_by_sorting(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [[np.mean([i for i, w in enumerate(sorted(v)) if w == u]) for u in v] for v in (x, y)]
    return float(np.corrcoef(ranks)[0, 1])


def test_resampled_correlations_are_those_of_the_repeated_items() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 300).astype(float), rng.standard_normal(300).round(1)
    y += 0.2 * x
    (drawn,) = metrics.draws(np.arange(300), resamples=4, seed=0)
    counts = np.concatenate([each_item_once(300), drawn])
    figures = {name: figure(x, y, counts) for name, figure in metrics.CORRELATIONS.items()}
    rounding = 10 * 300 * np.finfo(np.float64).eps  # of sums of 300 terms, in both computations
    for row, count in enumerate(counts.astype(int)):
        sample = np.repeat(x, count), np.repeat(y, count)
        assert figures["pearson"][row] == pytest.approx(np.corrcoef(*sample)[0, 1], abs=rounding)
        assert figures["spearman"][row] == pytest.approx(spearman_by_sorting(*sample), abs=rounding)
        assert figures["kendall"][row] == pytest.approx(kendall_by_pairs(*sample), abs=rounding)


def draw(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return np.concatenate(list(metrics.draws(groups, resamples=resamples, seed=seed)))


def test_resamples_draw_whole_groups_and_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = np.array([0, 0, 1, 2, 2, 2])
    counts = draw(groups, 500, 1)
    assert counts.shape == (500, 6)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 3] == counts[:, 5]).all()
    assert (counts[:, [0, 2, 3]].sum(1) == 3).all()
    assert counts[:, 0].mean() == pytest.approx(1, abs=0.15)
    assert not np.array_equal(counts, draw(groups, 500, 2))
    monkeypatch.setattr(metrics, "_COUNTS_AT_ONCE", 100)
    assert len(list(metrics.draws(groups, resamples=500, seed=1))) == 32
    assert np.array_equal(counts, draw(groups, 500, 1))


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = {"R@1": 0, "accuracy": 0, "pearson": 0}
    for seed in range(200):
        right = rng.random(150) < 0.3
        ranks, names = torch.from_numpy(np.where(right, 0, 20)), np.where(right, "a", "b").tolist()
        x = rng.standard_normal(150)
        y = x + rng.standard_normal(150)

        def figures(counts: np.ndarray, ranks=ranks, names=names, x=x, y=y) -> dict[str, np.ndarray]:
            retrieval = metrics.resampled_retrieval(ranks, counts)
            classified = metrics.resampled_classification(names, ["a"] * 150, counts)
            return retrieval | classified | {"pearson": metrics.pearson(x, y, counts)}

        intervals = metrics.bootstrap(figures, np.arange(150), resamples=300, seed=seed)
        assert intervals["accuracy"] == intervals["uar"]
        for name, truth in (("R@1", 0.3), ("accuracy", 0.3), ("pearson", 0.5**0.5)):
            covered[name] += intervals[name][0] <= truth <= intervals[name][1]
    assert all(0.89 <= count / 200 <= 0.99 for count in covered.values()), covered


def test_resampled_figures_are_those_of_the_repeated_items() -> None:
    rng = np.random.default_rng(0)
    ranks = torch.from_numpy(rng.integers(-1, 15, 60))
    labels, predicted = (rng.choice(["a", "b", "c"], 60).tolist() for _ in range(2))
    counts = draw(np.arange(60), 5, 3)
    retrieval = metrics.resampled_retrieval(ranks, counts)
    classified = metrics.resampled_classification(predicted, labels, counts)
    for row, count in enumerate(counts.astype(int)):
        figures = metrics.retrieval(torch.repeat_interleave(ranks, torch.from_numpy(count)))
        assert {name: values[row] for name, values in retrieval.items()} == pytest.approx(figures)
        repeated = [np.repeat(np.array(names), count).tolist() for names in (predicted, labels)]
        assert classified["accuracy"][row] == pytest.approx(metrics.accuracy(*repeated))
        assert classified["uar"][row] == pytest.approx(metrics.unweighted_average_recall(*repeated))


def test_a_figure_that_no_resample_defines_has_no_interval() -> None:
    ranks = torch.tensor([-1, 3])
    counts = np.array([[1.0, 0.0], [0.0, 1.0]])
    figures = metrics.resampled_retrieval(ranks, counts)
    assert np.isnan([values[0] for values in figures.values()]).all()
    assert figures["median_rank"][1] == 4
    assert metrics.interval(figures["R@5"]) == (1.0, 1.0)
    assert np.isnan(metrics.interval(np.array([np.nan]))).all()


def test_confusion_counts_labels_by_row() -> None:
    counts = metrics.confusion(["a", "b", "b"], ["a", "a", "b"], ["a", "b", "c"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
