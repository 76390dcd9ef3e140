"""The encoder of the speech tower, a Zipformer, batch-first.

Semantics and state_dict names are those of Zipformer2 in icefall (Yao et al., arXiv 2310.11230; CLSP recipe).
In evaluation mode both compute the same. Balancer and Whiten only change gradients in training, and are left
out.

Padding. `Ragged` says which frames of a batch are beyond a clip's end. With `alone=True`, every clip has the
result that the reference computes for it in a batch of one: the input of the front's ConvNeXt layer is zero
beyond the end, and every downsampling repeats the last frame of the clip. With `alone=False`, a clip has the
reference's result for the padded batch, where these two layers use the padding as input. All other layers
mask it.

Shape suffixes: N clips, T frames, C channels, H heads, D dimensions of a head, R = 2T-1 relative offsets,
K frames of a group, 1 a broadcast dimension.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clsp_fast.config import ModelConfig, StackConfig
from clsp_fast.towers.front import Conv1dSubsampling
from clsp_fast.towers.layers import BiasNorm, Ragged, checkpointed, drop_channels, swoosh_l, swoosh_r

# The final values of the reference's schedules. The CLSP recipe trains with them from the start.
FEATURE_MASK_RATE = 0.125
POSITION_DROPOUT = 0.15
LAYER_SKIP_RATE = 0.035


def _encode_offsets(pos_dim: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Encodings (2 reach - 1, pos_dim) of the offsets -(reach - 1) .. reach - 1."""
    offset = torch.arange(-(reach - 1), reach, dtype=dtype, device=device)[:, None]
    root = math.sqrt(pos_dim)
    compressed = root * offset.sign() * ((offset.abs() + root).log() - math.log(root))
    frequency = 1 + torch.arange(pos_dim // 2, device=device)
    angle = (compressed / (pos_dim / (2.0 * math.pi))).atan() * frequency
    table = rearrange([angle.cos(), angle.sin()], "two r d -> r (d two)")
    table[:, -1] = 1.0
    return table


@functools.lru_cache(maxsize=64)
def _offset_table(pos_dim: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`_encode_offsets`, cached and shared by all layers: it must not be written to."""
    with torch.inference_mode(False), torch.no_grad():
        # Computed in float64. The reference uses float32, where the logarithm rounds differently on each
        # machine; the highest frequencies amplify that to 2e-6 in the table.
        return _encode_offsets(pos_dim, reach, torch.float64, torch.device("cpu")).to(device, dtype)


def position_encoding(pos_dim: int, frames: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Relative position encoding (2 frames - 1, pos_dim). Row r encodes the offset key - query =
    r - frames + 1."""
    if torch.compiler.is_exporting():  # a slice of a cached table would fix the number of frames
        return _encode_offsets(pos_dim, frames, dtype, device)
    reach = max(256, 1 << (frames - 1).bit_length())
    return _offset_table(pos_dim, reach, dtype, device)[reach - frames : reach + frames - 1]


class AttentionWeights(nn.Module):
    """softmax_j(q_i . k_j + p_i . W_pos pe(j - i)), (N, H, T, T). Three modules of a layer share them."""

    def __init__(self, stack: StackConfig, pos_dim: int) -> None:
        super().__init__()
        self.heads, self.query_dim, self.pos_dim = stack.num_heads, stack.query_head_dim, stack.pos_head_dim
        self.in_proj = nn.Linear(stack.dim, stack.num_heads * (2 * stack.query_head_dim + stack.pos_head_dim))
        self.linear_pos = nn.Linear(pos_dim, stack.num_heads * stack.pos_head_dim, bias=False)

    def forward(self, x_NTC: Tensor, encoding_RD: Tensor, pad_NT: Tensor | None) -> Tensor:
        clips, frames, _ = x_NTC.shape
        queries = self.heads * self.query_dim
        parts = self.in_proj(x_NTC).split([queries, queries, self.heads * self.pos_dim], dim=2)
        q, k, p = (part.view(clips, frames, self.heads, -1).transpose(1, 2).flatten(0, 1) for part in parts)
        by_offset_HDR = self.linear_pos(encoding_RD).view(-1, self.heads, self.pos_dim).permute(1, 2, 0)
        by_offset = p.view(clips, self.heads, frames, -1) @ by_offset_HDR
        score = torch.baddbmm(_by_key(by_offset), q, k.transpose(1, 2))
        score_NHTT = score.view(clips, self.heads, frames, frames)
        if pad_NT is not None:
            score_NHTT = score_NHTT.masked_fill_(pad_NT[:, None, None, :], -math.inf)
        # Without a dtype, autocast would compute the softmax in float32 and cast it for each of three uses.
        return score_NHTT.softmax(dim=3, dtype=score_NHTT.dtype)


def _by_key(by_offset_NHTR: Tensor) -> Tensor:
    """Scores for each key, (N H, T, T), from scores for each relative offset: a view.

    Row i of the input holds the offsets -(T-1) .. T-1, so key j is in column T-1-i+j.
    """
    clips, heads, frames, offsets = by_offset_NHTR.shape
    if torch.compiler.is_exporting():  # ONNX has no strided views
        time_T = torch.arange(frames, device=by_offset_NHTR.device)
        column_TT = (frames - 1) - time_T[:, None] + time_T
        return by_offset_NHTR.flatten(0, 1).gather(2, column_TT.expand(clips * heads, frames, frames))
    size, stride = (clips * heads, frames, frames), (frames * offsets, offsets - 1, 1)
    return by_offset_NHTR.contiguous().as_strided(size, stride, frames - 1)


class SelfAttention(nn.Module):
    """Projection of the weighted sum of values, with one set of weights per head."""

    def __init__(self, stack: StackConfig) -> None:
        super().__init__()
        self.heads = stack.num_heads
        self.in_proj = nn.Linear(stack.dim, stack.num_heads * stack.value_head_dim)
        self.out_proj = nn.Linear(stack.num_heads * stack.value_head_dim, stack.dim)

    def forward(self, x_NTC: Tensor, weights_NHTT: Tensor) -> Tensor:
        clips, frames, _ = x_NTC.shape
        values_NHTD = self.in_proj(x_NTC).view(clips, frames, self.heads, -1).transpose(1, 2)
        return cast(Tensor, self.out_proj((weights_NHTT @ values_NHTD).transpose(1, 2).flatten(2)))


class NonlinAttention(nn.Module):
    """out_proj((A_0 (a * tanh s)) * y): attention of the first head between two gates.

    s, a and y are projections of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels // 4
        self.in_proj = nn.Linear(channels, 3 * hidden)
        self.out_proj = nn.Linear(hidden, channels)

    def forward(self, x_NTC: Tensor, weights_NTT: Tensor) -> Tensor:
        gate, value, out_gate = self.in_proj(x_NTC).chunk(3, dim=2)
        return cast(Tensor, self.out_proj((weights_NTT @ (value * gate.tanh())) * out_gate))


class FeedForward(nn.Module):
    """out_proj(SwooshL(in_proj(x)))."""

    def __init__(self, channels: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, hidden)
        self.out_proj = nn.Linear(hidden, channels)
        self.dropout = dropout

    def forward(self, x_NTC: Tensor) -> Tensor:
        hidden = drop_channels(swoosh_l(self.in_proj(x_NTC)), self.dropout, training=self.training)
        return cast(Tensor, self.out_proj(hidden))


class ConvModule(nn.Module):
    """Gate, depthwise convolution over time, SwooshR, projection."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, 2 * channels)
        self.depthwise_conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x_NTC: Tensor, pad_NT: Tensor | None) -> Tensor:
        x = F.glu(self.in_proj(x_NTC), dim=2)
        if pad_NT is not None:
            x = x.masked_fill(pad_NT[:, :, None], 0.0)
        conv = self.depthwise_conv
        # (N, T, C) is the memory layout of a channels-last image of height 1. A convolution of images
        # needs no transposed copy of x, and its kernel is much faster.
        image = F.conv2d(
            x.transpose(1, 2)[:, :, None],
            conv.weight[:, :, None],
            conv.bias,
            padding=(0, conv.kernel_size[0] // 2),
            groups=conv.groups,
        )
        return cast(Tensor, self.out_proj(swoosh_r(image[:, :, 0].transpose(1, 2))))


class Bypass(nn.Module):
    """original + (x - original) * bypass_scale, with one scale per channel.

    In training, the result of a share `skip_rate` of the clips is `original`.
    """

    def __init__(self, channels: int, *, skip_rate: float = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.skip_rate = skip_rate

    def forward(self, original_NTC: Tensor, x_NTC: Tensor) -> Tensor:
        scale: Tensor = self.bypass_scale
        if self.training and self.skip_rate > 0:
            scale = scale * (torch.rand(len(x_NTC), 1, 1, device=scale.device) >= self.skip_rate)
        dtype = original_NTC.dtype  # under autocast, that of x may differ
        return original_NTC.lerp(x_NTC.to(dtype), scale.to(dtype))


class ZipformerLayer(nn.Module):
    """One layer. Three modules share the attention weights, which are computed from the layer's input."""

    bypass_scale: Tensor

    def __init__(self, config: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        channels, hidden = stack.dim, stack.feedforward_dim
        # The reference's checkpoints contain this tensor, but no forward pass uses it.
        self.register_buffer("bypass_scale", torch.full((channels,), 0.5))
        self.self_attn_weights = AttentionWeights(stack, config.pos_dim)
        self.feed_forward1 = FeedForward(channels, 3 * hidden // 4, dropout=config.dropout)
        self.nonlin_attention = NonlinAttention(channels)
        self.self_attn1 = SelfAttention(stack)
        self.conv_module1 = ConvModule(channels, stack.kernel)
        self.feed_forward2 = FeedForward(channels, hidden, dropout=config.dropout)
        self.bypass_mid = Bypass(channels)
        self.self_attn2 = SelfAttention(stack)
        self.conv_module2 = ConvModule(channels, stack.kernel)
        self.feed_forward3 = FeedForward(channels, 5 * hidden // 4, dropout=config.dropout)
        self.norm = BiasNorm(channels)
        skip_rate = LAYER_SKIP_RATE * math.sqrt(stack.downsampling) if config.regularize else 0.0
        self.bypass = Bypass(channels, skip_rate=skip_rate)

    def forward(self, x_NTC: Tensor, encoding_RD: Tensor, pad_NT: Tensor | None) -> Tensor:
        original = x = x_NTC
        weights = self.self_attn_weights(x, encoding_RD, pad_NT)
        # The residual is added in place: each result is new memory that no backward pass reads.
        x = self.feed_forward1(x).add_(x)
        x = self.nonlin_attention(x, weights[:, 0]).add_(x)
        x = self.self_attn1(x, weights).add_(x)
        x = self.conv_module1(x, pad_NT).add_(x)
        x = self.feed_forward2(x).add_(x)
        x = self.bypass_mid(original, x)
        x = self.self_attn2(x, weights).add_(x)
        x = self.conv_module2(x, pad_NT).add_(x)
        x = self.feed_forward3(x).add_(x)
        return cast(Tensor, self.bypass(original, self.norm(x)))


class ZipformerStack(nn.Module):
    """Layers of one width at one frame rate."""

    def __init__(self, config: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ZipformerLayer(config, stack) for _ in range(stack.num_layers))
        self.pos_dim = config.pos_dim
        self.position_dropout = POSITION_DROPOUT if config.regularize else 0.0
        self.recompute = False

    def forward(self, x_NTC: Tensor, ragged: Ragged | None, mask_N1C: Tensor | None) -> Tensor:
        x = x_NTC if mask_N1C is None else x_NTC * mask_N1C
        encoding_RD = position_encoding(self.pos_dim, x.shape[1], dtype=x.dtype, device=x.device)
        encoding_RD = F.dropout(encoding_RD, self.position_dropout, self.training)
        for layer in self.layers:
            x = checkpointed(
                layer, x, encoding_RD, None if ragged is None else ragged.pad_NT, recompute=self.recompute
            )
            x = x if mask_N1C is None else x * mask_N1C
        return x


class Downsample(nn.Module):
    """Mean of each group of `factor` frames, weighted with softmax(bias). The last frame is repeated to fill
    the last group."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x_NTC: Tensor, ragged: Ragged | None) -> tuple[Tensor, Ragged | None]:
        """The means of the groups, and which groups are padding."""
        clips, frames, channels = x_NTC.shape
        factor = len(self.bias)
        slow = None if ragged is None else ragged.downsampled(factor)
        x = x_NTC
        if ragged is not None and ragged.alone:
            index = (ragged.lengths_N - 1)[:, None, None].expand(clips, 1, channels)
            x = torch.where(ragged.pad_NT[:, :, None], x.gather(1, index), x)
        if torch.compiler.is_exporting():
            assert slow is not None
            time_T = torch.arange(slow.pad_NT.shape[1] * factor, device=x.device)
            x = x.index_select(1, time_T.clamp(max=frames - 1))
        elif missing := -frames % factor:
            x = torch.cat([x, x[:, -1:].expand(clips, missing, channels)], dim=1)
        groups_NTKC = rearrange(x, "n (t k) c -> n t k c", k=factor)
        return (groups_NTKC * self.bias.softmax(0).to(x.dtype)[:, None]).sum(dim=2, dtype=x.dtype), slow


class DownsampledStack(nn.Module):
    """A stack at a lower frame rate. `out_combiner` combines its output with the input."""

    def __init__(self, config: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        self.factor = stack.downsampling
        self.downsample = Downsample(stack.downsampling)
        self.encoder = ZipformerStack(config, stack)
        self.out_combiner = Bypass(stack.dim)

    def forward(self, x_NTC: Tensor, ragged: Ragged | None, mask_N1C: Tensor | None) -> Tensor:
        slow = self.encoder(*self.downsample(x_NTC, ragged), mask_N1C)
        if torch.compiler.is_exporting():
            # Not by a slice: the exporter would compare its end with the number of frames.
            group_T = torch.arange(x_NTC.shape[1], device=slow.device) // self.factor
            fast = slow.index_select(1, group_T)
        else:
            fast = slow.repeat_interleave(self.factor, dim=1)[:, : x_NTC.shape[1]]
        return cast(Tensor, self.out_combiner(x_NTC, fast))


class Zipformer(nn.Module):
    """Stacks at several frame rates. The output has the channels of the widest stack."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stacks = config.stacks
        self.regularize = config.regularize
        self.encoders = nn.ModuleList(
            (ZipformerStack if stack.downsampling == 1 else DownsampledStack)(config, stack)
            for stack in self.stacks
        )
        if config.output_downsampling_factor == 2:
            self.downsample_output = Downsample(2)

    def forward(self, x_NTC: Tensor, ragged: Ragged | None) -> Tensor:
        """(N, T, C of the first stack) -> (N, T or ceil(T / 2), C of the widest stack)."""
        masks = self._feature_masks(x_NTC)
        outputs: list[Tensor] = []
        x = x_NTC
        for stack, encoder, mask in zip(self.stacks, self.encoders, masks, strict=True):
            x = encoder(_with_channels(x, stack.dim), ragged, mask)
            outputs.append(x)
        for output in reversed(outputs):
            if output.shape[2] > x.shape[2]:
                x = torch.cat([x, output[..., x.shape[2] :]], dim=2)
        return self.downsample_output(x, ragged)[0] if hasattr(self, "downsample_output") else x

    def _feature_masks(self, x_NTC: Tensor) -> list[Tensor | None]:
        """For each stack a mask (N, 1, C) of zeros and ones, or None outside training.

        Each clip has two random draws. The first keeps or drops all channels from `unmasked_dim` on, the
        second only the upper half of these.
        """
        if not self.training or not self.regularize:
            return [None] * len(self.stacks)
        keep_N12 = torch.rand(len(x_NTC), 1, 2, device=x_NTC.device) >= FEATURE_MASK_RATE
        keep_N12[..., 1] &= keep_N12[..., 0]
        masks: list[Tensor | None] = []
        for stack in self.stacks:
            mask = x_NTC.new_ones(len(x_NTC), 1, stack.dim)
            middle = stack.unmasked_dim + (stack.dim - stack.unmasked_dim) // 2
            mask[..., stack.unmasked_dim : middle] = keep_N12[..., :1]
            mask[..., middle:] = keep_N12[..., 1:]
            masks.append(mask)
        return masks


def _with_channels(x_NTC: Tensor, channels: int) -> Tensor:
    """The first `channels` channels. If x has fewer, zeros are appended."""
    missing = channels - x_NTC.shape[2]
    return x_NTC[..., :channels].contiguous() if missing <= 0 else F.pad(x_NTC, (0, missing))


# Initial scales of the reference's ScaledLinear and ScaledConv2d layers, by the end of the module's name.
_INITIAL_SCALE = {
    "self_attn_weights.linear_pos": 0.05,
    "self_attn1.out_proj": 0.05,
    "self_attn2.out_proj": 0.05,
    "nonlin_attention.out_proj": 0.05,
    "conv_module1.out_proj": 0.05,
    "conv_module2.out_proj": 0.05,
    "feed_forward1.out_proj": 0.1,
    "feed_forward2.out_proj": 0.1,
    "feed_forward3.out_proj": 0.1,
    "convnext.pointwise_conv2": 0.01,
}


@torch.no_grad()
def initialise(*towers: nn.Module) -> None:
    """Initial values for training from scratch, in place, as in the reference.

    Linear layers and convolutions have torch's default values. The last one of each residual branch and the
    projection of positions are then multiplied by 0.01 .. 0.1, so that a layer starts near the identity. The
    projection to queries and keys is multiplied by query_dim^-1/4. Norms start with log_scale 1 and a bias
    near 0, bypass scales with 0.5, and the frames of a downsampling with equal weights.
    """
    modules = [pair for tower in towers for pair in tower.named_modules()]
    for name, module in modules:
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()
            scale = next((value for end, value in _INITIAL_SCALE.items() if name.endswith(end)), 1.0)
            module.weight.mul_(scale)
            if module.bias is not None and scale < 1.0:
                module.bias.uniform_(-0.1 * scale, 0.1 * scale)
        elif isinstance(module, BiasNorm):
            module.log_scale.fill_(1.0)
            module.bias.normal_(std=1e-4)
        elif isinstance(module, (Bypass, ZipformerLayer)):
            module.bypass_scale.fill_(0.5)
        elif isinstance(module, Downsample):
            module.bias.zero_()
    for _, module in modules:
        if isinstance(module, AttentionWeights):
            module.in_proj.weight.mul_(module.query_dim**-0.25)
        elif isinstance(module, Conv1dSubsampling):
            module.fold_standardisation()
