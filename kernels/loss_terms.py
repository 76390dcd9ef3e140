"""The contrastive losses from products of positive pairs and from sums over negative pairs.

    s_j = scale dot_j + bias
    softmax:  mean over rows with captions of  softplus(rejected_i - accepted_i) + sum_j w_j (accepted_i - s_j)
              + mean over texts of  softplus(column_j - s_j),  all divided by 2
    sigmoid:  (sum_i row_i + sum_j softplus(-s_j)) / (M N)

docs/derivation.md, section 2, derives the formulas and explains the names. row_i and column_j are the sums
over negative pairs that contrastive.py and sigmoid.py compute, dot_j the products that positives.py computes.
`order` and `offset` (grouping.py) list the captions of each row. In the softmax kind, the bias cancels and is
left out. Smoothing adds e (target logit - mean logit) to each term. The sums of mean logits are products of
sums of embeddings.

Shape suffixes: M audio rows, N text rows, D joint dimension, R rows of a program, C captions of one step, L
lanes, P programs.

The forward pass computes the slopes of the loss too, in two launches: softmax_terms or sigmoid_terms, then
loss_total. The backward pass multiplies them by the incoming gradient in one: loss_slopes. Each of these
operators launches one kernel and nothing else, for any M and N. O(M + N) numbers are read, written and kept,
all in float64. No kernel uses atomics, and no sum depends on the number of multiprocessors, so the same call
gives the same bits.

Source: arXiv 2601.03065 (multi-positive targets), 2303.15343 (sigmoid).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, on_device
from .grouping import captions_of, narrow, wide

ROWS, CAPTIONS, TEXTS, TOTAL_LANES = 64, 4, 256, 1024
CONSTANTS = {"ROWS": ROWS, "CAPTIONS": CAPTIONS, "TEXTS": TEXTS, "TOTAL_LANES": TOTAL_LANES}
CONSTANTS |= {"SIGMOID": False, "COUNTED": True, "SHARDED": True, "WEIGHT_SLOPE": True, "SMOOTHING": 0.1}
"""The constants that budgets.py compiles with: those of the longest code."""


def softmax_loss_reference(
    row_M: Tensor,
    column_N: Tensor,
    logit_N: Tensor,
    owner_N: Tensor,
    *,
    weights_N: Tensor | None = None,
) -> Tensor:
    """The definition of the softmax loss without smoothing, from the logits of positive pairs."""
    index_M = torch.arange(len(row_M), device=owner_N.device)
    share_MN = (owner_N == index_M[:, None]) * (torch.ones_like(logit_N) if weights_N is None else weights_N)
    captioned_M = share_MN.sum(1) > 0
    share_MN = share_MN[captioned_M] / share_MN[captioned_M].sum(1, keepdim=True)
    logits_MN = logit_N.expand(len(row_M), -1).masked_fill(owner_N != index_M[:, None], -torch.inf)
    lse_M = torch.cat([logits_MN, row_M[:, None].to(logit_N)], 1).logsumexp(1)[captioned_M]
    rows = (lse_M - (share_MN * logit_N).sum(1)).sum() / max(1, len(lse_M))
    return (rows + (torch.logaddexp(column_N.to(logit_N), logit_N) - logit_N).mean()) / 2


def sigmoid_loss_reference(row_M: Tensor, logit_N: Tensor) -> Tensor:
    """The definition of the sigmoid loss without smoothing, from the logits of positive pairs."""
    return (row_M.sum() + torch.nn.functional.softplus(-logit_N).sum()) / (len(row_M) * len(logit_N))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, with all digits of a tiny x: the quotient corrects the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_captions(
    rows, largest_R, total_R, start, CAPTIONS: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Some captions of each row: number in the row, text, product, logit, and share (-1 outside the row)."""
    dot, weight, order, scale, first_R, count_R = rows
    k_C = start + tl.arange(0, CAPTIONS)
    inside = k_C[None, :] < count_R[:, None]
    j_RC = first_R[:, None] + k_C[None, :]
    if not SINGLE:
        j_RC = tl.load(order + j_RC, mask=inside, other=0)
    dot_RC = tl.load(dot + j_RC, mask=inside, other=0.0)
    share_RC = tl.zeros_like(dot_RC) + 1.0
    if WEIGHTED:
        share_RC = wide(tl.load(weight + j_RC, mask=inside, other=0.0))
    share_RC = share_RC / largest_R[:, None] / total_R[:, None]
    return k_C, j_RC, dot_RC, dot_RC * scale, tl.where(inside, share_RC, -1.0)


@triton.jit
def _sums_of_weights(rows, CAPTIONS: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Of each row: the largest weight, the sum of weights divided by it, and whether a weight is positive.

    The division comes first, because a sum of finite weights could overflow.
    """
    count_R = rows[5]
    one_R = tl.zeros_like(count_R).to(tl.float64) + 1.0
    if not WEIGHTED:
        return one_R, tl.maximum(count_R, 1).to(tl.float64), count_R > 0
    longest = tl.max(count_R, 0)
    largest_R = one_R * 0.0
    for start in range(0, longest, CAPTIONS):
        weight_RC = _load_captions(rows, one_R, one_R, start, CAPTIONS, SINGLE, WEIGHTED)[4]
        largest_R = tl.maximum(largest_R, tl.max(weight_RC, 1))
    captioned_R = largest_R > 0
    largest_R = tl.where(captioned_R, largest_R, 1.0)
    total_R = one_R * 0.0
    for start in range(0, longest, CAPTIONS):
        weight_RC = _load_captions(rows, largest_R, one_R, start, CAPTIONS, SINGLE, WEIGHTED)[4]
        total_R += tl.sum(tl.where(weight_RC > 0, weight_RC, 0.0), 1)
    return largest_R, tl.where(captioned_R, total_R, 1.0), captioned_R


@triton.jit
def _peak_and_rest(
    rows,
    largest_R,
    total_R,
    first_logit_R,
    ACCEPTED: tl.constexpr,
    CAPTIONS: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The largest of first_logit and a row's accepted (or rejected) logits, and sum exp(logit - largest) over
    all but one largest. That one is the last; its number in the row is the third result, -1 for first_logit.
    """
    longest = tl.max(rows[5], 0)
    peak_R = first_logit_R
    for start in range(0, longest, CAPTIONS):
        k_C, j_RC, dot_RC, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        included = share_RC > 0 if ACCEPTED else share_RC == 0
        peak_R = tl.maximum(peak_R, tl.max(tl.where(included, s_RC, float("-inf")), 1))
    place_R = tl.zeros_like(rows[5]) - 1
    for start in range(0, longest, CAPTIONS):
        k_C, j_RC, dot_RC, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        included = share_RC > 0 if ACCEPTED else share_RC == 0
        is_peak = included & (s_RC == peak_R[:, None])
        place_R = tl.maximum(place_R, tl.max(tl.where(is_peak, k_C[None, :], -1), 1))
    shift_R = tl.where(peak_R == float("-inf"), 0.0, peak_R)
    rest_R = tl.where(place_R < 0, 0.0, tl.exp(first_logit_R - shift_R))
    for start in range(0, longest, CAPTIONS):
        k_C, j_RC, dot_RC, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        included = share_RC > 0 if ACCEPTED else share_RC == 0
        other = included & (k_C[None, :] != place_R[:, None])
        rest_R += tl.sum(tl.where(other, tl.exp(s_RC - shift_R[:, None]), 0.0), 1)
    return peak_R, rest_R, place_R


@triton.jit
def _row_terms(
    i_R,
    row,
    rows,
    row_slope,
    pair_slope,
    weight_slope,
    M,
    CAPTIONS: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Loss of rows, whether they count, and slopes with respect to the scale. Stores all other slopes."""
    row_R = wide(tl.load(row + i_R, mask=i_R < M, other=float("-inf")))
    nothing_R = tl.zeros_like(row_R)
    none_R = nothing_R + float("-inf")
    largest_R, total_R, captioned_R = _sums_of_weights(rows, CAPTIONS, SINGLE, WEIGHTED)
    peak_R, rest_R, place_R = _peak_and_rest(
        rows, largest_R, total_R, none_R, True, CAPTIONS, SINGLE, WEIGHTED
    )
    peak_R = tl.where(captioned_R, peak_R, 0.0)
    log_rest_R = _log1p(rest_R)
    rejected_R, rejected_rest_R = row_R, nothing_R
    if WEIGHTED:  # a caption of weight 0 counts as a negative of its clip
        rejected_R, rejected_rest_R, _ = _peak_and_rest(
            rows, largest_R, total_R, row_R, False, CAPTIONS, SINGLE, WEIGHTED
        )
    gap_R = rejected_R + _log1p(rejected_rest_R) - (peak_R + log_rest_R)
    gap_R = tl.where(captioned_R, gap_R, float("-inf"))
    # The slope of the loss is this number times the softmax of rejected minus the softmax of accepted logits.
    wrong_R = _sigmoid(gap_R)
    wrong_share_R = wrong_R / (1.0 + rejected_rest_R)
    rejected_R = tl.where(rejected_R == float("-inf"), 0.0, rejected_R)

    cross_entropy_R, target_R, others_R = nothing_R, nothing_R, nothing_R
    for start in range(0, tl.max(rows[5], 0), CAPTIONS):
        k_C, j_RC, dot_RC, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        accepted = share_RC > 0
        below_RC = (peak_R[:, None] - s_RC) + log_rest_R[:, None]
        cross_entropy_R += tl.sum(tl.where(accepted, share_RC * below_RC, 0.0), 1)
        target_R += tl.sum(tl.where(accepted, share_RC * s_RC, 0.0), 1)
        softmax_RC = tl.exp(s_RC - peak_R[:, None]) / (1.0 + rest_R)[:, None]
        other = accepted & (k_C[None, :] != place_R[:, None])
        others_R += tl.sum(tl.where(other, softmax_RC - share_RC, 0.0), 1)
    scale_slope_R = nothing_R
    for start in range(0, tl.max(rows[5], 0), CAPTIONS):
        k_C, j_RC, dot_RC, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        softmax_RC = tl.exp(s_RC - peak_R[:, None]) / (1.0 + rest_R)[:, None]
        # For the peak, softmax - share would lose its digits. The sum over the other captions does not.
        is_peak = k_C[None, :] == place_R[:, None]
        slope_RC = tl.where(is_peak, -others_R[:, None], softmax_RC - share_RC)
        slope_RC += SMOOTHING * share_RC - wrong_R[:, None] * softmax_RC
        rejected_RC = wrong_share_R[:, None] * tl.exp(s_RC - rejected_R[:, None])
        slope_RC = tl.where(share_RC > 0, slope_RC, tl.where(share_RC == 0, rejected_RC, 0.0))
        scale_slope_R += tl.sum(slope_RC * dot_RC, 1)
        tl.store(pair_slope + j_RC, slope_RC, mask=share_RC >= 0)
        if WEIGHT_SLOPE:
            below_RC = (peak_R[:, None] - s_RC) + log_rest_R[:, None] - cross_entropy_R[:, None]
            below_RC += SMOOTHING * (s_RC - target_R[:, None])
            below_RC = tl.where(captioned_R[:, None], below_RC, 0.0) / total_R[:, None] / largest_R[:, None]
            tl.store(weight_slope + j_RC, below_RC, mask=share_RC >= 0)
    tl.store(row_slope + i_R, wrong_share_R * tl.exp(row_R - rejected_R), mask=i_R < M)
    loss_R = _softplus(gap_R) + cross_entropy_R + SMOOTHING * target_R
    return tl.where(captioned_R, loss_R, 0.0), captioned_R.to(tl.float64), scale_slope_R


@triton.jit(do_not_specialize=["M", "N"])
def _softmax_kernel(
    row,
    column,
    dot,
    scale,
    weight,
    order,
    offset,
    row_slope,
    pair_slope,
    text_slope,
    weight_slope,
    partial,
    M,
    N,
    ROWS: tl.constexpr,
    CAPTIONS: tl.constexpr,
    TEXTS: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Slopes, and partial sums (3, P): loss, rows with captions, slope of the scale.

    The first programs have rows, the others texts.
    """
    program = tl.program_id(0)
    programs = (M + ROWS - 1) // ROWS
    partial += program
    P = tl.num_programs(0)
    scale = wide(tl.load(scale))
    if program < programs:
        i_R = program * ROWS + tl.arange(0, ROWS)
        first_R, count_R = captions_of(offset, i_R, i_R < M, SINGLE)
        rows = (dot, weight, order, scale, first_R, count_R)
        loss_R, captioned_R, scale_slope_R = _row_terms(
            i_R,
            row,
            rows,
            row_slope,
            pair_slope,
            weight_slope,
            M,
            CAPTIONS,
            SINGLE,
            WEIGHTED,
            WEIGHT_SLOPE,
            SMOOTHING,
        )
        tl.store(partial, tl.sum(loss_R, 0))
        tl.store(partial + P, tl.sum(captioned_R, 0))
        tl.store(partial + 2 * P, tl.sum(scale_slope_R, 0))
    else:
        j_L = (program - programs) * TEXTS + tl.arange(0, TEXTS)
        inside_L = j_L < N
        dot_L = tl.load(dot + j_L, mask=inside_L, other=0.0)
        column_L = wide(tl.load(column + j_L, mask=inside_L, other=float("-inf")))
        gap_L = column_L - dot_L * scale
        slope_L = -_sigmoid(gap_L)
        tl.store(text_slope + j_L, slope_L, mask=inside_L)
        tl.store(partial, tl.sum(_softplus(gap_L) + SMOOTHING * (dot_L * scale), 0))
        tl.store(partial + P, 0.0)
        tl.store(partial + 2 * P, tl.sum((slope_L + SMOOTHING) * dot_L, 0))


@triton.jit(do_not_specialize=["M", "N"])
def _sigmoid_kernel(
    row,
    dot,
    scale,
    bias,
    text_slope,
    partial,
    M,
    N,
    TEXTS: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Slopes of the logits, and partial sums (3, P): loss, slope of the bias, slope of the scale."""
    program = tl.program_id(0)
    partial += program
    P = tl.num_programs(0)
    at_L = program * TEXTS + tl.arange(0, TEXTS)
    dot_L = tl.load(dot + at_L, mask=at_L < N, other=0.0)
    s_L = dot_L * wide(tl.load(scale)) + wide(tl.load(bias))
    slope_L = -_sigmoid(-s_L)
    tl.store(text_slope + at_L, slope_L, mask=at_L < N)
    slope_L = tl.where(at_L < N, slope_L + SMOOTHING, 0.0)
    loss_L = tl.where(at_L < N, _softplus(-s_L) + SMOOTHING * s_L, 0.0)
    loss_L += wide(tl.load(row + at_L, mask=at_L < M, other=0.0))
    tl.store(partial, tl.sum(loss_L, 0))
    tl.store(partial + P, tl.sum(slope_L, 0))
    tl.store(partial + 2 * P, tl.sum(slope_L * dot_L, 0))


@triton.jit
def _sum(x, first, stop, LANES: tl.constexpr):
    """Sum of x[first:stop] in float64."""
    total_L = tl.zeros([LANES], tl.float64)
    for start in range(first, stop, LANES):
        at_L = start + tl.arange(0, LANES)
        total_L += tl.load(x + at_L, mask=at_L < stop, other=0.0)
    return tl.sum(total_L, 0)


@triton.jit
def _product(x, y, depth, LANES: tl.constexpr):
    """Inner product of two vectors in float64."""
    total_L = tl.zeros([LANES], tl.float64)
    for start in range(0, depth, LANES):
        at_L = start + tl.arange(0, LANES)
        x_L = tl.load(x + at_L, mask=at_L < depth, other=0.0)
        total_L += x_L * tl.load(y + at_L, mask=at_L < depth, other=0.0)
    return tl.sum(total_L, 0)


@triton.jit(do_not_specialize=["M", "clips", "texts", "row_programs", "P", "depth"])
def _total_kernel(
    partial,
    counted,
    sums,
    all_sums,
    scale,
    bias,
    loss,
    factors,
    M,
    clips,
    texts,
    row_programs,
    P,
    depth,
    TOTAL_LANES: tl.constexpr,
    SIGMOID: tl.constexpr,
    COUNTED: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """The loss, and `factors`: of row terms, of text terms, then the slopes of the scale and of the bias.

    One program adds the partial sums of all programs. `sums` are those of this rank, `all_sums` of all ranks.
    """
    pairs = clips.to(tl.float64) * texts
    if SIGMOID:
        row_factor = 1.0 / pairs
        text_factor = 1.0 / pairs
    else:
        if COUNTED:
            count = tl.load(counted)
        else:
            count = _sum(partial + P, 0, row_programs, TOTAL_LANES)
        row_factor = 0.5 / tl.maximum(count, 1.0)
        text_factor = 0.5 / texts.to(tl.float64)
    total = _sum(partial, 0, row_programs, TOTAL_LANES) * row_factor
    total += _sum(partial, row_programs, P, TOTAL_LANES) * text_factor
    scale_slope = _sum(partial + 2 * P, 0, row_programs, TOTAL_LANES) * row_factor
    scale_slope += _sum(partial + 2 * P, row_programs, P, TOTAL_LANES) * text_factor
    bias_slope = scale_slope * 0.0
    if SIGMOID:
        bias_slope += _sum(partial + P, row_programs, P, TOTAL_LANES) * text_factor
    if SMOOTHING > 0:
        if SIGMOID:
            mean = _product(sums, all_sums + 2 * depth, depth, TOTAL_LANES) * (0.5 / pairs)
            share = M.to(tl.float64) / clips * 0.5
            total -= SMOOTHING * share * wide(tl.load(bias))
            bias_slope -= SMOOTHING * share
        else:
            mean = _product(sums + depth, all_sums + 2 * depth, depth, TOTAL_LANES) * (row_factor / texts)
            mean += _product(sums + 2 * depth, all_sums, depth, TOTAL_LANES) * (0.5 / pairs)
        total -= SMOOTHING * mean * wide(tl.load(scale))
        scale_slope -= SMOOTHING * mean
    tl.store(loss, total.to(loss.dtype.element_ty))
    tl.store(factors, row_factor)
    tl.store(factors + 1, text_factor)
    tl.store(factors + 2, scale_slope)
    tl.store(factors + 3, bias_slope)


@triton.jit(do_not_specialize=["M", "N", "clips", "texts", "depth"])
def _slope_kernel(
    gradient,
    factors,
    scale,
    row_slope,
    pair_slope,
    text_slope,
    weight_slope,
    sums,
    all_sums,
    d_row,
    d_column,
    d_dot,
    d_scale,
    d_bias,
    d_weight,
    d_sums,
    d_all_sums,
    M,
    N,
    clips,
    texts,
    depth,
    TEXTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SHARDED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """All slopes times the incoming gradient."""
    at_L = tl.program_id(0) * TEXTS + tl.arange(0, TEXTS)
    gradient = wide(tl.load(gradient))
    row_factor = tl.load(factors) * gradient
    text_factor = tl.load(factors + 1) * gradient
    scale = wide(tl.load(scale))
    slope_L = tl.load(text_slope + at_L, mask=at_L < N, other=0.0)
    d_dot_L = (slope_L + SMOOTHING) * text_factor
    d_row_L = tl.zeros_like(slope_L) + row_factor
    if not SIGMOID:
        tl.store(d_column + at_L, (-slope_L * text_factor).to(d_column.dtype.element_ty), mask=at_L < N)
        d_dot_L += tl.load(pair_slope + at_L, mask=at_L < N, other=0.0) * row_factor
        d_row_L *= tl.load(row_slope + at_L, mask=at_L < M, other=0.0)
    tl.store(d_row + at_L, d_row_L.to(d_row.dtype.element_ty), mask=at_L < M)
    tl.store(d_dot + at_L, d_dot_L * scale, mask=at_L < N)
    if WEIGHT_SLOPE:
        d_weight_L = tl.load(weight_slope + at_L, mask=at_L < N, other=0.0) * row_factor
        tl.store(d_weight + at_L, narrow(d_weight_L, d_weight.dtype.element_ty), mask=at_L < N)
    if tl.program_id(0) == 0:
        tl.store(d_scale, (tl.load(factors + 2) * gradient).to(d_scale.dtype.element_ty))
        tl.store(d_bias, (tl.load(factors + 3) * gradient).to(d_bias.dtype.element_ty))
    if SMOOTHING > 0:
        # Of the products of sums in `_total_kernel`: audio, captioned audio and texts of this rank and of all.
        mean = -0.5 * SMOOTHING * scale * gradient / clips.to(tl.float64) / texts
        row_mean = -SMOOTHING * scale * row_factor / texts
        inside_L = at_L < depth
        zero_L = tl.zeros([TEXTS], tl.float64)
        audio_L = tl.load(sums + at_L, mask=inside_L, other=0.0)
        captioned_L = tl.load(sums + depth + at_L, mask=inside_L, other=0.0)
        text_L = tl.load(sums + 2 * depth + at_L, mask=inside_L, other=0.0)
        all_audio_L = tl.load(all_sums + at_L, mask=inside_L, other=0.0)
        all_text_L = tl.load(all_sums + 2 * depth + at_L, mask=inside_L, other=0.0)
        if SIGMOID:
            d_audio_L, d_captioned_L, d_text_L = mean * all_text_L, zero_L, zero_L
            d_all_audio_L, d_all_text_L = zero_L, mean * audio_L
        else:
            d_audio_L, d_captioned_L, d_text_L = zero_L, row_mean * all_text_L, mean * all_audio_L
            d_all_audio_L, d_all_text_L = mean * text_L, row_mean * captioned_L
        if SHARDED:
            tl.store(d_all_sums + at_L, d_all_audio_L, mask=inside_L)
            tl.store(d_all_sums + depth + at_L, zero_L, mask=inside_L)
            tl.store(d_all_sums + 2 * depth + at_L, d_all_text_L, mask=inside_L)
        else:
            d_audio_L += d_all_audio_L
            d_text_L += d_all_text_L
        tl.store(d_sums + at_L, d_audio_L, mask=inside_L)
        tl.store(d_sums + depth + at_L, d_captioned_L, mask=inside_L)
        tl.store(d_sums + 2 * depth + at_L, d_text_L, mask=inside_L)


KERNELS = {
    "softmax_terms": _softmax_kernel,
    "sigmoid_terms": _sigmoid_kernel,
    "loss_total": _total_kernel,
    "loss_slopes": _slope_kernel,
}
"""The kernels that budgets.py compiles. Each operator below launches one of them, and nothing else."""
POINTERS = dict.fromkeys(("row_slope", "pair_slope", "text_slope", "weight_slope", "factors", "partial"), "*fp64")
POINTERS |= dict.fromkeys(("counted", "all_sums", "d_all_sums"), "*fp64")
"""Types of arguments, for budgets.py."""


@torch.library.custom_op("clsp_fast::softmax_terms", mutates_args=())
def _softmax_terms(
    row: Tensor,
    column: Tensor,
    dot: Tensor,
    scale: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offset: Tensor | None,
    weight_slope: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slopes: of row (M,), of logits in row terms (N,), in text terms (N,), of weights; partial sums (3, P)."""
    results = _empty_terms(row, dot, weight_slope)
    row_slope, pair_slope, text_slope, slope_of_weights, partial = results
    with on_device(dot):
        _softmax_kernel[(partial.shape[1],)](
            row,
            column,
            dot,
            scale,
            dot if weights is None else weights,
            dot if order is None else order,
            dot if offset is None else offset,
            row_slope,
            pair_slope,
            text_slope,
            slope_of_weights,
            partial,
            len(row),
            len(dot),
            ROWS=ROWS,
            CAPTIONS=CAPTIONS,
            TEXTS=TEXTS,
            SINGLE=order is None,
            WEIGHTED=weights is not None,
            WEIGHT_SLOPE=weight_slope,
            SMOOTHING=smoothing,
            **OPTIONS,
        )
    return results


def _row_programs(rows: int) -> int:
    return triton.cdiv(rows, ROWS)


def _text_programs(texts: int) -> int:
    return triton.cdiv(texts, TEXTS)


def _empty_terms(
    row: Tensor, dot: Tensor, weight_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    programs = _row_programs(len(row)) + _text_programs(len(dot))
    row_slope = dot.new_empty(len(row))
    slope_of_weights = dot.new_empty(len(dot) if weight_slope else 0)
    return row_slope, torch.empty_like(dot), torch.empty_like(dot), slope_of_weights, dot.new_empty(3, programs)


@_softmax_terms.register_fake
def _(row, column, dot, scale, weights, order, offset, weight_slope, smoothing):  # type: ignore[no-untyped-def]
    return _empty_terms(row, dot, weight_slope)


@torch.library.custom_op("clsp_fast::sigmoid_terms", mutates_args=())
def _sigmoid_terms(
    row: Tensor, dot: Tensor, scale: Tensor, bias: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Slopes of logits (N,), without smoothing, and partial sums (3, P)."""
    text_slope, partial = _empty_sigmoid_terms(row, dot)
    with on_device(dot):
        _sigmoid_kernel[(partial.shape[1],)](
            row,
            dot,
            scale,
            bias,
            text_slope,
            partial,
            len(row),
            len(dot),
            TEXTS=TEXTS,
            SMOOTHING=smoothing,
            **OPTIONS,
        )
    return text_slope, partial


def _empty_sigmoid_terms(row: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dot), dot.new_empty(3, _text_programs(max(len(row), len(dot))))


@_sigmoid_terms.register_fake
def _(row, dot, scale, bias, smoothing):  # type: ignore[no-untyped-def]
    return _empty_sigmoid_terms(row, dot)


@torch.library.custom_op("clsp_fast::loss_total", mutates_args=())
def _loss_total(
    partial: Tensor,
    captioned: Tensor | None,
    sums: Tensor | None,
    all_sums: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    rows: int,
    row_programs: int,
    clips: int,
    texts: int,
    sigmoid: bool,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss in `dtype`, and the factors of its slopes (4,). `captioned` holds the count of all ranks."""
    loss, factors = partial.new_empty((), dtype=dtype), partial.new_empty(4)
    with on_device(partial):
        _total_kernel[(1,)](
            partial,
            partial if captioned is None else captioned,
            partial if sums is None else sums,
            partial if all_sums is None else all_sums,
            scale,
            bias,
            loss,
            factors,
            rows,
            clips,
            texts,
            row_programs,
            partial.shape[1],
            0 if sums is None else sums.shape[1],
            TOTAL_LANES=TOTAL_LANES,
            SIGMOID=sigmoid,
            COUNTED=captioned is not None,
            SMOOTHING=smoothing,
            **OPTIONS,
        )
    return loss, factors


@_loss_total.register_fake
def _(partial, *rest):  # type: ignore[no-untyped-def]
    return partial.new_empty((), dtype=rest[-1]), partial.new_empty(4)


@torch.library.custom_op("clsp_fast::loss_slopes", mutates_args=())
def _loss_slopes(
    gradient: Tensor,
    factors: Tensor,
    scale: Tensor,
    slopes: list[Tensor],
    sums: Tensor | None,
    all_sums: Tensor | None,
    weights: Tensor | None,
    rows: int,
    clips: int,
    texts: int,
    sharded: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of row, column, products, scale, bias, weights, sums and all sums; empty if not needed.

    `slopes` are the results of `softmax_terms` without the sums, or the slopes of `sigmoid_terms` alone.
    """
    results = _empty_slopes(scale, slopes, sums, weights, rows, sharded)
    d_row, d_column, d_dot, d_scale, d_bias, d_weights, d_sums, d_all_sums = results
    sigmoid = len(slopes) == 1
    row_slope, pair_slope, text_slope, weight_slope = slopes * 4 if sigmoid else slopes
    depth = 0 if sums is None else sums.shape[1]
    with on_device(factors):
        _slope_kernel[(_text_programs(max(rows, len(text_slope), depth)),)](
            gradient,
            factors,
            scale,
            row_slope,
            pair_slope,
            text_slope,
            weight_slope,
            factors if sums is None else sums,
            factors if all_sums is None else all_sums,
            d_row,
            d_column,
            d_dot,
            d_scale,
            d_bias,
            d_weights,
            d_sums,
            d_all_sums,
            rows,
            len(text_slope),
            clips,
            texts,
            depth,
            TEXTS=TEXTS,
            SIGMOID=sigmoid,
            SHARDED=sharded,
            WEIGHT_SLOPE=weights is not None,
            SMOOTHING=smoothing,
            **OPTIONS,
        )
    return results


def _empty_slopes(
    scale: Tensor,
    slopes: list[Tensor],
    sums: Tensor | None,
    weights: Tensor | None,
    rows: int,
    sharded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    text_slope = slopes[-2 if len(slopes) > 1 else 0]
    texts, like = len(text_slope), text_slope if sums is None else sums
    return (
        scale.new_empty(rows),
        scale.new_empty(texts if len(slopes) > 1 else 0),
        torch.empty_like(text_slope),
        torch.empty_like(scale),
        torch.empty_like(scale),
        text_slope.new_empty(0) if weights is None else torch.empty_like(weights),
        like.new_empty(0 if sums is None else sums.shape),
        like.new_empty(sums.shape if sums is not None and sharded else 0),
    )


@_loss_slopes.register_fake
def _(gradient, factors, scale, slopes, sums, all_sums, weights, rows, clips, texts, sharded, smoothing):  # type: ignore[no-untyped-def]
    return _empty_slopes(scale, slopes, sums, weights, rows, sharded)


class _Loss(torch.autograd.Function):
    """Both kinds. `column` is None for the sigmoid kind."""

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        column: Tensor | None,
        dot: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        sums: Tensor | None,
        all_sums: Tensor | None,
        groups: tuple[Tensor | None, Tensor | None],
        totals: tuple[int, int],
        smoothing: float,
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        needs_weights = weights is not None and ctx.needs_input_grad[5]
        captioned = None
        if column is None:
            *slopes, partial = _sigmoid_terms(row, dot, scale, cast(Tensor, bias), smoothing)
        else:
            *slopes, partial = _softmax_terms(
                row, column, dot, scale, weights, *groups, needs_weights, smoothing
            )
            if sum_over_ranks is not None:
                captioned = sum_over_ranks(partial[1].sum())
        loss, factors = _loss_total(
            partial,
            captioned,
            sums,
            sums if all_sums is None else all_sums,
            scale,
            scale if bias is None else bias,
            len(row),
            0 if column is None else _row_programs(len(row)),
            *totals,
            column is None,
            smoothing,
            scale.dtype if sum_over_ranks is None else torch.float64,
        )
        ctx.save_for_backward(factors, scale, sums, all_sums, weights if needs_weights else None, *slopes)
        ctx.rows, ctx.totals, ctx.smoothing = len(row), totals, smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factors, scale, sums, all_sums, weights, *slopes = ctx.saved_tensors
        gradients = _loss_slopes(
            gradient,
            factors,
            scale,
            slopes,
            sums,
            sums if all_sums is None else all_sums,
            weights,
            ctx.rows,
            *ctx.totals,
            all_sums is not None,
            ctx.smoothing,
        )
        needs = ctx.needs_input_grad[:8]
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None


def softmax_loss(
    row_M: Tensor,
    column_N: Tensor,
    dot_N: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    weights_N: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    totals: tuple[int, int] | None = None,
    smoothing: float = 0.0,
    sums_3D: Tensor | None = None,
    all_sums_3D: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss with kind="softmax", in the dtype of `scale`; differentiable once.

    Args:
        row_M: log-sum-exp of each row's negatives; its dtype is that of `scale`, as is that of column_N.
        column_N: log-sum-exp of each text's negatives.
        dot_N: float64, the products of `pair_products`.
        scale: scalar.
        bias: scalar that receives the gradient 0, since it cancels.
        weights_N: floating, finite and not negative; default: all captions of a row have the same weight.
        groups: order and offsets of `group_by_owner`; None if text j is the only text of row j, for all rows.
        totals: number of clips and of texts, over all ranks; default: those of this rank.
        smoothing: share of each target that is spread evenly over all candidates.
        sums_3D, all_sums_3D: the sums of `pair_products`, of this rank and of all ranks, if there is
            smoothing. Without `all_sums_3D`, there is one rank.
        sum_over_ranks: sums a float64 scalar over the ranks. Then the result is float64: this rank's part of
            the loss, a sum over the ranks.
    """
    totals = totals or (len(row_M), len(column_N))
    tensors = (row_M.contiguous(), column_N.contiguous(), dot_N, scale, bias, weights_N, sums_3D, all_sums_3D)
    loss = _Loss.apply(*tensors, groups or (None, None), totals, smoothing, sum_over_ranks)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def sigmoid_loss(
    row_M: Tensor,
    dot_N: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    totals: tuple[int, int] | None = None,
    smoothing: float = 0.0,
    sums_3D: Tensor | None = None,
    all_sums_3D: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss with kind="sigmoid", from sums (M,) of softplus over each row's negatives.

    The arguments are those of `softmax_loss`; `bias` counts here.
    """
    totals = totals or (len(row_M), len(dot_N))
    tensors = (row_M.contiguous(), None, dot_N, scale, bias, None, sums_3D, all_sums_3D)
    loss = _Loss.apply(*tensors, (None, None), totals, smoothing, sum_over_ranks)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)
