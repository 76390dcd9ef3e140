"""Log-mel augmentation: repeatable, different for each clip, bounded, without effect on padding."""

from __future__ import annotations

import torch

from clsp_fast.data.augment import augment

LENGTHS = torch.tensor([50, 80, 20, 80])


def features() -> torch.Tensor:
    values = torch.randn(4, 80, 128) * 2 - 6
    for row, length in zip(values, LENGTHS, strict=True):
        row[length:] = -23.0
    return values


def test_repeatable_and_seeded() -> None:
    x = features()
    first, same_seed, other_seed = (augment(x, LENGTHS, strength=1.0, seed=(1, s)) for s in (3, 3, 4))
    assert torch.equal(first, same_seed)
    assert not torch.equal(first, other_seed)
    assert augment(x, LENGTHS, strength=0.0, seed=(1, 3)) is x


def test_padding_is_untouched_and_irrelevant() -> None:
    x = features()
    out = augment(x, LENGTHS, strength=1.0, seed=(7,))
    louder = x.clone()
    for row, longer, length in zip(out, louder, LENGTHS, strict=True):
        assert torch.equal(row[length:], torch.full_like(row[length:], -23.0))
        longer[length:] = 50.0
    changed = augment(louder, LENGTHS, strength=1.0, seed=(7,))
    for row, other, length in zip(out, changed, LENGTHS, strict=True):
        assert torch.equal(row[:length], other[:length])


def test_adds_noise_equaliser_and_band_limit_as_often_as_it_says() -> None:
    count = 600
    x = torch.full((count, 10, 128), -15.0)
    x[:, 5] = 0.0
    lengths = torch.full((count,), 10)
    out = augment(x, lengths, strength=1.0, seed=(2,))
    gain = out[:, 5] - x[:, 5]
    dropped = (gain[:, 120] < -5).float().mean()
    assert 0.2 < dropped < 0.4
    assert 0.7 < gain[:, 10].std() < 1.5
    noisy = (out[:, 0] > -14).any(1).float().mean()
    assert noisy > 0.6
    assert bool(out.isfinite().all())
    assert float(out.min()) >= -15.95
