"""A training step in parts or with recomputed layers: the gradients of the whole batch, in less memory."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import assert_agrees, assert_as_exact, eps, error, in_float64, norm
from peak_memory import peak_memory

from clsp_fast.config import MODEL_PRESETS, ModelConfig, TrainConfig
from clsp_fast.data import Batch
from clsp_fast.model import CLSP
from clsp_fast.storage.ranks import Ranks
from clsp_fast.training import step

# Operations whose rounding errors add up: some 20 layers, forward and backward, of some 10 operations each.
CHAIN = 1e3
# The same in bfloat16, where the errors, of random signs, add up like the square root of their number.
ROUNDINGS = 200**0.5
ONE_RANK = Ranks(0, 1, torch.device("cpu"), None)


def without_dropout(**changes: object) -> ModelConfig:
    text = dataclasses.replace(
        MODEL_PRESETS["tiny"].text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return dataclasses.replace(MODEL_PRESETS["tiny"], dropout=0.0, regularize=False, text=text, **changes)


def make_batch(clips: int, frames: int, captions: int = 2) -> Batch:
    """Clips of different lengths, all their first captions, then all their second ones."""
    lengths = torch.linspace(frames // 2, frames, clips).long().flip(0)
    sizes = torch.linspace(3, 9, clips * captions).long()
    mask = (torch.arange(9) < sizes[:, None]).long()
    return Batch(
        step=0,
        ids=[str(i) for i in range(clips)],
        features=torch.randn(clips, frames, 128) * 3 - 8,
        lengths=lengths,
        token_ids=torch.randint(5, 300, mask.shape).where(mask > 0, 1),
        attention_mask=mask,
        text_owner=torch.arange(clips).repeat(captions),
        seconds=float(lengths.sum()) / 100,
    )


def take_step(
    model: CLSP, batch: Batch, ranks: Ranks = ONE_RANK, **settings: object
) -> dict[str, torch.Tensor]:
    """Loss, embeddings, gradients and moments of a step."""
    config = TrainConfig(model=model.config, **settings)
    model.zero_grad()
    torch.manual_seed(1)
    output, loss = step.forward(model, batch, ranks, config)
    loss.backward()
    tensors = {"loss": loss.detach(), "audio": output.audio.detach(), "text": output.text.detach()}
    tensors |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors | {f"moments{i}": norm.batch_moments for i, norm in enumerate(model.running_norms)}


def gradient_norm(tensors: dict[str, torch.Tensor], model: CLSP) -> float:
    """Norm of the gradient of all parameters together.

    The gradient of one tensor gives no scale for its rounding errors: for a bias before a softmax it is 0
    except for rounding, and for other tensors it is a small sum of large terms.
    """
    return norm([norm(tensors[name]) for name, _ in model.named_parameters()])


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("micro_seconds", [0.01, 1.3, 2.5])
def test_parts_give_the_step_of_the_whole_batch(captions: int, micro_seconds: float) -> None:
    model, batch = CLSP(without_dropout()), make_batch(7, 60, captions)
    exact = in_float64(model)
    truth, exact_parts = (take_step(exact, batch, micro_seconds=s) for s in (0.0, micro_seconds))
    whole, parts = (take_step(model, batch, micro_seconds=s) for s in (0.0, micro_seconds))
    assert truth.keys() == exact_parts.keys() == whole.keys() == parts.keys()
    assert "logit_scale" in whole
    gradient = gradient_norm(truth, model)
    for name, value in truth.items():
        size = gradient if name in dict(model.named_parameters()) else value
        assert_agrees(exact_parts[name], value, count=CHAIN, size=size, name=name)
        # A batch of one clip takes another path, where sums are rounded in another order.
        assert_as_exact(parts[name], whole[name], value, size=size, name=name)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("settings", [{}, {"micro_seconds": 1.3}, {"recompute_layers": True}], ids=str)
def test_a_step_is_the_same_on_both_devices(each_device: torch.device, settings: dict[str, object]) -> None:
    model, batch = CLSP(without_dropout()), make_batch(7, 60)
    truth, plain = take_step(in_float64(model), batch), take_step(model, batch)
    ranks = Ranks(0, 1, each_device, None)
    result = take_step(copy.deepcopy(model).to(each_device), batch, ranks, **settings)
    assert {x.device.type for x in result.values()} == {each_device.type}
    gradient = gradient_norm(truth, model)
    for name, value in truth.items():
        size = gradient if name in dict(model.named_parameters()) else value
        if each_device.type == "cpu":
            assert_as_exact(result[name], plain[name], value, size=size, name=name)
        else:
            # A card computes by other algorithms, so the CPU's error is no measure of its error.
            assert_agrees(result[name], value, count=CHAIN, dtype=torch.float32, size=size, name=name)


def test_a_bf16_step_stays_close_on_both_devices(each_device: torch.device) -> None:
    model, batch = CLSP(without_dropout()), make_batch(7, 60)
    truth = take_step(in_float64(model), batch)
    ranks = Ranks(0, 1, each_device, None)
    result = take_step(copy.deepcopy(model).to(each_device), batch, ranks, precision="bf16")
    gradient = gradient_norm(truth, model)
    total = 0.0
    for name, value in truth.items():
        if name in dict(model.named_parameters()):
            total += error(result[name], value) ** 2
        else:
            assert_agrees(result[name], value, count=ROUNDINGS, dtype=torch.bfloat16, name=name)
    # The backward pass rounds as often as the forward pass.
    assert total**0.5 <= 2 * ROUNDINGS * eps(torch.bfloat16) * gradient


def _rank_main(rank: int, folder: str) -> None:
    """Saves float64 gradients, averaged over two ranks, of a step in one part and of a step in several. The
    ranks have different numbers of clips, and so of parts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), dist.group.WORLD)
    torch.manual_seed(0)
    model = CLSP(without_dropout()).double()
    torch.manual_seed(rank)
    batch, steps = make_batch((7, 3)[rank], 60), []
    for micro_seconds in (0.0, 1.3):
        gradients = take_step(model, batch, ranks, micro_seconds=micro_seconds)
        ranks.average([x for name, x in gradients.items() if name not in ("audio", "text")])
        steps.append(gradients)
    torch.save(steps, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiproc
def test_parts_give_the_step_of_the_whole_batch_on_two_ranks(tmp_path: Path) -> None:
    mp.spawn(_rank_main, args=(str(tmp_path),), nprocs=2)
    model = CLSP(without_dropout())
    for rank in range(2):
        whole, parts = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        gradient = gradient_norm(whole, model)
        for name in set(whole) - {"audio", "text"}:
            size = gradient if name in dict(model.named_parameters()) else whole[name]
            assert_agrees(parts[name], whole[name], count=CHAIN, size=size, name=name)


@pytest.mark.parametrize("settings", [{"recompute_layers": True}, {"micro_seconds": 2.0}])
def test_the_recomputation_draws_the_same_dropout(settings: dict[str, object]) -> None:
    torch.set_num_threads(1)
    model, batch = CLSP(MODEL_PRESETS["tiny"]), make_batch(6, 60)
    with pytest.MonkeyPatch.context() as patch:  # the same parts, whose activations are stored
        patch.setattr(step, "checkpoint", lambda f, *x, **_: f(*x))
        patch.setattr("clsp_fast.towers.layers.checkpoint", lambda f, *x, **_: f(*x))
        stored = take_step(model, batch, **settings)
    recomputed = take_step(model, batch, **settings)
    for name, value in stored.items():
        assert torch.equal(recomputed[name], value), name


def test_recomputing_layers_of_parts_changes_only_the_memory() -> None:
    torch.set_num_threads(1)
    model, batch = CLSP(MODEL_PRESETS["tiny"]), make_batch(6, 60)
    one = take_step(model, batch, micro_seconds=1.3)
    both = take_step(model, batch, micro_seconds=1.3, recompute_layers=True)
    for name, value in one.items():
        assert torch.equal(both[name], value), name


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of a process")
def test_memory_is_that_of_a_part() -> None:
    torch.set_num_threads(1)
    model, batch = CLSP(without_dropout()), make_batch(256, 200)
    take_step(model, make_batch(4, 200))
    peaks = []
    for settings in ({}, {"micro_seconds": 16.0}, {"recompute_layers": True}):
        with peak_memory() as peak:
            take_step(model, batch, **settings)
        peaks.append(peak.bytes)
    assert peaks[1] < peaks[0] / 4
    assert peaks[2] < 0.9 * peaks[0]


@pytest.mark.parametrize("size", [-1.0, float("inf"), float("nan")])
def test_an_invalid_size_of_parts_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="micro_seconds must be finite and at least 0"):
        TrainConfig(micro_seconds=size)
