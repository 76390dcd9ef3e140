"""The contrastive losses against recorded values of the reference recipe, their formulas, and bad input."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.loss import contrastive_loss, hard_negative_loss


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def captions_owner(clips: int, texts: int) -> Tensor:
    return torch.arange(texts) % clips


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("dim", [8, 512])
def test_equals_the_recipe(golden, task: str, batch: int, dim: int) -> None:
    case = {
        k.rsplit(".", 1)[1]: v
        for k, v in golden("loss").items()
        if k.startswith(f"ws1.{task}.B{batch}.D{dim}.")
    }
    audio, text, scale = (case[k].double().requires_grad_() for k in ("audio", "text", "scale"))
    loss = contrastive_loss(audio, text, scale, text_owner=captions_owner(batch, len(text)))
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-12, atol=1e-13)
    for name, value in (("audio", audio), ("text", text), ("scale", scale)):
        stored = case[f"grad_{name}"]  # the largest case is stored in float32
        rtol = 1e-10 if stored.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(value.grad.to(stored.dtype), stored, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_hard_negatives_equal_the_recipe(golden, batch: int) -> None:
    prefix = f"local_clip_loss.B{batch}."
    case = {k.removeprefix(prefix): v for k, v in golden("loss").items() if k.startswith(prefix)}
    audio, text, scale = (case[k].requires_grad_() for k in ("audio", "text", "scale"))
    loss = hard_negative_loss(audio, text, scale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-12, atol=1e-13)
    for name, value in (("audio", audio), ("text", text), ("scale", scale)):
        torch.testing.assert_close(value.grad, case[f"grad_{name}"], rtol=1e-10, atol=1e-12)


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
    ({"logit_scale": torch.ones(1)}, ValueError, "logit_scale must be a scalar"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_names_the_wrong_argument(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"audio_MD": torch.zeros(3, 4), "text_ND": torch.zeros(3, 4), "logit_scale": 10.0} | change
    with pytest.raises(error, match=re.escape(message)):
        contrastive_loss(**arguments)


def test_hard_negative_loss_refuses_wrong_shapes() -> None:
    for text_shape in ((3, 1, 4), (3, 4), (2, 2, 4), (3, 2, 5)):
        with pytest.raises(ValueError, match="text_BKD"):
            hard_negative_loss(torch.zeros(3, 4), torch.zeros(*text_shape), 10.0)


def _rank_main(rank: int, world: int, folder: str, kind: str) -> None:
    """One process: its shard's gradients, averaged over ranks as DDP would, go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    data = torch.load(f"{folder}/batch.pt", weights_only=True)
    audio, text, owner = data["audio"][rank], data["text"][rank], data["owner"][rank]
    matrix = data["matrix"].requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(
        audio @ matrix, text @ matrix, scale, text_owner=owner, kind=kind, group=dist.group.WORLD
    )
    loss.backward()
    for gradient in (matrix.grad, scale.grad):
        dist.all_reduce(gradient)
        gradient /= world
    torch.save({"loss": loss.detach(), "matrix": matrix.grad, "scale": scale.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiproc
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_over_ranks_equal_those_of_one_process(tmp_path: Path, kind: str) -> None:
    clips, texts = [3, 5], [6, 7]  # unequal shards, unequal captions
    audio, text = [unit(c, 6) for c in clips], [unit(t, 6) for t in texts]
    owner = [captions_owner(c, t) for c, t in zip(clips, texts, strict=True)]
    matrix = torch.randn(6, 6, dtype=torch.float64)
    torch.save({"audio": audio, "text": text, "owner": owner, "matrix": matrix}, tmp_path / "batch.pt")
    mp.spawn(_rank_main, args=(2, str(tmp_path), kind), nprocs=2)
    matrix.requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([owner[0], owner[1] + clips[0]])
    loss = contrastive_loss(
        torch.cat(audio) @ matrix, torch.cat(text) @ matrix, scale, text_owner=whole, kind=kind
    )
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["matrix"], matrix.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found["scale"], scale.grad, rtol=1e-11, atol=1e-12)
