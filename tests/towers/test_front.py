"""The convolutional fronts: number of frames, receptive field, and folded standardisation.

test_zipformer.py compares the paper's front with recorded outputs and formulas, as a part of the tower.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numerics import assert_agrees

from clsp_fast.config import ModelConfig
from clsp_fast.towers.front import Conv1dSubsampling, frames_after_front, make_front, standardise
from clsp_fast.towers.layers import make_ragged

PAPER = ModelConfig(feature_dim=20, encoder_dim=(8,), encoder_unmasked_dim=(8,), embed_channels=(2, 3, 5))
CHEAP = replace(PAPER, embed_channels=(6,))


@pytest.mark.parametrize("config", [PAPER, CHEAP], ids=["paper", "cheap"])
def test_fronts_halve_the_frame_rate(config: ModelConfig) -> None:
    front = make_front(config).eval()
    for frames in (9, 10, 11, 12, 61):
        y = front(torch.randn(2, frames, 20), None)
        assert y.shape == (2, frames_after_front(frames), 8)
    assert frames_after_front(torch.tensor([9, 10, 11])).tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("config", "first", "last"), [(PAPER, -6, 14), (CHEAP, 0, 8)], ids=["paper", "cheap"]
)
def test_a_frame_sees_the_documented_input_frames(config: ModelConfig, first: int, last: int) -> None:
    front = make_front(config).eval()
    x = torch.randn(1, 61, 20, requires_grad=True)
    frame = 10
    front(x, None)[0, frame].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(1).nonzero()[:, 0].tolist()
    assert (seen[0], seen[-1]) == (2 * frame + first, 2 * frame + last)


def test_alone_hides_frames_beyond_the_end() -> None:
    front = make_front(PAPER).eval()
    lengths = frames_after_front(torch.tensor([41, 30]))
    x = torch.randn(2, 41, 20)
    ragged = make_ragged(lengths, frames_after_front(41), alone=True)
    y = front(x, ragged)
    x[1, 30:] = 7.0
    assert torch.equal(front(x, ragged)[1, : lengths[1]], y[1, : lengths[1]])
    with_neighbours = make_ragged(lengths, frames_after_front(41), alone=False)
    assert not torch.equal(front(x, with_neighbours)[1, : lengths[1]], y[1, : lengths[1]])


def test_folded_weights_standardise_the_features() -> None:
    front = Conv1dSubsampling(CHEAP).double().eval()
    features = 4 * torch.randn(2, 33, 20, dtype=torch.float64) - 8
    expected = front(standardise(features), None)
    front.fold_standardisation()
    assert_agrees(front(features, None), expected, count=1e4)
