"""The contrastive losses against recorded values of the reference recipe, their formulas, what naive forms
get wrong, and bad input."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, assert_agrees, assert_as_exact, norm
from peak_memory import peak_memory
from torch import Tensor

from clsp_fast.loss import contrastive_loss, contrastive_loss_reference, hard_negative_loss, loss_and_grad

# In float64: sums over up to 128 pairs and 512 dimensions, of terms whose exponents are logits.
SUMS = 1e3
# Of float32 gradients, which the README promises.
PROMISE = 1e-5


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def captions_owner(clips: int, texts: int) -> Tensor:
    return torch.arange(texts) % clips


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("dim", [8, 512])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_equals_the_recipe(golden, task: str, batch: int, dim: int, implementation: str) -> None:
    case = {
        k.rsplit(".", 1)[1]: v
        for k, v in golden("loss").items()
        if k.startswith(f"ws1.{task}.B{batch}.D{dim}.")
    }
    audio, text, scale = (case[k].double().requires_grad_() for k in ("audio", "text", "scale"))
    owner = captions_owner(batch, len(text))
    loss = contrastive_loss(audio, text, scale, text_owner=owner, implementation=implementation)
    loss.backward()
    # The recipe subtracts logits of the scale's size.
    assert_agrees(loss, case["loss"], count=SUMS, size=scale)
    for name, value in (("audio", audio), ("text", text), ("scale", scale)):
        stored = case[f"grad_{name}"]
        count = SUMS if stored.dtype == torch.float64 else 1  # the largest case is stored in float32
        size = norm(scale) if name == "scale" else norm(scale) * len(value) ** -0.5
        size = max(size * SUMS * 2.0**-52, norm(stored)) if count == 1 else size
        assert_agrees(value.grad, stored, count=count, dtype=stored.dtype, size=size, name=name)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_hard_negatives_equal_the_recipe(golden, batch: int) -> None:
    prefix = f"local_clip_loss.B{batch}."
    case = {k.removeprefix(prefix): v for k, v in golden("loss").items() if k.startswith(prefix)}
    audio, text, scale = (case[k].requires_grad_() for k in ("audio", "text", "scale"))
    loss = hard_negative_loss(audio, text, scale)
    loss.backward()
    assert_agrees(loss, case["loss"], count=SUMS, size=scale)
    for name, value in (("audio", audio), ("text", text), ("scale", scale)):
        assert_agrees(value.grad, case[f"grad_{name}"], count=SUMS, size=scale, name=name)


def by_the_formula(audio: Tensor, text: Tensor, scale: float, owner: Tensor, weights: Tensor) -> Tensor:
    """Section 1 of the derivation, written out with loops."""
    scores = scale * audio @ text.T
    rows = []
    for i in range(len(audio)):
        own = [j for j in range(len(text)) if owner[j] == i and weights[j] > 0]
        total = sum(weights[j] for j in own)
        if own:
            rows.append(torch.logsumexp(scores[i], 0) - sum(weights[j] / total * scores[i, j] for j in own))
    columns = [torch.logsumexp(scores[:, j], 0) - scores[owner[j], j] for j in range(len(text))]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2


@pytest.mark.parametrize("owner", [[0, 0, 0, 2, 3], [4, 1, 1, 0, 2, 3, 3], [1]])
def test_any_number_of_captions_and_weights(owner: list[int]) -> None:
    audio, text = unit(5, 16), unit(len(owner), 16)
    weights = torch.rand(len(owner), dtype=torch.float64)
    if len(owner) > 2:
        weights[1] = 0.0
    owner_N = torch.tensor(owner)
    ours = contrastive_loss(audio, text, 20.0, text_owner=owner_N, weights=weights)
    torch.testing.assert_close(ours, by_the_formula(audio, text, 20.0, owner_N, weights))
    doubled = contrastive_loss(audio, text, 20.0, text_owner=owner_N, weights=2 * weights)
    torch.testing.assert_close(ours, doubled)


def test_label_smoothing_mixes_in_the_uniform_target() -> None:
    audio, text = unit(6, 8), unit(6, 8)
    plain, smooth = (contrastive_loss(audio, text, 10.0, label_smoothing=e) for e in (0.0, 0.3))
    scores = 10.0 * audio @ text.T
    uniform = (-scores.log_softmax(1).mean() - scores.log_softmax(0).mean()) / 2
    torch.testing.assert_close(smooth, 0.7 * plain + 0.3 * uniform)


def test_sigmoid_is_the_mean_over_pairs() -> None:
    audio, text = unit(3, 8), unit(5, 8)
    owner, bias = torch.tensor([0, 1, 2, 2, 0]), torch.tensor(-4.0, dtype=torch.float64)
    sign = 2.0 * (owner == torch.arange(3)[:, None]) - 1
    expected = -F.logsigmoid(sign * (9.0 * audio @ text.T + bias)).mean()
    ours = contrastive_loss(audio, text, 9.0, text_owner=owner, logit_bias=bias, kind="sigmoid")
    torch.testing.assert_close(ours, expected)


def test_bias_cancels_in_softmax_but_not_in_sigmoid() -> None:
    audio, text = unit(4, 8), unit(4, 8)
    for kind, equal in (("softmax", True), ("sigmoid", False)):
        plain, biased = (contrastive_loss(audio, text, 10.0, logit_bias=b, kind=kind) for b in (0.0, 3.0))
        assert math.isclose(plain, biased, rel_tol=1e-9) == equal


OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"kind": "sigmoid"},
    {"kind": "sigmoid", "label_smoothing": 0.2},
    {"normalize": True},
    {"text_owner": torch.tensor([3, 0, 0, 1, 3, 3, 4])},
    {"text_owner": torch.tensor([3, 0, 0, 1, 3, 3, 4]), "label_smoothing": 0.2},
    {"text_owner": torch.tensor([2, 0, 0, 1, 4, 3, 4]), "weights": torch.tensor([1, 0, 2, 0, 0.5, 3, 0.1])},
    {"text_owner": torch.tensor([3, 0, 0, 1, 3, 3, 4]), "kind": "sigmoid", "logit_bias": -4.0},
    {"text_owner": torch.tensor([5, 5, 5, 5, 5, 5, 5])},
    {"workspace_bytes": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_equals_the_dense_definition(options: dict) -> None:
    audio, text = (3 * unit(7, 6)).requires_grad_(), unit(7, 6).requires_grad_()
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=True)
    dense = contrastive_loss_reference(audio, text, scale, **options)
    expected = torch.autograd.grad(dense, (audio, text, scale))
    fused = contrastive_loss(audio, text, scale, implementation="cpu", **options)
    assert_agrees(fused, dense, count=SUMS)
    found = torch.autograd.grad(fused, (audio, text, scale), retain_graph=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert_agrees(mine, theirs, count=SUMS, size=norm([norm(x) for x in expected]))
    again = torch.autograd.grad(fused, (audio, text, scale))  # nothing was used up
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_kernels_equal_the_dense_definition(options: dict, kernel_device: torch.device) -> None:
    audio, text = ((x.float()).to(kernel_device).requires_grad_() for x in (3 * unit(7, 6), unit(7, 6)))
    scale = torch.tensor(11.0, device=kernel_device, requires_grad=True)
    options = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in options.items()}
    results = []
    for name, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (audio, text, scale)]
        loss = contrastive_loss(*leaves, implementation=name, **options)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    gradient = norm([norm(x) for x in results[2][1:]])
    for found, plain, truth in zip(*results, strict=True):
        assert_as_exact(found, plain, truth, size=norm(truth) if truth is results[2][0] else gradient)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_kernels_keep_the_gradient_of_a_good_model(kernel_device: torch.device) -> None:
    audio, text, scale = (x.to(kernel_device) for x in aligned(0.06, 14.0, batch=64, dim=128))
    _, gradient, probability = exact(audio, text, scale)
    assert probability > 0.9
    found = loss_and_grad(audio, text, scale, implementation="triton")
    assert found.audio_MD.dtype == torch.bfloat16
    # Rounded once, at the end; the products' own rounding of negatives to bfloat16 is 1e-3 of them.
    assert relative(found.audio_MD, gradient) < torch.finfo(torch.bfloat16).eps / 2
    assert relative(rounded_then_subtracted(audio, text, scale), gradient) > 6e-3


def test_autocast_changes_nothing() -> None:
    audio, text = unit(9, 16, dtype=torch.float32), unit(9, 16, dtype=torch.float32)
    negative = text.view(9, 1, 16).repeat(1, 2, 1)
    for loss in (
        lambda: contrastive_loss(audio, text, 50.0, label_smoothing=0.1),
        lambda: contrastive_loss(audio, text, 50.0, implementation="reference"),
        lambda: hard_negative_loss(audio, negative, 50.0),
    ):
        expected = loss()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(), expected)


def test_normalized_16_bit_rows_are_not_rounded_again() -> None:
    audio, text = (3 * unit(30, 24)).bfloat16(), (2 * unit(30, 24)).bfloat16()
    dense = contrastive_loss_reference(audio.double(), text.double(), 20.0, normalize=True)
    plain = contrastive_loss_reference(audio.float(), text.float(), 20.0, normalize=True)
    assert_as_exact(contrastive_loss(audio, text, 20.0, normalize=True), plain, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_16_bit_embeddings_are_widened_exactly(dtype: torch.dtype, kind: str) -> None:
    audio, text = (x.to(dtype) for x in (unit(30, 24), unit(30, 24)))
    text[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, 100.0])
    narrow = loss_and_grad(audio, text, 20.0, kind=kind)
    wide = loss_and_grad(audio.float(), text.float(), 20.0, kind=kind)
    for ours, theirs in zip(narrow[:4], wide[:4], strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert narrow.audio_MD.dtype == narrow.text_ND.dtype == dtype


def test_small_hard_negative_losses_keep_their_digits() -> None:
    audio = torch.eye(8, dtype=torch.float64)
    text = torch.stack([audio, audio.roll(1, 0)], 1)
    found = hard_negative_loss(audio.float(), text.float(), 30.0)
    assert_agrees(found, math.log1p(math.exp(-30.0)), count=FEW, dtype=torch.float32)  # logits are exact


def test_one_pair_has_no_loss() -> None:
    audio, text = unit(1, 4).requires_grad_(), unit(1, 4)
    loss = contrastive_loss(audio, text, 10.0)
    loss.backward()
    assert loss == 0
    assert bool((audio.grad == 0).all())


def test_loss_and_gradients_at_once() -> None:
    audio, text = unit(9, 8, dtype=torch.float32), unit(9, 8, dtype=torch.float32)
    found = loss_and_grad(audio, text, 10.0, logit_bias=-3.0, kind="sigmoid")
    leaves = [
        x.requires_grad_() for x in (audio.clone(), text.clone(), torch.tensor(10.0), torch.tensor(-3.0))
    ]
    loss = contrastive_loss(*leaves[:3], logit_bias=leaves[3], kind="sigmoid")
    assert torch.equal(found.loss, loss)
    for ours, theirs in zip(found[1:], torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(ours, theirs)
    assert not found.loss.requires_grad
    assert loss_and_grad(audio, text, 10.0).logit_bias is None
    wide = loss_and_grad(audio.double(), text.double(), 10, logit_bias=-3, kind="sigmoid")
    assert wide.logit_scale.dtype == torch.float64
    assert_agrees(found.loss, wide.loss, count=FEW + 10, dtype=torch.float32)  # of logits of up to 10


def test_gradients_that_are_cached_are_those_of_the_whole_batch() -> None:
    tower = torch.nn.Linear(12, 8).double()
    clips, text = torch.randn(10, 12, dtype=torch.float64), unit(10, 8)
    contrastive_loss(tower(clips), text, 10.0, normalize=True).backward()
    expected, tower.weight.grad = tower.weight.grad, None
    with torch.no_grad():
        cached = loss_and_grad(tower(clips), text, 10.0, normalize=True)
    for part, gradient in zip(clips.split(3), cached.audio_MD.split(3), strict=True):
        tower(part).backward(gradient)
    assert_agrees(tower.weight.grad, expected, count=SUMS)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it
def test_compiles_into_one_graph() -> None:
    audio, text = (unit(6, 8, dtype=torch.float32).requires_grad_() for _ in range(2))
    owner = torch.tensor([0, 0, 2, 1, 5, 4])

    def losses(a: Tensor, t: Tensor) -> Tensor:
        pairs = contrastive_loss(a, t, 10.0, kind="sigmoid", logit_bias=-2.0)
        return pairs + contrastive_loss(a, t, 10.0, text_owner=owner, label_smoothing=0.1)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(losses(audio, text), (audio, text))
    wide = [x.detach().double().requires_grad_() for x in (audio, text)]
    truths = torch.autograd.grad(losses(*wide), wide)
    found = torch.autograd.grad(compiled(audio, text), (audio, text))
    for mine, plain, truth in zip(found, expected, truths, strict=True):
        assert_as_exact(mine, plain, truth)


def aligned(noise: float, scale: float, batch: int = 512, dim: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 embeddings of a model that is as good as `noise` is small, and the scale."""
    audio = unit(batch, dim, dtype=torch.float32)
    text = F.normalize(audio + noise * torch.randn(batch, dim), dim=1)
    return audio.bfloat16(), text.bfloat16(), torch.tensor(scale)


def exact(audio: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Loss and gradient by audio in float64 from all digits of the inputs, and the mean probability p_ii."""
    leaf = audio.double().requires_grad_()
    scores = scale.double() * leaf @ text.double().T
    loss = (
        F.cross_entropy(scores, torch.arange(len(audio)))
        + F.cross_entropy(scores.T, torch.arange(len(audio)))
    ) / 2
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, float(scores.detach().softmax(1).diag().mean())


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def rounded_then_subtracted(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Gradient by audio as kernels form it that round probabilities to bfloat16 and subtract 1 afterwards."""
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
    # Rounding the result to bfloat16 is not the loss's error. An error of PROMISE before it takes at most a
    # share of 2 PROMISE / step of the elements to the neighbouring bfloat16, a step away.
    step = torch.finfo(torch.bfloat16).eps / 2
    assert relative(narrow.audio_MD, gradient.bfloat16().double()) < step * (2 * PROMISE / step) ** 0.5
    if probability > 0.9:
        assert relative(rounded_then_subtracted(audio, text, scale_), gradient) > 3e-3


def test_a_tiny_loss_keeps_its_digits() -> None:
    audio = torch.eye(64).double() * 0.5
    loss = contrastive_loss(audio.float(), audio.float(), 100.0)
    truth = contrastive_loss_reference(audio, audio, 100.0)
    assert 0 < truth < 1e-8
    assert_agrees(loss, math.log1p(63 * math.exp(-25.0)), count=FEW, dtype=torch.float32)  # logits are exact
    # float32 logits and log-softmax have nothing left of it.
    assert contrastive_loss_reference(audio.float(), audio.float(), 100.0) == 0


def test_no_sum_underflows_at_the_largest_scale() -> None:
    audio, text = unit(256, 512, dtype=torch.float32), unit(256, 512, dtype=torch.float32)
    # A fixed maximum of 1 / temperature saves kernels the search for one; where hardware flushes subnormal
    # numbers, it loses whole rows.
    fixed = torch.exp(100.0 * (audio @ text.T - 1))
    flushed = torch.where(fixed < torch.finfo(torch.float32).tiny, 0.0, fixed)
    assert float((flushed.sum(1) == 0).float().mean()) > 0.3
    found = loss_and_grad(audio, text, 100.0)
    loss, gradient, _ = exact(audio, text, torch.tensor(100.0))
    assert_agrees(found.loss, loss, count=FEW + 100, dtype=torch.float32)
    assert relative(found.audio_MD, gradient) < PROMISE


@pytest.mark.parametrize("options", [{}, {"text_owner": torch.arange(1500) % 700}, {"kind": "sigmoid"}])
def test_no_bit_depends_on_the_number_of_threads(options: dict) -> None:
    audio, text = (unit(k, 40, dtype=torch.float32) for k in (1500, 1500))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(loss_and_grad(audio, text, 20.0, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0][:4], other[:4], strict=True))


@pytest.mark.parametrize("workspace", [0, 20 << 20, 40 << 20])
def test_keeps_no_more_than_the_workspace_for_the_backward_pass(workspace: int) -> None:
    # Of 64 MB of logits.
    audio, text = (unit(4000, 64, dtype=torch.float32).requires_grad_() for _ in range(2))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contrastive_loss(audio, text, 10.0, workspace_bytes=workspace)
    for own in (audio, text):
        kept.pop(own.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert sum(kept.values()) < workspace + 64 * 8000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("workspace", "copies", "options"),
    [(16 << 20, 0, {}), (64 << 20, 0, {"label_smoothing": 0.1}), (16 << 20, 1, {"normalize": True})],
)
def test_memory_is_gradients_workspace_and_copies(workspace: int, copies: int, options: dict) -> None:
    # 128 MB of logits in float32. Gradients of positive pairs are not held beside those of negatives.
    inputs = [unit(m, 256, dtype=torch.float32).requires_grad_() for m in (4096, 8192)]
    owner = torch.arange(8192) // 2
    contrastive_loss(inputs[0][:64], inputs[1][:128], 10.0, text_owner=owner[:128], **options).backward()
    peaks = []
    for _ in range(3):  # the least: what the allocator has in pieces differs by megabytes from call to call
        inputs[0].grad = inputs[1].grad = None
        with peak_memory() as peak:
            loss = contrastive_loss(*inputs, 10.0, text_owner=owner, workspace_bytes=workspace, **options)
            loss.backward()
        peaks.append(peak.bytes)
    assert min(peaks) < (1 + copies) * sum(x.nbytes for x in inputs) + workspace + (8 << 20)


def test_second_derivatives_are_refused() -> None:
    audio, text = (unit(3, 4).requires_grad_() for _ in range(2))
    (gradient,) = torch.autograd.grad(contrastive_loss(audio, text, 5.0), audio, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.square().sum(), audio)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck(kind: str) -> None:
    audio, text = unit(3, 4).requires_grad_(), unit(5, 4).requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (7.0, -1.0))
    owner = torch.tensor([0, 0, 2, 1, 0])

    def loss(a: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return contrastive_loss(a, t, s, text_owner=owner, logit_bias=b, label_smoothing=0.1, kind=kind)

    assert torch.autograd.gradcheck(loss, (audio, text, scale, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 200.0])
def test_stays_finite_and_float32(dtype: torch.dtype, scale: float) -> None:
    audio = unit(256, 64).to(dtype).requires_grad_()
    text = unit(256, 64).to(dtype).requires_grad_()
    loss = contrastive_loss(audio, text, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(bool(t.isfinite().all()) for t in (loss, audio.grad, text.grad))


BAD = [
    ({"audio_MD": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "audio_MD must be floating"),
    ({"text_ND": torch.zeros(3, 5)}, ValueError, "text_ND must have 4 columns"),
    ({"audio_MD": torch.zeros(0, 4)}, ValueError, "audio_MD must be a non-empty matrix"),
    ({"text_ND": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "must share dtype and device"),
    ({"text_ND": torch.zeros(4, 4)}, ValueError, "text_owner must be given"),
    ({"text_owner": torch.tensor([0, 1, 3])}, ValueError, "text_owner must lie in 0..2"),
    ({"text_owner": torch.tensor([0.0, 1, 2])}, ValueError, "text_owner must be int64 of shape (3,)"),
    ({"weights": torch.tensor([1.0, -1, 2])}, ValueError, "weights must be finite and not negative"),
    ({"weights": torch.ones(3), "kind": "sigmoid"}, ValueError, "weights must be None"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in [0, 1)"),
    ({"kind": "hinge"}, ValueError, "kind must be"),
    ({"implementation": "fast"}, ValueError, "implementation must be"),
    ({"implementation": "triton"}, ValueError, 'implementation="triton" needs CUDA tensors, got cpu'),
    ({"logit_scale": torch.ones(1)}, ValueError, "logit_scale must be a scalar"),
    ({"logit_bias": torch.ones(3)}, ValueError, "logit_bias must be a scalar"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_names_the_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, change: dict, error: type[Exception], message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"audio_MD": torch.zeros(3, 4), "text_ND": torch.zeros(3, 4), "logit_scale": 10.0} | change
    with pytest.raises(error, match=re.escape(message)):
        contrastive_loss(**arguments)


def test_hard_negative_loss_refuses_wrong_shapes() -> None:
    for text_shape in ((3, 1, 4), (3, 4), (2, 2, 4), (3, 2, 5)):
        with pytest.raises(ValueError, match="text_BKD"):
            hard_negative_loss(torch.zeros(3, 4), torch.zeros(*text_shape), 10.0)
