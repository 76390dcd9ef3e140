"""Signal tools of the demo corpus: resampling, pitch, levels, whisper and intonation."""

from __future__ import annotations

import numpy as np
import pytest

from clsp_fast.demo import signal


@pytest.mark.parametrize("ratio", [320 / 441, 2 / 3, 0.87, 1.21])
def test_resample_keeps_a_tone(ratio: float) -> None:
    t = np.arange(9000)
    y = signal.resample(np.sin(2 * np.pi * 0.05 * t), ratio)
    assert len(y) == round(9000 * ratio)
    expected = np.sin(2 * np.pi * 0.05 * np.arange(len(y)) / ratio)
    half_a_sample = np.pi * 0.05 / min(ratio, 1.0)  # the length is a whole number, so the scale is rounded
    assert np.max(np.abs(y - expected)[400:-400]) < half_a_sample + 0.01


@pytest.mark.parametrize("f0_hz", [80.0, 131.0, 290.0])
def test_pitch_is_measured_and_removed(f0_hz: float) -> None:
    t = np.arange(16000) / 16000
    voice = sum(np.cos(2 * np.pi * k * f0_hz * t) / k for k in range(1, int(3000 / f0_hz)))
    x = signal.set_level(np.asarray(voice), -25.0)
    part = signal.measured(x).whole
    assert abs(part.f0_hz / f0_hz - 1) < 0.02
    assert part.f0_sd < 0.2
    assert abs(signal.active_level_db(x) + 25) < 0.2
    whispered = signal.whisper(x, np.random.default_rng(0))
    assert signal.measured(whispered).whole.clear_voice < 0.1
    assert len(whispered) == len(x)
    crept = signal.measured(signal.creak(x, 55.0, np.random.default_rng(0))).whole
    assert crept.creak > 0.7
    assert crept.clear_voice < 0.3
    assert crept.f0_hz < 0.95 * f0_hz


def test_intonation_is_widened_and_flattened() -> None:
    t = np.arange(32000) / 16000
    phase = 2 * np.pi * np.cumsum(150 * 2 ** (2 * np.sin(2 * np.pi * 1.5 * t) / 12)) / 16000
    x = np.asarray(sum(np.cos(k * phase) / k for k in range(1, 15)))
    spreads = [signal.measured(signal.scale_intonation(x, factor)).whole.f0_sd for factor in (0.0, 1.0, 2.0)]
    assert spreads[0] < 0.5 * spreads[1]
    assert spreads[2] > 1.5 * spreads[1]
