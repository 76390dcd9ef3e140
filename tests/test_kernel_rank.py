"""The kernels of ranks and neighbours against a full sort, ties included: on the card or interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.kernels import _launch, neighbours, rank
from clsp_fast.kernels.neighbours import topk, topk_reference
from clsp_fast.kernels.rank import rank_counts, rank_counts_reference

SHAPES = [(1, 1, 4), (2, 1, 3), (3, 70, 4), (33, 63, 8), (70, 150, 16), (64, 128, 32)]


def tied(device: torch.device, m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Embeddings of small integers: scores are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (m, n))
    return x.to(device), y.to(device)


def assert_ranks(x: Tensor, y: Tensor, owner: Tensor) -> None:
    expected = rank_counts_reference(x.float(), y.float(), owner)
    for result, true in zip(rank_counts(x, y, owner), expected, strict=True):
        assert torch.equal(result, true)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_those_of_a_full_comparison(
    kernel_device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, _ = shape
    x, y = (t.to(dtype) for t in tied(kernel_device, *shape))
    assert_ranks(x, y, torch.arange(n, device=kernel_device) % m)
    assert_ranks(x, y, torch.randperm(n).to(kernel_device) % m)
    assert_ranks(x, y, torch.randint(-2, 2 * m, (n,)).to(kernel_device))


def test_equal_embeddings_rank_in_the_order_of_their_index(kernel_device: torch.device) -> None:
    row = F.normalize(torch.randn(1, 40), dim=1).to(kernel_device)
    order = torch.arange(70, device=kernel_device)
    audio_to_text, text_to_audio = rank_counts(row.repeat(70, 1), row.repeat(70, 1), order)
    assert torch.equal(audio_to_text, order)
    assert torch.equal(text_to_audio, order)
    _, index = topk(row.repeat(3, 1), row.repeat(200, 1), 20)
    assert torch.equal(index, torch.arange(20, device=kernel_device).expand(3, 20))


def test_ranks_in_panels_and_by_pointers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(_launch, "has_descriptors", lambda target: False)
    x, y = tied(kernel_device, 100, 150, 18)
    assert_ranks(x, y, torch.arange(150, device=kernel_device) % 100)
    assert_ranks(x[:, ::2], y[:, ::2], torch.arange(150, device=kernel_device) % 100)


def test_an_empty_side_has_no_positive(kernel_device: torch.device) -> None:
    x = torch.ones(3, 4, device=kernel_device)
    owner = torch.zeros(0, dtype=torch.int64, device=kernel_device)
    assert rank_counts(x, x[:0], owner)[0].tolist() == [-1, -1, -1]
    assert rank_counts(x[:0], x, owner.new_zeros(3))[1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7, 40])
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
    queries, database = tied(kernel_device, 40, 260, 8)
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


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("chunk_rows", [9, 2])
def test_scores_that_overflow_are_named(
    kernel_device: torch.device, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_ROWS", chunk_rows)
    queries, database = (torch.full((n, 4), x, device=kernel_device) for n, x in ((2, -1e30), (9, 1e30)))
    with pytest.raises(ValueError, match="overflow float32"):
        topk(queries, database, 3)


def test_finite_rows_whose_sum_overflows_are_taken(kernel_device: torch.device) -> None:
    queries, database = torch.ones(1, 4, device=kernel_device), torch.zeros(9, 4, device=kernel_device)
    database[3:6, 0] = 3e38
    assert topk(queries, database, 4)[1].tolist() == [[3, 4, 5, 0]]


def test_the_operators_are_registered_correctly(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 20, 33, 8)
    owner = torch.arange(33, device=kernel_device) % 20
    torch.library.opcheck(rank._rank_counts, (x, y, owner))
    torch.library.opcheck(neighbours._topk_chunk, (x, y, 3))
    compiled = torch.compile(rank_counts, fullgraph=True, backend="aot_eager")
    for result, eager in zip(compiled(x, y, owner), rank_counts(x, y, owner), strict=True):
        assert torch.equal(result, eager)


def test_wrong_arguments_are_named(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 3, 5, 4)
    with pytest.raises(ValueError, match="same, positive number of columns"):
        rank_counts(x, y[:, :3], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"text_owner_N must be int64 of shape \(5,\)"):
        rank_counts(x, y, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="float64"):
        topk(x.double(), y.double(), 1)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5"):
        topk(x, y, 6)
    y[3, 1] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        topk(x, y, 2)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "target"),
    [
        ("cpu", None, None, None),
        ("cuda", (7, 5), None, None),
        ("cuda", (9, 4), "6.0", None),
        ("cuda", (8, 0), None, 80),
        ("cuda", (8, 6), None, 89),
        ("cuda", (9, 0), None, 90),
        ("cuda", (12, 0), None, 89),
    ],
)
def test_a_device_without_kernels_is_known_before_a_launch(
    device: str,
    capability: tuple[int, int] | None,
    hip: str | None,
    target: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _launch.supports(torch.device(device)) == (target is not None)
    if target is None:
        with pytest.raises(ValueError, match=r"need an NVIDIA GPU of compute capability 8\.0"):
            _launch.target_of(torch.device(device))
    else:
        assert _launch.target_of(torch.device(device)) == target


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_sides_on_a_card(cuda: torch.device, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in tied(cuda, 3000, 5001, 512))
    assert_ranks(x, y, torch.randperm(5001).to(cuda) % 3000)
    for k in (1, 10, 32):
        expected = topk_reference(x.float(), y.float(), k)
        assert all(torch.equal(a, b) for a, b in zip(topk(x, y, k), expected, strict=True))
