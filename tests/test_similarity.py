"""Ranks against a full sort, with ties, several captions a clip and ragged sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clsp_fast import similarity


def by_sorting(scores_QN: Tensor, positive_QN: Tensor) -> list[int]:
    """Best positive's place in a stable descending sort that leaves out the query's other positives."""
    found = []
    for scores, positive in zip(scores_QN.tolist(), positive_QN.tolist(), strict=True):
        own = [j for j, is_positive in enumerate(positive) if is_positive]
        if not own:
            found.append(-1)
            continue
        best = max(own, key=lambda j: (scores[j], -j))
        others = [j for j in range(len(scores)) if j == best or not positive[j]]
        found.append(sorted(others, key=lambda j: (-scores[j], j)).index(best))
    return found


@pytest.mark.parametrize(("clips", "texts"), [(1, 1), (7, 7), (5, 13), (13, 5), (1100, 30)])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_those_of_a_sort(clips: int, texts: int, ties: bool) -> None:
    audio, text = torch.randn(clips, 8), torch.randn(texts, 8)
    if ties:  # few distinct values: many equal scores, exactly representable
        audio, text = audio.sign(), text.sign()
    owner = torch.randint(clips, (texts,))
    found = similarity.ranks(audio, text, text_owner=owner)
    positive = owner == torch.arange(clips)[:, None]
    scores = audio @ text.T
    assert found.audio_to_text.tolist() == by_sorting(scores, positive)
    assert found.text_to_audio.tolist() == by_sorting(scores.T, positive.T)


def test_equal_embeddings_give_the_index_order() -> None:
    found = similarity.ranks(torch.ones(5, 3), torch.ones(5, 3))
    assert found.audio_to_text.tolist() == found.text_to_audio.tolist() == [0, 1, 2, 3, 4]


def test_nan_is_no_perfect_score() -> None:
    for audio, text in (
        (torch.full((2, 3), torch.nan), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.full((2, 3), torch.inf)),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            similarity.ranks(audio, text)


def test_wrong_shapes_and_owners_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of columns"):
        similarity.ranks(torch.ones(5, 3), torch.ones(5, 4))
    for owner in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0])):
        with pytest.raises(ValueError, match=r"text_owner must hold 2 indices in 0\.\.4"):
            similarity.ranks(torch.ones(5, 3), torch.ones(2, 3), text_owner=owner)
