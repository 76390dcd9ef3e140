"""Log-sum-exp and softplus sums over the negative pairs of a contrastive batch, without M x N memory.

    s_ij = scale <x_i, y_j> + bias,   negative pairs: owner[j] != i
    negative_lse:       row_i = log sum_j exp s_ij,  column_j = log sum_i exp s_ij      (softmax kind)
    negative_softplus:  row_i = sum_j log(1 + exp s_ij)                                 (sigmoid kind)

docs/derivation.md derives them. The kernels leave out positive pairs; the loss adds these in float64. So no
kernel subtracts a target from a rounded probability.

Shape suffixes: M audio rows, N text rows, D joint dimension, J columns of a narrow tile, T tiles, L lanes.

Forward, 2 M N D FLOPs: a program keeps a tile of columns and runs over tiles of rows. It sums exponentials
relative to one reference logit, so that an element takes one exp2 and two additions. A second kernel adds the
partial sums in a fixed order. A sum that is starved, because exponentials underflowed, is recomputed relative
to its own peak. Backward, 6 M N D FLOPs: a kernel writes a panel, some rows of G = dL/ds, in `compute_dtype`.
Two library products give dX = scale G Y and dY = scale G^T X. Memory beyond inputs and outputs:
`workspace_bytes`, O(M + N) kept for the backward pass, and the N x D sums of dY in fp32. No kernel uses
atomics, so the same call gives the same bits. The workspace does not change the bits of the forward pass.

Inside the kernels, logits and log-sum-exps are in base 2 (times log2 e), because the hardware computes exp2.
Source: arXiv 2103.00020 (loss), 2303.15343 (sigmoid), 1805.02867 (the running maximum of starved sums).
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
    has_positives,
    load_owners,
    mask_positives,
    on_device,
    operand,
    panel_rows,
    positives_of_tile,
    score_arguments,
    score_tile,
    target_of,
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
# A sum of `terms` exponentials is starved if it is less than `terms` times this. An exponential that
# underflowed to zero was less than 2^-126, so in a sum that is not starved, these are less than 2^-26 of it.
_STARVED = tl.constexpr(2.0**-100)
_LARGEST_EXPONENT = 126
# The forward pass has about this many programs or more, of at most so many tiles. They are constants, so that
# results do not depend on the card.
_PROGRAMS = 1024
_LONGEST_RUN = 16
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


@triton.jit
def _largest_square(x, row, M, stride, D: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr):
    """The largest squared norm of BL rows."""
    row_L = row + tl.arange(0, BL)
    square_L = tl.zeros([BL], tl.float32)
    for k in range(0, D, BK):
        k_K = k + tl.arange(0, BK)
        inside = (row_L < M)[:, None] & (k_K < D)[None, :]
        x_LK = tl.load(x + row_L.to(tl.int64)[:, None] * stride + k_K[None, :], mask=inside, other=0.0)
        x_LK = x_LK.to(tl.float32)
        square_L += tl.sum(x_LK * x_LK, 1)
    return tl.max(square_L, 0)


@triton.jit(do_not_specialize=["M", "N", "blocks_m"])
def _norms_kernel(
    x_rows,
    y_rows,
    squares,
    M,
    N,
    blocks_m,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BL: tl.constexpr,
    BW: tl.constexpr,
):
    """The largest squared norm of every BL rows: first of x, from `blocks_m` on of y."""
    block = tl.program_id(0)
    if block < blocks_m:
        tl.store(squares + block, _largest_square(x_rows, block * BL, M, stride_x, D, BL, BW))
    else:
        row = (block - blocks_m) * BL
        tl.store(squares + block, _largest_square(y_rows, row, N, stride_y, D, BL, BW))


@triton.jit(do_not_specialize=["blocks_m", "blocks", "headroom"])
def _reference_kernel(squares, scale, bias, reference, blocks_m, blocks, headroom, BL: tl.constexpr):
    """The reference logit, in base 2: bias + max(largest - headroom, 0).

    `largest`, a bound of the logits without bias, is |scale| max |x_i| max |y_j|.
    """
    x_L = tl.zeros([BL], tl.float32)
    y_L = tl.zeros([BL], tl.float32)
    for first in range(0, blocks, BL):
        i_L = first + tl.arange(0, BL)
        x_L = tl.maximum(x_L, tl.load(squares + i_L, mask=i_L < blocks_m, other=0.0))
        y_L = tl.maximum(y_L, tl.load(squares + i_L, mask=(i_L >= blocks_m) & (i_L < blocks), other=0.0))
    largest = tl.sqrt(tl.max(x_L, 0)) * tl.sqrt(tl.max(y_L, 0)) * tl.abs(tl.load(scale) * LOG2_E)
    tl.store(reference, tl.load(bias) * LOG2_E + tl.maximum(largest - headroom, 0.0))


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _lse_kernel(
    x,
    y,
    scale,
    bias,
    owner,
    reference,
    row_sum,
    column_sum,
    first_row,
    M,
    N,
    tiles_m,
    tiles_n,
    run,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
    FLATTEN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Sums of 2^(s - reference) over negative pairs: row_sum (tiles_n, panel rows), column_sum (runs, N).

    A program keeps a tile of columns and runs over `run` tiles of rows. A thread sums its part of each column
    in registers, so that threads exchange column sums once a run. With PAIRS, it sums rows i and i + 8 of 16
    first, which the matrix instruction leaves in one thread on every target but 100.
    """
    tile_n = tl.program_id(0) % tiles_n
    part = tl.program_id(0) // tiles_n
    column = tile_n * BN
    owner_N = load_owners(owner, column, M, N, BN)
    first_owner = tl.min(tl.where(owner_N < 0, M, owner_N), 0)
    last_owner = tl.max(owner_N, 0)
    slope = tl.load(scale) * LOG2_E
    offset = tl.load(bias) * LOG2_E - tl.load(reference)
    sums = tl.zeros([BM // 16, 8, BN] if PAIRS else [BM, BN], tl.float32)
    for tile_m in tl.range(part * run, tl.minimum(part * run + run, tiles_m), flatten=FLATTEN):
        row = first_row + tile_m * BM
        score = score_tile(
            x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
        )
        e = tl.exp2(score * slope + offset)
        masked = (row + BM > M) | (column + BN > N)
        if (row <= last_owner) & (row + BM > first_owner):
            masked = masked | has_positives(owner_N, row, BM)
        if masked:
            e = mask_positives(e, owner_N, row, M, 0.0, BM)
        row_at = tile_n.to(tl.int64) * tiles_m * BM + tile_m * BM + tl.arange(0, BM)
        tl.store(row_sum + row_at, tl.sum(e, 1))
        if PAIRS:
            sums += tl.sum(tl.reshape(e, [BM // 16, 2, 8, BN]), 1)
        else:
            sums += e
    if PAIRS:
        sums = tl.sum(sums, 0)
    column_N = column + tl.arange(0, BN)
    tl.store(column_sum + part.to(tl.int64) * N + column_N, tl.sum(sums, 0), mask=column_N < N)


@triton.jit(do_not_specialize=["terms", "T", "length", "stride"])
def _combine_kernel(
    sums,
    state,
    reference,
    out,
    terms,
    T,
    length,
    stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """Adds sums over T parts in order; `state` carries the total between panels. NaN if it is starved."""
    i_L = tl.program_id(0) * BL + tl.arange(0, BL)
    inside_L = i_L < length
    total_L = tl.zeros([BL], tl.float32)
    if not FIRST:
        total_L = tl.load(state + i_L, mask=inside_L, other=0.0)
    for first in range(0, T, BT):
        t_T = first + tl.arange(0, BT)
        at = t_T.to(tl.int64)[:, None] * stride + i_L[None, :]
        total_L += tl.sum(tl.load(sums + at, mask=(t_T < T)[:, None] & inside_L[None, :], other=0.0), 0)
    if LAST:
        exact_L = (total_L >= terms * _STARVED) & (total_L < float("inf"))
        lse_L = tl.load(reference) + tl.log2(total_L)
        tl.store(out + i_L, tl.where(exact_L, lse_L, float("nan")), mask=inside_L)
    else:
        tl.store(state + i_L, total_L, mask=inside_L)


@triton.jit(do_not_specialize=[*SIZES, "transposed"])
def _starved_kernel(
    x,
    y,
    scale,
    bias,
    owner,
    lse,
    transposed,
    M,
    N,
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
    """Replaces every NaN of `lse` (M,) by the log-sum-exp of that row of x, relative to the row's peak.

    If `transposed`, x holds the texts and y the clips. A tile of rows without a NaN costs one load.
    """
    row = tl.program_id(0) * BM
    row_M = row + tl.arange(0, BM)
    lse_M = tl.load(lse + row_M, mask=row_M < M, other=0.0)
    starved_M = lse_M != lse_M
    if tl.max(starved_M.to(tl.int32), 0) > 0:
        owned_M = row_M < tl.where(transposed > 0, M, 0)
        key_M = tl.where(owned_M, tl.load(owner + row_M, mask=owned_M, other=-1), row_M)
        slope = tl.load(scale) * LOG2_E
        offset = tl.load(bias) * LOG2_E
        peak_M = tl.full([BM], float("-inf"), tl.float32)
        sum_M = tl.zeros([BM], tl.float32)
        for column in range(0, N, BN):
            score = score_tile(
                x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST
            )
            column_N = column + tl.arange(0, BN)
            owned_N = column_N < tl.where(transposed > 0, 0, N)
            key_N = tl.where(owned_N, tl.load(owner + column_N, mask=owned_N, other=-1), column_N)
            negative = (key_M[:, None] != key_N[None, :]) & (column_N < N)[None, :]
            s = tl.where(negative, score * slope + offset, float("-inf"))
            next_M = tl.maximum(peak_M, tl.max(s, 1))
            shift_M = tl.where(next_M == float("-inf"), 0.0, next_M)
            sum_M = sum_M * tl.exp2(peak_M - shift_M) + tl.sum(tl.exp2(s - shift_M[:, None]), 1)
            peak_M = next_M
        tl.store(lse + row_M, peak_M + tl.log2(sum_M), mask=(row_M < M) & starved_M)


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

    Each thread computes a few of them, and the threads exchange the results, because of the reduction.
    Without it, the compiler would repeat the exponential for every element of G.
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
    close = (tl.maximum(high_M, high_N) - low < _CLOSE) & (low < float("inf"))
    owner_N, masked = positives_of_tile(owner, row, column, M, N, BM, BN)
    # The product comes before the branch, although the rare path repeats it: inside a branch, the loop would
    # need more instructions.
    score = score_tile(x, y, row, column, M, N, stride_x, stride_y, D, BM, BN, BK, DESCRIPTORS, DOTS, UPCAST)
    if close:
        e = tl.exp2(logits(score, scale, bias, owner_N, masked, row, M, BM, low))
        # A factor 2^(low - lse) is at least 2^-60, so e is at most 2^60 times a probability.
        a_M = _factors(row_pairs, row, low, BM)
        b_N = _factors(column_pairs, column, low, BN)
        g = e * (a_M[:, None] + b_N[None, :])
        store_gradients(panel, stride_panel, g, row - first_row, column, BM, BN)
    else:
        for part in range(column, column + BN, _PART):
            owner_J, masked_J = positives_of_tile(owner, row, part, M, N, BM, _PART)
            score_J = score_tile(
                x_rows, y_rows, row, part, M, N, stride_x, stride_y, D, BM, _PART, BK, False, DOTS, UPCAST
            )
            s = logits(score_J, scale, bias, owner_J, masked_J, row, M, BM)
            lse_M, d_M = tl.split(_load_pairs(row_pairs, row, BM))
            lse_J, d_J = tl.split(_load_pairs(column_pairs, part, _PART))
            g = d_M[:, None] * tl.exp2(s - lse_M[:, None]) + d_J[None, :] * tl.exp2(s - lse_J[None, :])
            store_gradients(panel, stride_panel, g, row - first_row, part, BM, _PART)


KERNELS = {
    "norms": _norms_kernel,
    "reference": _reference_kernel,
    "lse": _lse_kernel,
    "combine": _combine_kernel,
    "starved": _starved_kernel,
    "normalisers": _normalisers_kernel,
    "panel": _panel_kernel,
}
"""The kernels that budgets.py compiles."""
CONSTANTS = {"FIRST": False, "LAST": True, "BT": COMBINED_TILES, "BL": COMBINED_LANES, "BW": 64}


def lse_constants(target: int, dtype: torch.dtype) -> dict[str, bool]:
    """The compile-time arguments that only `_lse_kernel` has.

    A flattened loop loads the next tile's operands during the sums of this one. On target 100, and in float32
    on target 90, it would spill registers.
    """
    return {
        "FLATTEN": target < 90 or (target == 90 and dtype != torch.float32),
        "PAIRS": target != 100,
    }


def _reference(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Launches the kernels that compute the reference logit."""
    m, n, lanes = len(x), len(y), COMBINED_LANES
    blocks_m = triton.cdiv(m, lanes)
    blocks = blocks_m + triton.cdiv(n, lanes)
    squares = scale.new_empty(blocks)
    _norms_kernel[(blocks,)](
        x,
        y,
        squares,
        m,
        n,
        blocks_m,
        x.stride(0),
        y.stride(0),
        D=x.shape[1],
        BL=lanes,
        BW=CONSTANTS["BW"],
        **OPTIONS,
    )
    reference = scale.new_empty(())
    headroom = _LARGEST_EXPONENT - (max(m, n) - 1).bit_length()
    _reference_kernel[(1,)](squares, scale, bias, reference, blocks_m, blocks, headroom, BL=lanes, **OPTIONS)
    return reference


def _combine(
    sums: Tensor, state: Tensor, reference: Tensor, out: Tensor, terms: int, first: bool, last: bool
) -> None:
    """Launches `_combine_kernel`, which adds `sums` (parts, length) of `terms` logits over the parts.

    The second dimension may be longer than `out`; the rest is ignored.
    """
    length = len(out)
    _combine_kernel[(triton.cdiv(length, COMBINED_LANES),)](
        sums,
        state,
        reference,
        out,
        terms,
        len(sums),
        length,
        sums.stride(0),
        FIRST=first,
        LAST=last,
        BT=COMBINED_TILES,
        BL=COMBINED_LANES,
        **OPTIONS,
    )


def _recompute_starved(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, owner: Tensor, lse: Tensor, transposed: bool
) -> None:
    """Launches `_starved_kernel`, which finds the starved sums on the device. The host does not wait."""
    arguments = score_arguments("starved", x, y)
    _starved_kernel[(triton.cdiv(len(x), arguments["BM"]),)](
        **arguments, scale=scale, bias=bias, owner=owner, lse=lse, transposed=int(transposed)
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
    if m == 0 or n == 0:
        return scale.new_full((m,), -torch.inf), scale.new_full((n,), -torch.inf)
    row_lse, column_lse = scale.new_empty(m), scale.new_empty(n)
    with on_device(audio):
        x, y = operand(audio, compute_dtype), operand(text, compute_dtype)
        reference = _reference(x, y, scale, bias)
        arguments = score_arguments("lse", x, y)
        arguments |= lse_constants(target_of(x.device), x.dtype)
        rows = arguments["BM"]
        tiles_n = triton.cdiv(n, arguments["BN"])
        run = min(_LONGEST_RUN, max(1, triton.cdiv(m, rows) * tiles_n // _PROGRAMS))
        # With whole groups of runs, the order of additions does not depend on the workspace.
        step = rows * run * COMBINED_TILES
        panel = panel_rows(m, 4 * tiles_n + 4 * n // (rows * run), workspace_bytes, step)
        row_parts = scale.new_empty(tiles_n * min(panel, triton.cdiv(m, rows) * rows))
        column_parts = scale.new_empty(panel // (rows * run), n)
        state = scale.new_empty(n)
        for first in range(0, m, panel):
            stop = min(first + panel, m)
            _, position = tile_grid(arguments, first, stop)
            tiles_m = position["tiles_m"]
            row_sum = row_parts[: tiles_n * tiles_m * rows].view(tiles_n, -1)
            column_sum = column_parts[: triton.cdiv(tiles_m, run)]
            _lse_kernel[(len(column_sum) * tiles_n,)](
                **arguments,
                **position,
                run=run,
                scale=scale,
                bias=bias,
                owner=owner,
                reference=reference,
                row_sum=row_sum,
                column_sum=column_sum,
            )
            _combine(row_sum, state, reference, row_lse[first:stop], n, True, True)
            _combine(column_sum, state, reference, column_lse, m, first == 0, stop == m)
        _recompute_starved(x, y, scale, bias, owner, row_lse, False)
        _recompute_starved(y, x, scale, bias, owner, column_lse, True)
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
            default 2 GiB, or 544 MiB on cards with 99 KB of shared memory per block. Panels of G are as small
            as they can be without more waves of product tiles: 554 MB (counted) for M = N = 32,768 and
            D = 512 on an H100. A panel has at least eight runs of row tiles in the forward pass and one row
            of tiles in the backward pass, even if these exceed the bound.

    Returns:
        float32 (M,) and (N,), natural logarithms; -inf if a row or column has no negative pair.

    Raises:
        ValueError: a shape is wrong, or the device is not supported.
        TypeError: an argument is no tensor, or its dtype is not supported.
    """
    operands = check_operands(
        audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, compute_dtype, workspace_bytes
    )
    row_lse, column_lse = _negative_lse(*operands)
    return row_lse * _LN_2, column_lse * _LN_2
