"""Activations, norm and pooling against recorded values, autograd and plain loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, assert_agrees, eps
from sample_data import Golden
from torch import Tensor

from clsp_fast.towers.layers import (
    BiasNorm,
    downsampled_lengths,
    drop_channels,
    make_ragged,
    pool_mean,
    pool_statistics,
    swoosh_l,
    swoosh_r,
)


@pytest.mark.parametrize(("name", "function"), [("SwooshL", swoosh_l), ("SwooshR", swoosh_r)])
def test_swoosh_and_its_gradient_match_the_recorded_ones(
    golden: Golden, name: str, function: Callable[[Tensor], Tensor]
) -> None:
    unit = {key.rsplit(".", 1)[1]: value for key, value in golden("units").items() if f".{name}." in key}
    keys = ("y", "grad_x", "grad_w", "grad_b")

    def layer(dtype: torch.dtype) -> list[Tensor]:
        inputs = [unit[key].to(dtype).requires_grad_() for key in ("x", "w", "b")]
        output = F.linear(function(inputs[0]), inputs[1], inputs[2])
        return [output, *torch.autograd.grad(output, inputs, unit["grad_out"].to(dtype))]

    for dtype in (torch.float32, torch.float64):  # a swoosh of about 5 operations, and sums of a few terms
        for key, value in zip(keys, layer(dtype), strict=True):
            assert_agrees(value, unit[key], count=2 * FEW, dtype=dtype, name=key)


@pytest.mark.parametrize(("function", "shift"), [(swoosh_l, 4.0), (swoosh_r, 1.0)])
def test_swoosh_is_exact_far_from_zero_and_at_16_bits(
    function: Callable[[Tensor], Tensor], shift: float
) -> None:
    x = torch.tensor([-800.0, -30.0, -1.0, 0.0, 3.99, 19.0, 24.0, 41.0, 900.0], dtype=torch.float64)
    exact = torch.logaddexp(torch.zeros_like(x), x - shift) - 0.08 * x
    offset = exact[3] - function(x)[3]
    # A few roundings of each element, or of its terms, which may be larger: up to the shift.
    rounding = FEW * eps(torch.float64)
    torch.testing.assert_close(function(x), exact - offset, atol=4 * rounding, rtol=rounding)
    half = function(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), function(x.bfloat16().double()), atol=1e-3, rtol=2**-8)
    assert torch.autograd.gradcheck(function, (torch.randn(7, dtype=torch.float64, requires_grad=True) * 5,))


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_swoosh_keeps_only_its_input_and_its_dtype(function: Callable[[Tensor], Tensor]) -> None:
    x, kept = torch.randn(9).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function(x)
    assert [t.dtype for t in kept] == [torch.bfloat16]
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


def test_biasnorm_and_its_gradients_match_the_recorded_ones(golden: Golden) -> None:
    unit = {key.removeprefix("biasnorm."): value for key, value in golden("units").items()}
    norm = BiasNorm(10).double()
    norm.load_state_dict({"bias": unit["bias"], "log_scale": unit["log_scale"]})
    x = unit["x"].clone().requires_grad_()
    y = norm(x)
    assert_agrees(y, unit["y"], count=100)  # a mean of 10 values, a root, a product
    y.backward(unit["grad_out"])
    for gradient, key in (
        (x.grad, "grad_x"),
        (norm.bias.grad, "grad_bias"),
        (norm.log_scale.grad, "grad_log_scale"),
    ):
        assert_agrees(gradient, unit[key], count=1000, name=key)  # and additional sums over all frames


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 7], [7, 7]], ids=str)
def test_pooling_equals_a_loop_over_each_clips_frames(lengths: list[int]) -> None:
    x = torch.randn(len(lengths), max(lengths), 5, dtype=torch.float64)
    lens = torch.tensor(lengths)
    pooled = pool_statistics(x, lens)
    for row, length in enumerate(lengths):
        clip = x[row, :length]
        change = (clip[1:] - clip[:-1]).abs().mean(0) if length > 1 else torch.zeros(5, dtype=torch.float64)
        halves = clip[length // 2 :].mean(0) - clip[: (length + 1) // 2].mean(0)
        deviation = (clip.var(0, unbiased=False) + 1e-5).sqrt()
        expected = torch.cat([clip.mean(0), deviation, change, halves])
        assert_agrees(pooled[row], expected, count=100)
    assert_agrees(pool_mean(x, lens), pooled[:, :5], count=FEW)


def test_statistics_of_a_single_frame_have_finite_gradients() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    pool_statistics(x, torch.tensor([1, 3])).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad[0, 1:] == 0).all())


def test_statistics_keep_their_digits_under_autocast() -> None:
    x = torch.randn(2, 50, 4) * 0.01 + 3
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_statistics(x, torch.tensor([50, 31]))
    assert torch.equal(pooled, pool_statistics(x, torch.tensor([50, 31])))


def test_ragged_marks_a_group_as_padding_by_its_first_frame() -> None:
    ragged = make_ragged(torch.tensor([7, 1, 6]), 7, alone=True).downsampled(3)
    assert ragged.lengths_N.tolist() == [3, 1, 2]
    assert ragged.pad_NT.tolist() == [[False] * 3, [False, True, True], [False, False, True]]
    assert downsampled_lengths(torch.tensor([8, 9, 1]), 8).tolist() == [1, 2, 1]


def test_channel_dropout_is_constant_in_time_and_keeps_the_mean() -> None:
    x = torch.ones(300, 4, 20)
    dropped = drop_channels(x, 0.25, training=True)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert drop_channels(x, 0.25, training=False) is x
