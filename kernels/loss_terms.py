"""The terms of the contrastive losses, from products of positive pairs and from sums over negative pairs.

    s_j = scale dot_j + bias
    softmax:  row i with captions:  softplus(rejected_i - accepted_i) + sum_j w_j (accepted_i - s_j)
              text j:               softplus(column_j - s_j)
    sigmoid:  row i: row_i,   text j: softplus(-s_j)

docs/derivation.md, section 2, derives the formulas and explains the names. row_i and column_j are the sums
over negative pairs that contrastive.py and sigmoid.py compute, dot_j the products that positives.py computes.
`order` and `offset` (grouping.py) list the captions of each row. In the softmax kind, the bias cancels and is
left out. Smoothing adds e (target logit - mean logit) to each term. The mean logits are left to loss.py.
Kernels take e as a number, so that a schedule of e compiles nothing new. Its annotation as float64 keeps
triton from rounding it to float32.

Shape suffixes: M audio rows, N text rows, R rows of a program, C captions of one step, L lanes, P programs.

Each operator launches one kernel and nothing else, for any M and N, and computes the slopes of the terms too.
O(M + N) numbers are read and written, all in float64. No kernel uses atomics, and no sum depends on the
number of multiprocessors, so the same call gives the same bits. A row with thousands of captions is slow,
because one program reads them a few at a time.

Source: arXiv 2601.03065 (multi-positive targets), 2303.15343 (sigmoid).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, on_device
from .grouping import captions_of, to_float64

ROWS, CAPTIONS, TEXTS = 32, 4, 256
"""Sizes of a program: rows, captions of a row that are read at once, and texts."""


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
    """The next captions of each row: number in the row, text, product, logit, share (-1 outside the row)."""
    dot, weight, order, scale, first_R, count_R = rows
    k_C = start + tl.arange(0, CAPTIONS)
    inside = k_C[None, :] < count_R[:, None]
    j_RC = first_R[:, None] + k_C[None, :]
    if not SINGLE:
        j_RC = tl.load(order + j_RC, mask=inside, other=0)
    dot_RC = tl.load(dot + j_RC, mask=inside, other=0.0)
    share_RC = tl.zeros_like(dot_RC) + 1.0
    if WEIGHTED:
        share_RC = to_float64(tl.load(weight + j_RC, mask=inside, other=0.0))
    share_RC = share_RC / largest_R[:, None] / total_R[:, None]
    return k_C, j_RC, dot_RC, dot_RC * scale, tl.where(inside, share_RC, -1.0)


@triton.jit
def _sums_of_weights(rows, CAPTIONS: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr):
    """For each row: the largest weight, the sum of weights divided by it, whether a weight is positive.

    The division comes first, because a sum of finite weights could overflow.
    """
    count_R = rows[5]
    one_R = tl.zeros_like(count_R).to(tl.float64) + 1.0
    largest_R = one_R
    total_R = count_R.to(tl.float64)
    captioned_R = count_R > 0
    if WEIGHTED:
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
    """The peak of first_logit and of a row's accepted (or rejected) logits, and two more results.

    The second is sum exp(logit - peak) over all logits except the last one that is equal to the peak. The
    third is the number of that logit in the row; -1 for first_logit.
    """
    longest = tl.max(rows[5], 0)
    peak_R = first_logit_R
    for start in range(0, longest, CAPTIONS):
        k_C, _, _, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        included = share_RC > 0 if ACCEPTED else share_RC == 0
        peak_R = tl.maximum(peak_R, tl.max(tl.where(included, s_RC, float("-inf")), 1))
    place_R = tl.zeros_like(rows[5]) - 1
    for start in range(0, longest, CAPTIONS):
        k_C, _, _, s_RC, share_RC = _load_captions(
            rows, largest_R, total_R, start, CAPTIONS, SINGLE, WEIGHTED
        )
        included = share_RC > 0 if ACCEPTED else share_RC == 0
        is_peak = included & (s_RC == peak_R[:, None])
        place_R = tl.maximum(place_R, tl.max(tl.where(is_peak, k_C[None, :], -1), 1))
    shift_R = tl.where(peak_R == float("-inf"), 0.0, peak_R)
    rest_R = tl.where(place_R < 0, 0.0, tl.exp(first_logit_R - shift_R))
    for start in range(0, longest, CAPTIONS):
        k_C, _, _, s_RC, share_RC = _load_captions(
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
    smoothing,
    CAPTIONS: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
):
    """Loss of rows, whether they count, and slopes with respect to the scale. Stores all other slopes."""
    row_R = to_float64(tl.load(row + i_R, mask=i_R < M, other=float("-inf")))
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
        slope_RC += smoothing * share_RC - wrong_R[:, None] * softmax_RC
        rejected_RC = wrong_share_R[:, None] * tl.exp(s_RC - rejected_R[:, None])
        slope_RC = tl.where(share_RC > 0, slope_RC, tl.where(share_RC == 0, rejected_RC, 0.0))
        scale_slope_R += tl.sum(slope_RC * dot_RC, 1)
        tl.store(pair_slope + j_RC, slope_RC, mask=share_RC >= 0)
        if WEIGHT_SLOPE:
            below_RC = (peak_R[:, None] - s_RC) + log_rest_R[:, None] - cross_entropy_R[:, None]
            below_RC += smoothing * (s_RC - target_R[:, None])
            below_RC = tl.where(captioned_R[:, None], below_RC, 0.0) / total_R[:, None] / largest_R[:, None]
            tl.store(weight_slope + j_RC, below_RC, mask=share_RC >= 0)
    tl.store(row_slope + i_R, wrong_share_R * tl.exp(row_R - rejected_R), mask=i_R < M)
    loss_R = _softplus(gap_R) + cross_entropy_R + smoothing * target_R
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
    smoothing: tl.float64,
    ROWS: tl.constexpr,
    CAPTIONS: tl.constexpr,
    TEXTS: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
):
    """Slopes, and partial sums (3, P): loss, rows with captions, slope of the scale.

    The first programs have rows, the others texts.
    """
    program = tl.program_id(0)
    programs = (M + ROWS - 1) // ROWS
    partial += program
    P = tl.num_programs(0)
    scale = to_float64(tl.load(scale))
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
            smoothing,
            CAPTIONS,
            SINGLE,
            WEIGHTED,
            WEIGHT_SLOPE,
        )
        tl.store(partial, tl.sum(loss_R, 0))
        tl.store(partial + P, tl.sum(captioned_R, 0))
        tl.store(partial + 2 * P, tl.sum(scale_slope_R, 0))
    else:
        j_L = (program - programs) * TEXTS + tl.arange(0, TEXTS)
        inside_L = j_L < N
        dot_L = tl.load(dot + j_L, mask=inside_L, other=0.0)
        column_L = to_float64(tl.load(column + j_L, mask=inside_L, other=float("-inf")))
        gap_L = column_L - dot_L * scale
        slope_L = -_sigmoid(gap_L)
        tl.store(text_slope + j_L, slope_L, mask=inside_L)
        tl.store(partial, tl.sum(_softplus(gap_L) + smoothing * (dot_L * scale), 0))
        tl.store(partial + P, 0.0)
        tl.store(partial + 2 * P, tl.sum((slope_L + smoothing) * dot_L, 0))


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
    smoothing: tl.float64,
    TEXTS: tl.constexpr,
):
    """Slopes of the logits, and partial sums (3, P): loss, slope of the bias, slope of the scale."""
    program = tl.program_id(0)
    partial += program
    P = tl.num_programs(0)
    at_L = program * TEXTS + tl.arange(0, TEXTS)
    dot_L = tl.load(dot + at_L, mask=at_L < N, other=0.0)
    s_L = dot_L * to_float64(tl.load(scale)) + to_float64(tl.load(bias))
    slope_L = -_sigmoid(-s_L)
    tl.store(text_slope + at_L, slope_L, mask=at_L < N)
    slope_L = tl.where(at_L < N, slope_L + smoothing, 0.0)
    loss_L = tl.where(at_L < N, _softplus(-s_L) + smoothing * s_L, 0.0)
    loss_L += to_float64(tl.load(row + at_L, mask=at_L < M, other=0.0))
    tl.store(partial, tl.sum(loss_L, 0))
    tl.store(partial + P, tl.sum(slope_L, 0))
    tl.store(partial + 2 * P, tl.sum(slope_L * dot_L, 0))


KERNELS = {"softmax_terms": _softmax_kernel, "sigmoid_terms": _sigmoid_kernel}
"""The kernels that budgets.py compiles. Each operator below launches one of them, and nothing else."""


@torch.library.custom_op("clsp_fast::softmax_terms", mutates_args=())
def softmax_terms(
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
    """Slopes and partial sums (3, P).

    The slopes are those of row terms with respect to row (M,), logits (N,) and weights (N,), and of text
    terms with respect to logits (N,). They come in the order row, logits, logits, weights.
    """
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
            smoothing,
            ROWS=ROWS,
            CAPTIONS=CAPTIONS,
            TEXTS=TEXTS,
            SINGLE=order is None,
            WEIGHTED=weights is not None,
            WEIGHT_SLOPE=weight_slope,
            maxnreg=128,  # with fewer registers, some variants would spill a few
            **OPTIONS,
        )
    return results


def count_row_programs(rows: int) -> int:
    return triton.cdiv(rows, ROWS)


def count_text_programs(texts: int) -> int:
    return triton.cdiv(texts, TEXTS)


def _empty_terms(
    row: Tensor, dot: Tensor, weight_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    programs = count_row_programs(len(row)) + count_text_programs(len(dot))
    row_slope = dot.new_empty(len(row))
    slope_of_weights = dot.new_empty(len(dot) if weight_slope else 0)
    return (
        row_slope,
        torch.empty_like(dot),
        torch.empty_like(dot),
        slope_of_weights,
        dot.new_empty(3, programs),
    )


@softmax_terms.register_fake
def _(row, column, dot, scale, weights, order, offset, weight_slope, smoothing):  # type: ignore[no-untyped-def]
    return _empty_terms(row, dot, weight_slope)


@torch.library.custom_op("clsp_fast::sigmoid_terms", mutates_args=())
def sigmoid_terms(
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
            smoothing,
            TEXTS=TEXTS,
            **OPTIONS,
        )
    return text_slope, partial


def _empty_sigmoid_terms(row: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dot), dot.new_empty(3, count_text_programs(max(len(row), len(dot))))


@sigmoid_terms.register_fake
def _(row, dot, scale, bias, smoothing):  # type: ignore[no-untyped-def]
    return _empty_sigmoid_terms(row, dot)
