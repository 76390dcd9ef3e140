"""The losses from products of pairs equal their definition, and keep their digits as the CPU's code does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import FEW, assert_agrees, norm
from torch import Tensor

from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.positives import Pairs, Positives
from clsp_fast.contrastive.positives import softmax_loss as softmax_loss_of_torch
from clsp_fast.contrastive.problem import Problem
from clsp_fast.kernels import grouping, loss_terms, positives
from clsp_fast.kernels import loss as kernels
from clsp_fast.kernels.grouping import group_by_owner
from clsp_fast.kernels.loss import (
    sigmoid_loss,
    sigmoid_loss_reference,
    softmax_loss,
    softmax_loss_reference,
)
from clsp_fast.kernels.loss_terms import softmax_terms

MODULES = (grouping, positives, loss_terms, kernels)
# Triton's interpreter computes with numpy, which warns about infinities that the kernels intend.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
OWNERS = {
    "several": [4, 0, 0, 2, 4, 4, 6, 4, 4, 4],
    "one": [3],
    "many": [2] * 21,
    "one each": [6, 2, 0, 1, 3, 5, 4],
}
CLIPS = 7


def inputs(texts: int, dtype: torch.dtype = torch.float64, size: float = 3.0) -> list[Tensor]:
    """Sums over negatives, products and scale, which require gradients."""
    values = (size * torch.randn(CLIPS), size * torch.randn(texts), torch.randn(texts), torch.tensor(2.0))
    return [x.to(torch.float64 if i == 2 else dtype).requires_grad_() for i, x in enumerate(values)]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def by_kernels(
    leaves: list[Tensor], owner_N: Tensor, weights_N: Tensor | None = None, **options: Any
) -> Tensor:
    groups = group_by_owner(owner_N, CLIPS)[:2]
    return softmax_loss(*leaves[:4], groups=groups, weights_N=weights_N, **options)


def by_torch(leaves: list[Tensor], owner_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """The same loss by the code for the CPU, in float64."""
    row_M, column_N, dot_N, scale = (x.double() for x in leaves[:4])
    none_MD = torch.empty(0, device=dot_N.device)
    problem = Problem(
        audio_MD=none_MD,
        text_ND=none_MD,
        scale=1.0,
        bias=0.0,
        owner_N=owner_N,
        weights=weights_N,
        smoothing=0.0,
        kind="softmax",
        normalize=False,
        group=None,
        one_caption_each=False,
    )
    shards = Shards(None, [CLIPS], [len(dot_N)], 0, torch.float64)
    pairs = Pairs(problem, none_MD, none_MD, scale, scale * 0, shards)
    return softmax_loss_of_torch(pairs, Positives(scale * dot_N, None, None), row_M, column_N)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OWNERS)
def test_softmax_equals_its_definition(kernel_device: torch.device, name: str, weighted: bool) -> None:
    owner_N = torch.tensor(OWNERS[name], device=kernel_device)
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(len(owner_N))]
    weights_N = None
    if weighted:
        weights_N = torch.rand(len(owner_N), dtype=torch.float64, device=kernel_device)
        weights_N[::3] = 0.0
        leaves.append(weights_N.requires_grad_())
    result = gradients(by_kernels(leaves, owner_N, weights_N), leaves)
    row_M, column_N, dot_N, scale = leaves[:4]
    truth = softmax_loss_reference(row_M, column_N, scale * dot_N, owner_N, weights_N=weights_N)
    for value, exact in zip(result, gradients(truth, leaves), strict=True):
        assert_agrees(value, exact, count=100, size=norm(exact) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("good", [0.0, 15.0, 40.0])
def test_losses_keep_their_digits(
    kernel_device: torch.device, dtype: torch.dtype, weighted: bool, good: float
) -> None:
    """`good` is the distance of positive logits from negative ones: losses down to exp(-80)."""
    owner_N = torch.tensor(OWNERS["one each"], device=kernel_device)
    leaves = [x.to(kernel_device).detach() for x in inputs(len(owner_N), dtype)]
    leaves[2] += good
    leaves = [x.requires_grad_() for x in leaves]
    weights_N = torch.rand(len(owner_N), device=kernel_device) + 0.1 if weighted else None
    result = gradients(by_kernels(leaves, owner_N, weights_N), leaves)
    truth = gradients(by_torch(leaves, owner_N, weights_N), leaves)
    for value, exact in zip(result, truth, strict=True):
        assert_agrees(value, exact, count=100 if value.dtype == torch.float64 else FEW, dtype=value.dtype)


def test_shares_of_any_size_keep_the_digits_of_the_peak(kernel_device: torch.device) -> None:
    """One caption has nearly all of the weight and nearly all of the softmax; both differ from 1 by 1e-13."""
    owner_N = torch.tensor([1, 1, 0], device=kernel_device)
    leaves = [x.to(kernel_device).detach() for x in inputs(3)]
    leaves[2] = torch.tensor([20.0, 5.0, 10.0], dtype=torch.float64, device=kernel_device)
    leaves = [x.requires_grad_() for x in leaves]
    weights_N = torch.tensor([1.0, 1e-14, 1.0], device=kernel_device, dtype=torch.float64)
    result, truth = (
        gradients(function(leaves, owner_N, weights_N), leaves) for function in (by_kernels, by_torch)
    )
    for value, exact in zip(result, truth, strict=True):
        assert_agrees(value, exact, count=100)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e308])
def test_weights_may_have_any_size(kernel_device: torch.device, size: float) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(len(owner_N))]
    weights_N = torch.rand(len(owner_N), dtype=torch.float64, device=kernel_device) + 0.1
    usual, scaled = (gradients(by_kernels(leaves, owner_N, w), leaves) for w in (weights_N, size * weights_N))
    for value, exact in zip(scaled, usual, strict=True):
        assert_agrees(value, exact, count=FEW, size=norm(exact) + 1)


def test_rows_without_negatives_or_captions_have_no_loss(kernel_device: torch.device) -> None:
    owner_N = torch.tensor([2], device=kernel_device)
    row_M = torch.full((CLIPS,), -torch.inf, device=kernel_device).requires_grad_()
    column_N = torch.full((1,), -torch.inf, device=kernel_device).requires_grad_()
    dot_N = torch.ones(1, dtype=torch.float64, device=kernel_device).requires_grad_()
    leaves = [row_M, column_N, dot_N, torch.tensor(5.0, device=kernel_device, requires_grad=True)]
    for weights_N in (None, torch.zeros(1, device=kernel_device)):
        for value in gradients(by_kernels(leaves, owner_N, weights_N), leaves):
            assert bool((value == 0).all())


def test_one_caption_each_needs_no_groups(kernel_device: torch.device) -> None:
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(CLIPS, torch.float32)]
    alone = gradients(softmax_loss(*leaves), leaves)
    grouped = gradients(by_kernels(leaves, torch.arange(CLIPS, device=kernel_device)), leaves)
    for value, exact in zip(alone, grouped, strict=True):
        assert_agrees(value, exact, count=FEW, dtype=value.dtype)


def with_gaps(x: Tensor) -> Tensor:
    """The same numbers, with other numbers between them."""
    return torch.stack([x, torch.full_like(x, 7)], x.ndim).select(x.ndim, 0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_every_argument_may_have_gaps(kernel_device: torch.device, kind: str) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    groups = group_by_owner(owner_N, CLIPS)[:2]
    values = [x.to(kernel_device).detach() for x in inputs(len(owner_N))]
    weights_N = torch.rand(len(owner_N), dtype=torch.float64, device=kernel_device)
    sums_3D, all_sums_3D = (torch.randn(3, 5, dtype=torch.float64, device=kernel_device) for _ in range(2))
    results = []
    for change in (Tensor.clone, with_gaps):
        row_M, column_N, dot_N, scale, weights, sums, all_sums = leaves = [
            change(x).detach().requires_grad_() for x in (*values, weights_N, sums_3D, all_sums_3D)
        ]
        options: dict[str, Any] = {"sums_3D": sums, "all_sums_3D": all_sums, "smoothing": 0.1}
        if kind == "softmax":
            options |= {"weights_N": weights, "groups": tuple(change(x) for x in groups)}
            loss = softmax_loss(row_M, column_N, dot_N, scale, **options)
        else:
            leaves = [row_M, dot_N, scale, sums, all_sums]
            loss = sigmoid_loss(row_M, dot_N, scale, scale * 0.1, **options)
        results.append(gradients(loss, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("texts", [1, 4, 600])
def test_sigmoid_equals_its_definition(kernel_device: torch.device, texts: int) -> None:
    row_M, _, dot_N, scale = (x.to(kernel_device).detach().requires_grad_() for x in inputs(texts))
    bias = torch.tensor(-1.5, dtype=torch.float64, device=kernel_device, requires_grad=True)
    leaves = [row_M, dot_N, scale, bias]
    result = gradients(sigmoid_loss(row_M, dot_N, scale, bias), leaves)
    truth = gradients(sigmoid_loss_reference(row_M, scale * dot_N + bias), leaves)
    for value, exact in zip(result, truth, strict=True):
        assert_agrees(value, exact, count=100)


def test_a_bias_that_cancels_has_the_gradient_zero(kernel_device: torch.device) -> None:
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(CLIPS, torch.float32)]
    bias = torch.tensor(3.0, device=kernel_device, requires_grad=True)
    assert torch.autograd.grad(softmax_loss(*leaves, bias=bias), bias)[0] == 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck_with_smoothing(kernel_device: torch.device, kind: str) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    groups = group_by_owner(owner_N, CLIPS)[:2]
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(len(owner_N), size=1.0)]
    bias = torch.tensor(0.5, dtype=torch.float64, device=kernel_device, requires_grad=True)
    sums_3D = torch.randn(3, 5, dtype=torch.float64, device=kernel_device, requires_grad=True)
    weights_N = torch.rand(len(owner_N), dtype=torch.float64, device=kernel_device).requires_grad_()

    def softmax(*x: Tensor) -> Tensor:
        options = {"groups": groups, "weights_N": x[4], "sums_3D": x[5], "smoothing": 0.3}
        return softmax_loss(*x[:4], **options)

    def sigmoid(*x: Tensor) -> Tensor:
        return sigmoid_loss(x[0], x[2], x[3], x[4], sums_3D=x[5], smoothing=0.3)

    if kind == "softmax":
        assert torch.autograd.gradcheck(softmax, (*leaves, weights_N, sums_3D), fast_mode=True)
    else:
        leaves[1].requires_grad_(False)
        assert torch.autograd.gradcheck(sigmoid, (*leaves, bias, sums_3D), fast_mode=True)


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    owner_N = torch.randint(CLIPS, (500,), device=kernel_device)
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(500, torch.float32)]
    first, second = (gradients(by_kernels(leaves, owner_N), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo
def test_compiled_graphs_hold_the_operators_whole(kernel_device: torch.device) -> None:
    owner_N = torch.tensor(OWNERS["several"], device=kernel_device)
    leaves = [x.to(kernel_device).detach().requires_grad_() for x in inputs(len(owner_N), torch.float32)]

    def loss(*x: Tensor) -> Tensor:
        return by_kernels(list(x), owner_N)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = gradients(loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled(*leaves), leaves), eager, strict=True))


def test_sums_get_the_gradient_zero_without_smoothing(kernel_device: torch.device) -> None:
    leaves = [x.to(kernel_device).detach() for x in inputs(CLIPS)]
    sums_3D = torch.ones(3, 5, dtype=torch.float64, device=kernel_device, requires_grad=True)
    loss = softmax_loss(*leaves, sums_3D=sums_3D)
    assert torch.equal(loss, softmax_loss(*leaves))
    assert not torch.autograd.grad(loss, sums_3D)[0].any()


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"row_M": [1.0] * CLIPS}, "row_M must be a torch.Tensor, got list"),
        (TypeError, {"scale": 1.0}, "scale must be a torch.Tensor, got float"),
        (TypeError, {"sums_3D": [1.0]}, "sums_3D must be a torch.Tensor, got list"),
        (TypeError, {"row_M": torch.ones(CLIPS)}, "row_M must be torch.float64 .* got torch.float32"),
        (
            ValueError,
            {"row_M": torch.ones(1, CLIPS)},
            r"row_M and dot_N must be of shape \(M,\) and \(N,\) .* \(1, 7\)",
        ),
        (ValueError, {"dot_N": torch.ones(0)}, r"row_M and dot_N .* N >= 1, got \(7,\) and \(0,\)"),
        (TypeError, {"dot_N": torch.ones(CLIPS)}, "dot_N must be torch.float64 .* got torch.float32"),
        (ValueError, {"scale": torch.ones(1)}, r"scale must be floating of shape \(\) .* \(1,\)"),
        (TypeError, {"bias": torch.ones(())}, "bias must be torch.float64 .* got torch.float32"),
        (ValueError, {"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        (ValueError, {"smoothing": 0.1}, "with smoothing or all_sums_3D, sums_3D must be given"),
        (
            ValueError,
            {"sums_3D": torch.ones(2, 5).double()},
            r"sums_3D must be torch.float64 of shape \(3, 5\) .* \(2, 5\)",
        ),
        (
            ValueError,
            {"column_N": torch.ones(3).double()},
            r"column_N must be torch.float64 of shape \(7,\) .* \(3,\)",
        ),
        (ValueError, {"weights_N": torch.ones(3)}, r"weights_N must be floating of shape \(7,\) .* \(3,\)"),
        (ValueError, {"row_M": torch.ones(3).double()}, "without groups, .* got 3 rows and 7 texts"),
    ],
)
def test_wrong_arguments_are_named(
    kernel_device: torch.device, error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    names = ("row_M", "column_N", "dot_N", "scale")
    arguments = dict(zip(names, (x.detach() for x in inputs(CLIPS)), strict=True)) | changes
    arguments = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        softmax_loss(**arguments)
    if set(changes) <= {"dot_N", "scale", "bias", "smoothing", "sums_3D"}:  # both kinds check these
        del arguments["column_N"]
        with pytest.raises(error, match=message):
            sigmoid_loss(**{"bias": arguments["scale"]} | arguments)


def test_the_operators_are_registered_correctly(kernel_device: torch.device) -> None:
    row_M, column_N, dot_N, scale = (x.to(kernel_device).detach() for x in inputs(4, torch.float32))
    groups = group_by_owner(torch.arange(4, device=kernel_device), CLIPS)[:2]
    *slopes, partial = softmax_terms(row_M, column_N, dot_N, scale, None, *groups, False, 0.0)
    total = (partial, None, None, None, scale, scale, CLIPS, 1, CLIPS, 4, False, 0.0, torch.float32)
    torch.library.opcheck(kernels._loss_total, total, test_utils=("test_schema", "test_faketensor"))
    factors = kernels._loss_total(*total)[1]
    last = (scale, factors, scale, slopes, None, None, None, CLIPS, CLIPS, 4, False, 0.0)
    torch.library.opcheck(kernels._loss_slopes, last, test_utils=("test_schema", "test_faketensor"))


def test_every_variant_compiles_without_a_spill() -> None:
    """Another process compiles, because this one may interpret kernels."""
    script = Path(__file__).parent / "loss_launches.py"
    settings = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    names = [variant["kernel"] for variant in variants]
    assert set(names) == {name for module in MODULES for name in module.KERNELS}
    assert names.count("softmax_terms") >= 4
    for variant in variants:
        assert variant["spills"] == variant["atomics"] == 0, variant
        # Triton would round a number to float32, and compiling it in would take a binary for each value.
        is_smoothed = variant["kernel"] in (*loss_terms.KERNELS, *kernels.KERNELS)
        assert variant["smoothing"] == ("fp64" if is_smoothed else None), variant
