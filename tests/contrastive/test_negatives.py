"""The CPU engine against sums over dense float64 logits (docs/derivation.md, section 3), for all instruction
sets, sizes, workspaces and numbers of threads; and its torch operator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, assert_agrees, assert_as_exact, norm
from torch import Tensor

from clsp_fast import _C
from clsp_fast.contrastive import negatives

ISAS = _C.instruction_sets()
# One pair; less than a micro-tile; several tiles, the last ones incomplete; several panels.
SIZES = [(1, 1, 3), (2, 3, 8), (97, 385, 33), (800, 1600, 20)]
SMALL, LARGE = 0, 1 << 30  # bytes of the workspace: for no logits, and for all of them


class Batch(NamedTuple):
    audio_MD: Tensor
    text_ND: Tensor
    scale: Tensor
    owner_N: Tensor
    bias: Tensor


def make_batch(m: int, n: int, d: int, dtype: torch.dtype = torch.float64, scale: float = 9.0) -> Batch:
    """Some owners lie outside 0..m-1: their texts belong to audio of other ranks."""
    audio, text = (F.normalize(torch.randn(k, d, dtype=torch.float64), dim=1).to(dtype) for k in (m, n))
    scale_, bias = (torch.tensor(x, dtype=dtype) for x in (scale, -1.5))
    return Batch(audio, text, scale_, torch.randint(-2, m + 2, (n,)), bias)


def dense_sums(batch: Batch, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    audio, text, scale, owner, bias = (x.to(dtype) if x.is_floating_point() else x for x in batch)
    scores = scale * audio @ text.T + bias
    positive = owner == torch.arange(len(audio))[:, None]
    if kind == "softmax":
        scores = scores.masked_fill(positive, -math.inf)
        return scores.logsumexp(1), scores.logsumexp(0)
    return F.softplus(scores, threshold=40.0).masked_fill(positive, 0.0).sum(1), scores.new_zeros(0)


def run_engine(
    batch: Batch,
    kind: str,
    d_sums: tuple[Tensor, Tensor],
    workspace: int = LARGE,
    threads: int = 2,
    isa: str = "auto",
) -> tuple[Tensor, ...]:
    """Row sums, column sums, and gradients by audio, text, scale and bias, in memory that held NaN."""
    audio, text, scale, owner, bias = batch
    kept = negatives._kept_logits(len(audio), len(text), audio.shape[1], workspace // audio.itemsize)
    shapes = [(len(audio),), (len(text) if kind == "softmax" else 0,), (kept,), audio.shape, text.shape]
    row, column, logits, d_audio, d_text = (
        torch.full(s, math.nan, dtype=audio.dtype).numpy() for s in shapes
    )
    arguments = negatives._extension_arguments(kind, audio, text, scale, owner, bias)
    _C.sum_negatives(*arguments, (row, column), logits, num_threads=threads, isa=isa)
    d_out = tuple(x.numpy() for x in d_sums)
    d_scale, d_bias = _C.sum_negatives_backward(
        *arguments, (row, column), d_out, logits, d_audio, d_text, num_threads=threads, isa=isa
    )
    return (
        *(torch.from_numpy(x) for x in (row, column, d_audio, d_text)),
        torch.tensor(d_scale, dtype=torch.float64),
        torch.tensor(d_bias, dtype=torch.float64),
    )


def dense_gradients(
    batch: Batch, kind: str, d_sums: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    leaves = batch._replace(
        **{
            name: getattr(batch, name).to(dtype).clone().requires_grad_()
            for name in ("audio_MD", "text_ND", "scale", "bias")
        }
    )
    loss = torch.tensor(0.0, dtype=torch.float64)
    for sums, gradient in zip(dense_sums(leaves, kind, dtype), d_sums, strict=True):
        has_negatives = sums.isfinite()
        loss = loss + (sums[has_negatives] * gradient[has_negatives].to(dtype)).sum()
    inputs = (leaves.audio_MD, leaves.text_ND, leaves.scale, leaves.bias)
    if not loss.requires_grad:
        return iter([torch.zeros_like(x) for x in inputs])
    return iter(torch.autograd.grad(loss, inputs))


def random_gradients(batch: Batch, kind: str) -> tuple[Tensor, Tensor]:
    dtype, columns = batch.audio_MD.dtype, len(batch.text_ND) if kind == "softmax" else 0
    return torch.rand(len(batch.audio_MD), dtype=dtype), torch.rand(columns, dtype=dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_and_gradients_are_those_of_dense_logits(
    isa: str, kind: str, size: tuple[int, int, int]
) -> None:
    batch = make_batch(*size)
    d_sums = random_gradients(batch, kind)
    sums, expected = dense_sums(batch, kind), list(dense_gradients(batch, kind, d_sums))
    whole = norm([norm(x) for x in expected])
    for workspace in (SMALL, 3 << 20, LARGE):
        row, column, *gradients = run_engine(batch, kind, d_sums, workspace, isa=isa)
        # Sums of up to 1,600 terms whose exponents are logits.
        for result, dense in zip((row, column), sums, strict=True):
            assert_agrees(result, dense, count=1e3)
        for result, dense in zip(gradients, expected, strict=True):
            assert_agrees(result, dense, count=1e3, size=whole)


def assert_as_exact_as_torch(
    results: tuple[Tensor, ...], batch: Batch, kind: str, d_sums: tuple[Tensor, Tensor]
) -> None:
    """Errors of float32 sums and gradients are at most twice those of dense logits in float32."""
    plain, truth = (
        [*dense_sums(batch, kind, dtype), *dense_gradients(batch, kind, d_sums, dtype)]
        for dtype in (torch.float32, torch.float64)
    )
    whole = norm([norm(x) for x in truth[2:]])
    names = ("rows", "columns", "audio", "text", "scale", "bias")
    for name, result, dense, exact in zip(names, results, plain, truth, strict=True):
        if name in ("scale", "bias"):  # sums over all pairs: along each row, then over rows
            count = (len(batch.audio_MD) * len(batch.text_ND)) ** 0.5
            assert_agrees(result, exact, count=count, dtype=torch.float32, size=whole, name=name)
        else:
            assert_as_exact(
                result, dense, exact, size=whole if name in ("audio", "text") else None, name=name
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_single_precision_is_as_exact_as_its_logits(isa: str, scale: float, kind: str) -> None:
    batch = make_batch(200, 450, 70, torch.float32, scale)
    d_sums = random_gradients(batch, kind)
    assert_as_exact_as_torch(run_engine(batch, kind, d_sums, isa=isa), batch, kind, d_sums)


def test_logits_far_apart_take_two_exponentials() -> None:
    batch = make_batch(100, 400, 16, torch.float32, 100.0)
    batch.audio_MD[::3] *= 0.01  # the normalisers of these rows are 90 below those of the others
    d_sums = random_gradients(batch, "softmax")
    assert_as_exact_as_torch(run_engine(batch, "softmax", d_sums), batch, "softmax", d_sums)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [87.1, 87.33])
def test_normalisers_beyond_the_range_of_a_single_exponential(isa: str, scale: float) -> None:
    row = F.normalize(torch.ones(1, 4), dim=1).expand(5, 4).contiguous()
    batch = Batch(row, row, torch.tensor(scale), torch.arange(5), torch.tensor(0.0))
    d_sums = random_gradients(batch, "softmax")
    *_, d_scale, d_bias = run_engine(batch, "softmax", d_sums, isa=isa)
    expected = float(sum(d_sums).sum())  # every row and column spreads its gradient over equal logits
    for gradient in (d_scale, d_bias):  # their rounding includes that of an exponent as large as the scale
        assert_agrees(gradient, expected, count=FEW + scale, dtype=torch.float32)


@pytest.mark.parametrize(("m", "n"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_side_without_rows_has_no_negatives(m: int, n: int, dtype: torch.dtype) -> None:
    audio, text, scale, _, bias = leaves(make_batch(4, 5, 3, dtype))
    audio_MD, text_ND, owner_N = audio[:m], text[:n], torch.zeros(n, dtype=torch.int64)
    row_M, column_N = negatives.negative_lse(audio_MD, text_ND, scale, owner_N, logit_bias=bias)
    sums_M = negatives.negative_softplus(audio_MD, text_ND, scale, owner_N, logit_bias=bias)
    assert row_M.tolist() == [-math.inf] * m
    assert column_N.tolist() == [-math.inf] * n
    assert sums_M.tolist() == [0.0] * m
    gradients = torch.autograd.grad(
        row_M.sum() + column_N.sum() + sums_M.sum(), (audio, text, scale, bias), materialize_grads=True
    )
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_bit_depends_on_threads_or_workspace_or_the_run(dtype: torch.dtype, kind: str) -> None:
    batch = make_batch(900, 1700, 40, dtype)
    d_sums = random_gradients(batch, kind)
    first = run_engine(batch, kind, d_sums, threads=1)
    for threads, workspace in [(1, LARGE), (2, LARGE), (2, SMALL), (3, 6 << 20), (5, LARGE), (2, LARGE)]:
        repeated = run_engine(batch, kind, d_sums, workspace, threads)
        assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))


def test_nan_reaches_the_sums_and_gradients_that_depend_on_it() -> None:
    batch = make_batch(30, 50, 8, torch.float32)
    batch.audio_MD[7, 3] = math.nan
    row, column, d_audio, d_text, *_ = run_engine(batch, "softmax", random_gradients(batch, "softmax"))
    assert row.isnan().nonzero().flatten().tolist() == [7]
    others = batch.owner_N != 7
    assert column[others].isnan().all()
    assert d_audio[7].isnan().all()
    assert d_text[others].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    audio, text, scale, owner, _ = make_batch(4, 5, 3, torch.float32)
    for refused, sums in ((audio.to(dtype), negatives.negative_lse), (audio, negatives.negative_softplus)):
        with pytest.raises(TypeError, match=r"must both be float32 or both float64, got .*torch\.\w+"):
            sums(refused, text.to(dtype), scale, owner)


def test_refuses_arrays_of_other_shapes_dtypes_and_layouts() -> None:
    batch = make_batch(4, 5, 3, torch.float32)
    good = list(negatives._extension_arguments("softmax", batch[0], batch[1], batch[2], batch[3], batch[4]))
    row, column, kept = (np.zeros(k, np.float32) for k in (4, 5, 0))
    for place, bad, error, message in [
        (0, "hinge", ValueError, "unknown kind"),
        (1, np.zeros((4, 3)), TypeError, "incompatible"),
        (1, np.zeros((4, 3), np.float16), TypeError, "incompatible"),
        (1, np.zeros((4, 6), np.float32)[:, ::2], TypeError, "incompatible"),
        (1, np.zeros((0, 3), np.float32), ValueError, "a row or more"),
        (2, np.zeros((0, 3), np.float32), ValueError, "a row or more"),
        (2, np.zeros((5, 4), np.float32), ValueError, "same number of columns"),
        (3, np.zeros(4, np.int64), ValueError, "owner has the wrong"),
    ]:
        with pytest.raises(error, match=message):
            _C.sum_negatives(*good[:place], bad, *good[place + 1 :], (row, column), kept, num_threads=1)
    with pytest.raises(ValueError, match="row sums has the wrong"):
        _C.sum_negatives(*good, (row[:3], column), kept, num_threads=1)


def leaves(batch: Batch) -> list[Tensor]:
    return [x.clone().requires_grad_(x.is_floating_point()) for x in batch]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operator_is_registered_correctly(kind: str, dtype: torch.dtype) -> None:
    # The pairs fill one tile of kept logits, so that every logit of the tile is written.
    arguments = (*leaves(make_batch(96, 384, 4, dtype)), kind, 96 * 384)
    torch.library.opcheck(negatives._sum_negatives, arguments)


def test_gradcheck() -> None:
    audio, text, scale, owner, bias = leaves(make_batch(3, 5, 4))
    owner = torch.tensor([0, 0, 2, 1, 9])
    assert torch.autograd.gradcheck(
        lambda a, t, s, b: negatives.negative_lse(a, t, s, owner, logit_bias=b), (audio, text, scale, bias)
    )
    assert torch.autograd.gradcheck(
        lambda a, t, s, b: negatives.negative_softplus(a, t, s, owner, logit_bias=b),
        (audio, text, scale, bias),
    )


def test_compiles_into_one_graph() -> None:
    audio, text, scale, owner, bias = leaves(make_batch(6, 9, 8, torch.float32))

    def total(a: Tensor, t: Tensor) -> Tensor:
        row, column = negatives.negative_lse(a, t, scale, owner, logit_bias=bias)
        return (row.sum() + column.sum()) * negatives.negative_softplus(a, t, scale, owner).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(total(audio, text), (audio, text, scale))
    gradients = torch.autograd.grad(compiled(audio, text), (audio, text, scale))
    wide = [x.detach().double().requires_grad_() for x in (audio, text, scale)]
    scale, bias = wide[2], bias.double()
    for gradient, plain, truth in zip(
        gradients, expected, torch.autograd.grad(total(*wide[:2]), wide), strict=True
    ):
        assert_as_exact(gradient, plain, truth)


def test_takes_strided_embeddings_and_unused_results() -> None:
    batch = make_batch(40, 60, 16, torch.float32)
    strided = torch.stack([batch.text_ND, batch.text_ND], dim=2)[:, :, 0].requires_grad_()
    assert not strided.is_contiguous()
    row, _ = negatives.negative_lse(batch.audio_MD, strided, batch.scale, batch.owner_N)
    (strided_gradient,) = torch.autograd.grad(row.sum(), strided)
    plain = batch.text_ND.clone().requires_grad_()
    row, _ = negatives.negative_lse(batch.audio_MD, plain, batch.scale, batch.owner_N)
    assert torch.equal(strided_gradient, torch.autograd.grad(row.sum(), plain)[0])


def test_keeps_no_logits_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, engine = [], _C.sum_negatives

    def sum_negatives(*arguments: Any, **options: Any) -> None:
        kept.append(arguments[-1].size)
        engine(*arguments, **options)

    monkeypatch.setattr(_C, "sum_negatives", sum_negatives)
    batch = make_batch(96, 384, 8, torch.float32)
    negatives.negative_lse(*batch[:4])
    with torch.no_grad():
        negatives.negative_lse(*leaves(batch)[:4])
    negatives.negative_lse(*leaves(batch)[:4])
    assert kept == [0, 0, 96 * 384]


@pytest.mark.parametrize("d", [64, 512])
@pytest.mark.parametrize("workspace", [0, 16 << 20, 256 << 20])
def test_kept_logits_fit_the_workspace(d: int, workspace: int) -> None:
    for m, n in [(1, 1), (100, 3000), (4096, 4096), (8192, 16384), (32768, 32768)]:
        kept = negatives._kept_logits(m, n, d, workspace // 4)
        assert kept % (96 * 384) == 0
        working = 2 * (min(768, m) + min(1536, n)) * d + min(768, m) * min(1536, n)
        assert kept == 0 or 4 * (kept + working) <= workspace
