"""Softplus sums over the negative pairs of a contrastive batch (sigmoid kind), without M x N memory.

    s_ij = scale <x_i, y_j> + bias,   row_i = sum over j with owner[j] != i of log(1 + exp s_ij)
    G_ij = dL/ds_ij = dL/drow_i sigmoid(s_ij)

docs/derivation.md derives the formulas.

Shape suffixes: M audio rows, N text rows, D joint dimension, T tiles, L lanes.

Forward 2 M N D FLOPs, backward 6 M N D. Memory, rounding and determinism are those of contrastive.py.
Source: arXiv 2303.15343.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    GROUP,
    INTERPRETED,
    OPTIONS,
    SIZES,
    on_device,
    operand,
    panel_rows,
    positives_of_tile,
    score_arguments,
    score_tile,
    tile_grid,
    tile_position,
)
from ._pairs import (
    COMBINED_LANES,
    COMBINED_TILES,
    LOG2_E,
    check_operands,
    empty_gradients,
    gain_of,
    input_gradients,
    logits,
    products,
    save_for_backward,
    store_gradients,
)


def negative_softplus_reference(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | float = 0.0,
) -> Tensor:
    """The dense definition of `negative_softplus`: any floating dtype, autograd."""
    s_MN = logit_scale * (audio_MD @ text_ND.T) + logit_bias
    positive_MN = text_owner_N == torch.arange(len(audio_MD), device=text_owner_N.device)[:, None]
    return torch.nn.functional.softplus(s_MN).masked_fill(positive_MN, 0.0).sum(1)


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def reciprocal(x):
    """1 / x for x in [1, infinity], to an ulp; 0 from 2^126 on. A division takes six instructions more."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit(do_not_specialize=SIZES)
def _softplus_kernel(
    x,
    y,
    scale,
    bias,
    owner,
    row_sum,
    first_row,
    M,
    N,
    tiles_m,
    tiles_n,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Partial row sums of log(1 + exp s), natural units, (tiles_n, panel rows)."""
    tile_m, tile_n = tile_position(tiles_m, tiles_n, GROUP)
    row = first_row + tile_m * BM
    column = tile_n * BN
    owner_N, masked = positives_of_tile(owner, row, column, M, N, BM, BN)
    score = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
    s = logits(score, scale, bias, owner_N, masked, row, M, BM)
    # log(1 + e) = 2 atanh(z) with z = e / (2 + e) <= 1/3. This form keeps the digits of a tiny e. The
    # polynomial replaces the series 1/3 + q/5 + q^2/7 + ...; it changes the result by less than 5e-9 of it.
    e = tl.exp2(-tl.abs(s))
    z = e * reciprocal(2.0 + e)
    q = z * z
    tail = 0.333332066 + q * (0.200108495 + q * (0.139995702 + q * 0.140122310))
    half = tl.maximum(s, 0.0) * (0.5 / LOG2_E) + (z + z * (q * tail))
    row_at = tile_n.to(tl.int64) * tiles_m * BM + tile_m * BM + tl.arange(0, BM)
    tl.store(row_sum + row_at, 2.0 * tl.sum(half, 1))


@triton.jit(do_not_specialize=["T", "length", "stride"])
def _add_kernel(sums, out, T, length, stride, BT: tl.constexpr, BL: tl.constexpr):
    """Sums over T tiles in an order that depends on T alone. torch.sum may order them by the width."""
    i_L = tl.program_id(0) * BL + tl.arange(0, BL)
    inside_L = i_L < length
    sum_L = tl.zeros([BL], tl.float32)
    for first in range(0, T, BT):
        t_T = first + tl.arange(0, BT)
        at = t_T.to(tl.int64)[:, None] * stride + i_L[None, :]
        sum_L += tl.sum(tl.load(sums + at, mask=(t_T < T)[:, None] & inside_L[None, :], other=0.0), 0)
    tl.store(out + i_L, sum_L, mask=inside_L)


@triton.jit(do_not_specialize=SIZES)
def _sigmoid_panel_kernel(
    x,
    y,
    scale,
    bias,
    owner,
    d_row,
    panel,
    tile_sum,
    first_row,
    M,
    N,
    tiles_m,
    tiles_n,
    stride_x,
    stride_y,
    stride_panel,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of G_ij = d_row_i sigmoid(s_ij), 0 at positives, and the sum of the tile (tiles_m, tiles_n)."""
    tile_m, tile_n = tile_position(tiles_m, tiles_n, GROUP)
    row = first_row + tile_m * BM
    column = tile_n * BN
    owner_N, masked = positives_of_tile(owner, row, column, M, N, BM, BN)
    score = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
    s = logits(score, scale, bias, owner_N, masked, row, M, BM)
    i_M = row + tl.arange(0, BM)
    g = tl.load(d_row + i_M, mask=i_M < M, other=0.0)[:, None] * reciprocal(1.0 + tl.exp2(-s))
    tl.store(tile_sum + tile_m * tiles_n + tile_n, tl.sum(tl.sum(g, 1), 0))
    store_gradients(panel, stride_panel, g, row - first_row, column, BM, BN)


KERNELS = {"softplus": _softplus_kernel, "add": _add_kernel, "sigmoid_panel": _sigmoid_panel_kernel}
"""The kernels that budgets.py compiles."""


@torch.library.custom_op("clsp_fast::negative_softplus", mutates_args=())
def _negative_softplus(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    owner: Tensor,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> Tensor:
    """Row sums (M,), fp32."""
    m, n = len(audio), len(text)
    out = scale.new_zeros(m)
    if m == 0 or n == 0:
        return out
    with on_device(audio):
        x, y = operand(audio, compute_dtype), operand(text, compute_dtype)
        arguments = score_arguments("softplus", x, y)
        tiles_n = triton.cdiv(n, arguments["BN"])
        rows = panel_rows(m, 4 * tiles_n, workspace_bytes, arguments["BM"])
        parts = scale.new_empty(tiles_n * rows)
        for first in range(0, m, rows):
            stop = min(first + rows, m)
            grid, position = tile_grid(arguments, first, stop)
            row_sum = parts[: grid[0] * arguments["BM"]].view(tiles_n, -1)
            _softplus_kernel[grid](
                **arguments, **position, scale=scale, bias=bias, owner=owner, row_sum=row_sum
            )
            _add_kernel[(triton.cdiv(stop - first, COMBINED_LANES),)](
                row_sum,
                out[first:stop],
                tiles_n,
                stop - first,
                row_sum.stride(0),
                BT=COMBINED_TILES,
                BL=COMBINED_LANES,
                **OPTIONS,
            )
    return out


@torch.library.custom_op("clsp_fast::negative_softplus_backward", mutates_args=())
def _negative_softplus_backward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    owner: Tensor,
    d_row: Tensor,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    needs_audio: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of audio, text, scale and bias."""
    gain = gain_of(compute_dtype, d_row)
    d_row = d_row.contiguous() * gain
    d_bias = scale.new_zeros((), dtype=torch.float64)

    def write(panel: Tensor, grid: tuple[int], arguments: dict[str, Any], x: Tensor, y: Tensor) -> None:
        tile_sum = scale.new_empty(grid)
        _sigmoid_panel_kernel[grid](
            **arguments,
            scale=scale,
            bias=bias,
            owner=owner,
            d_row=d_row,
            panel=panel,
            tile_sum=tile_sum,
            stride_panel=panel.stride(0),
        )
        d_bias.add_(tile_sum.sum(dtype=torch.float64))

    d_audio, d_text, d_scale = products(
        "sigmoid_panel",
        audio,
        text,
        scale,
        gain,
        write,
        compute_dtype,
        workspace_bytes,
        needs_audio,
        needs_text,
    )
    return d_audio, d_text, d_scale, (d_bias / gain).to(torch.float32)


@_negative_softplus.register_fake
def _(audio, text, scale, bias, owner, compute_dtype, workspace_bytes):  # type: ignore[no-untyped-def]
    return scale.new_empty(len(audio))


@_negative_softplus_backward.register_fake
def _(audio, text, scale, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(audio, text, scale, *rest[-2:])


def _softplus_gradient(ctx: Any, d_row: Tensor) -> tuple[Tensor | None, ...]:
    return input_gradients(ctx, _negative_softplus_backward, d_row)


_negative_softplus.register_autograd(_softplus_gradient, setup_context=save_for_backward)


def negative_softplus(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | float | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Sum of log(1 + exp s_ij) over the negative pairs of every row, float32 (M,).

    Arguments and errors are those of `negative_lse`.
    """
    operands = check_operands(
        audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, compute_dtype, workspace_bytes
    )
    return _negative_softplus(*operands)
