"""ScaledAdam and Eden against 130 recorded steps of the reference recipe."""

from __future__ import annotations

import pytest
import torch
from numerics import FEW, assert_agrees, assert_as_exact
from torch import Tensor

from clsp_fast.training import scaled_adam
from clsp_fast.training.scaled_adam import ScaledAdam, eden

GROUPS = [["enc.w1", "enc.w2", "enc.b", "enc.s"], ["head.w", "head.logit_scale"]]
BASE_RATES = [0.0009999, 0.045]
STEPS, SECOND_EPOCH = 130, 65


def rates(step: int) -> list[float]:
    share = eden(step + 1, int(step >= SECOND_EPOCH), batches=100, epochs=2, warmup=20)
    return [base * share for base in BASE_RATES]


def trajectory(golden: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters after the recorded steps: "after<steps>.<name>" -> value."""
    parameters = {
        name: torch.nn.Parameter(golden[f"init.{name}"].to(dtype, copy=True))
        for group in GROUPS
        for name in group
    }
    optimizer = ScaledAdam([{"params": [parameters[name] for name in group]} for group in GROUPS], lr=1.0)
    snapshots = {}
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates(step), strict=True):
            group["lr"] = rate
        for name, parameter in parameters.items():
            parameter.grad = golden[f"grads.{name}"][step].to(dtype, copy=True)
        optimizer.step()
        for name, parameter in parameters.items():
            snapshots[f"after{step + 1}.{name}"] = parameter.detach().clone()
    return {name: value for name, value in snapshots.items() if name in golden}


def test_follows_the_recorded_steps(golden) -> None:
    recorded = golden("scaled_adam")
    computed, truth = trajectory(recorded), trajectory(recorded, torch.float64)
    assert len(computed) == 120
    for name, value in computed.items():
        # A step adds to a parameter once, or twice if it also changes the parameter's size.
        steps = int(name.split(".")[0].removeprefix("after"))
        assert_agrees(truth[name], recorded[name], count=2 * steps, dtype=torch.float32, name=name)
        assert_as_exact(value, recorded[name], truth[name], name=name)


def test_small_chunks_give_the_same_steps(golden, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden("scaled_adam")
    whole = trajectory(recorded)
    monkeypatch.setattr(scaled_adam, "_ELEMENTS_AT_ONCE", 31)
    for name, value in trajectory(recorded).items():
        assert torch.equal(value, whole[name]), name


def test_eden_has_the_recorded_rates(golden) -> None:
    expected = golden("scaled_adam")["eden_rates"]
    shares = torch.tensor([rates(step) for step in range(STEPS)], dtype=torch.float64)
    assert_agrees(shares, expected, count=100)  # two powers of ratios


def test_tensors_move_by_a_share_of_their_size() -> None:
    small, large = (torch.nn.Parameter(torch.full((50,), size)) for size in (0.01, 1.0))
    optimizer = ScaledAdam([small, large], lr=0.01)
    for _ in range(3):
        small.grad, large.grad = torch.linspace(-1, 1, 50), torch.linspace(-1, 1, 50)
        optimizer.step()
    assert_agrees((small - 0.01) * 100, large - 1, count=FEW, dtype=torch.float32, size=large)


def test_a_burst_of_gradients_is_clipped() -> None:
    moved = []
    for burst in (1.0, 1e4):
        parameter = torch.nn.Parameter(torch.ones(8))
        optimizer, generator = ScaledAdam([parameter], lr=0.0), torch.Generator().manual_seed(0)
        for step in range(102):
            parameter.grad = torch.randn(8, generator=generator) * (burst if step == 101 else 1.0)
            optimizer.step()
        moved.append(float(parameter.grad.norm()))
    assert moved[1] < 4 * moved[0]


def test_an_optimiser_of_one_scalar_learns() -> None:
    parameter = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = ScaledAdam([parameter], lr=0.1)
    for _ in range(5):
        parameter.grad = torch.tensor(1.0)
        optimizer.step()
    assert parameter < 1


def test_a_closure_and_missing_gradients() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = ScaledAdam([used, unused], lr=0.1)

    def closure() -> float:
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (used < 1).all()
    assert torch.equal(unused, torch.ones(3))


def test_a_flagged_step_changes_nothing() -> None:
    parameters = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.tensor(1.0))]
    optimizer = ScaledAdam(parameters, lr=0.1)

    def step(gradient: float, flag: float | None) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = None if flag is None else torch.tensor(flag)
        optimizer.step()
        states = [x.clone() for p in parameters for x in optimizer.state[p].values()]
        return (
            [p.detach().clone() for p in parameters] + states + [optimizer.param_groups[0]["history"].clone()]
        )

    before = step(1.0, None)
    for value, same in zip(step(float("nan"), 1.0), before, strict=True):
        assert torch.equal(value, same)
    assert not torch.equal(step(1.0, 0.0)[0], before[0])
