"""The loss with kernels for positive pairs equals its dense definition, however the problem is stated."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numerics import assert_agrees, assert_as_exact, norm
from sample_data import unit
from torch import Tensor

from clsp_fast.contrastive import positives, triton_positives
from clsp_fast.contrastive.problem import Kind, check_problem
from clsp_fast.loss import contrastive_loss, contrastive_loss_reference

# Triton's interpreter computes with numpy, which warns about infinities that the kernels intend.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CLIPS = 9


def problems() -> dict[str, dict[str, Any]]:
    """Options of the loss. Without owners, text j describes audio j."""
    shuffled = torch.tensor([7, 0, 3, 0, 8, 7, 7, 1, 0, 5, 4, 0])
    weights = torch.tensor([0.0, 1, 2, 1e-9, 0, 3, 1, 1, 0, 2, 1, 1e6])
    return {
        "one each": {},
        "shuffled": {"text_owner": shuffled},
        "in order": {"text_owner": shuffled.sort()[0]},
        "many captions of one clip": {"text_owner": torch.full((12,), 4)},
        "one text": {"text_owner": torch.tensor([2])},
        "fewer texts": {"text_owner": torch.arange(4)},
        "weights": {"text_owner": shuffled, "weights": weights},
        "weights of single captions": {"weights": torch.rand(CLIPS)},
        "smoothing": {"text_owner": shuffled, "label_smoothing": 0.1},
        "smoothing and weights": {"text_owner": shuffled, "weights": weights, "label_smoothing": 0.1},
        "rows of any length": {"text_owner": shuffled, "normalize": True},
        "all at once": {
            "text_owner": shuffled,
            "weights": weights,
            "label_smoothing": 0.1,
            "normalize": True,
        },
        "sigmoid": {"kind": "sigmoid", "logit_bias": -2.0},
        "sigmoid, shuffled, smoothing": {
            "kind": "sigmoid",
            "text_owner": shuffled,
            "logit_bias": -2.0,
            "label_smoothing": 0.1,
            "normalize": True,
        },
    }


def results(
    audio: Tensor, text: Tensor, scale: Tensor, options: dict[str, Any], name: str, dtype: torch.dtype | None
) -> list[Tensor]:
    """Loss and gradients, with the embeddings converted to `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (audio, text, scale)]
    loss = contrastive_loss(*leaves, implementation=name, compute_dtype=torch.float32, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", problems())
def test_equals_the_dense_definition(kernel_device: torch.device, name: str, dtype: torch.dtype) -> None:
    options = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in problems()[name].items()}
    texts = len(options.get("text_owner", torch.empty(CLIPS)))
    size = 3 if "normalize" in options else 1
    audio, text = ((size * unit(n, 24)).to(kernel_device, dtype) for n in (CLIPS, texts))
    scale = torch.tensor(8.0, device=kernel_device)
    result = results(audio, text, scale, options, "triton", None)
    truth = results(audio, text, scale, options, "reference", torch.float64)
    # Of 16-bit embeddings, plain torch with float32 copies is the yardstick: products and sums are float32.
    plain = results(audio.float(), text.float(), scale, options, "reference", None)
    gradient = norm([norm(x) for x in truth[1:]])
    for value, rounded, exact in zip(result, plain, truth, strict=True):
        assert_as_exact(
            value, rounded, exact, dtype=value.dtype, size=norm(exact) if value is result[0] else gradient
        )


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("module", [positives, triton_positives])
def test_only_the_sigmoid_kind_has_a_bias(
    kernel_device: torch.device, module: ModuleType, kind: Kind
) -> None:
    audio = unit(CLIPS, 8).to(kernel_device, torch.float32)
    bias = torch.tensor(-3.0, device=kernel_device)
    for logit_bias in (None, bias):
        problem = check_problem(
            audio,
            audio,
            5.0,
            text_owner=None,
            weights=None,
            logit_bias=logit_bias,
            label_smoothing=0.0,
            kind=kind,
            normalize=False,
            group=None,
        )
        pairs = module.make_pairs(problem)[0]
        if kind == "softmax":
            assert pairs.bias is None
        else:
            assert pairs.bias == (0 if logit_bias is None else bias)


def test_a_bias_that_cancels_gets_the_gradient_zero(kernel_device: torch.device) -> None:
    audio = unit(CLIPS, 8).to(kernel_device, torch.float32)
    bias = torch.tensor(-3.0, device=kernel_device, requires_grad=True)
    loss = contrastive_loss(audio, audio, 5.0, logit_bias=bias, implementation="triton")
    assert torch.autograd.grad(loss, bias)[0] == 0


def test_owners_and_weights_may_have_gaps(kernel_device: torch.device) -> None:
    audio, text = (unit(n, 24).to(kernel_device, torch.float32) for n in (CLIPS, 12))
    owner = torch.randint(CLIPS, (12, 2), device=kernel_device)[:, 0]
    options = {"text_owner": owner, "weights": torch.rand(24, device=kernel_device)[::2]}
    scale = torch.tensor(8.0, device=kernel_device)
    result = results(audio, text, scale, options, "triton", None)
    options = {name: x.contiguous() for name, x in options.items()}
    expected = results(audio, text, scale, options, "triton", None)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_weights_may_learn(kernel_device: torch.device) -> None:
    owner = torch.tensor([0, 0, 2, 1, 2], device=kernel_device)
    audio, text = (unit(n, 8).to(kernel_device, torch.float32) for n in (3, 5))
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0, 0.5], device=kernel_device, requires_grad=True)
    options = {"text_owner": owner, "weights": weights, "label_smoothing": 0.1}
    (result,) = torch.autograd.grad(
        contrastive_loss(audio, text, 9.0, implementation="triton", **options), weights
    )
    exact = contrastive_loss_reference(audio.double(), text.double(), 9.0, **options)
    assert_agrees(result, torch.autograd.grad(exact, weights)[0], count=100, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_owner": torch.tensor([0, 1, 3])}, r"text_owner must lie in 0\.\.2"),
        ({"text_owner": torch.tensor([0, -1, 2])}, r"text_owner must lie in 0\.\.2"),
        ({"weights": torch.tensor([1.0, float("nan"), 0.0])}, "weights must be finite and not negative"),
        ({"weights": torch.tensor([1.0, -1.0, 0.0])}, "weights must be finite and not negative"),
    ],
)
def test_wrong_owners_and_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Tensor], message: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=message):
        contrastive_loss(x, x, 1.0, implementation="triton", **options)


def test_rows_that_are_too_long_for_the_kernels_are_computed_by_torch(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, text = (unit(5, 24).to(kernel_device, torch.float32) for _ in range(2))
    scale = torch.tensor(8.0, device=kernel_device)
    expected = results(audio, text, scale, {}, "triton", None)
    called = []

    def make_pairs(problem: Any) -> Any:
        called.append(problem)
        return real(problem)

    real = positives.make_pairs
    monkeypatch.setattr(positives, "make_pairs", make_pairs)
    monkeypatch.setattr(triton_positives._positives, "LARGEST_DEPTH", 23)
    result = results(audio, text, scale, {}, "triton", None)
    assert called
    for value, exact in zip(result, expected, strict=True):
        assert_agrees(value, exact, count=100, dtype=torch.float32, size=1.0)


def test_a_good_model_keeps_its_digits_with_normalized_rows(kernel_device: torch.device) -> None:
    """Products come from the rows before normalisation, so the rounding of unit rows does not reach them."""
    owner = torch.tensor([3, 5, 0, 1, 4, 2])
    audio = 3 * unit(6, 64, dtype=torch.float32)
    text = 0.2 * (F.normalize(audio[owner]) + 0.3 * unit(6, 64, dtype=torch.float32))
    leaves, options = [audio, text, torch.tensor(60.0)], {"normalize": True, "text_owner": owner}
    # Float64 logits would lose the digits of this loss. The code for the CPU does not.
    truth = results(*leaves, options, "cpu", torch.float64)
    assert 0 < truth[0] < 1e-15
    options["text_owner"] = owner.to(kernel_device)
    result = results(*(x.to(kernel_device) for x in leaves), options, "triton", None)
    for value, exact in zip(result, truth, strict=True):
        assert_agrees(value, exact, count=8 + 2 * 60, dtype=torch.float32)


def test_a_group_of_one_changes_nothing(kernel_device: torch.device) -> None:
    options = problems()["all at once"]
    options = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in options.items()}
    audio, text = (unit(n, 24).to(kernel_device, torch.float32) for n in (CLIPS, 12))
    scale = torch.tensor(8.0, device=kernel_device)
    alone = results(audio, text, scale, options, "triton", None)
    backend = "nccl" if kernel_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        grouped = results(audio, text, scale, options | {"group": dist.group.WORLD}, "triton", None)
    finally:
        dist.destroy_process_group()
    for value, exact in zip(grouped, alone, strict=True):
        assert_agrees(value, exact, count=20, dtype=torch.float32, size=1.0)


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    audio, text = (unit(n, 24).to(kernel_device, torch.bfloat16) for n in (CLIPS, 12))
    options = {"text_owner": problems()["shuffled"]["text_owner"].to(kernel_device)}
    scale = torch.tensor(8.0, device=kernel_device)
    first, second = (results(audio, text, scale, options, "triton", None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
