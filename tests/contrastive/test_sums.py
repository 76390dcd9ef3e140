"""Sums over captions and embeddings: their formulas, and the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, eps
from sample_data import unit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clsp_fast.contrastive import sums
from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.positives import Pairs, Positives, softmax_loss
from clsp_fast.contrastive.problem import Problem
from clsp_fast.loss import loss_and_grad


def same_for_any_threads(compute: Callable[[], list[Tensor]]) -> bool:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4, 2):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "kind": "sigmoid"},
        {"normalize": True},
        {"text_owner": torch.arange(700) % 300, "weights": torch.linspace(0, 1, 700)},
    ],
    ids=["smoothing", "sigmoid", "normalize", "weights"],
)
def test_no_bit_of_a_loss_depends_on_the_number_of_threads(options: dict) -> None:
    audio, text = 1.7 * unit(700, 512, dtype=torch.float32), unit(700, 512, dtype=torch.float32)
    assert same_for_any_threads(lambda: list(loss_and_grad(audio, text, 20.0, **options)[:4]))


def test_no_bit_depends_on_the_number_of_threads_with_many_captions_a_clip() -> None:
    # From 32,768 numbers on, torch adds on the CPU in several threads, in the order in which these finish.
    clips, texts = 20_000, 100_000
    pair_N, row_M, column_N = torch.randn(texts), torch.randn(clips) + 5, torch.randn(texts) + 5
    none_MD, scale = torch.empty(0), torch.tensor(1.0)
    problem = Problem(
        audio_MD=none_MD,
        text_ND=none_MD,
        scale=1.0,
        bias=0.0,
        owner_N=torch.arange(texts) % clips,
        weights=torch.linspace(0.1, 1, texts),
        smoothing=0.0,
        kind="softmax",
        normalize=False,
        group=None,
        one_caption_each=False,
    )
    shards = Shards(None, [clips], [texts], 0, torch.float32)
    pairs = Pairs(problem, none_MD, none_MD, scale, torch.tensor(0.0), shards)

    def compute() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (pair_N, row_M, column_N)]
        loss = softmax_loss(pairs, Positives(leaves[0], None, None), *leaves[1:])
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert same_for_any_threads(compute)


@pytest.mark.parametrize(("depth", "rows"), [(512, 32_768), (8192, 2048), (16_384, 1024), (1 << 20, 512)])
def test_a_part_on_a_card_has_a_bounded_size(depth: int, rows: int) -> None:
    with FakeTensorMode():
        x_BD = torch.empty(100_000, depth, device="cuda")
    parts = list(sums._parts(x_BD))
    assert parts[0] == slice(0, rows)
    assert len(parts) == -(-100_000 // rows)


def test_total_is_the_sum() -> None:
    for size in (0, 1, 1024, 1025, 5000):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(sums.total(x), x.sum())


def test_sums_over_captions_are_those_of_their_formulas() -> None:
    owner_N = torch.tensor([3, 0, 3, 1, 3, 1])
    x_N = (30 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    share_N = torch.tensor([0.5, 1.0, 0.2, 0.0, 0.3, 1.0], dtype=torch.float64).requires_grad_()
    counts_N = share_N > 0
    lse_M = sums.lse_by_owner(x_N, counts_N, owner_N, 4)
    entropy_M = sums.cross_entropy_by_owner(x_N, share_N, owner_N, 4)
    assert lse_M[2] == -torch.inf
    for row in (0, 1, 3):
        inside = counts_N & (owner_N == row)
        torch.testing.assert_close(lse_M[row], x_N[inside].logsumexp(0))
        torch.testing.assert_close(entropy_M[row], (share_N * (lse_M[row] - x_N))[inside].sum())
    assert entropy_M[[0, 1, 2]].tolist() == [0.0, 0.0, 0.0]
    near_N = torch.randn(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sums.lse_by_owner(x, counts_N, owner_N, 4)[[0, 1, 3]], near_N)
    assert torch.autograd.gradcheck(
        lambda x: sums.cross_entropy_by_owner(x, share_N.detach(), owner_N, 4), near_N
    )


def test_softplus_is_that_of_torch() -> None:
    edges = torch.tensor([-torch.inf, -800.0, -1e-300, 0.0, 3.0, 800.0, torch.inf], dtype=torch.float64)
    x = torch.cat([torch.randn(2000, dtype=torch.float64) * 20, edges]).requires_grad_()
    result, expected = sums.softplus(x), F.softplus(x, threshold=40.0)
    # Both results round an exponential, a logarithm and the operations between them, element by element.
    rounding = 2 * FEW * eps(torch.float64)
    torch.testing.assert_close(result, expected, rtol=rounding, atol=0)
    result, expected = (torch.autograd.grad(y[:-1].sum(), x)[0] for y in (result, expected))
    torch.testing.assert_close(result, expected, rtol=rounding, atol=1e-300)


def test_normalise_is_that_of_torch() -> None:
    x = torch.randn(1100, 5, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(1100, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(F.normalize(x), x, upstream)
    (result,) = torch.autograd.grad(sums.normalise(x, torch.float64), x, upstream.clone())
    torch.testing.assert_close(sums.normalise(x, torch.float64), F.normalize(x))
    torch.testing.assert_close(result, expected)
    assert sums.normalise(x.bfloat16(), torch.float32).dtype == torch.float32
    assert not sums.normalise(torch.zeros(2, 3), torch.float32).any()
