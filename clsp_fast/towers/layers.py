"""Layers that several parts of the towers share: padding, dropout, activations, norms and pooling.

For the backward pass, the activations and `BiasNorm` keep only their input and at most two numbers per frame.
Semantics: Yao et al., arXiv 2310.11230, section 3; checked against the reference implementation in float64.

Shape suffixes: N clips, T frames, C channels, 1 a broadcast dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Ragged(NamedTuple):
    """Which frames of a batch are padding. For a batch of clips of equal length, None is used instead.

    `alone` selects the semantics of padding; see `clsp_fast.towers.zipformer`.
    """

    lengths_N: Tensor
    pad_NT: Tensor
    alone: bool

    def downsampled(self, factor: int) -> Ragged:
        """The same clips after downsampling. A group of `factor` frames is padding if its first frame is."""
        lengths_N = downsampled_lengths(self.lengths_N, factor)
        if torch.compiler.is_exporting():
            return make_ragged(lengths_N, frames_in_graph(lengths_N), alone=self.alone)
        return Ragged(lengths_N, self.pad_NT[:, ::factor], self.alone)


def make_ragged(lengths_N: Tensor, frames: int, *, alone: bool) -> Ragged:
    """`Ragged` of clips with `lengths_N` valid frames (int64), padded to `frames` frames."""
    return Ragged(lengths_N, torch.arange(frames, device=lengths_N.device) >= lengths_N[:, None], alone)


def frames_in_graph(lengths_N: Tensor) -> int:
    """The largest length, at least 2, as a size in an exported graph.

    The exporter treats the result as a new symbol. If this size were computed from the number of input frames
    by floor divisions, the exporter would have to compare it with other computed sizes. It would then build
    into the graph what is true only of its example input, such as an odd number of frames. Because of the
    minimum of 2, the exporter need not consider broadcasting of this size.
    """
    frames = cast(int, lengths_N.max().clamp(min=2).item())
    torch._check(frames >= 2)  # type: ignore[no-untyped-call]
    return frames


def downsampled_lengths(lengths_N: Tensor, factor: int) -> Tensor:
    """ceil(lengths / factor), int64."""
    return torch.div(lengths_N + (factor - 1), factor, rounding_mode="floor")


def drop_channels(x_NTC: Tensor, rate: float, *, training: bool) -> Tensor:
    """Dropout with one random draw per clip and channel, the same for all frames."""
    if not training or rate == 0.0:
        return x_NTC
    keep = x_NTC.new_empty(len(x_NTC), 1, x_NTC.shape[2]).bernoulli_(1.0 - rate)
    return x_NTC * keep.div_(1.0 - rate)


def checkpointed(layer: nn.Module, x: Tensor, *arguments: Tensor | None, recompute: bool) -> Tensor:
    """layer(x, *arguments). With `recompute`, only the inputs are kept for the backward pass, which computes
    the layer a second time."""
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(layer, x, *arguments, use_reentrant=False))
    return cast(Tensor, layer(x, *arguments))


class _Swoosh(torch.autograd.Function):
    """softplus(x - shift) - 0.08 x - offset. Only x is kept for the backward pass, in its dtype.

    Inputs of 16 bits are computed in float32: x - shift in 16 bits would lose digits of the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Above the threshold, torch returns z for softplus(z). At 40 this is exact even in float64.
        return F.softplus(wide - shift, threshold=40.0).add_(wide, alpha=-0.08).sub_(offset).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide - ctx.shift).sigmoid_().sub_(0.08).mul_(grads[0]).to(x.dtype), None, None


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return cast(Tensor, _Swoosh.apply(x, shift, offset))  # type: ignore[no-untyped-call]


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = softplus(x - 4) - 0.08 x - 0.035, any shape, same dtype."""
    return _swoosh(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = softplus(x - 1) - 0.08 x - 0.313261687 (0 at 0), any shape, same dtype."""
    return _swoosh(x, 1.0, 0.313261687)


class _BiasNorm(torch.autograd.Function):
    """y = x e^log_scale / rms(x - bias), with its gradient in closed form.

    Kept for the backward pass: x, and two numbers per frame.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_C: Tensor, log_scale: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x - bias_C, dim=-1, keepdim=True, dtype=exact)
        scale = log_scale.to(exact).exp() * math.sqrt(x.shape[-1]) / norm
        ctx.save_for_backward(x, bias_C, norm, scale)
        return cast(Tensor, x * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias_C, norm, scale = ctx.saved_tensors
        grad = grads[0]
        dot = (grad * x).sum(-1, keepdim=True, dtype=scale.dtype) * scale
        pull = (x - bias_C).mul_((dot / norm.square()).to(x.dtype))
        grad_bias = pull.sum(dim=tuple(range(x.dim() - 1)))
        return (grad * scale.to(x.dtype)).sub_(pull), grad_bias, dot.sum().to(bias_C.dtype)


class BiasNorm(nn.Module):
    """x e^log_scale / sqrt(mean_c (x - bias)^2) over the last dimension, without an epsilon."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _BiasNorm.apply(x, self.bias, self.log_scale))  # type: ignore[no-untyped-call]


class RunningNorm(nn.Module):
    """Standardises each channel with the mean and deviation of earlier batches.

    Unlike batch normalisation, it computes the same in training and at inference, and an embedding does not
    depend on the other clips of its batch. Pooled vectors share a large constant. Without this layer, the
    embeddings therefore start in one narrow cone, and contrastive training needs hundreds of steps to spread
    them.

    In training, `forward` records the batch's moments in `batch_moments` (2, C): the mean and the mean
    square. If a batch comes in several parts, the moments are averaged over all rows of the parts. After the
    batch, `update_running` averages them into the running moments. While `record_moments` is False, nothing
    is recorded.
    """

    mean: Tensor
    power: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("power", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0.0))
        self.batch_moments: Tensor | None = None
        self.recorded_rows, self.record_moments = 0, True

    def forward(self, x_NC: Tensor) -> Tensor:
        if self.training and self.record_moments:
            self._record(x_NC.detach().to(self.mean.dtype))
        # The minimum keeps the rounding errors of channels that hardly vary from being amplified.
        variance = torch.maximum(self.power - self.mean.square(), 1e-4 * self.power + 1e-6)
        return (x_NC - self.mean) * variance.rsqrt()

    def _record(self, x_NC: Tensor) -> None:
        moments, rows = torch.stack([x_NC.mean(0), x_NC.square().mean(0)]), len(x_NC)
        if self.batch_moments is None:
            self.batch_moments, self.recorded_rows = moments, rows
        else:
            self.recorded_rows += rows
            self.batch_moments = self.batch_moments.lerp(moments, rows / self.recorded_rows)

    @torch.no_grad()
    def update_running(self, bad: Tensor) -> None:
        """Updates the running moments with the recorded ones. They are an average over all batches at first,
        later over about the last 50. If the scalar `bad` is 1 instead of 0, they do not change."""
        if self.batch_moments is not None:
            self.batches += 1 - bad
            weight = (1 / self.batches).clamp(min=0.02)
            for running, recorded in zip((self.mean, self.power), self.batch_moments, strict=True):
                # Chosen with `where`: moments of a bad step may be NaN, and a weight of 0 times NaN is NaN.
                running.copy_(torch.where(bad > 0, running, running.lerp(recorded, weight)))
            self.batch_moments = None


def pool_mean(x_NTC: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean (N, C) over the frames of each clip, without padding."""
    return _means(x_NTC, [(torch.zeros_like(lengths_N), lengths_N)])[:, 0]


def pool_statistics(x_NTC: Tensor, lengths_N: Tensor) -> Tensor:
    """Statistics (N, 4 C) over the frames of each clip, without padding: mean, deviation, mean absolute
    change from frame to frame, and mean of the second half minus mean of the first. If the number of frames
    is odd, the middle frame belongs to both halves."""
    start_N, time_T = torch.zeros_like(lengths_N), torch.arange(x_NTC.shape[1], device=x_NTC.device)
    pad_NT = time_T >= lengths_N[:, None]
    x = x_NTC.masked_fill(pad_NT[:, :, None], 0.0).to(torch.promote_types(x_NTC.dtype, torch.float32))
    halves = [(start_N, (lengths_N + 1) // 2), (lengths_N // 2, lengths_N)]
    mean, first, second = _means(x, [(start_N, lengths_N), *halves]).unbind(1)
    power = _means(x.square(), [(start_N, lengths_N)])[:, 0]
    deviation = ((power - mean.square()).clamp(min=0.0) + 1e-5).sqrt()
    change = _means((x[:, 1:] - x[:, :-1]).abs(), [(start_N, lengths_N - 1)])[:, 0]
    return torch.cat([mean, deviation, change, second - first], dim=1).to(x_NTC.dtype)


def _means(x_NTC: Tensor, spans: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Means (N, len(spans), C) over the frames start <= t < stop of each span; 0 for an empty span."""
    time_T = torch.arange(x_NTC.shape[1], device=x_NTC.device)
    inside = [(time_T >= start[:, None]) & (time_T < stop[:, None]) for start, stop in spans]
    count = torch.stack([stop - start for start, stop in spans], dim=1).clamp(min=1)
    weights = torch.stack(inside, dim=1).to(x_NTC.dtype) / count[:, :, None].to(x_NTC.dtype)
    # The deviation is computed from a small difference of two such means, which 16 bits or TF32 would round
    # to 0.
    with torch.autocast(x_NTC.device.type, enabled=False):
        if x_NTC.device.type == "cuda" and x_NTC.dtype == torch.float32:
            return products_without_tf32(weights, x_NTC)
        return weights @ x_NTC


def products_without_tf32(x_NST: Tensor, y_NTC: Tensor) -> Tensor:
    """x @ y (N, S, C), whatever torch's settings of TF32 are, also in the backward pass. Needs a temporary
    tensor of S times the size of y."""
    return (x_NST[:, :, :, None] * y_NTC[:, None]).sum(2)
