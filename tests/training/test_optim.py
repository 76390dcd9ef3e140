"""Parameter groups, the schedule, and optimiser state that is stored by parameter name."""

from __future__ import annotations

import pytest
import torch
from numerics import FEW, assert_agrees
from torch import nn

from clsp_fast.config import OptimConfig
from clsp_fast.training import optim


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.text_encoder = nn.Linear(4, 3)
        self.audio_projection = nn.Linear(3, 2)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def loss(self) -> torch.Tensor:
        return sum((p**2).sum() for p in self.parameters())


def test_groups_have_their_rates_and_decays() -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig(lr=0.1, text_lr_scale=4, head_lr_scale=2, weight_decay=0.3))
    optim.set_learning_rate(optimizer, 0.1)
    rate_and_decay = {}
    for name, parameter in model.named_parameters():
        (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        rate_and_decay[name] = (pytest.approx(group["lr"]), group["weight_decay"])
    assert rate_and_decay == {
        "logit_scale": (0.2, 0.0),
        "encoder.weight": (0.1, 0.3),
        "encoder.bias": (0.1, 0.0),
        "text_encoder.weight": (0.4, 0.0),
        "text_encoder.bias": (0.4, 0.0),
        "audio_projection.weight": (0.2, 0.3),
        "audio_projection.bias": (0.2, 0.0),
    }


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [optim.learning_rate(step, 200, 1, 1.0, config) for step in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[105] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    # The warm-up ends before a short stage does.
    assert max(optim.learning_rate(s, 20, 1, 1.0, config) for s in range(20)) == 1.0


@pytest.mark.parametrize("algorithm", ["adamw", "scaled_adam"])
def test_state_is_stored_by_name_and_continues_bit_exactly(algorithm: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()

    config = OptimConfig(algorithm=algorithm)
    model = Towers()
    optimizer = optim.build(model, config)
    run(model, optimizer, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in optim.state_tensors(model, optimizer).items()}
    run(model, optimizer, 3)
    restored = Towers()
    restored.load_state_dict(weights)
    restored_optimizer = optim.build(restored, config)
    optim.load_state_tensors(restored, restored_optimizer, state)
    run(restored, restored_optimizer, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])


def test_one_rate_is_one_group_of_scaled_adam() -> None:
    def sizes(**rates: float) -> list[int]:
        optimizer = optim.build(Towers(), OptimConfig(algorithm="scaled_adam", **rates))
        return [len(group["params"]) for group in optimizer.param_groups]

    assert sizes() == [7]
    # Groups are in the order of the parameters: logit_scale comes first, and has the rate of the heads.
    assert sizes(head_lr_scale=45.0) == [3, 4]


def test_foreign_state_is_refused() -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig())
    for key in ("nothing/exp_avg", "encoder.weight/exp_avg"):
        with pytest.raises(ValueError, match="fits no parameter"):
            optim.load_state_tensors(model, optimizer, {key: torch.zeros(9)})


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "scaled_adam"), ("scaled_adam", "adamw")])
def test_state_of_another_algorithm_is_refused(saved: str, loaded: str) -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig(algorithm=saved))
    model.loss().backward()
    optimizer.step()
    other = optim.build(model, OptimConfig(algorithm=loaded))
    with pytest.raises(ValueError, match=r"another optim\.algorithm"):
        optim.load_state_tensors(model, other, optim.state_tensors(model, optimizer))


def test_state_of_other_groups_is_refused() -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig(algorithm="scaled_adam", head_lr_scale=2.0))
    model.loss().backward()
    optimizer.step()
    other = optim.build(model, OptimConfig(algorithm="scaled_adam"))
    with pytest.raises(ValueError, match=r"has 2 groups .* and this run 1"):
        optim.load_state_tensors(model, other, optim.state_tensors(model, optimizer))


def test_the_average_is_a_mean_at_first_and_forgets_later() -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig(lr=0.1))
    seen, expected = [], torch.zeros(3, 4)
    for step in range(1, 7):
        model.loss().backward()
        optimizer.step()
        optim.update_average(optimizer, step, 4)
        seen.append(model.encoder.weight.detach().clone())
        expected = expected + (seen[-1] - expected) / min(step, 4)
        if step == 4:
            assert_agrees(expected, torch.stack(seen).mean(0), count=FEW, dtype=torch.float32)
    average = optim.state_tensors(model, optimizer)["encoder.weight/average"]
    assert_agrees(average, expected, count=FEW, dtype=torch.float32)
    with optim.averaged(optimizer):
        assert torch.equal(model.encoder.weight, average)
    assert torch.equal(model.encoder.weight, seen[-1])


def test_without_an_average_the_weights_are_used() -> None:
    model = Towers()
    optimizer = optim.build(model, OptimConfig())
    before = model.encoder.weight.detach().clone()
    with optim.averaged(optimizer):
        assert torch.equal(model.encoder.weight, before)
