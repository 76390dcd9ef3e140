"""Both engines have the two functions of the protocol, with the same signatures, and the right engine is
chosen."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch

from clsp_fast.contrastive import negatives
from clsp_fast.contrastive.engine import Engine, choose_engine
from clsp_fast.kernels import contrastive
from clsp_fast.loss import contrastive_loss

FUNCTIONS = {name for name in vars(Engine) if not name.startswith("_")}


@pytest.mark.parametrize("engine", [negatives, contrastive])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_engines_have_the_signature_of_the_protocol(engine: ModuleType, name: str) -> None:
    (_, *expected) = inspect.signature(getattr(Engine, name)).parameters.values()  # without self
    parameters = inspect.signature(getattr(engine, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == [
        (p.name, p.kind, p.default) for p in expected
    ]


def test_the_protocol_has_two_functions() -> None:
    assert sorted(FUNCTIONS) == ["negative_lse", "negative_softplus"]


# Triton's interpreter computes with numpy, which warns about infinities that the kernels intend.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_engines_give_the_same_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    audio_MD, text_ND, scale = torch.eye(3, 4), torch.eye(3, 4).roll(1, 0), torch.tensor(2.0)
    engine = choose_engine(name, audio_MD)
    assert engine is not None
    row_M, column_N = engine.negative_lse(audio_MD, text_ND, scale, torch.arange(3))
    # Each row and column has two negative pairs, with logits of 2 and 0.
    expected = torch.tensor([2.0, 0.0]).logsumexp(0).expand(3)
    torch.testing.assert_close(row_M, expected)
    torch.testing.assert_close(column_N, expected)
    sums_M = engine.negative_softplus(audio_MD, text_ND, scale, torch.arange(3))
    torch.testing.assert_close(sums_M, torch.tensor([2.0, 0.0]).exp().log1p().sum().expand(3))


@pytest.mark.parametrize(
    ("name", "dtype", "engine"),
    [
        ("auto", torch.bfloat16, negatives),
        ("auto", torch.float64, negatives),
        ("cpu", torch.float32, negatives),
        ("reference", torch.float32, None),
    ],
)
def test_the_engine_of_the_cpu_is_chosen(name: str, dtype: torch.dtype, engine: ModuleType | None) -> None:
    assert choose_engine(name, torch.zeros(2, 3, dtype=dtype)) is engine


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be at least 0"),
        ({"workspace_bytes": "1GB"}, TypeError, "workspace_bytes must be a whole number"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be bfloat16, float16 or float32"),
        ({"compute_dtype": torch.float64}, TypeError, "or float32, got torch.float64"),
    ],
)
def test_options_are_checked_on_every_device(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        contrastive_loss(torch.eye(2), torch.eye(2), 1.0, **options)
