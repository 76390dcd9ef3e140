"""Every way of stating a contrastive problem keeps the digits of its loss and gradients, however good the
model is (docs/derivation.md, sections 2 and 5). The truth has 60 decimal digits for small batches, and is in
float64 for losses that float64 can represent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from exact_loss import exact_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FEW, assert_agrees, eps
from sample_data import unit
from torch import Tensor

from clsp_fast.loss import contrastive_loss, contrastive_loss_reference, hard_negative_loss, loss_and_grad

# The largest relative error of float32 gradients that the README promises.
PROMISE = 1e-5
GRADIENTS = ("audio_MD", "text_ND", "logit_scale", "logit_bias")


def texts_at(audio_MD: Tensor, owner_N: Tensor, cosine: float | Tensor) -> Tensor:
    """Unit texts that have the given cosine with the audio they describe."""
    clip_ND, cosine = audio_MD[owner_N], torch.as_tensor(cosine, dtype=torch.float64)
    other_ND = torch.randn_like(clip_ND)
    other_ND = F.normalize(other_ND - (other_ND * clip_ND).sum(1, keepdim=True) * clip_ND, dim=1)
    cosine_N1 = cosine.expand(len(owner_N))[:, None]
    return cosine_N1 * clip_ND + (1 - cosine_N1.square()).sqrt() * other_ND


def error_limit(scale: float) -> float:
    """The largest relative error of a float32 gradient that docs/derivation.md, section 5, allows."""
    return (FEW + 2 * scale) * eps(torch.float32)


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def by_the_formula(audio: Tensor, text: Tensor, scale: float, owner: Tensor, weights: Tensor) -> Tensor:
    """docs/derivation.md, section 1, written with loops."""
    scores = scale * audio @ text.T
    rows = []
    for i in range(len(audio)):
        captions = [j for j in range(len(text)) if owner[j] == i and weights[j] > 0]
        total = sum(weights[j] for j in captions)
        if captions:
            rows.append(
                torch.logsumexp(scores[i], 0) - sum(weights[j] / total * scores[i, j] for j in captions)
            )
    columns = [torch.logsumexp(scores[:, j], 0) - scores[owner[j], j] for j in range(len(text))]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2


@pytest.mark.parametrize("owner", [[0, 0, 0, 2, 3], [4, 1, 1, 0, 2, 3, 3], [1]])
def test_any_number_of_captions_and_weights(owner: list[int]) -> None:
    audio, text = unit(5, 16), unit(len(owner), 16)
    weights = torch.rand(len(owner), dtype=torch.float64)
    if len(owner) > 2:
        weights[1] = 0.0
    owner_N = torch.tensor(owner)
    loss = contrastive_loss(audio, text, 20.0, text_owner=owner_N, weights=weights)
    torch.testing.assert_close(loss, by_the_formula(audio, text, 20.0, owner_N, weights))
    doubled = contrastive_loss(audio, text, 20.0, text_owner=owner_N, weights=2 * weights)
    torch.testing.assert_close(loss, doubled)


def test_one_pair_has_no_loss() -> None:
    audio, text = unit(1, 4).requires_grad_(), unit(1, 4)
    loss = contrastive_loss(audio, text, 10.0)
    loss.backward()
    assert loss == 0
    assert bool((audio.grad == 0).all())


def statements(clips: int) -> dict[str, dict[str, Any]]:
    """The same problem stated in several ways, and problems that differ by a few captions."""
    one, half = torch.arange(clips), torch.arange(clips // 2)
    shuffled, twice = torch.randperm(clips), torch.cat([one, one])
    first_of_two = torch.cat([torch.ones(clips), torch.zeros(clips)])
    return {
        "default": {},
        "owners in order": {"text_owner": one},
        "owners out of order": {"text_owner": shuffled},
        "equal weights": {"weights": torch.full((clips,), 3.0)},
        "any weights of single captions": {"weights": torch.rand(clips) + 0.01},
        "a bias": {"logit_bias": 1000.0},
        "one caption among many clips": {"text_owner": shuffled[:1]},
        "half of the clips": {"text_owner": half},
        "some clips with two, some with none": {"text_owner": torch.cat([one[:-20], half])},
        "two": {"text_owner": twice},
        "two, one without weight": {"text_owner": twice, "weights": first_of_two},
        "two, one with next to no weight": {"text_owner": twice, "weights": first_of_two + 1e-9},
        "three with other weights": {"text_owner": one.repeat(3), "weights": torch.rand(3 * clips)},
        "smoothing": {"text_owner": one, "label_smoothing": 0.1},
        "rows of any length": {"normalize": True},
        "two, rows of any length": {"text_owner": twice, "normalize": True},
        "sigmoid": {"kind": "sigmoid", "text_owner": shuffled, "logit_bias": -10.0},
    }


@pytest.mark.parametrize("cosine", [0.7, 0.8])
@pytest.mark.parametrize("name", statements(40))
def test_a_good_model_keeps_its_gradient_however_the_problem_is_stated(name: str, cosine: float) -> None:
    options = statements(256)[name]
    audio_MD, owner_N = unit(256, 128), options.get("text_owner", torch.arange(256))
    text_ND = texts_at(audio_MD, owner_N, cosine)
    if "normalize" in options:
        audio_MD, text_ND = 2 * audio_MD, 0.3 * text_ND
    check_against_float64(audio_MD, text_ND, 30.0, options)


@pytest.mark.parametrize("scale", [14.0, 30.0, 60.0, 100.0])
@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.8])
def test_the_rounding_of_logits_is_the_limit_at_any_scale(scale: float, cosine: float) -> None:
    """The truth is softplus of float64 sums over negatives only: 1 - probability would lose small losses."""
    for seed in range(6):
        torch.manual_seed(seed)
        audio_MD = unit(64, 128)
        text_ND = texts_at(audio_MD, torch.arange(64), cosine).float()
        x, y = audio_MD.float().double().requires_grad_(), text_ND.double().requires_grad_()
        cosine_MN = x @ y.T
        logits_MN = scale * cosine_MN
        positive_M = logits_MN.diag()
        others_MN = logits_MN.masked_fill(torch.eye(64, dtype=torch.bool), -math.inf)
        loss = sum(F.softplus(others_MN.logsumexp(axis) - positive_M).mean() for axis in (0, 1)) / 2
        by_audio, by_text, by_logit = torch.autograd.grad(loss, (x, y, logits_MN))
        result = loss_and_grad(audio_MD.float(), text_ND, scale)
        assert relative(result.loss, loss.detach()) <= error_limit(scale), seed
        assert relative(result.audio_MD, by_audio) <= error_limit(scale), seed
        assert relative(result.text_ND, by_text) <= error_limit(scale), seed
        terms_MN = by_logit * cosine_MN.detach()  # terms of both signs
        error = abs(float(result.logit_scale.double() - terms_MN.sum()))
        assert error <= error_limit(scale) * float(terms_MN.abs().sum()), seed


def check_against_float64(audio_MD: Tensor, text_ND: Tensor, scale: float, options: dict[str, Any]) -> None:
    audio_MD, text_ND = audio_MD.float(), text_ND.float()
    leaves = [audio_MD.double(), text_ND.double(), torch.tensor(scale, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in leaves]
    loss = contrastive_loss_reference(*leaves, **options)
    truth, loss = torch.autograd.grad(loss, leaves), loss.detach()
    result = loss_and_grad(audio_MD, text_ND, scale, **options)
    # Float64 itself rounds logits of 30 by up to 7e-15.
    assert relative(result.loss, loss) <= error_limit(scale) + 1e-14 / float(loss)
    for name, gradient in zip(GRADIENTS[:3], truth, strict=True):
        assert relative(getattr(result, name), gradient) <= error_limit(scale), name


@pytest.mark.parametrize("clips", [300, 1500])
@pytest.mark.parametrize("statement", ["owners in order", "equal weights", "a bias"])
def test_the_same_problem_has_the_same_bits(statement: str, clips: int) -> None:
    audio_MD = unit(clips, 40)
    text_ND = texts_at(audio_MD, torch.arange(clips), 0.8).float()
    expected, result = (
        loss_and_grad(audio_MD.float(), text_ND, 30.0, **statements(clips)[name])
        for name in ("default", statement)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected[:4], result[:4], strict=True))
    assert result.logit_bias is None or result.logit_bias == 0


@st.composite
def problems(draw: Callable[..., Any]) -> tuple[Tensor, Tensor, float, dict[str, Any]]:
    """Audio, texts, scale and options of a small batch. Cosines of pairs are equal or not, of either sign."""
    clips, texts, depth = (
        draw(st.integers(1, 8)),
        draw(st.integers(1, 10)),
        draw(st.sampled_from([3, 16, 40])),
    )
    torch.manual_seed(draw(st.integers(0, 2**31)))
    owner_N = torch.tensor(draw(st.lists(st.integers(0, clips - 1), min_size=texts, max_size=texts)))
    low = draw(st.sampled_from([-0.9, 0.5, 0.8]))
    spread_N = torch.rand(texts) if draw(st.booleans()) else torch.zeros(texts)
    audio_MD = unit(clips, depth)
    text_ND = texts_at(audio_MD, owner_N, low + (0.95 - low) * spread_N.double())
    options: dict[str, Any] = {"text_owner": owner_N}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1]))
    if draw(st.integers(0, 3)) == 0:
        options |= {"kind": "sigmoid", "logit_bias": draw(st.sampled_from([-10.0, 0.0, 3.0]))}
    else:
        values = draw(st.sampled_from([None, [2.0], [0.0, 1.0, 2.0], [1e-9, 1e-3, 1.0]]))
        if values is not None:
            options["weights"] = torch.tensor(values)[torch.randint(len(values), (texts,))]
    return audio_MD.float(), text_ND.float(), draw(st.sampled_from([1.0, 14.0, 30.0, 60.0, 100.0])), options


@settings(max_examples=60, deadline=None)
@given(problems())
def test_any_problem_keeps_its_digits(problem: tuple[Tensor, Tensor, float, dict[str, Any]]) -> None:
    """A gradient errs by at most `error_limit` times the size of the terms that add up to it: a sum of terms
    of opposite sign is no more exact than its terms. The loss errs by at most `error_limit` times the loss.
    Float32 has no normal numbers for the gradients of a loss below 1e-30."""
    audio_MD, text_ND, scale, options = problem
    exact = exact_loss(audio_MD, text_ND, scale, **options)
    result = loss_and_grad(audio_MD, text_ND, scale, **{"logit_bias": 0.0, **options})
    subnormal = float(exact.loss) < 1e-30
    assert subnormal or relative(result.loss, exact.loss) <= error_limit(scale)
    for name, terms in zip(GRADIENTS, exact.terms, strict=True):
        gradient, truth = getattr(result, name), getattr(exact, name)
        assert bool(gradient.isfinite().all()), name
        error = float((gradient.double() - truth).norm())
        assert subnormal or error <= error_limit(scale) * terms, (name, error / terms)


@pytest.mark.parametrize("loss", [1e-1, 1e-3, 1.8e-5, 3.7e-7, 1e-9, 1e-12, 1e-20, 1e-28])
@pytest.mark.parametrize("owner", [[0, 1, 2, 3, 4, 5], [3, 5, 1, 0, 2, 4], [4, 2], [0, 1, 2, 3, 4, 5, 2, 0]])
def test_a_loss_of_any_size_keeps_its_digits(loss: float, owner: list[int]) -> None:
    # The last two captions of the longest list are copies. Each pair of copies has a loss of about log 2.
    owner_N = torch.tensor(owner)
    audio_MD = torch.eye(6, 8, dtype=torch.float64) + 0.01 * torch.randn(6, 8, dtype=torch.float64)
    text_ND = (audio_MD[owner_N] + 0.01 * torch.randn(len(owner), 8, dtype=torch.float64)).float()
    text_ND[6:] = text_ND[[2, 0][: max(0, len(owner) - 6)]]
    scale = math.log(5 / loss)
    exact = exact_loss(audio_MD.float(), text_ND, scale, text_owner=owner_N)
    for weights in (None, torch.full((len(owner),), 0.7)):
        result = loss_and_grad(audio_MD.float(), text_ND, scale, text_owner=owner_N, weights=weights)
        assert relative(result.loss, exact.loss) <= error_limit(scale)
        for name in GRADIENTS[:3]:
            assert relative(getattr(result, name), getattr(exact, name)) <= error_limit(scale), name


def test_weights_have_the_gradient_of_the_definition() -> None:
    audio_MD, text_ND = unit(5, 8), unit(8, 8)
    owner_N = torch.tensor([0, 0, 0, 2, 3, 3, 0, 2])
    for weights in ([1, 2, 0.5, 1e-9, 1, 1, 0.3, 2], [0, 2, 0.5, 0, 1, 1, 0.3, 2]):
        weight_N = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        gradient, expected = (
            torch.autograd.grad(
                contrastive_loss(
                    audio_MD, text_ND, 9.0, text_owner=owner_N, weights=weight_N, implementation=name
                ),
                weight_N,
            )
            for name in ("cpu", "reference")
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_group_of_one_keeps_the_digits() -> None:
    audio_MD, owner_N = unit(60, 128), torch.cat([torch.arange(60), torch.arange(20)])
    text_ND = texts_at(audio_MD, owner_N, 0.8).float()
    alone = loss_and_grad(audio_MD.float(), text_ND, 30.0, text_owner=owner_N)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = {"text_owner": owner_N, "group": dist.group.WORLD}
        grouped = loss_and_grad(audio_MD.float(), text_ND, 30.0, **options)
    finally:
        dist.destroy_process_group()
    for a, b in zip(alone[:4], grouped[:4], strict=True):
        assert relative(a, b.double()) <= error_limit(30.0)


@pytest.mark.parametrize("scale", [5.0, 30.0, 60.0])
def test_near_misses_keep_their_gradient(scale: float) -> None:
    audio_BD = unit(16, 64)
    text_BKD = torch.stack([texts_at(audio_BD, torch.arange(16), c) for c in (0.9, 0.2, -0.3)], 1)
    inputs = [audio_BD.float(), text_BKD.float(), torch.tensor(scale)]
    results, truth = [], []
    for dtype, out in ((torch.float32, results), (torch.float64, truth)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out += torch.autograd.grad(hard_negative_loss(*leaves), leaves)
    for a, b in zip(results, truth, strict=True):
        assert relative(a, b) <= error_limit(scale)


# Triton's interpreter computes with numpy, which warns about infinities that the kernels intend.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text_owner": torch.arange(60)},
        {"weights": torch.full((60,), 2.0)},
        {"text_owner": torch.arange(59, -1, -1)},
        {"text_owner": torch.tensor([7])},
        {"text_owner": torch.arange(80) % 60},
        {"text_owner": torch.arange(80) % 60, "weights": (torch.arange(80) < 60).float()},
        {"text_owner": torch.arange(30), "kind": "sigmoid", "logit_bias": -10.0},
    ],
    ids=["default", "owners", "weights", "permuted", "one", "some two", "no weight", "sigmoid"],
)
@pytest.mark.parametrize("cosine", [0.6, 0.8])
def test_kernels_keep_the_gradient_however_the_problem_is_stated(
    kernel_device: torch.device, options: dict, cosine: float
) -> None:
    audio = unit(60, 128)
    text = texts_at(audio, options.get("text_owner", torch.arange(60)), cosine)
    inputs = [x.float().to(kernel_device) for x in (audio, text, torch.tensor(30.0))]
    options = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in options.items()}
    leaves = [x.double().requires_grad_() for x in inputs]
    truth = torch.autograd.grad(contrastive_loss_reference(*leaves, **options), leaves)
    result = loss_and_grad(*inputs, implementation="triton", **options)
    for gradient, true in zip(result[1:4], truth, strict=True):
        assert (gradient.double() - true).norm() <= error_limit(30.0) * true.norm()


def aligned(noise: float, scale: float, batch: int = 512, dim: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 embeddings and the scale; the smaller the noise, the better the model that they stand for."""
    audio = unit(batch, dim, dtype=torch.float32)
    text = F.normalize(audio + noise * torch.randn(batch, dim), dim=1)
    return audio.bfloat16(), text.bfloat16(), torch.tensor(scale)


def exact(audio: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Loss and gradient by audio, computed in float64 from the inputs, and the mean probability p_ii."""
    leaf = audio.double().requires_grad_()
    scores = scale.double() * leaf @ text.double().T
    loss = (
        F.cross_entropy(scores, torch.arange(len(audio)))
        + F.cross_entropy(scores.T, torch.arange(len(audio)))
    ) / 2
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, float(scores.detach().softmax(1).diag().mean())


def rounded_then_subtracted(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Gradient by audio from probabilities that are rounded to bfloat16 before 1 is subtracted."""
    scores = scale * audio.float() @ text.float().T
    rounded = ((scores.softmax(1) + scores.softmax(0)) * scale / (2 * len(audio))).bfloat16()
    return rounded.float() @ text.float() - scale / len(audio) * text.float()


@pytest.mark.parametrize(
    ("noise", "scale", "low", "high"),
    [(0.16, 14.0, 0.15, 0.3), (0.12, 14.0, 0.4, 0.6), (0.06, 14.0, 0.95, 0.98), (0.07, 20.0, 0.995, 0.999)],
)
def test_a_good_model_keeps_its_gradient(noise: float, scale: float, low: float, high: float) -> None:
    audio, text, scale_ = aligned(noise, scale)
    loss, gradient, probability = exact(audio, text, scale_)
    assert low < probability < high
    wide = loss_and_grad(audio.float(), text.float(), scale_)
    assert_agrees(wide.loss, loss, count=FEW + scale, dtype=torch.float32)
    assert relative(wide.audio_MD, gradient) < PROMISE
    narrow = loss_and_grad(audio, text, scale_)
    assert_agrees(narrow.loss, loss, count=FEW + scale, dtype=torch.float32)
    # Rounding the result to bfloat16 is no error of the loss. An error of PROMISE before the rounding moves a
    # share of at most 2 PROMISE / step of the elements to the neighbouring bfloat16, one step away.
    step = torch.finfo(torch.bfloat16).eps / 2
    assert relative(narrow.audio_MD, gradient.bfloat16().double()) < step * (2 * PROMISE / step) ** 0.5
    if probability > 0.9:
        assert relative(rounded_then_subtracted(audio, text, scale_), gradient) > 3e-3


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_kernels_keep_the_gradient_of_a_good_model(kernel_device: torch.device) -> None:
    audio, text, scale = (x.to(kernel_device) for x in aligned(0.06, 14.0, batch=64, dim=128))
    _, gradient, probability = exact(audio, text, scale)
    assert probability > 0.9
    result = loss_and_grad(audio, text, scale, implementation="triton")
    assert result.audio_MD.dtype == torch.bfloat16
    # The result is rounded once, at the end. Rounding G to bfloat16 costs 1e-3 of the negatives' part.
    assert relative(result.audio_MD, gradient) < torch.finfo(torch.bfloat16).eps / 2
    assert relative(rounded_then_subtracted(audio, text, scale), gradient) > 6e-3


def test_a_tiny_loss_keeps_its_digits() -> None:
    audio = torch.eye(64).double() * 0.5
    loss = contrastive_loss(audio.float(), audio.float(), 100.0)
    truth = contrastive_loss_reference(audio, audio, 100.0)
    assert 0 < truth < 1e-8
    assert_agrees(loss, math.log1p(63 * math.exp(-25.0)), count=FEW, dtype=torch.float32)  # logits are exact
    # Float32 logits and log-softmax lose all digits of this loss.
    assert contrastive_loss_reference(audio.float(), audio.float(), 100.0) == 0


def test_small_hard_negative_losses_keep_their_digits() -> None:
    audio = torch.eye(8, dtype=torch.float64)
    text = torch.stack([audio, audio.roll(1, 0)], 1)
    result = hard_negative_loss(audio.float(), text.float(), 30.0)
    assert_agrees(result, math.log1p(math.exp(-30.0)), count=FEW, dtype=torch.float32)  # logits are exact


def test_no_sum_underflows_at_the_largest_scale() -> None:
    audio, text = unit(256, 512, dtype=torch.float32), unit(256, 512, dtype=torch.float32)
    # Some kernels subtract a fixed maximum, 1 / temperature, instead of a peak that they search. Where
    # hardware flushes subnormal numbers, that loses whole rows.
    fixed = torch.exp(100.0 * (audio @ text.T - 1))
    flushed = torch.where(fixed < torch.finfo(torch.float32).tiny, 0.0, fixed)
    assert float((flushed.sum(1) == 0).float().mean()) > 0.3
    result = loss_and_grad(audio, text, 100.0)
    loss, gradient, _ = exact(audio, text, torch.tensor(100.0))
    assert_agrees(result.loss, loss, count=FEW + 100, dtype=torch.float32)
    assert relative(result.audio_MD, gradient) < PROMISE


def test_only_the_ratios_of_weights_matter() -> None:
    audio, text = unit(3, 8, dtype=torch.float32), unit(6, 8, dtype=torch.float32)
    owner = torch.arange(6) % 3
    shares = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    expected = contrastive_loss(audio, text, 10.0, text_owner=owner, weights=shares)
    for size in (1e300, 1e-46):
        scaled = contrastive_loss(audio, text, 10.0, text_owner=owner, weights=shares * size)
        assert_agrees(scaled, expected, count=FEW, dtype=torch.float32)
