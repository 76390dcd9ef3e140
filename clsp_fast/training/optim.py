"""The optimiser with a learning rate for each part of the model, the schedule of the learning rate, and the
running average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from clsp_fast.config import OptimConfig
from clsp_fast.training.scaled_adam import ScaledAdam, eden

_PARTS = {
    "encoder_embed": "speech",
    "encoder": "speech",
    "encoder_downsample": "speech",
    "text_encoder": "text",
}


def part_of(name: str) -> str:
    """The part of a CLSP that a parameter belongs to: "speech", "text" or "head" (projections,
    logit_scale)."""
    return _PARTS.get(name.split(".")[0], "head")


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of `config.algorithm` over the trainable parameters of a CLSP.

    Each group has a `scale`: its learning rate relative to the speech tower's.

    With AdamW, weight decay applies to the matrices and filters of the speech tower and the heads, but not to
    vectors and scalars. It does not apply to the text tower either: there it would shrink the embeddings of
    rare words faster than training restores them. With ScaledAdam, nothing decays. Parts with the same scale
    form one group, and the gradients of a group are clipped together.
    """
    scales = {"speech": 1.0, "text": config.text_lr_scale, "head": config.head_lr_scale}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        decays = config.algorithm == "adamw" and part != "text" and parameter.ndim >= 2
        key = (scales[part], config.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    if config.algorithm == "scaled_adam":
        scaled = [{"params": group, "scale": scale} for (scale, _), group in groups.items()]
        return ScaledAdam(scaled, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(
        [
            {"params": group, "scale": scale, "weight_decay": decay}
            for (scale, decay), group in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=1e-8,
        fused=True,
    )


def learning_rate(step: int, steps: int, steps_per_epoch: int, peak: float, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) in a stage of `steps` steps: warm-up, then `config.schedule`."""
    if config.schedule == "eden":
        factor = eden(
            step + 1,
            step // steps_per_epoch,
            batches=config.lr_batches,
            epochs=config.lr_epochs,
            warmup=config.warmup_steps,
        )
        return peak * factor
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_lr_share
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of each group to `rate` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def step_unless(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """One step of the optimiser. If the scalar `bad` is 1 instead of 0, it changes no weight and no moment.

    torch's fused AdamW reads such a flag on the device, so the host does not wait for it. The attribute has
    the name that torch's gradient scaler uses.
    """
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Adds the weights after `step` steps (from 1) to their running average.

    During the first `steps` steps, the average is the mean of all weights so far. Later it is an exponential
    average with a time constant of `steps` steps. A bad step adds the unchanged weights. Checkpoints contain
    the average, because it is stored in the optimiser's state, as "average".
    """
    updated = [(p, state) for p, state in optimizer.state.items() if state]
    fresh = [(p, state) for p, state in updated if "average" not in state]
    for parameter, state in fresh:
        state["average"] = parameter.detach().clone()
    if len(fresh) < len(updated):
        averages, weights = zip(*((state["average"], p.detach()) for p, state in updated), strict=True)
        torch._foreach_lerp_(averages, weights, 1 / min(step, steps))


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In this context the model has the running averages of its weights, if there are any."""
    pairs = [(p, state) for p, state in optimizer.state.items() if "average" in state]
    _swap(pairs)
    try:
        yield
    finally:
        _swap(pairs)


def _swap(pairs: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    for parameter, state in pairs:
        parameter.data, state["average"] = state["average"], parameter.data


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by name: "<parameter>/<key>", and "@<number of the group>/history".

    torch's own state_dict numbers the parameters. Names stay valid when the order of the parameters changes.
    """
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for number, group in enumerate(optimizer.param_groups):
        if "history" in group:
            tensors[f"@{number}/history"] = group["history"]
    return tensors


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `state_tensors`.

    Raises:
        ValueError: the tensors do not fit this model's parameters, or belong to another optimiser.
    """
    parameters = dict(model.named_parameters())
    groups = {f"@{number}": group for number, group in enumerate(optimizer.param_groups)}
    fields = {key.rpartition("/")[2] for key in tensors}
    if fields and ("delta" in fields) != isinstance(optimizer, ScaledAdam):
        raise ValueError("the checkpoint was made with another optim.algorithm; give the same one")
    histories = {key.rpartition("/")[0] for key in tensors if key.startswith("@")}
    if histories and histories != groups.keys():
        raise ValueError(
            f"the checkpoint has {len(histories)} groups of parameters and this run {len(groups)}: "
            "give the optim.text_lr_scale and optim.head_lr_scale that it was made with"
        )
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name in groups:
            groups[name][field] = value
            continue
        any_shape = value.ndim == 0 or field == "sizes"
        if name not in parameters or not (any_shape or value.shape == parameters[name].shape):
            raise ValueError(f"optimiser state {key!r} of shape {tuple(value.shape)} fits no parameter")
        parameter = parameters[name]
        optimizer.state[parameter][field] = value if field == "sizes" else value.to(parameter.device)
