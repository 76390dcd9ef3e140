"""The kernels of both kinds of loss against fp64: on the card if there is one, otherwise interpreted.

Their formulas are those of docs/derivation.md, sections 3 and 4.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from numerics import FEW, assert_agrees, assert_as_exact, eps, norm
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from clsp_fast.kernels import _launch, _pairs, contrastive, sigmoid
from clsp_fast.kernels.contrastive import (
    negative_lse,
    negative_lse_reference,
    negative_softplus,
    negative_softplus_reference,
)

# Triton's interpreter computes with numpy, which warns about infinities that the kernels intend.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# One row or column, more than an interpreted tile has, and sizes beside powers of two.
SHAPES = [(1, 1, 1), (1, 70, 16), (2, 1, 3), (33, 63, 31), (31, 65, 33), (70, 150, 40), (64, 128, 64)]


@pytest.fixture
def rounding(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes kernels round float32 to the nearest bfloat16, as a card does; the interpreter truncates."""
    if kernel_device.type == "cuda":
        return

    def rounded(builder: InterpreterBuilder, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return builder.cast_impl(x, dtype)
        bits = torch.from_numpy(x.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)


class Case:
    """Inputs of one dtype, and what kernels and dense definitions compute from them."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, int, int],
        scale: float,
        *,
        dtype: torch.dtype = torch.float32,
        owner: Tensor | None = None,
        bias: float = -0.5,
    ) -> None:
        m, n, d = shape
        generator = torch.Generator().manual_seed(m + n + d)
        rows = [torch.randn(length, d, generator=generator) for length in (m, n)]
        self.x, self.y = (F.normalize(r, dim=1).to(device, dtype) for r in rows)
        self.scale = torch.tensor(scale, device=device)
        self.bias = torch.tensor(bias, device=device)
        self.owner = (torch.arange(n) % max(m, 1) if owner is None else owner).to(device)
        self.weights = [torch.randn(length, generator=generator).to(device) for length in (m, n)]

    def outputs(self, function: Callable[..., object], dtype: torch.dtype, **options: object) -> list[Tensor]:
        """Results and gradients of (x, y, scale, bias), as float64."""
        wide = torch.promote_types(dtype, torch.float32)
        inputs = [t.detach().to(dtype) for t in (self.x, self.y)]
        inputs += [t.detach().to(wide) for t in (self.scale, self.bias)]
        inputs = [t.requires_grad_() for t in inputs]
        x, y, scale, bias = inputs
        results = function(x, y, scale, self.owner, logit_bias=bias, **options)
        results = list(results) if isinstance(results, tuple) else [results]
        finite = [torch.where(r.isfinite(), r, 0.0) for r in results]
        total = sum((r.double() * w).sum() for r, w in zip(finite, self.weights, strict=False))
        return [t.detach().double() for t in [*results, *torch.autograd.grad(total, inputs)]]

    def check(
        self, kernel: Callable[..., object], reference: Callable[..., object], **options: object
    ) -> None:
        """Checks that errors are at most twice those of the dense definition in the same dtype, plus a term.

        The term is the cost of rounding a base-2 logit to fp32: |s| eps of every probability.
        """
        truth = self.outputs(reference, torch.float64)
        dense = self.outputs(reference, self.x.dtype)
        results = self.outputs(kernel, self.x.dtype, **options)
        scale = float(self.scale)
        rounding = eps(torch.float32) * (FEW + scale / 2)
        if self.x.dtype != torch.float32:
            rounding = 2 * eps(self.x.dtype)
        sizes = [torch.where(t.isfinite(), t, 0.0).norm() for t in truth]
        # The gradients by the scalars are sums of terms of both signs.
        d_x, weights = truth[-4], torch.cat(self.weights)
        sizes[-2] = (self.x.double() * d_x).sum(1).abs().sum() / scale + sizes[-2]
        sizes[-1] = weights.abs().sum() + sizes[-1]
        for result, dense_result, true, size in zip(results, dense, truth, sizes, strict=True):
            assert torch.equal(result.isneginf(), true.isneginf())
            errors = [torch.where(true.isfinite(), r - true, 0.0).norm() for r in (result, dense_result)]
            assert errors[0].isfinite()
            assert errors[0] <= 2 * errors[1] + rounding * size + 1e-12
            if self.x.dtype == torch.float32:
                # docs/derivation.md, section 5: the rounding of float32 logits.
                assert errors[0] <= (FEW + 2 * scale) * eps(torch.float32) * size + 1e-12

    def check_both(self, **options: object) -> None:
        self.check(negative_lse, negative_lse_reference, **options)
        self.check(negative_softplus, negative_softplus_reference, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_results_and_gradients_are_those_of_the_dense_definition(
    kernel_device: torch.device, shape: tuple[int, int, int], scale: float
) -> None:
    Case(kernel_device, shape, scale).check_both()


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(kernel_device: torch.device, dtype: torch.dtype) -> None:
    Case(kernel_device, (40, 70, 33), 30.0, dtype=dtype).check_both()


def test_pointer_loads_do_what_descriptors_do(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "has_descriptors", lambda target: False)
    for depth in (33, 64):
        Case(kernel_device, (40, 70, depth), 100.0).check_both()


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (0, 0, 4)])
def test_an_empty_side_has_no_negatives(kernel_device: torch.device, shape: tuple[int, int, int]) -> None:
    case = Case(kernel_device, shape, 10.0)
    case.check_both()
    row, column = case.outputs(negative_lse, torch.float32)[:2]
    assert row.isneginf().all()
    assert column.isneginf().all()


def test_owners_of_any_kind(kernel_device: torch.device) -> None:
    owners = {
        "one clip owns all": torch.zeros(70, dtype=torch.int64),
        "owned elsewhere": torch.full((70,), 1 << 40),
        "nobody's": torch.full((70,), -1),
        "unsorted": torch.randperm(70) % 35,
    }
    for owner in owners.values():
        Case(kernel_device, (35, 70, 16), 50.0, owner=owner).check_both()
    single = Case(kernel_device, (1, 70, 16), 50.0, owner=owners["one clip owns all"])
    row, column, *gradients = single.outputs(negative_lse, torch.float32)
    assert row.isneginf().all()
    assert column.isneginf().all()
    assert not any(g.any() for g in gradients)


def test_logits_far_apart_in_one_tile(kernel_device: torch.device) -> None:
    # Columns at +200 and -200. Relative to the tile's peak the latter are exp(-400), which is 0 in fp32.
    case = Case(kernel_device, (40, 70, 16), 200.0)
    case.x = F.normalize(torch.eye(16, device=kernel_device)[:1] + 0.1 * case.x, dim=1)
    signs = torch.where(torch.arange(70, device=kernel_device) % 3 == 0, 1.0, -1.0)
    case.y = signs[:, None] * F.normalize(torch.eye(16, device=kernel_device)[:1] + 0.1 * case.y, dim=1)
    assert case.outputs(negative_lse_reference, torch.float64)[1].aminmax().max > 150
    case.check_both()
    case.x, case.y, case.owner = case.y, case.x, torch.arange(40, device=kernel_device)
    case.weights.reverse()
    case.check_both()


def test_an_exponential_that_flushes_denormals_loses_nothing(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A card flushes denormals. With one fixed maximum for all logits, many rows of this batch would be 0.
    if kernel_device.type == "cpu":

        def flushed(builder: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
            values = np.exp2(x.data)
            return TensorHandle(np.where(values < 2.0**-126, 0, values).astype(values.dtype), x.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_exp2", flushed)
    case = Case(kernel_device, (70, 100, 512), 100.0)
    fixed = torch.exp2((case.x.double() @ case.y.double().T - 1) * 100 / math.log(2))
    assert (fixed.amax(1) < 2.0**-126).double().mean() > 0.3
    case.check_both()


def starve(case: Case, rows: slice, columns: slice) -> None:
    """Makes logits near -scale between `rows` and other columns, and `columns` and other rows; else scale."""
    axis = torch.zeros(case.x.shape[1], device=case.x.device)
    axis[0] = 1
    case.x = F.normalize(axis + 0.1 * case.x, dim=1)
    case.y = F.normalize(axis + 0.1 * case.y, dim=1)
    case.x[rows] *= -1
    case.y[columns] *= -1


@pytest.fixture
def starved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sums that each call of `_recompute_starved` finds starved: of rows, then of columns."""
    numbers: list[int] = []
    recompute = contrastive._recompute_starved

    def recorded(*arguments: object) -> None:
        numbers.append(int(arguments[5].isnan().sum()))  # type: ignore[attr-defined]
        recompute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(contrastive, "_recompute_starved", recorded)
    return numbers


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(3, 4), slice(0)),  # one row is far below the others
        (slice(0), slice(68, 70)),  # two columns
        (slice(40), slice(0)),  # every row and every column
        (slice(20), slice(35)),  # some logits of every row and column are far above the rest
    ],
)
def test_sums_that_underflow_are_recomputed(
    kernel_device: torch.device, starved: list[int], rows: slice, columns: slice
) -> None:
    case = Case(kernel_device, (40, 70, 16), 200.0)
    starve(case, rows, columns)
    case.outputs(negative_lse, torch.float32)
    expected = [len(range(40)[rows]), len(range(70)[columns])]
    if expected == [40, 0]:
        expected = [40, 70]
    elif expected == [20, 35]:
        expected = [0, 0]
    assert starved == expected
    case.check(negative_lse, negative_lse_reference)


@pytest.mark.parametrize("norm", [1.0, 16.0])
def test_sums_starve_beyond_the_documented_scale(
    kernel_device: torch.device, starved: list[int], norm: float
) -> None:
    def limit(rows: int) -> float:
        """The scale in docs/derivation.md, section 4."""
        return (226 - math.ceil(math.log2(rows))) * math.log(2) / norm

    assert round(limit(32_768) * norm) == 146
    # All negative pairs have the logit 0. M = N = 33, so L = 33.
    unit = torch.eye(33, 40, device=kernel_device)
    for factor, expected in ((0.99, [0, 0]), (1.01, [33, 33])):
        starved.clear()
        scale = torch.tensor(factor * limit(33), device=kernel_device)
        row, column = negative_lse(norm * unit, unit, scale, torch.arange(33, device=kernel_device))
        assert starved == expected
        for result in (row, column):
            assert_agrees(result, torch.full((33,), 32.0).log(), count=FEW + 2 * 160, dtype=torch.float32)


@pytest.mark.parametrize("scale", [-30.0, 0.0, 1e-3, 77.0, 1000.0])
def test_any_scale(kernel_device: torch.device, scale: float) -> None:
    case = Case(kernel_device, (40, 70, 16), scale, bias=300.0)
    truth = case.outputs(negative_lse_reference, torch.float64)
    for result, true in zip(case.outputs(negative_lse, torch.float32)[:2], truth[:2], strict=True):
        # docs/derivation.md, section 5: a logit, the reference and the result are rounded.
        assert ((result - true).abs() <= eps(torch.float32) * (FEW + 2 * (abs(scale) + 300))).all()


def test_rows_of_very_different_norms(kernel_device: torch.device) -> None:
    # The largest norms bound the logits by 1e10, which is far above nearly all of them.
    case = Case(kernel_device, (40, 70, 16), 50.0)
    case.x[7] *= 1e4
    case.y[9] *= 1e4
    truth = case.outputs(negative_lse_reference, torch.float64)[:2]
    dense = case.outputs(negative_lse_reference, torch.float32)[:2]
    results = case.outputs(negative_lse, torch.float32)[:2]
    for result, usual, true in zip(results, dense, truth, strict=True):
        assert ((result - true).abs() <= 2 * (usual - true).abs() + 4 * eps(torch.float32) * true.abs()).all()


def test_only_rows_and_columns_that_meet_a_value_that_is_not_finite_are_not_finite(
    kernel_device: torch.device,
) -> None:
    case = Case(kernel_device, (40, 70, 16), 50.0)
    expected = case.outputs(negative_lse, torch.float32)[0]
    for value in (math.nan, math.inf):
        case.x[5, 2] = value
        row, column = negative_lse(case.x, case.y, case.scale, case.owner, logit_bias=case.bias)
        assert row[5].isnan()
        others = torch.arange(40) != 5
        assert_agrees(row[others].double(), expected[others], count=FEW + 50, dtype=torch.float32)
        # Texts 5 and 45 describe clip 5, so they do not meet it. A logit of -infinity adds nothing.
        meets = (case.owner != 5) & ((case.y[:, 2] > 0) | math.isnan(value))
        assert torch.equal(~column.isfinite(), meets)


def test_long_runs_give_the_same_bits_with_any_workspace(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Case(kernel_device, (600, 70, 16), 100.0).outputs(negative_lse, torch.float32)
    # A program runs over two tiles of rows, so that the smallest panel has 16 of the 19.
    monkeypatch.setattr(contrastive, "_PROGRAMS", 16)
    case = Case(kernel_device, (600, 70, 16), 100.0)
    case.check(negative_lse, negative_lse_reference)
    results = case.outputs(negative_lse, torch.float32)
    small = case.outputs(negative_lse, torch.float32, workspace_bytes=1)
    for result, other in zip(results[:2], small[:2], strict=True):
        assert torch.equal(result, other)
    assert torch.equal(results[0], short[0])


def test_equal_embeddings(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (40, 70, 16), 100.0)
    case.x, case.y = case.x[:1].repeat(40, 1), case.x[:1].repeat(70, 1)
    row = case.outputs(negative_lse, torch.float32)[0]
    negatives = 70 - torch.bincount(case.owner, minlength=40).double()
    expected = 99.5 + negatives.log()
    assert_agrees(row, expected, count=FEW, dtype=torch.float32)


def test_layouts(kernel_device: torch.device) -> None:
    plain = Case(kernel_device, (40, 70, 18), 100.0)
    expected = plain.outputs(negative_lse, torch.float32)
    wide = torch.zeros(41, 37, device=kernel_device)
    layouts = {
        "odd rows, misaligned": wide[1:, 1:19],
        "every second column": wide[:40, :36:2],
        "columns first": torch.zeros(18, 40, device=kernel_device).T,
    }
    for name, x in layouts.items():
        case = Case(kernel_device, (40, 70, 18), 100.0)
        case.x = x.copy_(plain.x)
        results = case.outputs(negative_lse, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), name
    case.x = plain.x[:1].expand(40, 18)
    case.check_both()


def test_the_same_call_gives_the_same_bits_and_the_forward_with_any_workspace(
    kernel_device: torch.device,
) -> None:
    case = Case(kernel_device, (300, 40, 16), 100.0)
    first = [case.outputs(f, torch.float32) for f in (negative_lse, negative_softplus)]
    repeated = [case.outputs(f, torch.float32) for f in (negative_lse, negative_softplus)]
    small = [case.outputs(f, torch.float32, workspace_bytes=1) for f in (negative_lse, negative_softplus)]
    references = negative_lse_reference, negative_softplus_reference
    for one, two, three in zip(first, repeated, small, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        results = len(one) - 4
        assert all(torch.equal(a, b) for a, b in zip(one[:results], three[:results], strict=True))
    for one, three, reference in zip(first, small, references, strict=True):
        truth = case.outputs(reference, torch.float64)
        for a, b, exact in zip(one, three, truth, strict=True):
            assert_as_exact(b, a, exact, size=norm([norm(t) for t in truth]))


@pytest.mark.slow
def test_a_hundred_calls_give_the_same_bits(kernel_device: torch.device) -> None:
    # Interpreted programs run one after the other, so that little can differ: one tile is enough.
    shape = (30, 60, 4) if kernel_device.type == "cpu" else (300, 700, 512)
    case = Case(kernel_device, shape, 100.0)
    for function in (negative_lse, negative_softplus):
        first = case.outputs(function, torch.float32)
        for _ in range(99):
            repeated = case.outputs(function, torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))


def to_tf32(x: Tensor) -> Tensor:
    """x rounded to the 10 explicit mantissa bits of TF32, as matrix units of a card read it; in float64."""
    bits = x.float().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).double()


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(
    ("noise", "probability", "bf16_factor", "tf32_factor"),
    [
        (0.25, 0.215, 2, 0),
        (0.2, 0.382, 4, 0),
        (0.15, 0.682, 10, 1),
        (0.12, 0.870, 25, 2.5),
        (0.1, 0.949, 70, 6),
        (0.08, 0.984, 200, 20),
        (0.055, 0.997, 1000, 100),
    ],
)
def test_gradients_of_good_models_survive_bf16(
    kernel_device: torch.device, noise: float, probability: float, bf16_factor: float, tf32_factor: float
) -> None:
    """The nearer p_ii is to 1, the more digits a rounded p_ii - 1 loses. The kernels keep positives apart,
    and lose none.

    The rounded forms are those of other kernels, emulated in float64: the sum of row and column probability
    in bf16, as memeff has it, and scaled embeddings and probabilities in TF32, as Inf-CL has them. A factor
    says how many times larger than the kernels' their error is at least.
    """
    x = F.normalize(torch.randn(256, 128), dim=1).to(kernel_device)
    y = F.normalize(x + noise * torch.randn(256, 128).to(kernel_device), dim=1)
    x, y = (t.bfloat16().float().requires_grad_() for t in (x, y))
    owner, scale = torch.arange(256, device=kernel_device), torch.tensor(1 / 0.07, device=kernel_device)

    def dense(x: Tensor, y: Tensor) -> Tensor:
        s_MN = scale.to(x.dtype) * (x @ y.T)
        return (F.cross_entropy(s_MN, owner) + F.cross_entropy(s_MN.T, owner)) / 2

    def subtracted_afterwards(both_MN: Tensor) -> list[Tensor]:
        """Gradients from the probabilities of both directions; a second product subtracts their targets."""
        return [
            scale.double() * (p @ other - 2 * other) / (2 * 256)
            for p, other in ((both_MN, wide[1].detach()), (both_MN.T, wide[0].detach()))
        ]

    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    half = [t.detach().bfloat16().requires_grad_() for t in (x, y)]
    loss = dense(*wide)
    truth = torch.autograd.grad(loss, wide)
    s_MN = scale.double() * (wide[0] @ wide[1].T).detach()
    p_MN, q_MN = s_MN.softmax(1), s_MN.softmax(0)
    assert abs(p_MN.diag().mean() - probability) < 0.002
    coarse_MN = to_tf32(scale * x.detach()) @ to_tf32(y.detach()).T
    rounded_forms = {
        "dense bf16": (bf16_factor, torch.autograd.grad(dense(*half), half)),
        "bf16": (bf16_factor, subtracted_afterwards((p_MN + q_MN).bfloat16().double())),
        "TF32": (
            tf32_factor,
            subtracted_afterwards(to_tf32(coarse_MN.softmax(1)) + to_tf32(coarse_MN.softmax(0))),
        ),
    }

    row_M, column_N = negative_lse(x, y, scale, owner, compute_dtype=torch.bfloat16)
    positive_M = scale * (x * y).sum(1)
    kernel_loss = (F.softplus(row_M - positive_M).mean() + F.softplus(column_N - positive_M).mean()) / 2
    assert_agrees(kernel_loss, loss, count=FEW + 1 / 0.07, dtype=torch.float32)
    for i, gradient in enumerate(torch.autograd.grad(kernel_loss, (x, y))):
        error = (gradient.double() - truth[i]).norm() / truth[i].norm()
        # The promise for bf16 inputs. The error of an element of G is at most half an eps of bf16, 2e-3.
        # These errors have either sign, so the errors of sums of many elements are smaller.
        assert error < 3e-4
        for name, (factor, rounded) in rounded_forms.items():
            assert (rounded[i].double() - truth[i]).norm() / truth[i].norm() > factor * error, name


@pytest.mark.usefixtures("rounding")
def test_computing_in_bf16_keeps_fp32_gradients(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (40, 70, 33), 20.0)
    truth = case.outputs(negative_lse_reference, torch.float64)
    case.x, case.y = case.x.bfloat16().float(), case.y.bfloat16().float()
    results = case.outputs(negative_lse, torch.float32, compute_dtype=torch.bfloat16)
    plain = case.outputs(negative_lse, torch.float32)
    # bf16 holds these operands exactly, so that only G is rounded.
    assert_agrees(results[0], plain[0], count=FEW, dtype=torch.float32)
    assert FEW * eps(torch.float32) < (results[2] - plain[2]).norm() / truth[2].norm() < eps(torch.bfloat16)


def test_small_gradients_survive_fp16(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (40, 70, 33), 20.0)
    case.x, case.y = case.x.half().float(), case.y.half().float()
    case.weights = [1e-8 * w for w in case.weights]
    for kernel, reference in (
        (negative_lse, negative_lse_reference),
        (negative_softplus, negative_softplus_reference),
    ):
        truth = case.outputs(reference, torch.float64)
        results = case.outputs(kernel, torch.float32, compute_dtype=torch.float16)
        for gradient, true in list(zip(results, truth, strict=True))[-4:-2]:
            assert_agrees(gradient, true, count=1, dtype=torch.float16)


def test_only_what_needs_a_gradient_gets_one(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (40, 70, 16), 10.0)
    tensors = [case.x, case.y, case.scale, case.bias]

    def gradients(chosen: tuple[int, ...]) -> list[Tensor]:
        inputs = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
        x, y, scale, bias = inputs
        row_M, column_N = negative_lse(x, y, scale, case.owner, logit_bias=bias)
        sums_M = negative_softplus(x, y, scale, case.owner, logit_bias=bias)
        total = (row_M * case.weights[0]).sum() + (column_N * case.weights[1]).sum() + sums_M.sum()
        return list(torch.autograd.grad(total, [inputs[i] for i in chosen]))

    everything = gradients((0, 1, 2, 3))
    for chosen in ((0,), (1,), (2,), (1, 2), (0, 3)):
        for gradient, i in zip(gradients(chosen), chosen, strict=True):
            size = norm([norm(x) for x in everything])
            assert_agrees(gradient, everything[i], count=FEW, dtype=torch.float32, size=size)


def test_what_is_kept_for_the_backward_pass_is_linear(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (100, 140, 16), 10.0)
    x, y = case.x.requires_grad_(), case.y.requires_grad_()
    inputs = {t.data_ptr() for t in (x, y, case.owner)}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        negative_lse(x, y, case.scale, case.owner)
        negative_softplus(x, y, case.scale, case.owner)
    assert inputs <= set(kept)
    assert sum(size for at, size in kept.items() if at not in inputs) <= 4 * (100 + 140) + 64


def test_the_operators_are_registered_correctly(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (20, 33, 8), 3.0)
    tensors = [t.requires_grad_() for t in (case.x, case.y, case.scale, case.bias)]
    arguments = (*tensors, case.owner, torch.float32, 1 << 20)
    torch.library.opcheck(contrastive._negative_lse, arguments)
    torch.library.opcheck(sigmoid._negative_softplus, arguments)


def test_compiled_graphs_hold_the_operators_whole(kernel_device: torch.device) -> None:
    case = Case(kernel_device, (20, 33, 8), 3.0)

    def both(x: Tensor, y: Tensor, scale: Tensor, owner: Tensor, *, logit_bias: Tensor) -> tuple[Tensor, ...]:
        results = negative_lse(x, y, scale, owner, logit_bias=logit_bias)
        return *results, negative_softplus(x, y, scale, owner, logit_bias=logit_bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for result, eager in zip(
        case.outputs(compiled, torch.float32), case.outputs(both, torch.float32), strict=True
    ):
        assert torch.equal(result, eager)


def test_wrong_arguments_are_named(kernel_device: torch.device) -> None:
    x, y = torch.zeros(3, 4, device=kernel_device), torch.zeros(5, 4, device=kernel_device)
    owner = torch.zeros(5, dtype=torch.int64, device=kernel_device)
    with pytest.raises(ValueError, match="same, positive number of columns"):
        negative_lse(x, y[:, :3], 1.0, owner)
    with pytest.raises(TypeError, match="float64"):
        negative_lse(x.double(), y.double(), 1.0, owner)
    with pytest.raises(ValueError, match=r"text_owner_N must be int64 of shape \(5,\)"):
        negative_softplus(x, y, 1.0, owner[:3])
    with pytest.raises(TypeError, match=r"text_owner_N must be int64 of shape \(5,\), got torch.int32"):
        negative_softplus(x, y, 1.0, owner.int())
    with pytest.raises(TypeError, match=r"text_owner_N must be a torch.Tensor, got list"):
        negative_lse(x, y, 1.0, [0] * 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_scale must be a scalar"):
        negative_softplus(x, y, torch.ones(1), owner)


@pytest.mark.parametrize("function", [negative_lse, negative_softplus])
def test_panels_are_zero_beyond_the_last_row_and_column(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]
) -> None:
    buffers = []
    add_product = _pairs.add_product

    def recorded(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if a.shape == (40, 70):
            assert a._base is not None
            buffers.append(a._base.clone())
        return add_product(total, a, b)

    monkeypatch.setattr(_pairs, "add_product", recorded)
    case = Case(kernel_device, (40, 70, 16), 100.0, owner=torch.zeros(70, dtype=torch.int64))
    case.outputs(function, torch.float32)
    (buffer,) = buffers
    assert buffer.shape[0] > 40
    assert buffer.shape[1] > 70
    assert buffer[1:40, :70].any()
    buffer[:40, :70] = 0
    assert not buffer.any()
    assert buffer.isfinite().all()


def test_one_panel_has_a_product_at_a_time(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[weakref.ref[Tensor]] = []
    add_product = _pairs.add_product

    def recorded(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        assert [ref() for ref in products] == [None] * len(products)
        result = add_product(total, a, b)
        if total is None:
            products.append(weakref.ref(result))
        return result

    monkeypatch.setattr(_pairs, "add_product", recorded)
    Case(kernel_device, (70, 150, 40), 20.0).outputs(negative_lse, torch.float32, workspace_bytes=1)
    # A panel has one row of tiles.
    target = _launch.target_of(kernel_device)
    assert len(products) == -(-70 // _launch.tile_of("panel", target, torch.float32).rows)


@pytest.mark.parametrize("function", [negative_lse, negative_softplus])
@pytest.mark.parametrize("learns", ["audio", "text"])
def test_the_gradient_of_the_scale_needs_no_more_than_the_workspace(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, function: Callable[..., object], learns: str
) -> None:
    lengths = []
    real = _pairs._sum

    def recorded(product: Tensor) -> Tensor:
        lengths.append(len(product))
        return real(product)

    monkeypatch.setattr(_pairs, "_sum", recorded)
    case = Case(kernel_device, (300, 400, 40), 20.0)
    x, y = (t.clone().requires_grad_(name == learns) for name, t in (("audio", case.x), ("text", case.y)))
    gradients = []
    for workspace_bytes in (None, 1):
        scale = case.scale.clone().requires_grad_()
        results = function(x, y, scale, case.owner, workspace_bytes=workspace_bytes)
        results[0].sum().backward() if isinstance(results, tuple) else results.sum().backward()
        gradients.append(scale.grad)
    assert_agrees(gradients[1], gradients[0], count=FEW, dtype=torch.float32)
    # At first everything fits. Then a product has as many rows as a tile, the fewest possible.
    target = _launch.target_of(kernel_device)
    rows = _launch.tile_of("panel", target, torch.float32).rows
    expected = 300 if learns == "audio" else 400
    assert lengths == [expected] + [min(rows, expected - first) for first in range(0, expected, rows)]


def test_tiles_can_be_replaced_for_a_measurement() -> None:
    usual = _launch.tile_of("lse", 90, torch.float32)
    wide = _launch.Tile(32, 128, 32, 4, 1)
    with _launch.override_tiles(lse=wide):
        assert _launch.tile_of("lse", 90, torch.float32) == wide
        assert _launch.tile_of("panel", 90, torch.float32) == usual
    assert _launch.tile_of("lse", 90, torch.float32) == usual
    with pytest.raises(ValueError, match="got combine"), _launch.override_tiles(combine=wide):
        pass


def test_panels_fit_the_workspace() -> None:
    assert _launch.panel_rows(1000, 10, 1 << 30, 128) == 1024
    assert _launch.panel_rows(1000, 10, 5120, 128) == 512
    assert _launch.panel_rows(1000, 10, 5119, 128) == 384
    assert _launch.panel_rows(1000, 10, 1, 128) == 128


@pytest.mark.parametrize(
    ("target", "rows", "expected"),
    [(90, 8_192, 8_192), (90, 32_768, 8_192), (90, 65_536, 8_192), (80, 32_768, 6_656), (100, 65_536, 9_472)],
)
def test_panels_fill_whole_waves_of_products(target: int, rows: int, expected: int) -> None:
    row_bytes = 2 * rows + 4 * 512
    chosen = _pairs.product_rows(rows, row_bytes, 2 << 30, 128, 512, target)
    assert chosen == expected
    assert 2 * chosen / 128 <= _pairs._MULTIPROCESSORS[target]
    # A smaller workspace makes smaller panels.
    small = _pairs.product_rows(rows, row_bytes, 64 << 20, 128, 512, target)
    assert small * row_bytes <= 64 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_batches_on_a_card(cuda: torch.device, dtype: torch.dtype) -> None:
    for shape in ((1000, 2100, 512), (1024, 2048, 512), (129, 257, 100)):
        for scale in (1.0, 100.0):
            Case(cuda, shape, scale, dtype=dtype).check_both()


@pytest.mark.gpu
def test_memory_and_repeatability_on_a_card(cuda: torch.device) -> None:
    case = Case(cuda, (32_768, 32_768, 512), 50.0, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = case.outputs(negative_lse, torch.bfloat16, workspace_bytes=64 << 20)
    grown = torch.cuda.max_memory_allocated() - before
    # The workspace, both gradients in two bytes, dY in fp32 and a temporary, and the float64 copies of this
    # test.
    assert grown < (64 << 20) + 32_768 * 512 * (2 + 2 + 4 + 4 + 16)
    for _ in range(10):
        repeated = case.outputs(negative_lse, torch.bfloat16, workspace_bytes=64 << 20)
        assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
    assert math.isfinite(first[0].sum())
