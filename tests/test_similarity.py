"""Ranks and nearest neighbours against a full sort, with ties, several captions a clip and ragged sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


def neighbours_by_sorting(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition: all scores in float64, sorted by (score descending, row ascending)."""
    scores = queries.double() @ database.double().T
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@pytest.mark.parametrize(
    ("q", "n", "k"), [(1, 1, 1), (3, 700, 700), (5, 1300, 10), (2, 1024, 1024), (0, 9, 3)]
)
def test_topk_is_exact_ties_included(q: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK_ROWS", 257)
    monkeypatch.setattr(similarity, "_TILE_ROWS", 2)
    queries, database = torch.randint(-2, 3, (q, 6)).float(), torch.randint(-2, 3, (n, 6)).float()
    scores, index = similarity.topk(queries, database, k)
    want_scores, want_index = neighbours_by_sorting(queries, database, k)
    assert torch.equal(scores, want_scores.float())
    assert torch.equal(index, want_index)
    assert index.dtype == torch.int64


def test_topk_of_equal_rows_is_the_database_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK_ROWS", 10)
    _, index = similarity.topk(torch.ones(2, 4), torch.ones(35, 4), 12)
    assert index.tolist() == [list(range(12))] * 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_topk_reads_a_mapped_database(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK_ROWS", 100)
    rows = torch.nn.functional.normalize(torch.randn(421, 32), dim=1).numpy().astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    queries = torch.randn(7, 32, dtype=torch.float64)
    scores, index = similarity.topk(queries, mapped, 20)
    want_scores, want_index = neighbours_by_sorting(queries, torch.from_numpy(rows), 20)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=1e-12)
    assert torch.equal(index, want_index)
    halves, _ = similarity.topk(queries.half(), torch.from_numpy(rows).bfloat16(), 1)
    assert halves.dtype == torch.float32


@pytest.mark.parametrize(
    ("queries", "database", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), 1, r"same number of columns, got \(2, 3\) and \(5, 4\)"),
        (torch.zeros(3), torch.zeros(5, 3), 1, r"must be matrices .* got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 6, r"k must be in \[1, 5\] for 5 rows .* got 6"),
        (torch.zeros(2, 3), torch.zeros(2000, 3), 1025, r"k must be in \[1, 1024\]"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 0, "got 0"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, r"k must be in \[1, 0\]"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 1.0, "k must be an integer, got float"),
        (torch.zeros(2, 3).int(), torch.zeros(5, 3), 1, "must be floating, got Tensor of torch.int32"),
        (torch.zeros(2, 3), np.zeros((5, 3), np.int8), 1, "and ndarray of int8"),
        (torch.zeros(2, 3), [[0.0, 0.0, 0.0]], 1, "and list of"),
        (torch.full((2, 3), torch.nan), torch.zeros(5, 3), 1, "queries_QD must be finite"),
        (torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, -torch.inf, 0]]), 1, "infinity in row 1"),
    ],
)
def test_topk_names_what_is_wrong(queries: object, database: object, k: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        similarity.topk(queries, database, k)  # type: ignore[arg-type]
