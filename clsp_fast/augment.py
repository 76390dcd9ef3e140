"""Log-mel augmentation: what microphones, rooms and codecs do to speech, applied to features.

A file of its own because it is neither reading (data.py) nor the frontend's definition (features.py). It
lets a small synthetic corpus transfer to recordings: equaliser, noise floor and band limit are what its
engines lack.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_KNOTS = 6
_BAND_LIMIT_SHARE = 0.3
_BAND_LIMIT_BINS = (0.55, 0.9)
_BAND_LIMIT_DROP = 10.0
_NOISE_DOWN_DB = (13.0, 60.0)
_SILENCE = math.log(torch.finfo(torch.float32).eps)


def augment(features_BTF: Tensor, lengths_B: Tensor, *, strength: float, seed: tuple[int, ...]) -> Tensor:
    """Random equaliser, level, noise floor and band limit, each clip its own.

    Args:
        features_BTF: float32 (B, T, F), natural-log mel energies.
        lengths_B: int64 (B,), valid frames.
        strength: scales the equaliser and the level; a clip gets noise with probability min(strength, 1)
        and a
            band limit with 0.3 times that. 0 returns the input.
        seed: non-negative integers that determine every draw.

    Returns:
        A new tensor of the same shape; padding frames are as they were.
    """
    if strength == 0:
        return features_BTF
    batch, frames, bins = features_BTF.shape
    random = np.random.default_rng(seed)
    gain_BF, floor_BF = _draw(random, batch, bins, strength)
    valid_BT1 = (torch.arange(frames) < lengths_B[:, None])[:, :, None]
    shaped_BTF = features_BTF + gain_BF[:, None, :]
    peak_B11 = shaped_BTF.masked_fill(~valid_BT1, -torch.inf).amax((1, 2), keepdim=True)
    # The larger of speech and noise stands for their sum: within 0.7 nats, at a tenth of the cost.
    shaped_BTF = torch.maximum(shaped_BTF, (peak_B11 + floor_BF[:, None, :]).clamp(min=_SILENCE))
    return torch.where(valid_BT1, shaped_BTF, features_BTF)


def _draw(random: np.random.Generator, batch: int, bins: int, strength: float) -> tuple[Tensor, Tensor]:
    """Gain in nats (B, F), and noise floor in nats relative to the clip's peak (B, F), -inf without noise."""
    knots = torch.from_numpy(random.normal(0, strength, (batch, 1, _KNOTS)).astype(np.float32))
    level = torch.from_numpy(random.normal(0, strength / 2, (batch, 1)).astype(np.float32))
    gain_BF = F.interpolate(knots, size=bins, mode="linear", align_corners=True)[:, 0] + level
    share = min(strength, 1.0)
    cut = random.uniform(*_BAND_LIMIT_BINS, batch) * bins
    cut[random.random(batch) >= share * _BAND_LIMIT_SHARE] = bins
    above_BF = torch.arange(bins) >= torch.from_numpy(cut)[:, None]
    down = random.uniform(*_NOISE_DOWN_DB, batch) * (math.log(10) / 10)
    down[random.random(batch) >= share] = np.inf
    tilt = random.normal(0, 1, (batch, 1)) * np.linspace(-1, 1, bins)
    floor_BF = torch.from_numpy((tilt - down[:, None]).astype(np.float32))
    return gain_BF - _BAND_LIMIT_DROP * above_BF, floor_BF.masked_fill(above_BF, -torch.inf)
