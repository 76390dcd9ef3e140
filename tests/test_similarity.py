"""Ranks and nearest neighbours against a full sort: ties, several captions a clip and sizes that fill no
tile, in plain torch and in the extension, for any instruction set, tiles and number of threads."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_agrees
from torch import Tensor

from clsp_fast import _C, row_stream, similarity
from clsp_fast.kernels import neighbours, rank


@pytest.fixture(params=[*_C.instruction_sets(), "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each instruction set of the extension, and without the extension."""
    if request.param == "reference":
        monkeypatch.setattr(similarity, "_fits_engine", lambda *tensors: False)
    else:
        names = ("rank_targets", "count_ahead", "update_best")
        engine = {name: functools.partial(getattr(_C, name), isa=request.param) for name in names}
        monkeypatch.setattr(similarity, "_C", SimpleNamespace(**engine))
    return str(request.param)


def by_sorting(scores_QN: Tensor, positive_QN: Tensor) -> list[int]:
    """The place of the best positive in a stable descending sort without the query's other positives."""
    places = []
    for scores, positive in zip(scores_QN.tolist(), positive_QN.tolist(), strict=True):
        positives = [j for j, is_positive in enumerate(positive) if is_positive]
        if not positives:
            places.append(-1)
            continue
        best = max(positives, key=lambda j: (scores[j], -j))
        others = [j for j in range(len(scores)) if j == best or not positive[j]]
        places.append(sorted(others, key=lambda j: (-scores[j], j)).index(best))
    return places


@pytest.mark.parametrize(("clips", "texts"), [(1, 1), (7, 7), (5, 13), (13, 5), (1100, 30), (48, 97)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.usefixtures("implementation")
def test_ranks_equal_those_of_a_sort(clips: int, texts: int, ties: bool) -> None:
    # Whole numbers: their scores are exact in any order of addition.
    audio, text = ((100 * torch.randn(rows, 8)).round() for rows in (clips, texts))
    if ties:  # few distinct values, so that many scores are equal
        audio, text = audio.sign(), text.sign()
    owner = torch.randint(clips, (texts,))
    result = similarity.ranks(audio, text, text_owner=owner)
    positive = owner == torch.arange(clips)[:, None]
    scores = audio @ text.T
    assert result.audio_to_text.tolist() == by_sorting(scores, positive)
    assert result.text_to_audio.tolist() == by_sorting(scores.T, positive.T)


@pytest.mark.parametrize("count", [5, 331])
@pytest.mark.usefixtures("implementation")
def test_equal_embeddings_give_the_index_order(count: int) -> None:
    result = similarity.ranks(torch.ones(count, 3), torch.ones(count, 3))
    assert result.audio_to_text.tolist() == result.text_to_audio.tolist() == list(range(count))


def nearly_tied(rows: int, columns: int) -> Tensor:
    """Vectors that differ by a rounding error: their scores differ in the last bits, if at all."""
    return torch.randn(columns) + 3e-8 * torch.randn(rows, columns)


@pytest.mark.parametrize(("clips", "texts", "columns"), [(301, 700, 37), (700, 301, 512)])
def test_a_target_is_compared_by_the_score_it_has_in_the_tile(
    clips: int, texts: int, columns: int, implementation: str
) -> None:
    if implementation == "reference":
        pytest.skip("the reference takes targets from its own tiles")
    audio, text = nearly_tied(clips, columns), nearly_tied(texts, columns)
    text[texts // 2 :] = text[: texts - texts // 2].flip(0)  # exact ties too, at other places of tiles
    owner = torch.randint(clips, (texts,))
    scores, index = similarity.topk(audio, text, texts)
    scores = torch.empty_like(scores).scatter_(1, index, scores)
    assert len(scores.unique()) < scores.numel() / 500
    positive = owner == torch.arange(clips)[:, None]
    result = similarity.ranks(audio, text, text_owner=owner)
    assert result.audio_to_text.tolist() == by_sorting(scores, positive)
    assert result.text_to_audio.tolist() == by_sorting(scores.T, positive.T)


def test_a_score_does_not_depend_on_neighbours_place_or_threads() -> None:
    queries, database = nearly_tied(60, 100), nearly_tied(900, 100)
    scores, index = similarity.topk(queries, database, 900)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        repeated = similarity.topk(queries, database, 900)
        counted = similarity.ranks(queries, database[:60])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(repeated[0], scores)
    assert torch.equal(repeated[1], index)
    for part, expected in zip(counted, similarity.ranks(queries, database[:60]), strict=True):
        assert torch.equal(part, expected)
    alone, place = similarity.topk(queries[7:8], database[index[7, 500] :][:1], 1)
    assert (float(alone), int(place)) == (float(scores[7, 500]), 0)
    order = torch.randperm(900)
    shuffled, _ = similarity.topk(queries, database[order], 900)
    assert torch.equal(shuffled, scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranks_of_other_types_are_those_of_exact_scores(dtype: torch.dtype) -> None:
    audio, text = torch.randn(40, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    result = similarity.ranks(audio, text)
    scores = audio.double() @ text.double().T
    assert result.audio_to_text.tolist() == by_sorting(scores, torch.eye(40, dtype=torch.bool))
    assert result.text_to_audio.tolist() == by_sorting(scores.T, torch.eye(40, dtype=torch.bool))


def test_large_sets_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    audio, text = torch.randn(200, 8), torch.randn(200, 8)
    whole = similarity.ranks(audio, text)
    monkeypatch.setattr(similarity, "_WORK_AT_ONCE", 70 * 200 * 8)
    for part, expected in zip(similarity.ranks(audio, text), whole, strict=True):
        assert torch.equal(part, expected)
    transposed = similarity.ranks(audio.T.contiguous().T, text[:, ::2].repeat_interleave(2, 1))
    assert torch.equal(
        transposed.text_to_audio,
        similarity.ranks(audio, text[:, ::2].repeat_interleave(2, 1).contiguous()).text_to_audio,
    )


def test_rows_that_are_not_aligned_are_copied() -> None:
    rows = torch.randn(5, 3)
    view = np.frombuffer(b"x" + rows.numpy().tobytes(), np.float32, offset=1).reshape(5, 3)
    assert not view.flags.aligned
    assert similarity._float32_rows(view).flags.aligned
    scores, index = similarity.topk(rows, view, 2)
    expected = similarity.topk(rows, rows, 2)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])


def test_nan_is_refused() -> None:
    for audio, text in (
        (torch.full((2, 3), torch.nan), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.full((2, 3), torch.inf)),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            similarity.ranks(audio, text)


def test_wrong_shapes_and_owners_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of columns"):
        similarity.ranks(torch.ones(5, 3), torch.ones(5, 4))
    with pytest.raises(ValueError, match="audio_MD and text_ND must be matrices"):
        similarity.ranks(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"more texts \(6\) than clips \(5\)"):
        similarity.ranks(torch.ones(5, 3), torch.ones(6, 3))
    for owner, message in (
        (torch.tensor([0, 5]), r"text_owner must lie in 0\.\.4"),
        (torch.tensor([-1, 0]), r"text_owner must lie in 0\.\.4"),
        (torch.tensor([0]), r"text_owner must be int64 of shape \(2,\), got torch.int64 \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity.ranks(torch.ones(5, 3), torch.ones(2, 3), text_owner=owner)
    for options in ({}, {"text_owner": torch.tensor([0, 0])}):
        with pytest.raises(ValueError, match="audio_MD must have a row or more, because text_ND has 2"):
            similarity.ranks(torch.ones(0, 3), torch.ones(2, 3), **options)


def test_wrong_types_are_named() -> None:
    audio, text = torch.ones(5, 3), torch.ones(2, 3)
    for other in (text.double(), text.half(), text.to("meta")):
        with pytest.raises(TypeError, match="audio_MD and text_ND must share dtype and device"):
            similarity.ranks(audio, other)
    with pytest.raises(TypeError, match=r"audio_MD must be floating .* got torch.int32"):
        similarity.ranks(audio.int(), text.int())
    with pytest.raises(TypeError, match=r"text_ND must be floating .* got torch.float8_e4m3fn"):
        similarity.ranks(audio, text.to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"audio_MD must be a torch.Tensor, got list"):
        similarity.ranks(audio.tolist(), text)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"text_owner must be a torch.Tensor, got ndarray"):
        similarity.ranks(audio, text, text_owner=np.array([0, 1]))  # type: ignore[arg-type]
    for owner in (torch.tensor([0.0, 1.9]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="text_owner must be int64"):
            similarity.ranks(audio, text, text_owner=owner)


def neighbours_by_sorting(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition: all scores in float64, sorted by (score descending, row ascending)."""
    scores = queries.double() @ database.double().T
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@pytest.mark.parametrize(
    ("q", "n", "k"), [(1, 1, 1), (3, 700, 700), (101, 1300, 10), (2, 1024, 1024), (0, 9, 3)]
)
@pytest.mark.usefixtures("implementation")
def test_topk_is_exact_ties_included(q: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK_ROWS", 257)
    monkeypatch.setattr(similarity, "_TILE_ROWS", 2)
    queries, database = torch.randint(-2, 3, (q, 6)).float(), torch.randint(-2, 3, (n, 6)).float()
    scores, index = similarity.topk(queries, database, k)
    want_scores, want_index = neighbours_by_sorting(queries, database, k)
    assert torch.equal(scores, want_scores.float())
    assert torch.equal(index, want_index)
    assert index.dtype == torch.int64


@pytest.mark.usefixtures("implementation")
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
    narrow, narrow_index = similarity.topk(queries.float(), mapped, 20)
    assert narrow.dtype == torch.float32
    # Sums of 32 products of both signs, each as large as the query.
    assert_agrees(narrow, scores, count=32, dtype=torch.float32)
    assert (narrow_index == index).double().mean() > 0.99  # others differ by a rounding error
    want_scores, want_index = neighbours_by_sorting(queries, torch.from_numpy(rows), 20)
    assert scores.dtype == torch.float64
    assert_agrees(scores, want_scores, count=32)
    assert torch.equal(index, want_index)
    halves, _ = similarity.topk(queries.half(), torch.from_numpy(rows).bfloat16(), 1)
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kernels_search_a_mapped_database_in_chunks(
    kernel_device: torch.device, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.nn.functional.normalize(torch.randn(700, 24), dim=1).numpy().astype(dtype)
    rows[100:600:5] = rows[7]  # copies of one row, in every chunk
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    chunk_rows = 256
    monkeypatch.setattr(
        similarity,
        "device_chunks",
        functools.partial(row_stream.device_chunks, buffer_bytes=chunk_rows * rows[0].nbytes),
    )
    queries = torch.nn.functional.normalize(torch.randn(9, 24), dim=1)
    queries[4] = torch.from_numpy(rows[7]).float()
    parts: list[tuple[int, similarity.Database]] = [(0, mapped[:300]), (1000, mapped[300:])]
    scores, index = similarity._kernel_topk(neighbours, queries.to(kernel_device), parts, 6)
    expected_scores, place = similarity.topk(queries, mapped, 6)
    assert torch.equal(index.cpu(), torch.where(place < 300, place, place + 700))
    assert_agrees(scores.cpu(), expected_scores, count=24, dtype=torch.float32)


def test_the_kernels_name_a_row_of_a_later_part(kernel_device: torch.device) -> None:
    rows = np.ones((9, 4), np.float32)
    damaged = rows.copy()
    damaged[5, 2] = np.nan
    queries = torch.ones(2, 4, device=kernel_device)
    with pytest.raises(similarity.RowError, match="NaN or infinity in row 105") as error:
        similarity._kernel_topk(neighbours, queries, [(0, rows), (100, damaged)], 3)
    assert error.value.row == 105


def test_without_a_card_no_kernel_is_chosen() -> None:
    queries, rows = torch.ones(2, 3), np.ones((5, 3), np.float32)
    assert similarity.topk_of_parts(queries, [(0, rows)], 2) is None


@pytest.mark.parametrize(
    ("queries", "database", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), 1, r"same number of columns, got \(2, 3\) and \(5, 4\)"),
        (torch.zeros(3), torch.zeros(5, 3), 1, r"must be matrices .* got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 6, r"k must be in \[1, 5\] for 5 rows .* got 6"),
        (torch.zeros(2, 3), torch.zeros(2000, 3), 1025, r"k must be in \[1, 1024\]"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 0, "got 0"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, "database_ND must have a row or more, got none"),
        (torch.zeros(2, 3), torch.zeros(5, 3), 1.0, "k must be an integer, got float"),
        (torch.zeros(2, 3), torch.zeros(5, 3), True, "k must be an integer, got bool"),
        (torch.zeros(2, 3), torch.zeros(5, 3), np.float32(1), "k must be an integer, got float32"),
        (torch.zeros(2, 3).int(), torch.zeros(5, 3), 1, "queries_QD must be floating .* got torch.int32"),
        (np.zeros((2, 3)), torch.zeros(5, 3), 1, "queries_QD must be a torch.Tensor, got ndarray"),
        (torch.zeros(2, 3), np.zeros((5, 3), np.int8), 1, "database_ND must be float16, .* got int8"),
        (torch.zeros(2, 3), np.zeros((5, 3), ">f4"), 1, "database_ND must be .* byte order, got >f4"),
        (torch.zeros(2, 3), np.zeros((5, 3), np.longdouble), 1, "database_ND must be float16, float32 or"),
        (torch.zeros(2, 3), [[0.0, 0.0, 0.0]], 1, "database_ND must be a torch.Tensor or .* got list"),
        (torch.full((2, 3), torch.nan), torch.zeros(5, 3), 1, "queries_QD must be finite"),
        (torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, -torch.inf, 0]]), 1, "infinity in row 1"),
    ],
)
@pytest.mark.usefixtures("implementation")
def test_topk_names_what_is_wrong(queries: object, database: object, k: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        similarity.topk(queries, database, k)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clips", [0, 3])
def test_nothing_has_no_rank_and_no_query_has_no_neighbour(dtype: torch.dtype, clips: int) -> None:
    audio, none = torch.ones(clips, 4, dtype=dtype), torch.ones(0, 4, dtype=dtype)
    result = similarity.ranks(audio, none)
    assert result.audio_to_text.tolist() == [-1] * clips
    assert result.text_to_audio.tolist() == []
    assert result.audio_to_text.dtype == result.text_to_audio.dtype == torch.int64
    scores, rows = similarity.topk(none, torch.ones(5, 4, dtype=dtype), 2)
    assert scores.shape == rows.shape == (0, 2)
    assert (scores.dtype, rows.dtype) == (dtype, torch.int64)


@pytest.mark.usefixtures("implementation")
def test_k_may_be_an_integer_of_numpy() -> None:
    rows = torch.randn(5, 3)
    for result, expected in zip(
        similarity.topk(rows, rows, np.int64(2)), similarity.topk(rows, rows, 2), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("value", [-1e30, 1e30])
@pytest.mark.usefixtures("implementation")
def test_scores_that_overflow_are_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"overflow (torch\.)?float32"):
        similarity.topk(torch.full((1, 4), value), torch.full((3, 4), 1e30), 2)


def test_the_extension_refuses_what_would_read_beyond_its_arrays() -> None:
    rows, owner = np.ones((4, 3), np.float32), np.zeros(4, np.int32)
    state = {"scores": np.zeros((4, 2), np.float32), "index": np.zeros((4, 2), np.int64)}
    for first, second, owners, message in (
        (rows, rows[:, :2].copy(), owner, "same number of columns"),
        (rows, rows, owner[:3], "owner has the wrong"),
        (rows, rows, owner + 4, "owner must hold rows of audio"),
        (rows, rows, owner - 1, "owner must hold rows of audio"),
        (rows[:, :0], rows[:, :0], owner, "a column or more"),
        (rows[0], rows[0], owner, "two dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.rank_targets(first, second, owners, num_threads=1)
    with pytest.raises(TypeError):
        _C.rank_targets(rows[:, ::2], rows[:, ::2], owner, num_threads=1)
    for change, message in (
        ({"index": state["index"][:, :1].copy()}, "index has the wrong"),
        ({"index": state["index"].astype(np.int32)}, "index has the wrong"),
        ({"scores": state["scores"][:3]}, "scores has the wrong"),
        ({"scores": state["scores"][0]}, r"scores must be \(Q, K\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.update_best(rows, rows, first_row=0, num_threads=1, **(state | change))
    none = rows[:0]
    assert _C.update_best(rows, none, first_row=0, num_threads=1, **state) is None
    empty = {name: values[:0] for name, values in state.items()}
    assert _C.update_best(none, rows, first_row=0, num_threads=1, **empty) is None
    frozen = state["scores"].copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="scores has the wrong"):
        _C.update_best(rows, rows, first_row=0, num_threads=1, **(state | {"scores": frozen}))


@pytest.mark.parametrize(("clips", "texts"), [(0, 4), (4, 0), (0, 0)])
def test_the_extension_counts_nothing_on_a_side_without_rows(clips: int, texts: int) -> None:
    targets = [(np.zeros(size, np.float32), np.zeros(size, np.int32)) for size in (clips, texts)]
    ahead = [np.zeros(size, np.int64) for size in (clips, texts)]
    _C.count_ahead(
        np.ones((clips, 3), np.float32),
        np.ones((texts, 3), np.float32),
        first_text=0,
        audio_targets=targets[0],
        text_targets=targets[1],
        audio_ahead=ahead[0],
        text_ahead=ahead[1],
        num_threads=2,
    )
    assert not ahead[0].any()
    assert not ahead[1].any()


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels' functions that are called from now on; they still run."""
    calls: list[str] = []
    for place, name in ((rank, "rank_counts"), (neighbours.Neighbours, "add")):
        real = getattr(place, name)

        def call(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(place, name, call)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_device_takes_its_kernels_and_agrees_with_float64(
    each_device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = launched(monkeypatch)
    # Small integers: every score is exact in every dtype, and many are equal.
    audio, text = (torch.randint(-3, 4, (rows, 40)).to(dtype) for rows in (300, 701))
    owner = torch.randint(300, (701,))
    result = similarity.ranks(*(x.to(each_device) for x in (audio, text)), text_owner=owner.to(each_device))
    expected = similarity.ranks_reference(audio.double(), text.double(), text_owner=owner)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))
    scores, rows = similarity.topk(audio.to(each_device), text.to(each_device), 10)
    expected_scores, expected_rows = neighbours_by_sorting(audio.double(), text.double(), 10)
    assert torch.equal(scores.cpu().double(), expected_scores)
    assert torch.equal(rows.cpu(), expected_rows)
    assert calls == (["rank_counts", "add"] if each_device.type == "cuda" else [])
