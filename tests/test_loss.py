"""The contrastive losses against recorded values of the reference recipe, their formulas (docs/derivation.md,
section 1) and the dense definition; memory, options, and bad input."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, assert_agrees, assert_as_exact, norm
from peak_memory import peak_memory
from sample_data import unit
from torch import Tensor

from clsp_fast.contrastive import negatives, sums
from clsp_fast.contrastive.engine import choose_engine
from clsp_fast.kernels import contrastive
from clsp_fast.kernels._launch import target_of, tile_of
from clsp_fast.kernels._pairs import product_rows
from clsp_fast.loss import contrastive_loss, contrastive_loss_reference, hard_negative_loss, loss_and_grad

# Roundings in float64 of sums over up to 128 pairs and 512 dimensions. Exponents of their terms are logits.
SUMS = 1e3
# numpy, with which Triton interprets kernels, warns of exponentials that are 0.
INTERPRETED = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


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
    # The recipe subtracts logits that are as large as the scale.
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
    loss = contrastive_loss(audio, text, 9.0, text_owner=owner, logit_bias=bias, kind="sigmoid")
    torch.testing.assert_close(loss, expected)


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
    gradients = torch.autograd.grad(fused, (audio, text, scale), retain_graph=True)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert_agrees(gradient, exact, count=SUMS, size=norm([norm(x) for x in expected]))
    repeated = torch.autograd.grad(fused, (audio, text, scale))  # a second backward pass gives the same
    assert all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))


@INTERPRETED
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
    for result, plain, truth in zip(*results, strict=True):
        assert_as_exact(result, plain, truth, size=norm(truth) if truth is results[2][0] else gradient)


ENGINES = ["cpu", "reference", pytest.param("triton", marks=INTERPRETED)]


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 2.0**65),
        (torch.float32, 2.0**127),
        (torch.bfloat16, 2.0**65),
        (torch.float64, 2.0**513),
    ],
)
def test_rows_are_normalised_even_if_their_norms_overflow(
    kernel_device: torch.device, implementation: str, dtype: torch.dtype, size: float
) -> None:
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    device = kernel_device if implementation == "triton" else "cpu"
    audio, text = unit(7, 12).to(dtype), unit(7, 12).to(dtype)
    audio[::2] = audio[::2] / audio[::2].abs().amax(1, keepdim=True) * size
    options: dict[str, Any] = {"text_owner": torch.arange(7), "label_smoothing": 0.1, "normalize": True}
    options["compute_dtype"] = torch.float32
    directions = audio.double()
    directions[::2] /= size
    truth = loss_and_grad(directions, text.double(), 20.0, implementation="reference", **options)
    plain = loss_and_grad(directions.to(dtype), text, 20.0, implementation="reference", **options)
    options["text_owner"] = options["text_owner"].to(device)
    result = loss_and_grad(audio.to(device), text.to(device), 20.0, implementation=implementation, **options)
    wide = torch.promote_types(dtype, torch.float32)
    assert_as_exact(result.loss.cpu(), plain.loss, truth.loss, dtype=wide, size=20)
    # In 16 bits, the rounding of the result counts, not that of its terms. Triton's interpreter truncates.
    terms = None if dtype == torch.bfloat16 else 20
    assert_as_exact(result.text_ND.cpu(), plain.text_ND, truth.text_ND, dtype=dtype, size=terms)
    if size < 2.0**126:  # otherwise the gradient of a huge row underflows
        gradient = result.audio_MD.cpu().double()
        gradient[::2] *= size
        assert_as_exact(gradient, plain.audio_MD, truth.audio_MD, dtype=dtype, size=terms)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_overflow_are_found_in_a_compiled_loss_too(dtype: torch.dtype) -> None:
    audio, text = (unit(7, 12, dtype=dtype) for _ in range(2))

    def loss(audio: Tensor) -> Tensor:
        return contrastive_loss(audio, text, 10.0, normalize=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    rows = [audio.clone().requires_grad_(), (audio * 2.0**65).requires_grad_()]
    losses = [compiled(x) for x in rows]
    # All factors are powers of two, so nothing is rounded otherwise.
    assert_agrees(losses[1], losses[0], count=FEW, dtype=torch.float32)
    plain, scaled = (torch.autograd.grad(value, x)[0] for value, x in zip(losses, rows, strict=True))
    assert_agrees(scaled.float() * 2.0**65, plain.float(), count=FEW, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_rows_stay_as_they_are_where_a_compiler_divides_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the host does not wait to learn whether a norm overflows."""
    rows = unit(7, 12, dtype=dtype)
    assert sums.without_overflow(rows, torch.float32) is rows
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(sums.without_overflow(rows, torch.float32), rows)
    rows[3] *= 2.0**65
    divided = sums.without_overflow(rows, torch.float32)
    assert divided.dtype == dtype
    assert 1 <= divided[3].abs().max() < 2
    assert torch.equal(divided[:3], rows[:3])


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 3e38), (torch.float64, 1e308)])
def test_sums_of_weights_may_overflow(
    kernel_device: torch.device, implementation: str, dtype: torch.dtype, largest: float
) -> None:
    device = kernel_device if implementation == "triton" else "cpu"
    audio, text = (unit(n, 12, dtype=torch.float32).to(device) for n in (4, 7))
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3], device=device)
    weights = torch.tensor([1, 0.5, 1, 1, 0, 1e-3, 1e-20], dtype=dtype, device=device)
    options: dict[str, Any] = {"text_owner": owner, "implementation": implementation}
    huge = contrastive_loss(audio, text, 10.0, weights=weights * largest, **options)
    plain = contrastive_loss(audio, text, 10.0, weights=weights, **options)
    assert_agrees(huge.cpu(), plain.cpu(), count=100, dtype=torch.float32, size=10)


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("smallest", [1e-30, 1e-300])
def test_weights_may_be_tiny(kernel_device: torch.device, implementation: str, smallest: float) -> None:
    """Float32 holds none of them. Only the ratios of one clip's weights matter."""
    device = kernel_device if implementation == "triton" else "cpu"
    audio, text = (unit(n, 12, dtype=torch.float32).to(device) for n in (4, 7))
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3], device=device)
    weights = torch.tensor([1, 0.5, 1, 1, 0, 1e-3, 1e-20], dtype=torch.float64, device=device)
    options: dict[str, Any] = {"text_owner": owner, "implementation": implementation}
    plain = contrastive_loss(audio, text, 10.0, weights=weights, **options)
    for tiny in (weights * smallest, torch.where(owner == 2, smallest, weights)):
        loss = contrastive_loss(audio, text, 10.0, weights=tiny, **options)
        assert_agrees(loss.cpu(), plain.cpu(), count=100, dtype=torch.float32, size=10)


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("bias", [3.0, 1e10, 1e300, -math.inf, math.nan])
def test_the_softmax_kind_ignores_the_bias(
    kernel_device: torch.device, implementation: str, bias: float
) -> None:
    device = kernel_device if implementation == "triton" else "cpu"
    audio, text = (unit(5, 12, dtype=torch.float32).to(device) for _ in range(2))
    for options in ({}, {"label_smoothing": 0.1}):
        plain = loss_and_grad(audio, text, 10.0, implementation=implementation, **options)
        for given in (bias, torch.tensor(bias, dtype=torch.float64, device=device)):
            result = loss_and_grad(
                audio, text, 10.0, logit_bias=given, implementation=implementation, **options
            )
            assert all(torch.equal(a, b) for a, b in zip(result[:4], plain[:4], strict=True))
            assert result.loss.dtype == torch.float32
            assert result.logit_bias == 0


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
    for result, widened in zip(narrow[:4], wide[:4], strict=True):
        assert torch.equal(result, widened.to(result.dtype))
    assert narrow.audio_MD.dtype == narrow.text_ND.dtype == dtype


def test_loss_and_gradients_at_once() -> None:
    audio, text = unit(9, 8, dtype=torch.float32), unit(9, 8, dtype=torch.float32)
    result = loss_and_grad(audio, text, 10.0, logit_bias=-3.0, kind="sigmoid")
    leaves = [
        x.requires_grad_() for x in (audio.clone(), text.clone(), torch.tensor(10.0), torch.tensor(-3.0))
    ]
    loss = contrastive_loss(*leaves[:3], logit_bias=leaves[3], kind="sigmoid")
    assert torch.equal(result.loss, loss)
    for gradient, expected in zip(result[1:], torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, expected)
    assert not result.loss.requires_grad
    assert loss_and_grad(audio, text, 10.0).logit_bias is None
    wide = loss_and_grad(audio.double(), text.double(), 10, logit_bias=-3, kind="sigmoid")
    assert wide.logit_scale.dtype == torch.float64
    assert_agrees(result.loss, wide.loss, count=FEW + 10, dtype=torch.float32)  # logits are up to 10


@pytest.mark.parametrize(
    "implementation",
    ["cpu", pytest.param("triton", marks=INTERPRETED)],
)
@pytest.mark.parametrize("frozen", ["audio", "text"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_a_frozen_tower_costs_no_product(
    monkeypatch: pytest.MonkeyPatch, implementation: str, frozen: str, options: dict[str, float]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    audio, text, scale = (
        unit(5, 16, dtype=torch.float32),
        unit(5, 16, dtype=torch.float32),
        torch.tensor(10.0, requires_grad=True),
    )
    learns = text if frozen == "audio" else audio
    whole = loss_and_grad(audio, text, scale, **options)
    learns.requires_grad_()
    module, name = {
        "cpu": (negatives, "_sum_negatives_backward"),
        "triton": (contrastive, "products"),
    }[implementation]
    needs, compute = [], getattr(module, name)

    def spy(*arguments: object) -> tuple[Tensor, ...]:
        needs.append(arguments[-2:])
        return compute(*arguments)

    monkeypatch.setattr(module, name, spy)
    loss = contrastive_loss(audio, text, scale, implementation=implementation, **options)
    by_embedding, by_scale = torch.autograd.grad(loss, (learns, scale))
    assert needs == [(frozen == "text", frozen == "audio")]
    expected = whole.text_ND if frozen == "audio" else whole.audio_MD
    exact = loss_and_grad(*(x.detach().double() for x in (audio, text, scale)), **options)
    truth = exact.text_ND if frozen == "audio" else exact.audio_MD
    size = norm([norm(x) for x in exact[1:4]])
    assert_as_exact(by_embedding, expected, truth, size=size)
    assert_as_exact(by_scale, whole.logit_scale, exact.logit_scale, size=size)


def test_the_scale_alone_may_learn() -> None:
    audio, text, scale = (
        unit(5, 16, dtype=torch.float32),
        unit(5, 16, dtype=torch.float32),
        torch.tensor(10.0, requires_grad=True),
    )
    (result,) = torch.autograd.grad(contrastive_loss(audio, text, scale), scale)
    exact = loss_and_grad(*(x.detach().double() for x in (audio, text, scale))).logit_scale
    assert_as_exact(result, loss_and_grad(audio, text, scale).logit_scale, exact)


def test_embeddings_may_come_from_inference_mode() -> None:
    with torch.inference_mode():
        audio, text = unit(4, 8, dtype=torch.float32), unit(4, 8, dtype=torch.float32)
        result = loss_and_grad(audio, text, 10)
    expected = loss_and_grad(audio.clone(), text.clone(), torch.tensor(10.0))
    for a, b in zip(result[:4], expected[:4], strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo
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
    gradients = torch.autograd.grad(compiled(audio, text), (audio, text))
    for gradient, plain, truth in zip(gradients, expected, truths, strict=True):
        assert_as_exact(gradient, plain, truth)


@pytest.mark.parametrize("options", [{}, {"text_owner": torch.arange(1500) % 700}, {"kind": "sigmoid"}])
def test_no_bit_depends_on_the_number_of_threads(options: dict) -> None:
    audio, text = (unit(k, 40, dtype=torch.float32) for k in (1500, 1500))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(audio, text, 20.0, **options))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0][:4], other[:4], strict=True)
    )


@pytest.mark.parametrize("workspace", [0, 20 << 20, 40 << 20])
def test_keeps_no_more_than_the_workspace_for_the_backward_pass(workspace: int) -> None:
    # All logits would take 64 MB.
    audio, text = (unit(4000, 64, dtype=torch.float32).requires_grad_() for _ in range(2))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contrastive_loss(audio, text, 10.0, workspace_bytes=workspace)
    for x in (audio, text):
        kept.pop(x.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert sum(kept.values()) < workspace + 64 * 8000


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of a process")
@pytest.mark.parametrize(
    ("workspace", "copies", "options"),
    [(16 << 20, 0, {}), (64 << 20, 0, {"label_smoothing": 0.1}), (16 << 20, 1, {"normalize": True})],
)
def test_memory_is_gradients_workspace_and_copies(workspace: int, copies: int, options: dict) -> None:
    # All logits would take 128 MB. Gradients of positive pairs need no further memory.
    inputs = [unit(m, 256, dtype=torch.float32).requires_grad_() for m in (4096, 8192)]
    owner = torch.arange(8192) // 2
    contrastive_loss(inputs[0][:64], inputs[1][:128], 10.0, text_owner=owner[:128], **options).backward()
    peaks = []
    for _ in range(
        3
    ):  # the smallest peak counts: fragments of the allocator differ by megabytes from call to call
        inputs[0].grad = inputs[1].grad = None
        with peak_memory() as peak:
            loss = contrastive_loss(*inputs, 10.0, text_owner=owner, workspace_bytes=workspace, **options)
            loss.backward()
        peaks.append(peak.bytes)
    # Fragments of the allocator take several MiB, but less than one more copy of the inputs, 12 MiB.
    assert min(peaks) < (2 + copies) * sum(x.nbytes for x in inputs) + workspace


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [64 << 20, 512 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_at_32k_is_workspace_and_little_more(
    cuda: torch.device, workspace: int, dtype: torch.dtype
) -> None:
    rows, depth = 32_768, 512
    inputs = [F.normalize(torch.randn(rows, depth, device=cuda), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.3, device=cuda, requires_grad=True)
    assert choose_engine("auto", inputs[0]) is contrastive

    def step(audio: Tensor, text: Tensor) -> None:
        contrastive_loss(audio, text, scale, workspace_bytes=workspace, compute_dtype=dtype).backward()

    step(*(x[:256] for x in inputs))  # compiles kernels, and allocates what the libraries keep
    for x in inputs:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*inputs)
    peak = torch.cuda.max_memory_allocated() - before
    # The gradients are also the sums of both products. A panel of G has as many columns as there are texts.
    matrix = rows * depth
    gradients, operands = 2 * 4 * matrix, 0 if dtype == torch.float32 else 2 * dtype.itemsize * matrix
    target = target_of(cuda)
    row_bytes, tile_rows = dtype.itemsize * rows + 4 * depth, tile_of("panel", target, dtype).rows
    panel = row_bytes * product_rows(rows, row_bytes, workspace, tile_rows, depth, target)
    assert panel <= workspace
    # At most 8 numbers of 8 bytes for each row; the allocator may add 1 MiB to each of the 8 large tensors.
    vectors, rounding = 8 * 8 * rows, 8 << 20
    assert vectors + rounding < 2 * matrix  # one more matrix, even in 16 bits, would be noticed
    assert peak <= gradients + operands + panel + vectors + rounding


@INTERPRETED
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_second_derivatives_are_refused(kernel_device: torch.device, implementation: str) -> None:
    device = kernel_device if implementation == "triton" else "cpu"
    audio, text = (unit(3, 4).to(device, torch.float32).requires_grad_() for _ in range(2))
    loss = contrastive_loss(audio, text, 5.0, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, audio, create_graph=True)
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
    ({"text_owner": torch.tensor([0.0, 1, 2])}, TypeError, "text_owner must be int64 of shape (3,)"),
    ({"text_owner": torch.tensor([0, 1])}, ValueError, "text_owner must be int64 of shape (3,)"),
    ({"text_owner": np.array([0, 1, 2])}, TypeError, "text_owner must be a torch.Tensor, got ndarray"),
    ({"audio_MD": [[0.0] * 4] * 3}, TypeError, "audio_MD must be a torch.Tensor, got list"),
    ({"text_ND": np.zeros((3, 4))}, TypeError, "text_ND must be a torch.Tensor, got ndarray"),
    ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a torch.Tensor, got list"),
    ({"weights": torch.ones(3).int()}, TypeError, "weights must be floating"),
    ({"weights": torch.ones(2)}, ValueError, "weights must be of shape (3,) on cpu, got (2,) on cpu"),
    ({"weights": torch.tensor([1.0, -1, 2])}, ValueError, "weights must be finite and not negative"),
    ({"weights": torch.ones(3), "kind": "sigmoid"}, ValueError, "weights must be None"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in [0, 1)"),
    ({"kind": "hinge"}, ValueError, "kind must be"),
    ({"implementation": "fast"}, ValueError, "implementation must be"),
    ({"implementation": "triton"}, ValueError, 'implementation="triton" needs CUDA tensors, got cpu'),
    ({"logit_scale": torch.ones(1)}, ValueError, "logit_scale must be a scalar"),
    ({"logit_bias": torch.ones(3)}, ValueError, "logit_bias must be a scalar"),
    ({"logit_scale": "14"}, TypeError, "logit_scale must be a number or a scalar tensor, got '14'"),
    ({"logit_scale": torch.tensor(1j)}, TypeError, "logit_scale must be real, got torch.complex64"),
    ({"logit_bias": [0.0]}, TypeError, "logit_bias must be a number or a scalar tensor, got [0.0]"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got None"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got '0.1'"),
]


@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [
        (function, *case)
        for function in (contrastive_loss, contrastive_loss_reference, loss_and_grad)
        for case in BAD
        if function is not contrastive_loss_reference or "implementation" not in case[0]
    ],
)
def test_names_the_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, function: Callable, change: dict, error: type[Exception], message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"audio_MD": torch.zeros(3, 4), "text_ND": torch.zeros(3, 4), "logit_scale": 10.0} | change
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize("implementation", ["auto", "cpu", "reference"])
def test_a_dtype_of_8_bits_is_refused(implementation: str) -> None:
    narrow = torch.zeros(3, 4).to(torch.float8_e5m2)
    with pytest.raises(TypeError, match=r"audio_MD must be floating .* got torch\.float8_e5m2"):
        contrastive_loss(narrow, narrow, 10.0, implementation=implementation)


@pytest.mark.parametrize(
    ("audio", "text", "scale", "error", "message"),
    [
        *(
            (torch.zeros(3, 4), torch.zeros(*shape), 10.0, ValueError, "text_BKD")
            for shape in ((3, 1, 4), (3, 4), (2, 2, 4), (3, 2, 5))
        ),
        (torch.zeros(0, 4), torch.zeros(0, 2, 4), 10.0, ValueError, r"neither empty, got \(0, 4\)"),
        (torch.zeros(3, 0), torch.zeros(3, 2, 0), 10.0, ValueError, r"neither empty, got \(3, 0\)"),
        (torch.ones(3, 4).int(), torch.ones(3, 2, 4).int(), 10.0, TypeError, "audio_BD must be floating"),
        (torch.zeros(3, 4), [[[0.0] * 4] * 2] * 3, 10.0, TypeError, "text_BKD must be a torch.Tensor"),
        (torch.zeros(3, 4), torch.zeros(3, 2, 4).double(), 10.0, TypeError, "must share dtype and device"),
        (torch.zeros(3, 4), torch.zeros(3, 2, 4), "10", TypeError, "logit_scale must be a number"),
        (torch.zeros(3, 4), torch.zeros(3, 2, 4), torch.ones(1), ValueError, "logit_scale must be a scalar"),
    ],
)
def test_hard_negative_loss_names_the_wrong_argument(
    audio: Tensor, text: Tensor, scale: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hard_negative_loss(audio, text, scale)
