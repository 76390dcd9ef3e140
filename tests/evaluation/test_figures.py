"""Figures of sets of clips whose right answers are known, and tables of these figures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation import figures, report
from clsp_fast.evaluation.tasks import tasks_from_prompts

WORDS = ["slow", "fast", "male", "female"]


def encode(texts: Sequence[str]) -> Tensor:
    """A perfect text tower, with an axis for each word."""
    rows = torch.tensor([[float(word in text.split()) for word in WORDS] for text in texts])
    return torch.nn.functional.normalize(rows, dim=1)


def clip(name: str, speed: str, sex: str) -> Clip:
    tags = {"speed": speed, "sex": sex}
    captions = Captions((speed,), (sex, f"{speed} {sex}"))
    claims = {"global": ({"speed": speed},), "fine": ({"sex": sex}, tags)}
    return Clip(name, f"{name}.wav", 0.0, 2.0, None, captions, tags, claims)


CLIPS = [
    clip("a", "slow", "male"),
    clip("b", "fast", "male"),
    clip("c", "slow", "female"),
    clip("d", "slow", "male"),
]
TASKS = {"speed": {"slow": ["slow"], "fast": ["fast"]}, "age": {"old": ["slow"], "young": ["fast"]}}


def embeddings() -> Tensor:
    return encode([f"{c.tags['speed']} {c.tags['sex']}" for c in CLIPS])


def test_figures_of_a_perfect_model() -> None:
    results = figures.evaluate_embeddings(embeddings(), CLIPS, encode, tasks_from_prompts(TASKS))
    assert results["n"] == 4
    fine = results["retrieval"]["fine"]  # clips a and d have the same captions
    for direction in ("audio_to_text", "text_to_audio"):
        assert fine[direction]["R@1"] == 0.75
        assert fine[direction]["ceiling"] == {"R@1": 0.75, "R@5": 1.0, "R@10": 1.0}
        assert fine[direction]["hit@5"] == 1.0
        assert fine[direction]["chance"]["R@1"] == 0.25
    assert results["retrieval"]["global"]["text_to_audio"]["ceiling"]["R@1"] == pytest.approx(
        (1 / 3 * 3 + 1) / 4
    )
    assert results["zeroshot"] == {
        "speed": {"n": 4, "accuracy": 1.0, "uar": 1.0, "chance": 0.5, "majority": 0.75}
    }


def test_hits_count_any_clip_that_a_caption_is_true_of() -> None:
    count = 40
    # Caption j scores highest with clips j+1, j+2, ... (cyclically), and lowest with clip j, its positive.
    text = torch.stack([torch.arange(count, 0, -1.0).roll(j + 1) for j in range(count)])
    true = torch.eye(count, dtype=torch.bool)
    true[4, 1] = True  # caption 1 is also true of clip 4, its third choice
    computed = figures.retrieval_figures(torch.eye(count), text, true_MM=true)["text_to_audio"]
    assert computed["R@10"] == 0.0
    assert computed["hit@5"] == pytest.approx(1 / count)
    two_answers = 1 - (35 * 34) / (40 * 39)
    assert computed["hit@5_chance"] == pytest.approx(((count - 1) * 5 / count + two_answers) / count)
    assert computed["ceiling"]["R@1"] == pytest.approx((count - 0.5) / count)


def test_clips_without_claims_or_captions_of_a_kind() -> None:
    bare = [Clip(str(i), "x.wav", 0.0, None, None, Captions((), (w,))) for i, w in enumerate(WORDS)]
    results = figures.evaluate_embeddings(encode(WORDS), bare, encode, {})
    assert list(results["retrieval"]) == ["fine"]
    assert "hit@5" not in results["retrieval"]["fine"]["audio_to_text"]
    assert results["retrieval"]["fine"]["audio_to_text"]["R@1"] == 1.0
    assert "fine speech->text" in report.table_with_bounds(results, "test")
    assert report.summary(results).startswith("fine R@1 1.000")


def test_a_random_model_is_at_chance() -> None:
    count = 2000
    results = figures.retrieval_figures(torch.randn(count, 4), torch.randn(count, 4))
    for direction in ("audio_to_text", "text_to_audio"):
        computed = results[direction]
        assert abs(computed["R@10"] - computed["chance"]["R@10"]) < 4 * (0.005 / count) ** 0.5
