"""The resampler against its definition in float64, and against lhotse's copy of the reference."""

from __future__ import annotations

import math
import warnings
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FEW, assert_agrees, eps
from numpy.typing import NDArray

from clsp_fast import _C
from clsp_fast.audio import resample

RATES_HZ = [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000]


def defined(x: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float64]:
    """The definition in float64, output by output: no phases, no skipped taps, zeros outside."""
    divisor = math.gcd(from_hz, to_hz)
    o, n = from_hz // divisor, to_hz // divisor
    base = min(o, n) * 0.99
    outputs = int((Decimal(len(x) * to_hz) / Decimal(from_hz)).quantize(Decimal(1), ROUND_HALF_UP))
    t = np.clip((np.arange(len(x)) / o - np.arange(outputs)[:, None] / n) * base, -6, 6)
    h = base / o * np.sinc(t) * np.cos(np.pi * t / 12) ** 2
    return h @ x.astype(np.float64)


def roundings(from_hz: int, to_hz: int) -> float:
    """Roundings that add up in a sum over the taps: the root of their number. They span 12 zero crossings."""
    return FEW + (12 * max(1.0, from_hz / to_hz)) ** 0.5


def voice(samples: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    slow = np.sin(np.arange(samples) * 0.013) * 0.5
    return (slow + 0.1 * rng.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_follows_its_definition(rate_hz: int, isa: str) -> None:
    x = voice(1537)
    (y,) = _C.resample_batch([x], from_hz=rate_hz, to_hz=16000, isa=isa)
    truth = defined(x, rate_hz, 16000)
    assert len(y) == len(truth)
    assert np.abs(y - truth).max() <= roundings(rate_hz, 16000) * eps(np.float32) * np.abs(x).max()


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_agrees_with_the_recipe(rate_hz: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from lhotse.augmentation import get_or_create_resampler
    x = voice(rate_hz)
    # The recipe rounds phases, which are as large as the number of outputs in a period, to float32 before it
    # makes the filter.
    phases = 16000 // math.gcd(rate_hz, 16000)
    recipe = get_or_create_resampler(rate_hz, 16000)(torch.from_numpy(x)).numpy()
    y = resample(x, from_hz=rate_hz, to_hz=16000)
    assert_agrees(y, recipe[: len(y)], count=roundings(rate_hz, 16000) + phases, dtype=np.float32)


@settings(max_examples=40, deadline=None)
@given(
    from_hz=st.sampled_from([1000, 7999, 8000, 11025, 12345, 16000, 22050, 44100, 48000, 192000]),
    to_hz=st.sampled_from([1000, 8000, 16000, 16001, 22050, 44100]),
    samples=st.integers(0, 300) | st.integers(300, 4000),
    isa=st.sampled_from(_C.instruction_sets()),
)
def test_any_rates_and_any_length(from_hz: int, to_hz: int, samples: int, isa: str) -> None:
    samples = min(samples, 2000 * from_hz // to_hz)  # the definition is a dense matrix
    x = voice(samples, samples)
    if from_hz == to_hz:
        y = resample(x, from_hz=from_hz, to_hz=to_hz)
    else:
        (y,) = _C.resample_batch([x], from_hz=from_hz, to_hz=to_hz, isa=isa)
    truth = x if from_hz == to_hz else defined(x, from_hz, to_hz)
    assert y.shape == truth.shape
    assert y.dtype == np.float32
    largest = np.abs(x).max(initial=0)
    assert np.abs(y - truth).max(initial=0) <= roundings(from_hz, to_hz) * eps(np.float32) * largest


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(44100, 16000), (22050, 16000), (16000, 44100), (11025, 8000)]
)
def test_length_is_rounded_half_up(from_hz: int, to_hz: int) -> None:
    for samples in [*range(200), 10**9 + 1, 3 * 10**12 + 7]:
        exact = Decimal(samples * to_hz) / Decimal(from_hz)
        assert _C.resampled_size(samples, from_hz, to_hz) == int(exact.quantize(Decimal(1), ROUND_HALF_UP))


def test_constant_keeps_its_level_and_ends_fade_into_zeros() -> None:
    y = resample(np.ones(48000, np.float32), from_hz=48000, to_hz=16000)
    assert np.abs(y[20:-20] - 1).max() < 2e-3  # the reference's filter is not normalised at 0 Hz
    assert abs(y[0] - 1) > 0.1


def test_plans_are_replaced_without_harm() -> None:
    x = voice(500)
    first = resample(x, from_hz=44100, to_hz=16000)
    for rate_hz in range(8001, 8031):
        resample(x, from_hz=rate_hz, to_hz=8000)
    assert np.array_equal(resample(x, from_hz=44100, to_hz=16000), first)


def test_threads_do_not_change_a_bit() -> None:
    batch = [voice(1000 + 331 * i, i) for i in range(9)]
    one = _C.resample_batch(batch, from_hz=44100, to_hz=16000, num_threads=1)
    four = _C.resample_batch(batch, from_hz=44100, to_hz=16000, num_threads=4)
    assert all(np.array_equal(a, b) for a, b in zip(one, four, strict=True))


def test_same_rate_is_a_copy() -> None:
    x = voice(100)
    y = resample(x, from_hz=16000, to_hz=16000)
    assert np.array_equal(x, y)
    assert not np.shares_memory(x, y)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(0, 16000), (16000, 0), (-1, -1), (16000, 1_000_001)])
def test_rates_out_of_range_are_refused(from_hz: int, to_hz: int) -> None:
    with pytest.raises(ValueError, match=r"sample rates must be 1 \.\. 1000000 Hz"):
        resample(voice(10), from_hz=from_hz, to_hz=to_hz)


@pytest.mark.parametrize(
    ("waveform", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "waveform must be a numpy array or torch tensor, got list"),
        (np.zeros(10, np.int16), TypeError, "floating point in .* got int16"),
        (np.zeros((2, 10)), ValueError, r"waveform must have shape \(samples,\), got \(2, 10\)"),
    ],
)
def test_wrong_waveforms_are_named(waveform: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resample(waveform, from_hz=8000, to_hz=16000)
