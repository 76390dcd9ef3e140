"""The engine behind loss and retrieval, against dense float64 scores: ragged sizes, several threads, every
instruction set and each call of the extension.

Only numpy is used, so that sanitizers can run this file. test_negatives.py and test_similarity.py test more,
through torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numerics import assert_agrees
from numpy.typing import NDArray

from clsp_fast import _C

THREADS = 3
Array = NDArray[Any]
TILE_ROWS, TILE_COLUMNS, PANEL_ROWS, PANEL_COLUMNS = _C.LOGIT_TILES
# Less than a tile; four panels, three of them ragged.
SIZES = [(3, 5, 7), (PANEL_ROWS + 37, PANEL_COLUMNS + 41, 9)]
sizes = pytest.mark.parametrize(("m", "n", "depth"), SIZES)
isas = pytest.mark.parametrize("isa", _C.instruction_sets())


def embeddings(rows: int, depth: int, seed: int) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax_sums(scores_MN: Array, positive_MN: Array) -> tuple[Array, Array, Array]:
    """Log-sum-exp of rows and of columns, and the gradient of their total by each score."""
    with np.errstate(divide="ignore"):
        terms = np.where(positive_MN, 0.0, np.exp(scores_MN))
        row, column = terms.sum(1), terms.sum(0)
        gradient = terms / np.where(row, row, 1)[:, None] + terms / np.where(column, column, 1)
        return np.log(row), np.log(column), gradient


def sigmoid_sums(scores_MN: Array, positive_MN: Array) -> tuple[Array, Array, Array]:
    row = np.where(positive_MN, 0.0, np.log1p(np.exp(scores_MN))).sum(1)
    return row, np.empty(0), np.where(positive_MN, 0.0, 1 / (1 + np.exp(-scores_MN)))


@isas
@sizes
@pytest.mark.parametrize("row_tiles_kept", [0, 1, 2])
@pytest.mark.parametrize(("kind", "dense"), [("softmax", softmax_sums), ("sigmoid", sigmoid_sums)])
def test_negatives(isa: str, m: int, n: int, depth: int, row_tiles_kept: int, kind: str, dense: Any) -> None:
    audio, text = embeddings(m, depth, 0), embeddings(n, depth, 1)
    owner = np.random.default_rng(2).integers(-1, m + 1, n)
    scale, bias = 5.0, -0.5
    positive = owner == np.arange(m)[:, None]
    row, column, gradient = dense(scale * audio.astype(float) @ text.T + bias, positive)
    out = np.full(m, math.nan, np.float32), np.full(len(column), math.nan, np.float32)
    row_tiles, column_tiles = min(row_tiles_kept, -(-m // TILE_ROWS)), -(-n // TILE_COLUMNS)
    kept = np.full(row_tiles * TILE_ROWS * column_tiles * TILE_COLUMNS, math.nan, np.float32)
    problem = (kind, audio, text, owner, scale, bias, out)
    _C.sum_negatives(*problem, kept, num_threads=THREADS, isa=isa)
    d_out = np.ones(m, np.float32), np.ones(len(column), np.float32)
    d_audio, d_text = np.full_like(audio, math.nan), np.full_like(text, math.nan)
    d_scale, d_bias = _C.sum_negatives_backward(
        *problem, d_out, kept, d_audio, d_text, num_threads=THREADS, isa=isa
    )
    scores = audio.astype(float) @ text.T
    size = np.abs(gradient)
    for result, expected, terms in (
        (out[0], row, row),
        (out[1], column, column),
        (d_audio, scale * gradient @ text, scale * size @ np.abs(text)),
        (d_text, scale * gradient.T @ audio, scale * size.T @ np.abs(audio)),
        (d_bias, gradient.sum(), size.sum()),
        (d_scale, (gradient * scores).sum(), (size * np.abs(scores)).sum()),
    ):
        # Exponents are logits of up to 5. The error of a sum over rows or columns grows with the root of
        # their number, because roundings of both signs mostly cancel.
        assert_agrees(result, expected, count=8 + scale + (m + n) ** 0.5, dtype=np.float32, size=terms)


def exact_embeddings(rows: int, depth: int, seed: int) -> NDArray[np.float32]:
    """Scores are small integers: exact, with many ties."""
    return np.sign(embeddings(rows, depth, seed))


@isas
@sizes
def test_ranks(isa: str, m: int, n: int, depth: int) -> None:
    audio, text = exact_embeddings(m, depth, 0), exact_embeddings(n, depth, 1)
    owner = np.random.default_rng(2).integers(0, m, n).astype(np.int32)
    scores = audio @ text.T
    positives = np.where(owner == np.arange(m)[:, None], scores, -math.inf)
    has_text = np.isfinite(positives).any(1)
    text_score, audio_score, audio_index = _C.rank_targets(audio, text, owner, num_threads=THREADS, isa=isa)
    assert np.array_equal(text_score, scores[owner, np.arange(n)])
    assert np.array_equal(audio_score, np.where(has_text, positives.max(1), math.inf))
    assert np.array_equal(audio_index, np.where(has_text, positives.argmax(1), -1))
    ahead = np.zeros(m, np.int64), np.zeros(n, np.int64)
    for first in range(0, n, n // 2 + 1):
        part = slice(first, first + n // 2 + 1)
        _C.count_ahead(
            audio,
            text[part],
            first_text=first,
            audio_targets=(audio_score, audio_index),
            text_targets=(text_score[part], owner[part]),
            audio_ahead=ahead[0],
            text_ahead=ahead[1][part],
            num_threads=THREADS,
            isa=isa,
        )
    for counts, all_scores, target, index in (
        (ahead[0], scores, audio_score, audio_index),
        (ahead[1], scores.T, text_score, owner),
    ):
        earlier = np.arange(all_scores.shape[1]) < index[:, None]
        before = (all_scores > target[:, None]) | (all_scores == target[:, None]) & earlier
        assert np.array_equal(counts, before.sum(1))


@isas
@sizes
@pytest.mark.parametrize("k", [1, 4])
def test_best(isa: str, m: int, n: int, depth: int, k: int) -> None:
    queries, database = exact_embeddings(m, depth, 0), exact_embeddings(n, depth, 1)
    scores, index = np.full((m, k), -math.inf, np.float32), np.full((m, k), -1, np.int64)
    for first in range(0, n, n // 2 + 1):
        rows = database[first : first + n // 2 + 1]
        arguments = {"first_row": first, "scores": scores, "index": index, "num_threads": THREADS, "isa": isa}
        assert _C.update_best(queries, rows, **arguments) is None
    expected = np.argsort(-(queries @ database.T), axis=1, kind="stable")[:, :k]
    assert np.array_equal(index, expected)
    assert np.array_equal(scores, np.take_along_axis(queries @ database.T, expected, 1))
    database[n // 2, 1] = math.nan
    assert _C.update_best(queries, database, **(arguments | {"first_row": 0})) == n // 2
