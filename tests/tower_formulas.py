"""The speech tower from its formulas, in loops: the oracle for configurations without recorded data.

It shares only the configuration and the parameters' names with clsp_fast. Padding has the semantics "batch",
as in the reference. For one clip without padding, "alone" gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clsp_fast.config import ModelConfig, StackConfig

Weights = Mapping[str, Tensor]


def swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), x - shift) - 0.08 * x - offset


def swoosh_l(x: Tensor) -> Tensor:
    return swoosh(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    return swoosh(x, 1.0, 0.313261687)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.tensor(0.0, dtype=x.dtype))


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean = ((x - w[f"{name}.bias"]) ** 2).mean(-1, keepdim=True)
    return x * w[f"{name}.log_scale"].exp() * mean**-0.5


def front(w: Weights, x: Tensor) -> Tensor:
    def conv(name: str, image: Tensor, **how: object) -> Tensor:
        name = f"encoder_embed.{name}"
        return F.conv2d(image, w[f"{name}.weight"], w[f"{name}.bias"], **how)  # type: ignore[arg-type]

    x = swoosh_r(conv("conv.0", x[:, None], padding=(0, 1)))
    x = swoosh_r(conv("conv.4", x, stride=2))
    x = swoosh_r(conv("conv.7", x, stride=(1, 2)))
    branch = conv("convnext.depthwise_conv", x, padding=3, groups=x.shape[1])
    branch = swoosh_l(conv("convnext.pointwise_conv1", branch))
    x = x + conv("convnext.pointwise_conv2", branch)
    x = rearrange(x, "n c t f -> n t (c f)")
    return norm(w, "encoder_embed.out_norm", linear(w, "encoder_embed.out", x))


def encoding(dim: int, offset: int) -> Tensor:
    root = math.sqrt(dim)
    sign = (offset > 0) - (offset < 0)
    squashed = root * sign * (math.log(abs(offset) + root) - math.log(root))
    angle = math.atan(squashed * 2 * math.pi / dim)
    row = [f(k * angle) for k in range(1, dim // 2 + 1) for f in (math.cos, math.sin)]
    return torch.tensor([*row[:-1], 1.0], dtype=torch.float64)


def attention(w: Weights, pre: str, x: Tensor, pad: Tensor, stack: StackConfig, pos_dim: int) -> Tensor:
    frames, heads, dq = x.shape[1], stack.num_heads, stack.query_head_dim
    z = linear(w, f"{pre}.in_proj", x)
    parts = z[..., : heads * dq], z[..., heads * dq : 2 * heads * dq], z[..., 2 * heads * dq :]
    q, k, p = (rearrange(part, "n t (h d) -> n t h d", h=heads) for part in parts)
    score = torch.einsum("nihd,njhd->nhij", q, k)
    for offset in range(1 - frames, frames):
        position = w[f"{pre}.linear_pos.weight"] @ encoding(pos_dim, offset).to(x)
        position = rearrange(position, "(h d) -> h d", h=heads)
        i = torch.arange(max(0, -offset), min(frames, frames - offset))
        score[:, :, i, i + offset] = score[:, :, i, i + offset] + (p[:, i] * position).sum(-1).transpose(1, 2)
    return torch.where(pad[:, None, None, :], -1000.0, score).softmax(-1)


def self_attention(w: Weights, pre: str, x: Tensor, weights: Tensor) -> Tensor:
    values = rearrange(linear(w, f"{pre}.in_proj", x), "n t (h d) -> n t h d", h=weights.shape[1])
    mixed = torch.einsum("nhij,njhd->nihd", weights, values)
    return linear(w, f"{pre}.out_proj", rearrange(mixed, "n t h d -> n t (h d)"))


def nonlin_attention(w: Weights, pre: str, x: Tensor, weights: Tensor) -> Tensor:
    s, a, y = linear(w, f"{pre}.in_proj", x).chunk(3, -1)
    return linear(w, f"{pre}.out_proj", (weights[:, 0] @ (a * s.tanh())) * y)


def feed_forward(w: Weights, pre: str, x: Tensor) -> Tensor:
    return linear(w, f"{pre}.out_proj", swoosh_l(linear(w, f"{pre}.in_proj", x)))


def conv_module(w: Weights, pre: str, x: Tensor, pad: Tensor) -> Tensor:
    a, s = linear(w, f"{pre}.in_proj", x).chunk(2, -1)
    gated = torch.where(pad[..., None], 0.0, a * s.sigmoid())
    kernel = w[f"{pre}.depthwise_conv.weight"]
    x = F.conv1d(
        gated.transpose(1, 2),
        kernel,
        w[f"{pre}.depthwise_conv.bias"],
        padding=kernel.shape[2] // 2,
        groups=kernel.shape[0],
    )
    return linear(w, f"{pre}.out_proj", swoosh_r(x.transpose(1, 2)))


def layer(w: Weights, pre: str, x0: Tensor, pad: Tensor, stack: StackConfig, pos_dim: int) -> Tensor:
    weights = attention(w, f"{pre}.self_attn_weights", x0, pad, stack, pos_dim)
    x = x0 + feed_forward(w, f"{pre}.feed_forward1", x0)
    x = x + nonlin_attention(w, f"{pre}.nonlin_attention", x, weights)
    x = x + self_attention(w, f"{pre}.self_attn1", x, weights)
    x = x + conv_module(w, f"{pre}.conv_module1", x, pad)
    x = x + feed_forward(w, f"{pre}.feed_forward2", x)
    x = x0 + (x - x0) * w[f"{pre}.bypass_mid.bypass_scale"]
    x = x + self_attention(w, f"{pre}.self_attn2", x, weights)
    x = x + conv_module(w, f"{pre}.conv_module2", x, pad)
    x = x + feed_forward(w, f"{pre}.feed_forward3", x)
    return x0 + (norm(w, f"{pre}.norm", x) - x0) * w[f"{pre}.bypass.bypass_scale"]


def downsample(bias: Tensor, x: Tensor) -> Tensor:
    share, last = bias.softmax(0), x.shape[1] - 1
    groups = range(math.ceil(x.shape[1] / len(bias)))
    rows = [
        sum(share[k] * x[:, min(g * len(bias) + k, last)] for k in range(len(bias)))  # type: ignore[misc]
        for g in groups
    ]
    return torch.stack(rows, 1)


def frames(w: Weights, config: ModelConfig, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's output and its lengths; features (N, T, F) with T = max(lengths)."""
    x = front(w, features)
    lengths = (lengths - 7) // 2
    pad = torch.arange(x.shape[1]) >= lengths[:, None]
    outputs = []
    for s, stack in enumerate(config.stacks):
        x = F.pad(x, (0, max(0, stack.dim - x.shape[2])))[..., : stack.dim]
        pre, ds = f"encoder.encoders.{s}", stack.downsampling
        z = x if ds == 1 else downsample(w[f"{pre}.downsample.bias"], x)
        inner = pre if ds == 1 else f"{pre}.encoder"
        for n in range(stack.num_layers):
            z = layer(w, f"{inner}.layers.{n}", z, pad[:, ::ds], stack, config.pos_dim)
        if ds > 1:
            up = torch.stack([z[:, t // ds] for t in range(x.shape[1])], 1)
            z = x + (up - x) * w[f"{pre}.out_combiner.bypass_scale"]
        x = z
        outputs.append(x)
    for output in outputs[-2::-1]:
        x = torch.cat([x, output[..., x.shape[2] :]], -1)
    for name in ("encoder.downsample_output.bias", "encoder_downsample.bias"):
        if name in w:
            x, lengths = downsample(w[name], x), -(-lengths // len(w[name]))
    return x, lengths
