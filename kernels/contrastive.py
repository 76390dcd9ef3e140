"""Log-sum-exp and softplus sums over the negative pairs of a contrastive batch, without M x N memory.

    s_ij = scale <x_i, y_j> + bias,   negative pairs: owner[j] != i
    negative_lse:       row_i = log sum_j exp s_ij,  column_j = log sum_i exp s_ij      (softmax kind)
    negative_softplus:  row_i = sum_j log(1 + exp s_ij)                                 (sigmoid kind)

docs/derivation.md derives them. The kernels leave out positive pairs; the loss adds these in float64. So no
kernel subtracts a target from a rounded probability.

Shape suffixes: M audio rows, N text rows, D joint dimension, J columns of a narrow tile, T tiles, L lanes.

Forward, 2 M N D FLOPs: a kernel reduces a tile of logits to one (peak, sum) for each row and column, with one
exp2 per element. A second kernel combines these pairs of all tiles in a fixed order. Backward, 6 M N D FLOPs:
a kernel writes a panel, some rows of G = dL/ds, in `compute_dtype`. Two library products give dX = scale G Y
and dY = scale G^T X. Memory beyond inputs and outputs: `workspace_bytes`, O(M + N) kept for the backward
pass, and the N x D sums of dY in fp32. No kernel uses atomics, so the same call gives the same bits. The
workspace does not change the bits of the forward pass.

Inside the kernels, logits and log-sum-exps are in base 2 (times log2 e), because the hardware computes exp2.
Source: arXiv 2103.00020 (loss), 2303.15343 (sigmoid), online softmax arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    GROUP,
    OPTIONS,
    SIZES,
    on_device,
    operand,
    panel_rows,
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
from .sigmoid import negative_softplus, negative_softplus_reference

__all__ = ["negative_lse", "negative_lse_reference", "negative_softplus", "negative_softplus_reference"]

_LN_2 = math.log(2.0)
# Columns of the narrow tiles that the rare exact paths use: with wider ones, registers would spill.
_PART = tl.constexpr(32)
# If a column's sum, relative to the tile's peak, is below this, it is recomputed relative to the column's
# peak. Above this, a term that underflowed to zero was less than 2^-30 of the sum, and the terms of 128 rows
# together less than 2^-23.
_STARVED = tl.constexpr(2.0**-96)
# A multiple of the size of every tile, and of COMBINED_LANES.
_PADDING = 256
# If a tile's normalisers are this close in base 2, exp2(s - low) (a_i + b_j) replaces two exponentials.
_CLOSE = tl.constexpr(60.0)


def negative_lse_reference(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The dense definition of `negative_lse`: any floating dtype, autograd."""
    s_MN = logit_scale * (audio_MD @ text_ND.T) + logit_bias
    positive_MN = text_owner_N == torch.arange(len(audio_MD), device=text_owner_N.device)[:, None]
    s_MN = s_MN.masked_fill(positive_MN, -torch.inf)
    return s_MN.logsumexp(1), s_MN.logsumexp(0)


@triton.jit(do_not_specialize=SIZES)
def _lse_kernel(
    x,
    y,
    x_rows,
    y_rows,
    scale,
    bias,
    owner,
    row_peak,
    row_sum,
    column_peak,
    column_sum,
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
    """Partial (peak, sum) of one tile's rows and columns: row_* (tiles_n, panel rows), column_* (tiles_m, N).

    The peak of a row is its maximum. All columns have the tile's maximum as their peak, so that their sums
    reuse the rows' exponentials. If a column's sum is below _STARVED, the sums of all columns of the tile are
    recomputed, each relative to the maximum of its column.
    """
    tile_m, tile_n = tile_position(tiles_m, tiles_n, GROUP)
    row = first_row + tile_m * BM
    column = tile_n * BN
    score = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
    s = logits(score, scale, bias, owner, row, column, M, N, BM, BN)
    peak_M = tl.max(s, 1)
    peak = tl.max(peak_M, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    share_M = tl.exp2(peak_M - peak)
    e = tl.exp2(s - tl.where(peak_M == float("-inf"), 0.0, peak_M)[:, None])
    sum_N = tl.sum(e * share_M[:, None], 0)

    row_at = tile_n.to(tl.int64) * tiles_m * BM + tile_m * BM + tl.arange(0, BM)
    tl.store(row_peak + row_at, peak_M)
    tl.store(row_sum + row_at, tl.sum(e, 1))
    j_N = column + tl.arange(0, BN)
    column_at = tile_m.to(tl.int64) * N
    tl.store(column_peak + column_at + j_N, tl.zeros([BN], tl.float32) + peak, mask=j_N < N)
    tl.store(column_sum + column_at + j_N, sum_N, mask=j_N < N)

    # If the tile has one row, and it is the positive of a column, the column's sum is 0 and correct.
    paired_N = (tl.load(owner + j_N, mask=j_N < N, other=-1) != row) | (row < M - 1)
    starved_N = (sum_N < _STARVED) & (j_N < N) & paired_N
    if tl.max(starved_N.to(tl.int32), 0) > 0:
        for part in range(column, column + BN, _PART):
            score_J = score_tile(
                x_rows, y_rows, row, part, M, N, stride_x, stride_y, D, BM, _PART, BK, False, DOTS, UPCAST
            )
            s_J = logits(score_J, scale, bias, owner, row, part, M, N, BM, _PART)
            peak_J = tl.max(s_J, 0)
            peak_J = tl.where(peak_J == float("-inf"), 0.0, peak_J)
            j_J = part + tl.arange(0, _PART)
            tl.store(column_peak + column_at + j_J, peak_J, mask=j_J < N)
            tl.store(column_sum + column_at + j_J, tl.sum(tl.exp2(s_J - peak_J[None, :]), 0), mask=j_J < N)


@triton.jit(do_not_specialize=["T", "length", "stride"])
def _combine_kernel(
    peak,
    sums,
    state,
    out,
    T,
    length,
    stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """log2 of sum_t sums[t] 2^peak[t] over tiles t in order; `state` carries (peak, sum) between panels."""
    i_L = tl.program_id(0) * BL + tl.arange(0, BL)
    inside_L = i_L < length
    peak_L = tl.full([BL], float("-inf"), tl.float32)
    sum_L = tl.zeros([BL], tl.float32)
    if not FIRST:
        peak_L = tl.load(state + i_L, mask=inside_L, other=float("-inf"))
        sum_L = tl.load(state + length + i_L, mask=inside_L, other=0.0)
    for first in range(0, T, BT):
        t_T = first + tl.arange(0, BT)
        at = t_T.to(tl.int64)[:, None] * stride + i_L[None, :]
        inside = (t_T < T)[:, None] & inside_L[None, :]
        s = tl.load(sums + at, mask=inside, other=0.0)
        # The peak of a sum of 0 is left out: relative to it, the terms of other tiles might underflow.
        p = tl.where(s > 0, tl.load(peak + at, mask=inside, other=float("-inf")), float("-inf"))
        next_L = tl.maximum(peak_L, tl.max(p, 0))
        shift_L = tl.where(next_L == float("-inf"), 0.0, next_L)
        sum_L = sum_L * tl.exp2(peak_L - shift_L) + tl.sum(s * tl.exp2(p - shift_L[None, :]), 0)
        peak_L = next_L
    if LAST:
        tl.store(out + i_L, peak_L + tl.log2(sum_L), mask=inside_L)
    else:
        tl.store(state + i_L, peak_L, mask=inside_L)
        tl.store(state + length + i_L, sum_L, mask=inside_L)


@triton.jit(do_not_specialize=["length"])
def _normalisers_kernel(lse, d, gain, pairs, bounds, length, BL: tl.constexpr):
    """Pairs (log-sum-exp, gradient times gain), and the (lowest, highest) log-sum-exp of every _PART pairs.

    A pair is (+inf, 0) beyond `length`, and for a row or column without a negative pair.
    """
    i_L = tl.program_id(0) * BL + tl.arange(0, BL)
    lse_L = tl.load(lse + i_L, mask=i_L < length, other=float("-inf"))
    d_L = tl.load(d + i_L, mask=i_L < length, other=0.0) * (tl.load(gain) * LOG2_E)
    empty_L = lse_L == float("-inf")
    lse_L = tl.where(empty_L, float("inf"), lse_L)
    tl.store(pairs + 2 * i_L.to(tl.int64), lse_L)
    tl.store(pairs + 2 * i_L.to(tl.int64) + 1, tl.where(empty_L, 0.0, d_L))
    low = tl.min(tl.reshape(lse_L, [BL // _PART, _PART]), 1)
    high = tl.max(tl.reshape(tl.where(empty_L, float("-inf"), lse_L), [BL // _PART, _PART]), 1)
    at = 2 * (tl.program_id(0) * (BL // _PART) + tl.arange(0, BL // _PART))
    tl.store(bounds + at, low)
    tl.store(bounds + at + 1, high)


@triton.jit
def _load_pairs(pairs, first, length: tl.constexpr):
    at = (first + tl.arange(0, length)).to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.load(pairs + at)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _factors(pairs, first, low, length: tl.constexpr):
    """d 2^(low - lse) of `length` pairs.

    Each thread computes a few of them and they are exchanged, because a reduction ends where its inputs
    are. Without the reduction, the compiler would repeat the exponential for every element of G.
    """
    pairs = _load_pairs(pairs, first, length)
    lse = tl.arange(0, 2)[None, :] == 0
    return tl.reduce(tl.where(lse, tl.exp2(low - pairs), pairs), 1, _product)


@triton.jit
def _range(bounds, first, length: tl.constexpr):
    """The lowest and highest log-sum-exp of `length` pairs."""
    at = 2 * (first // _PART + tl.arange(0, length // _PART))
    return tl.min(tl.load(bounds + at), 0), tl.max(tl.load(bounds + at + 1), 0)


@triton.jit(do_not_specialize=SIZES)
def _panel_kernel(
    x,
    y,
    x_rows,
    y_rows,
    scale,
    bias,
    owner,
    row_pairs,
    row_bounds,
    column_pairs,
    column_bounds,
    panel,
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
    """A tile of G_ij = d_row_i 2^(s_ij - row_i) + d_column_j 2^(s_ij - column_j), 0 at positives."""
    tile_m, tile_n = tile_position(tiles_m, tiles_n, GROUP)
    row = first_row + tile_m * BM
    column = tile_n * BN
    low_M, high_M = _range(row_bounds, row, BM)
    low_N, high_N = _range(column_bounds, column, BN)
    low = tl.minimum(low_M, low_N)
    if (tl.maximum(high_M, high_N) - low < _CLOSE) & (low < float("inf")):
        score = score_tile(
            x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
        )
        e = tl.exp2(logits(score, scale, bias, owner, row, column, M, N, BM, BN, low))
        # A factor 2^(low - lse) is at least 2^-60, so e is at most 2^60 times a probability.
        a_M = _factors(row_pairs, row, low, BM)
        b_N = _factors(column_pairs, column, low, BN)
        g = e * (a_M[:, None] + b_N[None, :])
        store_gradients(panel, stride_panel, g, row - first_row, column, BM, BN)
    else:
        for part in range(column, column + BN, _PART):
            score = score_tile(
                x_rows, y_rows, row, part, M, N, stride_x, stride_y, D, BM, _PART, BK, False, DOTS, UPCAST
            )
            s = logits(score, scale, bias, owner, row, part, M, N, BM, _PART)
            lse_M, d_M = tl.split(_load_pairs(row_pairs, row, BM))
            lse_J, d_J = tl.split(_load_pairs(column_pairs, part, _PART))
            g = d_M[:, None] * tl.exp2(s - lse_M[:, None]) + d_J[None, :] * tl.exp2(s - lse_J[None, :])
            store_gradients(panel, stride_panel, g, row - first_row, part, BM, _PART)


KERNELS = {
    "lse": _lse_kernel,
    "combine": _combine_kernel,
    "normalisers": _normalisers_kernel,
    "panel": _panel_kernel,
}
"""The kernels that budgets.py compiles."""
CONSTANTS = {"FIRST": False, "LAST": True, "BT": COMBINED_TILES, "BL": COMBINED_LANES}


def _combine(peak: Tensor, sums: Tensor, state: Tensor, out: Tensor, first: bool, last: bool) -> None:
    """Launches `_combine_kernel`, which combines `peak` and `sums` (tiles, length) over the tiles into `out`.

    Their second dimension may be longer than `out`; the rest is ignored.
    """
    length = len(out)
    _combine_kernel[(triton.cdiv(length, COMBINED_LANES),)](
        peak,
        sums,
        state,
        out,
        len(sums),
        length,
        sums.stride(0),
        FIRST=first,
        LAST=last,
        BT=COMBINED_TILES,
        BL=COMBINED_LANES,
        **OPTIONS,
    )


def _normalisers(lse: Tensor, d: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Launches `_normalisers_kernel`. The results have whole tiles of any size up to `_PADDING`."""
    padded = triton.cdiv(len(lse), _PADDING) * _PADDING
    pairs, bounds = lse.new_empty(padded, 2), lse.new_empty(padded // _PART.value, 2)
    if padded:
        _normalisers_kernel[(padded // COMBINED_LANES,)](
            lse, d.contiguous(), gain, pairs, bounds, len(lse), BL=COMBINED_LANES, **OPTIONS
        )
    return pairs, bounds


@torch.library.custom_op("clsp_fast::negative_lse", mutates_args=())
def _negative_lse(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    owner: Tensor,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Base-2 log-sum-exp of rows (M,) and columns (N,), fp32."""
    m, n = len(audio), len(text)
    row_lse, column_lse = (scale.new_full((length,), -torch.inf) for length in (m, n))
    if m == 0 or n == 0:
        return row_lse, column_lse
    with on_device(audio):
        x, y = operand(audio, compute_dtype), operand(text, compute_dtype)
        arguments = score_arguments("lse", x, y)
        rows, columns = arguments["BM"], arguments["BN"]
        tiles_n = triton.cdiv(n, columns)
        row_bytes = 8 * tiles_n + 8 * n // rows
        step = rows * COMBINED_TILES
        panel = panel_rows(m, row_bytes, workspace_bytes, step)
        row_parts = scale.new_empty(2, tiles_n * panel)
        column_parts = scale.new_empty(2, panel // rows, n)
        state = scale.new_empty(2, n)
        for first in range(0, m, panel):
            stop = min(first + panel, m)
            grid, position = tile_grid(arguments, first, stop)
            tiles_m = position["tiles_m"]
            row_peak, row_sum = row_parts[:, : tiles_n * tiles_m * rows].unflatten(1, (tiles_n, -1))
            column_peak, column_sum = column_parts[:, :tiles_m]
            _lse_kernel[grid](
                **arguments,
                **position,
                x_rows=x,
                y_rows=y,
                scale=scale,
                bias=bias,
                owner=owner,
                row_peak=row_peak,
                row_sum=row_sum,
                column_peak=column_peak,
                column_sum=column_sum,
            )
            _combine(row_peak, row_sum, state, row_lse[first:stop], True, True)
            _combine(column_peak, column_sum, state, column_lse, first == 0, stop == m)
    return row_lse, column_lse


@_negative_lse.register_fake
def _(audio, text, scale, bias, owner, compute_dtype, workspace_bytes):  # type: ignore[no-untyped-def]
    return scale.new_empty(len(audio)), scale.new_empty(len(text))


@torch.library.custom_op("clsp_fast::negative_lse_backward", mutates_args=())
def _negative_lse_backward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    owner: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    d_row: Tensor,
    d_column: Tensor,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    needs_audio: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of audio, text, scale and bias, from the gradients of the base-2 results."""
    gain = gain_of(compute_dtype, d_row, d_column)
    with on_device(audio):
        row_pairs, row_bounds = _normalisers(row_lse, d_row, gain)
        column_pairs, column_bounds = _normalisers(column_lse, d_column, gain)

    def write(panel: Tensor, grid: tuple[int], arguments: dict[str, Any], x: Tensor, y: Tensor) -> None:
        _panel_kernel[grid](
            **arguments,
            row_pairs=row_pairs,
            row_bounds=row_bounds,
            column_pairs=column_pairs,
            column_bounds=column_bounds,
            x_rows=x,
            y_rows=y,
            scale=scale,
            bias=bias,
            owner=owner,
            panel=panel,
            stride_panel=panel.stride(0),
        )

    d_audio, d_text, d_scale = products(
        "panel",
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
    d_bias = (row_pairs[:, 1].sum() + column_pairs[:, 1].sum()) / gain
    return d_audio, d_text, d_scale, d_bias


@_negative_lse_backward.register_fake
def _(audio, text, scale, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(audio, text, scale, *rest[-2:])


def _lse_gradient(ctx: Any, d_row: Tensor, d_column: Tensor) -> tuple[Tensor | None, ...]:
    return input_gradients(ctx, _negative_lse_backward, d_row, d_column)


_negative_lse.register_autograd(_lse_gradient, setup_context=save_for_backward)


def negative_lse(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | float | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the negative pairs of every row and of every column of the logits.

    s_ij = logit_scale <audio_i, text_j> + logit_bias; pair (i, j) is negative if text_owner_N[j] != i.

    Args:
        audio_MD: bfloat16, float16 or float32, (M, D); M may be 0.
        text_ND: (N, D), same dtype and device; N may be 0.
        logit_scale: scalar, the multiplier itself; may require gradient.
        text_owner_N: int64 (N,), same device. A text whose value is outside 0..M-1 has negative pairs only.
        logit_bias: scalar added to all logits; may require gradient.
        compute_dtype: dtype of the operands of matrix products; default: that of the inputs. Sums are in
            fp32. If it is float32, a logit takes three TF32 products (relative error 1e-6), and the two
            gradient products follow torch's float32 precision setting.
        workspace_bytes: bound of the memory for partial sums, for panels of G and for products with them,
            default 512 MiB. A panel has at least eight rows of tiles in the forward pass and one in the
            backward pass, even if these exceed the bound.

    Returns:
        float32 (M,) and (N,), natural logarithms; -inf if a row or column has no negative pair.

    Raises:
        ValueError: a shape is wrong, or the device is not supported.
        TypeError: a dtype is not supported.
    """
    operands = check_operands(
        audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, compute_dtype, workspace_bytes
    )
    row_lse, column_lse = _negative_lse(*operands)
    return row_lse * _LN_2, column_lse * _LN_2
