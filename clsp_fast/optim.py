"""AdamW with a learning rate per part of the model, the schedule of a stage, an average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from clsp_fast.config import OptimConfig

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


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a CLSP.

    Each group carries `scale`, its learning rate relative to the speech tower's. Matrices and filters of the
    speech tower and the heads decay; vectors, scalars and the text tower do not: decay of a small bag of
    token embeddings forgets rare words faster than they are seen.
    """
    scales = {"speech": 1.0, "text": config.text_lr_scale, "head": config.head_lr_scale}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        groups.setdefault((part, part != "text" and parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": own, "scale": scales[part], "weight_decay": config.weight_decay if decays else 0.0}
            for (part, decays), own in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=1e-8,
        fused=True,
    )


def learning_rate(step: int, steps: int, peak: float, config: OptimConfig) -> float:
    """Rate of step `step` of a stage of `steps` steps: linear warm-up, then a cosine to final_lr_share of
    the peak."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_lr_share
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Takes the weights after `step` steps (counted from 1) up into their average.

    That is the mean of all at first, and forgets with a time constant of `steps` later. It is a part of the
    optimiser's state, "average", and so of every checkpoint.
    """
    own = [(p, state) for p, state in optimizer.state.items() if state]
    fresh = [(p, state) for p, state in own if "average" not in state]
    for parameter, state in fresh:
        state["average"] = parameter.detach().clone()
    if len(fresh) < len(own):
        averages, weights = zip(*((state["average"], p.detach()) for p, state in own), strict=True)
        torch._foreach_lerp_(averages, weights, 1 / min(step, steps))


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The model has its averaged weights inside, where there are any; nothing is copied."""
    own = [(p, state) for p, state in optimizer.state.items() if "average" in state]
    _swap(own)
    try:
        yield
    finally:
        _swap(own)


def _swap(own: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    for parameter, state in own:
        parameter.data, state["average"] = state["average"], parameter.data


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name: "<name>/<key>" -> tensor. Names survive a change of group
    order."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `state_tensors`.

    Raises:
        ValueError: the tensors are not those of this model's parameters.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        fits = name in parameters and (value.ndim == 0 or value.shape == parameters[name].shape)
        if not fits:
            raise ValueError(f"optimiser state {key!r} of shape {tuple(value.shape)} fits no parameter")
        device = parameters[name].device
        optimizer.state[parameters[name]][field] = value.to(device)
