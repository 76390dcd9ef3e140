"""The kernel of ranks against a full comparison, ties included: on the card or interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.kernels import _launch, rank
from clsp_fast.kernels.rank import rank_counts, rank_counts_reference

SHAPES = [(1, 1, 4), (2, 1, 3), (3, 70, 4), (33, 63, 8), (70, 150, 16), (64, 128, 32)]


def tied(device: torch.device, m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Embeddings of small integers: scores are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (m, n))
    return x.to(device), y.to(device)


def rank_counts_of_scores(scores_MN: Tensor, owner_N: Tensor) -> tuple[Tensor, Tensor]:
    """`rank_counts_reference` for given scores."""
    n = scores_MN.shape[1]
    return rank_counts_reference(scores_MN, torch.eye(n, dtype=scores_MN.dtype), owner_N[:n])


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


def test_equal_scores_rank_by_index_wherever_they_lie(kernel_device: torch.device) -> None:
    """Few different rows, whose scores are no whole numbers: a pair of equal rows must have the score of its
    copies in other tiles, bit by bit."""
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(rows, 48).to(kernel_device, dtype) for rows in (7, 5))
        x_copy, y_copy = torch.randint(7, (190,)), torch.randint(5, (300,))
        scores = (x.double() @ y.double().T).cpu()[x_copy][:, y_copy]
        for owner in (torch.arange(300) % 190, torch.randint(-1, 200, (300,)), torch.randperm(300)):
            expected = rank_counts_of_scores(scores, owner)
            result = rank_counts(x[x_copy], y[y_copy], owner.to(kernel_device))
            for ranks, true in zip(result, expected, strict=True):
                assert torch.equal(ranks.cpu(), true)


@pytest.mark.parametrize("tile", [(32, 256, 32), (64, 32, 32), (32, 32, 16)])
def test_tiles_of_other_sizes_give_the_same_ranks(
    kernel_device: torch.device, tile: tuple[int, int, int]
) -> None:
    rows, columns, depth = tile
    with _launch.override_tiles(rank=_launch.Tile(rows, columns, depth, 4, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = (t.to(dtype) for t in tied(kernel_device, 150, 330, 32))
            assert_ranks(x, y, torch.arange(330, device=kernel_device) // 3 % 150)
            assert_ranks(x, y, torch.randint(-1, 200, (330,)).to(kernel_device))


@pytest.mark.parametrize("owners", ["in order", "shuffled", "one clip", "none"])
def test_pairs_cost_one_diagonal_of_tiles_whatever_the_owners(
    kernel_device: torch.device, owners: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, texts = 120, 360
    owner = {
        "in order": torch.arange(texts) // 3,
        "shuffled": torch.arange(texts)[torch.randperm(texts)] // 3,
        "one clip": torch.full((texts,), 77),
        "none": torch.full((texts,), -1),
    }[owners]
    visited: list[tuple[object, object]] = []
    score_tile = rank.score_tile

    def counted(x: object, y: object, row: object, column: object, *rest: object) -> object:
        visited.append((row, column))
        return score_tile(x, y, row, column, *rest)

    if not _launch.INTERPRETED:
        pytest.skip("tiles are counted in the interpreter")
    monkeypatch.setattr(rank, "score_tile", counted)
    x, y = tied(kernel_device, clips, texts, 8)
    assert_ranks(x, y, owner.to(kernel_device))
    tiles = math.ceil(clips / 32) * math.ceil(texts / 64)
    diagonal, near_clips = math.ceil(texts / 32), math.ceil(texts / 64) + math.ceil(clips / 32)
    assert tiles + diagonal <= len(visited) <= tiles + diagonal + near_clips


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (64, 32), (256, 128), (512, 256), (5000, 1)])
def test_runs_cover_all_tiles_and_fit_into_a_byte(tiles_m: int, tiles_n: int) -> None:
    run, parts = _launch.split_rows(tiles_m, tiles_n, 127)
    assert 1 <= run <= 127
    assert (parts - 1) * run < tiles_m <= parts * run


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


def test_the_operator_is_registered_correctly(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 20, 33, 8)
    owner = torch.arange(33, device=kernel_device) % 20
    torch.library.opcheck(rank._rank_counts, (x, y, owner))
    compiled = torch.compile(rank_counts, fullgraph=True, backend="aot_eager")
    for result, eager in zip(compiled(x, y, owner), rank_counts(x, y, owner), strict=True):
        assert torch.equal(result, eager)


def test_wrong_arguments_are_named(kernel_device: torch.device) -> None:
    x, y = tied(kernel_device, 3, 5, 4)
    with pytest.raises(ValueError, match="same, positive number of columns"):
        rank_counts(x, y[:, :3], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"text_owner_N must be torch.int64 .* got torch.int32"):
        rank_counts(x, y, torch.zeros(5, dtype=torch.int32, device=kernel_device))
    with pytest.raises(TypeError, match=r"text_owner_N must be a torch.Tensor, got list"):
        rank_counts(x, y, [0, 0, 1, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"each side must be a torch.Tensor, got ndarray"):
        rank_counts(x, y.cpu().numpy(), torch.zeros(5, dtype=torch.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text_owner_N must be torch.int64 of shape \(5,\)"):
        rank_counts(x, y, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="float64"):
        rank_counts(x.double(), y.double(), torch.zeros(5, dtype=torch.int64))


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
