"""Differentiable sums over embeddings and captions, in a fixed order of additions.

Results have the same bits for any number of threads, and on CUDA in every run. torch does not promise that
for matrix-vector products, long sums, softplus and accumulating index_put on the CPU, nor for index_add on
CUDA.

Shape suffixes: M audio rows, N text rows, B rows of either side, P rows of a part, D joint dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512
"""Rows of a part on the CPU, where small parts stay in the cache."""
_ELEMENTS_AT_ONCE = 1 << 24
"""Elements of a part on CUDA. Each part is a few launches, so parts are large: 128 MB in float64."""
_SHORT = 1024
"""torch uses a single thread for tensors of up to this many elements."""
_LEAST_NORM = 1e-12
"""The default `eps` of `torch.nn.functional.normalize`."""


class Dots(NamedTuple):
    """The inner products that the loss needs, and the embeddings themselves, unchanged.

    Attributes:
        audio_MD, text_ND: the embeddings.
        pair_N: product of each text with its audio.
        mean_M: product of each audio with the mean text; None if no mean was given.
        mean_N: product of each text with the mean audio; None if no mean was given.
    """

    audio_MD: Tensor
    text_ND: Tensor
    pair_N: Tensor
    mean_M: Tensor | None
    mean_N: Tensor | None


def dots(
    audio_MD: Tensor,
    text_ND: Tensor,
    owner_N: Tensor | None,
    mean_text_D: Tensor | None,
    mean_audio_D: Tensor | None,
    raw: tuple[Tensor, Tensor] | None = None,
) -> Dots:
    """<audio_MD[owner_N[j]], text_ND[j]> of each text, and the products of all rows with the given means.

    Without `owner_N`, text j belongs to audio j, and the audio is not copied.

    The products of pairs are computed in float64. If two captions fit their clip almost equally well, the
    gradients are proportional to the difference of their products. Float32 would keep no digit of it.
    `raw` holds the rows before normalisation. Products computed from them are free of the rounding errors of
    the normalised rows.

    Compute the rest of the loss from the returned embeddings. The backward pass then adds the gradients of
    the products in place to the gradients of the rest. This saves a second matrix of that size. Only the loss
    may use the returned embeddings, because a gradient that other code holds would be changed too.
    """
    return Dots(*_Dots.apply(audio_MD, text_ND, owner_N, mean_text_D, mean_audio_D, raw))  # type: ignore[no-untyped-call]


def normalise(x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of unit norm in `dtype`, as `torch.nn.functional.normalize`.

    The backward pass needs only the result and the norms. It overwrites the incoming gradient.
    """
    return cast(Tensor, _Normalise.apply(x_BD, dtype))  # type: ignore[no-untyped-call]


def without_overflow(x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides each row whose norm overflows `dtype` by a power of two, which makes its largest absolute value
    1 to 2; leaves the other rows.

    Returns:
        x_BD itself if no norm overflows; on CUDA a copy, because the host does not wait for the norms.
    """
    overflows_B = norms(x_BD, dtype).isinf()
    if not (x_BD.is_cuda or torch.compiler.is_compiling() or bool(overflows_B.any())):
        return x_BD
    wide = torch.promote_types(x_BD.dtype, dtype)
    largest_B = torch.linalg.vector_norm(x_BD.detach(), ord=torch.inf, dim=1, dtype=wide)
    power_B = largest_B / (2 * torch.frexp(largest_B).mantissa)
    return x_BD / torch.where(overflows_B, power_B, 1.0).to(x_BD.dtype)[:, None]


def norms(x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms (B,) of rows in `dtype`, without gradient."""
    norm_B: Tensor = torch.linalg.vector_norm(x_BD.detach(), dim=1, dtype=dtype)
    return norm_B


def sum_by_owner(x_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
    """Sum of each owner's numbers, (rows,)."""
    return cast(Tensor, _SumByOwner.apply(x_N, owner_N, rows))  # type: ignore[no-untyped-call]


def of_owner(x_M: Tensor, owner_N: Tensor) -> Tensor:
    """x_M[owner_N] (N,): for each text, the number of its owner."""
    return cast(Tensor, _OfOwner.apply(x_M, owner_N))  # type: ignore[no-untyped-call]


def lse_by_owner(x_N: Tensor, counts_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
    """Log-sum-exp (rows,) of each owner's numbers whose counts_N (bool) is true; -inf if there are none."""
    return cast(Tensor, _LseByOwner.apply(x_N, counts_N, owner_N, rows))  # type: ignore[no-untyped-call]


def cross_entropy_by_owner(x_N: Tensor, share_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
    """sum_j share_j (lse - x_j) over each owner's numbers j of positive share, (rows,).

    lse is the log-sum-exp of these numbers. The shares of an owner must add up to 1. For a single number, the
    result and its gradient are exactly 0.
    """
    return cast(Tensor, _CrossEntropyByOwner.apply(x_N, share_N, owner_N, rows))  # type: ignore[no-untyped-call]


def softplus(x_B: Tensor) -> Tensor:
    """log(1 + exp x) of each number. Even a tiny result has full relative accuracy."""
    if x_B.is_cuda or len(x_B) <= _SHORT:
        # Above the threshold, torch returns x for softplus(x). At 40 this is exact even in float64.
        return torch.nn.functional.softplus(x_B, threshold=40.0)
    return cast(Tensor, _Softplus.apply(x_B))  # type: ignore[no-untyped-call]


def total(x_B: Tensor) -> Tensor:
    """Sum of a vector, a scalar."""
    if x_B.is_cuda or len(x_B) <= _SHORT:
        return x_B.sum()
    return torch.nn.functional.pad(x_B, (0, -len(x_B) % 1024)).view(-1, 1024).sum(1).sum()


def _parts(x_BD: Tensor) -> Iterator[slice]:
    """Slices of the rows of x."""
    step = _ROWS_AT_ONCE
    if x_BD.is_cuda:
        step = max(step, _ELEMENTS_AT_ONCE // x_BD.shape[1])
    return (slice(start, start + step) for start in range(0, len(x_BD), step))


def _add_to_owners(total: Tensor, owner_N: Tensor, x: Tensor) -> None:
    """Adds each row of x to the row of its owner, in order."""
    if total.is_cuda:
        total.index_put_((owner_N,), x, accumulate=True)
    else:
        total.index_add_(0, owner_N, x)


def _audio_of_texts(audio_MD: Tensor, owner_N: Tensor | None, part: slice) -> Tensor:
    """The audio of each text of a part. It may be a view: do not change it."""
    return audio_MD[part] if owner_N is None else audio_MD.index_select(0, owner_N[part])


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        audio_MD: Tensor,
        text_ND: Tensor,
        owner_N: Tensor | None,
        mean_text_D: Tensor | None,
        mean_audio_D: Tensor | None,
        raw: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.save_for_backward(audio_MD, text_ND, owner_N, mean_text_D, mean_audio_D)
        parts = _parts(text_ND)
        if raw is None:
            pairs = [
                _audio_of_texts(audio_MD, owner_N, p).to(torch.float64, copy=True).mul_(text_ND[p]).sum(1)
                for p in parts
            ]
        else:
            pairs = [_cosines(_audio_of_texts(raw[0], owner_N, p), raw[1][p]) for p in parts]
        pair_N = torch.cat(pairs)
        means = (_dot_rows(audio_MD, mean_text_D), _dot_rows(text_ND, mean_audio_D))
        return audio_MD.view_as(audio_MD), text_ND.view_as(text_ND), pair_N, *means

    @staticmethod
    def backward(
        ctx: Any,
        d_audio_MD: Tensor,
        d_text_ND: Tensor,
        d_pair_N: Tensor,
        d_mean_M: Tensor | None,
        d_mean_N: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, Tensor | None, None]:
        audio_MD, text_ND, owner_N, mean_text_D, mean_audio_D = ctx.saved_tensors
        needs_audio, needs_text, *_ = ctx.needs_input_grad
        for p in _parts(text_ND):
            d_pair_P1 = d_pair_N[p, None].to(text_ND.dtype)
            if needs_text:
                d_text_ND[p].addcmul_(d_pair_P1, _audio_of_texts(audio_MD, owner_N, p))
            if needs_audio and owner_N is None:
                d_audio_MD[p].add_(d_pair_P1 * text_ND[p])  # same rounding as with owners, unlike addcmul_
            elif needs_audio:
                _add_to_owners(d_audio_MD, owner_N[p], d_pair_P1 * text_ND[p])
        d_mean_text_D = _vector_gradient(audio_MD, mean_text_D, d_mean_M, d_audio_MD if needs_audio else None)
        d_mean_audio_D = _vector_gradient(text_ND, mean_audio_D, d_mean_N, d_text_ND if needs_text else None)
        d_inputs = (d_audio_MD if needs_audio else None, d_text_ND if needs_text else None)
        return *d_inputs, None, d_mean_text_D, d_mean_audio_D, None


def _cosines(a_PD: Tensor, b_PD: Tensor) -> Tensor:
    """Inner products (P,) of the rows of a and b after normalisation, in float64."""
    # a_PD is changed in place, so even float64 rows are copied.
    a_PD, b_PD = a_PD.to(torch.float64, copy=True), b_PD.double()
    norm_P = torch.linalg.vector_norm(a_PD, dim=1).clamp_(min=_LEAST_NORM)
    norm_P *= torch.linalg.vector_norm(b_PD, dim=1).clamp_(min=_LEAST_NORM)
    return a_PD.mul_(b_PD).sum(1).div_(norm_P)


def _dot_rows(x_BD: Tensor, vector_D: Tensor | None) -> Tensor | None:
    if vector_D is None:
        return None
    return torch.cat([(x_BD[p] * vector_D).sum(1) for p in _parts(x_BD)])


def _vector_gradient(
    x_BD: Tensor, vector_D: Tensor | None, d_dots_B: Tensor | None, d_x_BD: Tensor | None
) -> Tensor | None:
    """The gradient of the vector of `_dot_rows`. The gradient of the rows is added to d_x_BD."""
    if vector_D is None or d_dots_B is None:
        return None
    d_vector_D = torch.zeros_like(vector_D)
    for p in _parts(x_BD):
        d_dots_P1 = d_dots_B[p, None]
        d_vector_D += (d_dots_P1 * x_BD[p]).sum(0)
        if d_x_BD is not None:
            d_x_BD[p].addcmul_(d_dots_P1, vector_D)
    return d_vector_D


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, dtype: torch.dtype) -> Tensor:
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True, dtype=dtype).clamp_(min=_LEAST_NORM)
        unit_BD: Tensor = x_BD / norm_B1
        ctx.save_for_backward(unit_BD, norm_B1)
        ctx.dtype = x_BD.dtype
        return unit_BD

    @staticmethod
    def backward(ctx: Any, d_unit_BD: Tensor) -> tuple[Tensor, None]:
        unit_BD, norm_B1 = ctx.saved_tensors
        for p in _parts(unit_BD):
            d_unit_PD, unit_PD = d_unit_BD[p], unit_BD[p]
            radial_P1 = (d_unit_PD * unit_PD).sum(1, keepdim=True)
            d_unit_PD.addcmul_(radial_P1, unit_PD, value=-1).div_(norm_B1[p])
        return d_unit_BD.to(ctx.dtype), None


class _Softplus(torch.autograd.Function):
    """log(1 + exp x) whose bits do not depend on the number of threads.

    torch's vectorised softplus rounds differently in the scalar tail of each thread's chunk, so its result
    depends on the number of threads. exp and log1p do not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = x.neg().exp_().add_(1).reciprocal_()
        return slope.mul_(d_out)


class _SumByOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(owner_N)
        sums_M = x_N.new_zeros(rows)
        _add_to_owners(sums_M, owner_N, x_N)
        return sums_M

    @staticmethod
    def backward(ctx: Any, d_sums_M: Tensor) -> tuple[Tensor, None, None]:
        (owner_N,) = ctx.saved_tensors
        return d_sums_M.index_select(0, owner_N), None, None


class _OfOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_M: Tensor, owner_N: Tensor) -> Tensor:
        ctx.save_for_backward(owner_N)
        ctx.rows = len(x_M)
        return x_M.index_select(0, owner_N)

    @staticmethod
    def backward(ctx: Any, d_x_N: Tensor) -> tuple[Tensor, None]:
        (owner_N,) = ctx.saved_tensors
        d_x_M = d_x_N.new_zeros(ctx.rows)
        _add_to_owners(d_x_M, owner_N, d_x_N)
        return d_x_M, None


class _Softmax(NamedTuple):
    """Softmax over each owner's numbers whose counts_N is true.

    Attributes:
        peak_M: the largest of these numbers; -inf if there are none.
        rest_M: sum of exp(number - peak) over the others of these numbers.
        share_N: the softmax; 0 where counts_N is false.
        is_peak_N: true for one number of each owner: the last that equals the peak.
    """

    peak_M: Tensor
    rest_M: Tensor
    share_N: Tensor
    is_peak_N: Tensor


def _softmax_by_owner(x_N: Tensor, counts_N: Tensor, owner_N: Tensor, rows: int) -> _Softmax:
    x_N = torch.where(counts_N, x_N, -torch.inf)
    peak_M = x_N.new_full((rows,), -torch.inf).scatter_reduce(0, owner_N, x_N, "amax")
    index_N = torch.arange(len(x_N), device=x_N.device)
    candidate_N = torch.where(counts_N & (x_N == peak_M[owner_N]), index_N, -1)
    chosen_M = torch.full_like(peak_M, -1, dtype=torch.int64)
    is_peak_N = index_N == chosen_M.scatter_reduce(0, owner_N, candidate_N, "amax")[owner_N]
    shift_M = torch.where(peak_M.isneginf(), 0.0, peak_M)
    exp_N = (x_N - shift_M[owner_N]).exp()
    rest_M = sum_by_owner(torch.where(is_peak_N, 0.0, exp_N), owner_N, rows)
    return _Softmax(peak_M, rest_M, exp_N / (1 + rest_M)[owner_N], is_peak_N)


class _LseByOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, counts_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
        softmax = _softmax_by_owner(x_N, counts_N, owner_N, rows)
        ctx.save_for_backward(softmax.share_N, owner_N)
        return softmax.peak_M + softmax.rest_M.log1p()

    @staticmethod
    def backward(ctx: Any, d_lse_M: Tensor) -> tuple[Tensor, None, None, None]:
        share_N, owner_N = ctx.saved_tensors
        return d_lse_M[owner_N] * share_N, None, None, None


class _CrossEntropyByOwner(torch.autograd.Function):
    """sum_j share_j ((peak - x_j) + log(1 + rest)). No term is negative, so nothing cancels.

    The gradient is softmax - share. If both are almost 1, as they can be for the peak, their difference has
    no correct digits. So the gradient of the peak is computed as minus the sum of the other gradients.
    """

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, share_N: Tensor, owner_N: Tensor, rows: int) -> Tensor:
        counts_N = share_N > 0
        softmax = _softmax_by_owner(x_N, counts_N, owner_N, rows)
        others_N = torch.where(softmax.is_peak_N, 0.0, softmax.share_N - share_N)
        peak_slope_M = sum_by_owner(others_N, owner_N, rows).neg_()
        slope_N = torch.where(softmax.is_peak_N, peak_slope_M[owner_N], others_N)
        peak_M = torch.where(softmax.peak_M.isneginf(), 0.0, softmax.peak_M)
        below_N = (peak_M[owner_N] - x_N) + softmax.rest_M.log1p()[owner_N]
        ctx.save_for_backward(slope_N, below_N if ctx.needs_input_grad[1] else None, owner_N)
        return sum_by_owner(torch.where(counts_N, share_N * below_N, 0.0), owner_N, rows)

    @staticmethod
    def backward(ctx: Any, d_sums_M: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        slope_N, below_N, owner_N = ctx.saved_tensors
        d_sums_N = d_sums_M[owner_N]
        return d_sums_N * slope_N, None if below_N is None else d_sums_N * below_N, None, None
