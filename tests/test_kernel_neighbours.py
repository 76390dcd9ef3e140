"""The kernels of nearest neighbours against a full sort, ties included: on the card or interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.kernels import neighbours
from clsp_fast.kernels.neighbours import Neighbours, topk
from clsp_fast.similarity import topk_reference

SHAPES = [(1, 1, 4), (2, 1, 3), (3, 70, 4), (33, 63, 8), (70, 150, 16), (64, 128, 32), (9, 700, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# When numpy interprets kernels, it warns of infinity and NaN.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tied(device: torch.device, m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Embeddings of small integers: scores are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (m, n))
    return x.to(device), y.to(device)


def spread(device: torch.device, m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit vectors in all directions."""
    return F.normalize(torch.randn(m, d), dim=1).to(device), F.normalize(torch.randn(n, d), dim=1).to(device)


def exact_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best by scores that are computed in float64 and rounded to float32."""
    scores = (queries.double() @ database.double().T).float()
    scores, index = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], index[:, :k]


def assert_same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0], expected[0])


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries that had no proof, one tensor for each search."""
    calls: list[Tensor] = []
    scan = neighbours._scan

    def recorded(queries: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        calls.append(queries)
        return scan(queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours, "_scan", recorded)
    return calls


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7, 32])
def test_neighbours_are_those_of_a_sort(
    kernel_device: torch.device, shape: tuple[int, int, int], k: int
) -> None:
    queries, database = tied(kernel_device, *shape)
    k = min(k, len(database))
    for result, true in zip(topk(queries, database, k), topk_reference(queries, database, k), strict=True):
        assert torch.equal(result, true)


def test_neighbours_in_chunks_runs_and_other_dtypes(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_ROWS", 150)
    monkeypatch.setattr(neighbours, "_NARROW_BYTES", 1)  # pieces of 256 rows
    monkeypatch.setattr(neighbours, "_QUERY_ROWS", 17)
    queries, database = tied(kernel_device, 24, 600, 8)
    expected = topk_reference(queries, database, 7)
    for programs in (1, 4):
        monkeypatch.setattr(neighbours, "_PROGRAMS", programs)
        for q, d in ((queries, database.half()), (queries.half(), database)):
            assert all(torch.equal(a, b) for a, b in zip(topk(q, d, 7), expected, strict=True))
    assert topk(queries[:0], database, 7)[1].shape == (0, 7)


def test_a_wider_database_is_not_narrowed(kernel_device: torch.device) -> None:
    queries, database = tied(kernel_device, 9, 80, 8)
    # bfloat16 and float16 would round these differences away.
    database += 2.0**-14 * torch.arange(80, device=kernel_device)[:, None]
    expected = topk_reference(queries, database, 7)
    for dtype in (torch.bfloat16, torch.float16):
        assert all(
            torch.equal(a, b) for a, b in zip(topk(queries.to(dtype), database, 7), expected, strict=True)
        )


@QUIET
@pytest.mark.parametrize("chunk_rows", [9, 2])
def test_scores_that_overflow_are_named(
    kernel_device: torch.device, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_ROWS", chunk_rows)
    queries, database = (torch.full((n, 4), x, device=kernel_device) for n, x in ((2, -1e30), (9, 1e30)))
    with pytest.raises(ValueError, match="overflow float32"):
        topk(queries, database, 3)


@QUIET
@pytest.mark.parametrize("value", [1e30, 6e18])
def test_infinite_scores_are_refused(kernel_device: torch.device, value: float) -> None:
    """Some scores are +infinity. With the smaller value, sums of two products are finite."""
    queries, database = (torch.full((n, 4), value, device=kernel_device) for n in (2, 600))
    queries[0] = 1
    database[::2, 3] = -value
    assert topk(queries[:1], database, 3)[1].tolist() == [[1, 3, 5]]
    with pytest.raises(ValueError, match="overflow float32"):
        topk(queries * 2.0, database * 2.0, 3)


@QUIET
def test_finite_rows_whose_sum_overflows_are_taken(kernel_device: torch.device) -> None:
    queries, database = torch.ones(1, 4, device=kernel_device), torch.zeros(9, 4, device=kernel_device)
    database[3:6, 0] = 3e38
    assert topk(queries, database, 4)[1].tolist() == [[3, 4, 5, 0]]


def test_equal_rows_are_found_in_the_order_of_their_index(kernel_device: torch.device) -> None:
    row = F.normalize(torch.randn(1, 40), dim=1).to(kernel_device)
    _, index = topk(row.repeat(3, 1), row.repeat(2000, 1), 20)
    assert torch.equal(index, torch.arange(20, device=kernel_device).expand(3, 20))


@pytest.mark.parametrize(
    ("dtype", "database_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_ordinary_neighbours_are_exact_and_proved(
    kernel_device: torch.device, dtype: torch.dtype, database_dtype: torch.dtype, scanned: list[Tensor]
) -> None:
    queries, database = spread(kernel_device, 12, 1500, 24)
    queries, database = queries.to(dtype), database.to(database_dtype)
    for k in (1, 10):
        assert_same(topk(queries, database, k), exact_topk(queries, database, k))
    assert not scanned


def test_many_neighbours_have_many_spare_groups(kernel_device: torch.device, scanned: list[Tensor]) -> None:
    """The best rows of all groups are closer to each other than numbers of float16."""
    best = 1 - 4e-5 * torch.arange(60, device=kernel_device)
    database = torch.zeros(60, 32, 8, device=kernel_device)
    database[:, 5, 0] = best
    queries = torch.eye(8, device=kernel_device)[:1]
    scores, index = topk(queries, database.flatten(0, 1), 32)
    assert torch.equal(scores[0], best[:32])
    assert index[0].tolist() == list(range(5, 32 * 32, 32))
    assert not scanned


def test_only_queries_without_a_proof_are_scanned(kernel_device: torch.device, scanned: list[Tensor]) -> None:
    queries, database = spread(kernel_device, 6, 2000, 24)
    # 400 rows, in many groups, are almost equal to query 4: float16 cannot tell them apart.
    near = queries[4] + 1e-6 * torch.randn(400, 24, device=kernel_device)
    database[::5] = near
    scores, index = topk(queries, database, 10)
    assert [len(rows) for rows in scanned] == [1]
    assert torch.equal(scanned[0][0], queries[4])
    others = [0, 1, 2, 3, 5]
    expected = exact_topk(queries, database, 10)
    assert_same((scores[others], index[others]), (expected[0][others], expected[1][others]))
    # The scan's scores are within 2^-21 of the sum of magnitudes. So its last row is within twice that.
    true = (queries[4].double() @ database.double().T)[index[4]]
    bound = 2.0**-20 * float((queries[4].abs() @ database.abs().T).max())
    assert float((scores[4].double() - true).abs().max()) <= bound
    assert float(expected[0][4, -1] - true.min()) <= bound
    assert (index[4] % 5 == 0).all()


@pytest.mark.parametrize("gap", [2.0**-6, 2.0**-9, 2.0**-11, 2.0**-13, 2.0**-16])
def test_a_result_is_exact_however_close_the_next_rows_are(kernel_device: torch.device, gap: float) -> None:
    """Rows whose scores differ by `gap`, in random places, where rounding to float16 changes their order."""
    order = torch.randperm(1024)
    direction = F.normalize(torch.randn(1, 33), dim=1)
    database = direction * (1 - gap * order[:, None])
    queries = (direction + 0.2 * torch.randn(5, 33)).to(kernel_device)
    database = database.to(kernel_device)
    scores, index = topk(queries, database, 6)
    true = queries.double() @ database.double().T
    best = true.sort(dim=1, descending=True).values[:, :6]
    bound = 2.0**-20 * (queries.abs() @ database.abs().T).amax(1, keepdim=True)
    assert ((true.gather(1, index) - best).abs() <= bound).all()
    assert ((scores - best).abs() <= bound).all()


@QUIET
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1.0, 300.0, 1e6, 1e15])
def test_the_margin_bounds_the_error_of_the_maxima(kernel_device: torch.device, scale: float) -> None:
    queries, database = (scale**0.5 * torch.randn(rows, 40).to(kernel_device) for rows in (12, 640))
    narrow, measures = neighbours._narrowed(queries, torch.float16)
    piece, database_measures = neighbours._narrowed(database, torch.float16)
    maxima, group = neighbours._best_groups(narrow, piece, 0, neighbours._no_groups(narrow), 20)
    norms = neighbours._norms(measures[:2], 40)
    assert (norms[0] >= queries.double().norm(dim=1)).all()
    margin = neighbours._margins(norms, neighbours._norms(database_measures[:2].amax(1), 40), 40)
    true = (queries.double() @ database.double().T).unflatten(1, (20, 32)).amax(2).gather(1, group)
    error = (maxima.double() - true).abs().amax(1)
    assert ((error <= margin) | ~margin.isfinite()).all()
    if scale in (1e-4, 1.0, 300.0):  # float16 represents these numbers well
        assert (margin <= 2.0**-10 * norms[0] * database.double().norm(dim=1).max()).all()


@QUIET
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e6])
def test_numbers_out_of_the_range_of_float16_are_scanned(
    kernel_device: torch.device, scale: float, scanned: list[Tensor]
) -> None:
    queries, database = tied(kernel_device, 5, 1500, 8)
    queries, database = queries + 0.5, database * 2.0 ** round(torch.tensor(scale).log2().item())
    assert_same(topk(queries, database, 4), topk_reference(queries, database, 4))
    assert scanned


@QUIET
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_named(
    kernel_device: torch.device, dtype: torch.dtype, bad: float
) -> None:
    queries, database = (t.to(dtype) for t in spread(kernel_device, 3, 1500, 20))
    queries[:, 3:] = 0  # zeros must not hide the row
    database[1234, 7] = bad
    with pytest.raises(ValueError, match="row 1234 of database_ND is not finite"):
        topk(queries, database, 5)
    database[1234, 7] = 0
    queries[1, 2] = bad
    with pytest.raises(ValueError, match="queries_QD must be finite"):
        topk(queries, database, 5)


def test_a_database_in_chunks_gives_the_result_of_the_whole(
    kernel_device: torch.device, scanned: list[Tensor]
) -> None:
    queries, database = spread(kernel_device, 7, 2500, 16)
    database[1:2200:7] = database[0]  # too many for a proof, if they are the nearest
    queries[2] = database[0]
    chunks = [(first, database[first : first + 600]) for first in range(0, 2500, 600)]
    nearest = Neighbours(queries, 9)
    for first, chunk in chunks:
        nearest.add(first, chunk)
    scores, index = nearest.result(lambda: chunks, IndexError)
    assert [len(rows) for rows in scanned] == [1]
    others = [0, 1, 3, 4, 5, 6]
    expected = exact_topk(queries, database, 9)
    assert_same((scores[others], index[others]), (expected[0][others], expected[1][others]))
    assert index[2].tolist() == [0, 1, 8, 15, 22, 29, 36, 43, 50]


def test_the_operator_is_registered_correctly(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 20, 33, 8)
    torch.library.opcheck(neighbours._topk_chunk, (x, y, 3))


def test_wrong_arguments_are_named(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 3, 5, 4)
    with pytest.raises(ValueError, match="same, positive number of columns"):
        topk(x, y[:, :3], 1)
    with pytest.raises(TypeError, match="float64"):
        topk(x.double(), y.double(), 1)
    for k in (2.0, True, "2"):
        with pytest.raises(TypeError, match=f"k must be an integer, got {type(k).__name__}"):
            topk(x, y, k)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"k must be an integer, got {type(k).__name__}"):
            Neighbours(x, k)  # type: ignore[arg-type]
    assert_same(topk(x, y, np.int64(2)), topk(x, y, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"queries_QD must be a torch.Tensor, got list"):
        topk([[1.0]], y, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"database_ND must be a torch.Tensor, got ndarray"):
        topk(x, y.cpu().numpy(), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"each side must be a torch.Tensor, got ndarray"):
        Neighbours(x.cpu().numpy(), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"database_ND must be a torch.Tensor, got ndarray"):
        Neighbours(x, 1).add(0, y.cpu().numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5"):
        topk(x, y, 6)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.32"):
        Neighbours(x, 33)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.32"):
        topk(x, y.repeat(10, 1), 33)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_sides_on_a_card(cuda: torch.device, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in tied(cuda, 3000, 5001, 512))
    for k in (1, 10, 32):
        assert_same(topk(x, y, k), topk_reference(x.float(), y.float(), k))
