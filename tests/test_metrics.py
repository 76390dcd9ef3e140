"""Retrieval and classification figures against hand-counted values."""

from __future__ import annotations

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
    found = similarity.ranks(case["audio"], case["text"])
    for direction in ("audio_to_text", "text_to_audio"):
        figures = metrics.retrieval(getattr(found, direction))
        for ours, theirs in (("R@1", "R@1"), ("R@5", "R@5"), ("R@10", "R@10"), ("MRR@10", "mAP@10")):
            assert figures[ours] == pytest.approx(float(case[f"{direction}_{theirs}"]), abs=1e-7)


def test_accuracies_by_hand() -> None:
    labels, predicted = ["a", "a", "a", "b"], ["a", "a", "b", "c"]
    assert metrics.accuracy(predicted, labels) == 0.5
    assert metrics.unweighted_average_recall(predicted, labels) == pytest.approx((2 / 3 + 0) / 2)
    for wrong in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="as long and not empty"):
            metrics.unweighted_average_recall(*wrong)
