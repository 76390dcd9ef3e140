"""Log-mel augmentation: what microphones, rooms and codecs do to speech, applied to features.

The output of speech synthesisers has no equaliser, noise floor or band limit. With this augmentation, a model
that is trained on a small synthetic corpus also works on real recordings.

The code is numpy because it runs in the loader's thread. There, torch would start a second team of threads,
which would spin on the cores that training uses and nearly double the time of a step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]

_KNOTS = 6
_BAND_LIMIT_PROBABILITY = 0.3
_BAND_LIMIT_BINS = (0.55, 0.9)
_BAND_LIMIT_DROP = 10.0
_NOISE_BELOW_PEAK_DB = (13.0, 60.0)
_SILENCE = math.log(torch.finfo(torch.float32).eps)


def augment(features_BTF: Tensor, lengths_B: Tensor, *, strength: float, seed: tuple[int, ...]) -> Tensor:
    """Random equaliser, level, noise floor and band limit, drawn for each clip.

    Args:
        features_BTF: float32 (B, T, F), natural-log mel energies.
        lengths_B: int64 (B,), valid frames.
        strength: scales the equaliser and the level. A clip gets noise with probability min(strength, 1),
            and a band limit with 0.3 times this probability. 0: the input is returned.
        seed: non-negative integers that determine every draw.

    Returns:
        A new tensor of the same shape; padding frames are unchanged.
    """
    if strength == 0 or features_BTF.numel() == 0:
        return features_BTF
    x_BTF = features_BTF.numpy()
    batch, frames, bins = x_BTF.shape
    gain_BF, floor_BF = _draw(np.random.default_rng(seed), batch, bins, strength)
    shaped_BTF = x_BTF + gain_BF[:, None, :]
    pad_BT = np.arange(frames) >= lengths_B.numpy()[:, None]
    peak_B = np.where(pad_BT, -np.inf, shaped_BTF.max(2)).max(1)
    # The maximum of two log energies is within 0.7 nats of the log of their sum, at a tenth of the cost.
    floor_BF = np.maximum(peak_B[:, None] + floor_BF, _SILENCE, dtype=np.float32)
    np.maximum(shaped_BTF, floor_BF[:, None, :], out=shaped_BTF)
    shaped_BTF[pad_BT] = x_BTF[pad_BT]
    return torch.from_numpy(shaped_BTF)


def _draw(random: np.random.Generator, batch: int, bins: int, strength: float) -> tuple[Array, Array]:
    """Gain in nats (B, F), and noise floor in nats relative to the clip's peak (B, F); -inf: no noise."""
    knots = random.normal(0, strength, (batch, _KNOTS))
    level = random.normal(0, strength / 2, (batch, 1))
    # Each row is a hat function, so knots @ hats interpolates linearly between the knots.
    hats = np.array(
        [np.interp(np.linspace(0, _KNOTS - 1, bins), np.arange(_KNOTS), row) for row in np.eye(_KNOTS)]
    )
    probability = min(strength, 1.0)
    cutoff_B = random.uniform(*_BAND_LIMIT_BINS, batch) * bins
    cutoff_B[random.random(batch) >= probability * _BAND_LIMIT_PROBABILITY] = bins
    above_BF = np.arange(bins) >= cutoff_B[:, None]
    below_peak_B = random.uniform(*_NOISE_BELOW_PEAK_DB, batch) * (math.log(10) / 10)
    below_peak_B[random.random(batch) >= probability] = np.inf
    tilt = random.normal(0, 1, (batch, 1)) * np.linspace(-1, 1, bins)
    gain_BF = knots @ hats + level - _BAND_LIMIT_DROP * above_BF
    floor_BF = np.where(above_BF, -np.inf, tilt - below_peak_B[:, None])
    return gain_BF.astype(np.float32), floor_BF.astype(np.float32)
