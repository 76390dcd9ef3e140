"""The convolutional front of the speech tower: log-mel at 100 Hz -> channels at 50 Hz.

T frames become (T - 7) // 2.

Shape suffixes: N clips, T frames, F mel bins, C channels, 1 a broadcast dimension.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsp_fast.config import ModelConfig
from clsp_fast.towers.layers import BiasNorm, Ragged, drop_channels, swoosh_l, swoosh_r

Frames = TypeVar("Frames", int, Tensor)

# The final value of the reference's schedule.
CONVNEXT_SKIP_RATE = 0.015
# Approximate mean and standard deviation of log-mel over speech. The initial weights are made for features of
# mean 0 and deviation 1.
LOG_MEL_MEAN, LOG_MEL_DEVIATION = -8.0, 4.0


def frames_after_front(frames: Frames) -> Frames:
    """Number of frames at 50 Hz after the front, for 9 or more `frames` at 100 Hz."""
    return (frames - 7) // 2


def standardise(features: Tensor) -> Tensor:
    """Log-mel scaled to about mean 0 and deviation 1 over speech in general. The constants are the same for
    all clips, so differences of level between clips are kept."""
    return (features - LOG_MEL_MEAN) / LOG_MEL_DEVIATION


def make_front(config: ModelConfig) -> nn.Module:
    """The front that `config.embed_channels` describes: three 2-d convolutions, or one over time."""
    return Conv2dSubsampling(config) if len(config.embed_channels) == 3 else Conv1dSubsampling(config)


class ConvNeXt(nn.Module):
    """x + pointwise2(SwooshL(pointwise1(depthwise 7x7(x)))) on images (N, C, T, F)."""

    def __init__(self, channels: int, *, skip_rate: float) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, 1)
        self.pointwise_conv2 = nn.Conv2d(3 * channels, channels, 1)
        self.skip_rate = skip_rate

    def forward(self, x_NCTF: Tensor) -> Tensor:
        branch = self.pointwise_conv2(swoosh_l(self.pointwise_conv1(self.depthwise_conv(x_NCTF))))
        if self.training and self.skip_rate > 0:
            branch = branch * (torch.rand(len(x_NCTF), 1, 1, 1, device=x_NCTF.device) >= self.skip_rate)
        return cast(Tensor, branch.add_(x_NCTF))


class Conv2dSubsampling(nn.Module):
    """Log-mel (N, T, F) at 100 Hz -> (N, (T - 7) // 2, C) at 50 Hz.

    Through the convolutions, output frame t depends on the input frames 2t .. 2t + 8. Through the ConvNeXt
    layer it also depends on three output frames to either side, so on frames up to 2t + 14. In the front,
    only this layer can make a clip's result depend on frames beyond its end.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        first, second, third = config.embed_channels
        # The keys are indices in the reference's Sequential, whose other entries have no parameters.
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(1, first, 3, padding=(0, 1)),
                "4": nn.Conv2d(first, second, 3, stride=2),
                "7": nn.Conv2d(second, third, 3, stride=(1, 2)),
            }
        )
        self.convnext = ConvNeXt(third, skip_rate=CONVNEXT_SKIP_RATE if config.regularize else 0.0)
        bands = ((config.feature_dim - 1) // 2 - 1) // 2
        self.out = nn.Linear(third * bands, config.stacks[0].dim)
        self.out_norm = BiasNorm(config.stacks[0].dim)
        self.dropout = config.dropout

    def forward(self, features_NTF: Tensor, ragged: Ragged | None) -> Tensor:
        # With the strides of a channels-last image, every convolution below is several times faster.
        x = features_NTF[..., None].permute(0, 3, 1, 2)
        for conv in self.conv.values():
            x = swoosh_r(conv(x))
        if ragged is not None and ragged.alone:
            x = x.masked_fill(ragged.pad_NT[:, None, :, None], 0.0)
        x = self.convnext(x).transpose(1, 2).flatten(2)
        return drop_channels(self.out_norm(self.out(x)), self.dropout, training=self.training)


class Conv1dSubsampling(nn.Module):
    """One convolution over time with the mel bins as channels, SwooshR, linear, BiasNorm.

    Output frame t depends on the input frames 2t .. 2t + 8, as after the convolutions of Conv2dSubsampling.
    This front costs much less. It is for models that train in minutes on a CPU, and is not in the reference.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(config.feature_dim, config.embed_channels[0], 9, stride=2)
        self.out = nn.Linear(config.embed_channels[0], config.stacks[0].dim)
        self.out_norm = BiasNorm(config.stacks[0].dim)
        self.dropout = config.dropout

    def forward(self, features_NTF: Tensor, ragged: Ragged | None) -> Tensor:
        image = features_NTF.transpose(1, 2)[:, :, None]
        x = F.conv2d(image, self.conv.weight[:, :, None], self.conv.bias, stride=(1, 2))
        x = self.out_norm(self.out(swoosh_r(x[:, :, 0].transpose(1, 2))))
        return drop_channels(x, self.dropout, training=self.training)

    @torch.no_grad()
    def fold_standardisation(self) -> None:
        """Fold `standardise` into the convolution's weights and bias, in place."""
        self.conv.weight.div_(LOG_MEL_DEVIATION)
        bias = cast(Tensor, self.conv.bias)
        bias.sub_(self.conv.weight.sum(dim=(1, 2)), alpha=LOG_MEL_MEAN)
