"""TF32 is used only where a run or command asks for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from clsp_fast import embed, precision
from clsp_fast.config import ModelChoice, TrainConfig
from clsp_fast.embed import EmbedConfig
from clsp_fast.model import CLSP
from clsp_fast.towers import layers


def settings() -> tuple[str, str]:
    """torch's settings for matrix products and convolutions."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(("name", "expected"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_a_context_sets_both_kinds_of_products_and_restores_them(name: str, expected: str) -> None:
    before = settings()
    with precision.products(name):
        assert settings() == (expected, expected)
        with precision.products("fp32"):
            assert settings() == ("ieee", "ieee")
        assert settings() == (expected, expected)
    assert settings() == before
    with pytest.raises(KeyError), precision.products("tf32"):
        raise KeyError
    assert settings() == before


def test_tf32_is_off_unless_it_is_asked_for() -> None:
    assert TrainConfig().precision == ModelChoice().precision == "fp32"
    for config in (TrainConfig(), ModelChoice()):
        assert dataclasses.replace(config, precision="tf32").precision == "tf32"
        with pytest.raises(ValueError, match='precision must be "fp32", "tf32" or "bf16", got \'tf16\''):
            dataclasses.replace(config, precision="tf16")


@pytest.mark.parametrize(("name", "expected"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_a_command_computes_with_its_precision(
    model_folder: Path, make_clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    make_clips(tmp_path / "clips", 2)
    before, seen = settings(), []
    encode = CLSP.encode_frames

    def encode_frames(model: CLSP, *arguments: object, **options: object) -> object:
        seen.append((*settings(), model.dtype))
        return encode(model, *arguments, **options)

    monkeypatch.setattr(CLSP, "encode_frames", encode_frames)
    config = EmbedConfig(
        source=str(tmp_path / "clips"), out=tmp_path / "out", model=str(model_folder), precision=name
    )
    embed.embed(config)
    assert set(seen) == {(expected, expected, torch.float32)}
    assert settings() == before


def test_statistics_are_exact_in_a_run_with_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    product = torch.Tensor.__matmul__

    def matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(settings())
        return product(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    with precision.products("tf32"):
        layers.pool_statistics(torch.randn(2, 9, 4), torch.tensor([9, 5]))
    assert len(seen) == 3
    assert set(seen) == {("ieee", "ieee")}
