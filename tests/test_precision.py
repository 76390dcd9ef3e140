"""TF32 is used only where a run or command asks for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from numerics import FEW, assert_agrees, eps, error, norm
from torch.utils._python_dispatch import TorchDispatchMode

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
    message = 'precision must be "fp32", "tf32" or "bf16", got \'bf17\''
    with pytest.raises(ValueError, match=message), precision.products("bf17"):
        pass


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


@pytest.mark.parametrize("name", ["tf32", "fp32"])
def test_statistics_are_exact_whatever_the_setting(each_device: torch.device, name: str) -> None:
    """The deviation is a thirtieth of the mean. TF32 would round 1/50 and 1/31 by 2e-4 of their value. That
    changes the variance, of 0.01, by 2e-3."""
    x, lengths = torch.randn(3, 50, 4) * 0.1 + 3, torch.tensor([50, 31, 20])
    truth = layers.pool_statistics(x.double(), lengths)
    with precision.products(name):
        result = layers.pool_statistics(x.to(each_device), lengths.to(each_device)).cpu()
    mean, deviation = truth[:, :4], truth[:, 4:8]
    assert_agrees(result[:, :4], mean, count=50, dtype=torch.float32)
    # The variance is the difference of the power and the squared mean: 150 roundings of values of about 9. An
    # error of the variance is divided by twice the deviation.
    assert error(result[:, 4:8], deviation) <= norm(
        150 * eps(torch.float32) * mean.square() / (2 * deviation)
    )


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_product_without_tf32_needs_no_matrix_product_in_either_pass() -> None:
    weights, x = torch.rand(2, 3, 9), torch.randn(2, 9, 4, requires_grad=True)
    grad = torch.randn(2, 3, 4)
    with Operations() as operations:
        product = layers.products_without_tf32(weights, x)
        product.backward(grad)
    assert "aten::mul" in operations.names
    assert not operations.names & {"aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm"}
    assert_agrees(
        product.detach(), weights.double() @ x.detach().double(), count=FEW * 9, dtype=torch.float32
    )
    assert_agrees(x.grad, weights.double().mT @ grad.double(), count=FEW * 9, dtype=torch.float32)


def test_pooling_reads_and_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that a forward pass changes for a while is wrong in other threads, in the backward pass and
    in a compiled function."""
    changes: list[str] = []
    monkeypatch.setattr(precision, "products", changes.append)
    x, lengths = torch.randn(2, 9, 4), torch.tensor([9, 5])
    compiled = torch.compile(layers.pool_statistics, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, lengths), layers.pool_statistics(x, lengths))
    assert not changes


def test_older_settings_of_tf32_raise_in_its_context() -> None:
    """As the docstring says."""
    with precision.products("tf32"):
        for read in (
            lambda: torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision,
        ):
            with pytest.raises(RuntimeError, match="torch"):
                read()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
