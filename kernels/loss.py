"""The contrastive losses, from their terms (loss_terms.py) and from sums of embeddings (positives.py).

    softmax:  (mean of the terms of rows with captions + mean of the terms of texts) / 2
    sigmoid:  sum of all terms / (M N)
    smoothing e subtracts from these  e scale / 2 (<mean captioned x, mean y> + <mean x, mean y>)  or
              e / 2 (scale <mean x, mean y> + bias): means of mean logits

M and N are numbers of clips and texts of all ranks. docs/derivation.md, section 2, derives the formulas.

Shape suffixes: M audio rows, N text rows, D joint dimension, L lanes, P programs.

One launch adds the partial sums of the terms, all in float64 and in a fixed order: loss_total. The backward
pass multiplies the slopes of the terms by the incoming gradient in one launch: loss_slopes. Each of these
operators launches one kernel and nothing else, for any M and N. O(M + N) numbers are kept, in float64.
No kernel uses atomics, so the same call gives the same bits.

Source: arXiv 2601.03065 (multi-positive targets), 2303.15343 (sigmoid).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, check_argument, check_tensor, on_device
from .grouping import check_groups, from_float64, to_float64
from .loss_terms import TEXTS, count_row_programs, count_text_programs, sigmoid_terms, softmax_terms

TOTAL_LANES = 1024


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
    smoothing: tl.float64,
    TOTAL_LANES: tl.constexpr,
    SIGMOID: tl.constexpr,
    COUNTED: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The loss, and `factors`: of row terms, of text terms, then the slopes of the scale and of the bias.

    One program adds the partial sums of all programs. `sums` are those of this rank, `all_sums` of all ranks.
    """
    pairs = clips.to(tl.float64) * texts
    if SIGMOID:
        row_factor = 1.0 / pairs
        text_factor = 1.0 / pairs
    else:
        count = tl.load(counted) if COUNTED else _sum(partial + P, 0, row_programs, TOTAL_LANES)
        row_factor = 0.5 / tl.maximum(count, 1.0)
        text_factor = 0.5 / texts.to(tl.float64)
    total = _sum(partial, 0, row_programs, TOTAL_LANES) * row_factor
    total += _sum(partial, row_programs, P, TOTAL_LANES) * text_factor
    scale_slope = _sum(partial + 2 * P, 0, row_programs, TOTAL_LANES) * row_factor
    scale_slope += _sum(partial + 2 * P, row_programs, P, TOTAL_LANES) * text_factor
    bias_slope = scale_slope * 0.0
    if SIGMOID:
        bias_slope += _sum(partial + P, row_programs, P, TOTAL_LANES) * text_factor
    if SMOOTH:
        if SIGMOID:
            mean = _product(sums, all_sums + 2 * depth, depth, TOTAL_LANES) * (0.5 / pairs)
            share = M.to(tl.float64) / clips * 0.5
            total -= smoothing * share * to_float64(tl.load(bias))
            bias_slope -= smoothing * share
        else:
            mean = _product(sums + depth, all_sums + 2 * depth, depth, TOTAL_LANES) * (row_factor / texts)
            mean += _product(sums + 2 * depth, all_sums, depth, TOTAL_LANES) * (0.5 / pairs)
        total -= smoothing * mean * to_float64(tl.load(scale))
        scale_slope -= smoothing * mean
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
    smoothing: tl.float64,
    TEXTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SHARDED: tl.constexpr,
    WEIGHT_SLOPE: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """All slopes times the incoming gradient."""
    at_L = tl.program_id(0) * TEXTS + tl.arange(0, TEXTS)
    gradient = to_float64(tl.load(gradient))
    row_factor = tl.load(factors) * gradient
    text_factor = tl.load(factors + 1) * gradient
    scale = to_float64(tl.load(scale))
    slope_L = tl.load(text_slope + at_L, mask=at_L < N, other=0.0)
    d_dot_L = (slope_L + smoothing) * text_factor
    d_row_L = tl.zeros_like(slope_L) + row_factor
    if not SIGMOID:
        tl.store(d_column + at_L, (-slope_L * text_factor).to(d_column.dtype.element_ty), mask=at_L < N)
        d_dot_L += tl.load(pair_slope + at_L, mask=at_L < N, other=0.0) * row_factor
        d_row_L *= tl.load(row_slope + at_L, mask=at_L < M, other=0.0)
    tl.store(d_row + at_L, d_row_L.to(d_row.dtype.element_ty), mask=at_L < M)
    tl.store(d_dot + at_L, d_dot_L * scale, mask=at_L < N)
    if WEIGHT_SLOPE:
        d_weight_L = tl.load(weight_slope + at_L, mask=at_L < N, other=0.0) * row_factor
        tl.store(d_weight + at_L, from_float64(d_weight_L, d_weight.dtype.element_ty), mask=at_L < N)
    if tl.program_id(0) == 0:
        tl.store(d_scale, (tl.load(factors + 2) * gradient).to(d_scale.dtype.element_ty))
        tl.store(d_bias, (tl.load(factors + 3) * gradient).to(d_bias.dtype.element_ty))
    if SMOOTH:
        # The gradients of the products of sums in `_total_kernel`.
        mean = -0.5 * smoothing * scale * gradient / clips.to(tl.float64) / texts
        row_mean = -smoothing * scale * row_factor / texts
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


KERNELS = {"loss_total": _total_kernel, "loss_slopes": _slope_kernel}
"""The kernels that budgets.py compiles. Each operator below launches one of them, and nothing else."""


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
            smoothing,
            TOTAL_LANES=TOTAL_LANES,
            SIGMOID=sigmoid,
            COUNTED=captioned is not None,
            SMOOTH=sums is not None,
            **OPTIONS,
        )
    return loss, factors


@_loss_total.register_fake
def _(partial, *rest):  # type: ignore[no-untyped-def]
    return partial.new_empty((), dtype=rest[-1]), partial.new_empty(4)


class _Slopes(NamedTuple):
    """The results of `_loss_slopes`: gradients of the first inputs of `_Loss`; empty if not needed."""

    row_M: Tensor
    column_N: Tensor
    dot_N: Tensor
    scale: Tensor
    bias: Tensor
    weights_N: Tensor
    sums_3D: Tensor
    all_sums_3D: Tensor


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
    """The tensors of `_Slopes`.

    `slopes` are the results of `softmax_terms` without the sums, or the slopes of `sigmoid_terms` alone.
    """
    results = _empty_slopes(scale, slopes, sums, weights, rows, sharded)
    sigmoid = len(slopes) == 1
    row_slope, pair_slope, text_slope, weight_slope = slopes * 4 if sigmoid else slopes
    depth = 0 if sums is None else sums.shape[1]
    with on_device(factors):
        _slope_kernel[(count_text_programs(max(rows, len(text_slope), depth)),)](
            gradient,
            factors,
            scale,
            row_slope,
            pair_slope,
            text_slope,
            weight_slope,
            factors if sums is None else sums,
            factors if all_sums is None else all_sums,
            *results,
            rows,
            len(text_slope),
            clips,
            texts,
            depth,
            smoothing,
            TEXTS=TEXTS,
            SIGMOID=sigmoid,
            SHARDED=sharded,
            WEIGHT_SLOPE=weights is not None,
            SMOOTH=sums is not None,
            **OPTIONS,
        )
    return results[:]  # the operator must return a plain tuple


def _empty_slopes(
    scale: Tensor,
    slopes: list[Tensor],
    sums: Tensor | None,
    weights: Tensor | None,
    rows: int,
    sharded: bool,
) -> _Slopes:
    text_slope = slopes[-2 if len(slopes) > 1 else 0]
    texts, like = len(text_slope), text_slope if sums is None else sums
    return _Slopes(
        row_M=scale.new_empty(rows),
        column_N=scale.new_empty(texts if len(slopes) > 1 else 0),
        dot_N=torch.empty_like(text_slope),
        scale=torch.empty_like(scale),
        bias=torch.empty_like(scale),
        weights_N=text_slope.new_empty(0) if weights is None else torch.empty_like(weights),
        sums_3D=like.new_empty(0 if sums is None else sums.shape),
        all_sums_3D=like.new_empty(sums.shape if sums is not None and sharded else 0),
    )


@_loss_slopes.register_fake
def _(gradient, factors, scale, slopes, sums, all_sums, weights, rows, clips, texts, sharded, smoothing):  # type: ignore[no-untyped-def]
    return _empty_slopes(scale, slopes, sums, weights, rows, sharded)[:]


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
            *slopes, partial = sigmoid_terms(row, dot, scale, cast(Tensor, bias), smoothing)
        else:
            *slopes, partial = softmax_terms(
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
            0 if column is None else count_row_programs(len(row)),
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
        results = _loss_slopes(
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
        gradients, needs = _Slopes(*results), ctx.needs_input_grad[:8]
        return (
            *(g if need else None for g, need in zip(gradients, needs, strict=True)),
            None,
            None,
            None,
            None,
        )


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
        row_M: log-sum-exp of each row's negatives, in the dtype of `scale`; M >= 1.
        column_N: log-sum-exp of each text's negatives, in the dtype of `scale`; N >= 1.
        dot_N: float64, the products of `pair_products`.
        scale: floating scalar.
        bias: scalar in the dtype of `scale` that receives the gradient 0, since it cancels.
        weights_N: floating, finite and not negative; default: all captions of a row have the same weight.
        groups: order and offsets of `group_by_owner`; None if text j is the only text of row j, for all rows.
        totals: number of clips and of texts, over all ranks; default: those of this rank.
        smoothing: share of each target that is spread evenly over all candidates.
        sums_3D, all_sums_3D: float64 (3, D), the sums of `pair_products`, of this rank and of all ranks, if
            there is smoothing. Without `all_sums_3D`, there is one rank.
        sum_over_ranks: sums a float64 scalar over the ranks. Then the result is float64: this rank's part of
            the loss, a sum over the ranks.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a shape or device is wrong, or smoothing is not in [0, 1), or there is smoothing but no
            `sums_3D`. The values on the device are not checked.
    """
    _check_vectors(row_M, column_N, dot_N, scale, bias)
    check_argument("weights_N", weights_N, None, (len(dot_N),), dot_N.device)
    check_groups(groups, len(row_M), len(dot_N), dot_N.device)
    _check_smoothing(smoothing, sums_3D, all_sums_3D, dot_N.device)
    totals = totals or (len(row_M), len(column_N))
    tensors = _without_gaps(row_M, column_N, dot_N, scale, bias, weights_N, sums_3D, all_sums_3D)
    order, offset = (None, None) if groups is None else _without_gaps(*groups)
    loss = _Loss.apply(*tensors, (order, offset), totals, smoothing, sum_over_ranks)  # type: ignore[no-untyped-call]
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

    The arguments and errors are those of `softmax_loss`; `bias` counts here.
    """
    _check_vectors(row_M, None, dot_N, scale, bias)
    _check_smoothing(smoothing, sums_3D, all_sums_3D, dot_N.device)
    totals = totals or (len(row_M), len(dot_N))
    tensors = _without_gaps(row_M, None, dot_N, scale, bias, None, sums_3D, all_sums_3D)
    loss = _Loss.apply(*tensors, (None, None), totals, smoothing, sum_over_ranks)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def _without_gaps(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels read elements that follow each other in memory. Gradients reach the given tensors."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _check_vectors(
    row_M: Tensor, column_N: Tensor | None, dot_N: Tensor, scale: Tensor, bias: Tensor | None
) -> None:
    check_tensor("row_M", row_M)
    check_tensor("dot_N", dot_N)
    if row_M.ndim != 1 or dot_N.ndim != 1 or not len(row_M) or not len(dot_N):
        raise ValueError(
            "row_M and dot_N must be of shape (M,) and (N,) with M >= 1 and N >= 1, "
            f"got {tuple(row_M.shape)} and {tuple(dot_N.shape)}"
        )
    device = dot_N.device
    check_argument("dot_N", dot_N, torch.float64, (len(dot_N),), device)
    check_argument("scale", scale, None, (), device)
    check_argument("bias", bias, scale.dtype, (), device)
    check_argument("row_M", row_M, scale.dtype, (len(row_M),), device)
    check_argument("column_N", column_N, scale.dtype, (len(dot_N),), device)


def _check_smoothing(
    smoothing: float, sums_3D: Tensor | None, all_sums_3D: Tensor | None, device: torch.device
) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    if sums_3D is None:
        if smoothing > 0 or all_sums_3D is not None:
            raise ValueError("with smoothing or all_sums_3D, sums_3D must be given")
        return
    check_tensor("sums_3D", sums_3D)
    for name, x in (("sums_3D", sums_3D), ("all_sums_3D", all_sums_3D)):
        check_argument(name, x, torch.float64, (3, *sums_3D.shape[1:2]), device)
