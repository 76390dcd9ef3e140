"""Products of the positive pairs of a contrastive batch, and the gradients of embeddings.

    dot_j = <x_{owner[j]}, y_j>                                   rows have unit norm if `normalize` is true
    dX_i += sum over captions j of clip i of d_dot_j y_j,   dY_j += d_dot_j x_{owner[j]}

`order` and `offset` (grouping.py) list the captions of each clip. loss_terms.py and loss.py compute the loss
from the products. Label smoothing needs mean logits, which are products of sums of embeddings: of all X_i, of
the X_i of clips with captions, and of all Y_j. Their gradient adds one vector to all rows.

Shape suffixes: M audio rows, N text rows, D joint dimension, R rows of a program.

About 4 N D FLOPs forward and backward. Each pass reads the rows of each pair once. Operators, each of which
launches one kernel and nothing else for any M and N: pair_products, embedding_sums (only with smoothing),
pair_gradients. Products and sums are in float64. The gradients of pairs are added to those of negative pairs
before these are rounded to 16 bits, because the two nearly cancel. They are added in place if no conversion
is needed. No kernel uses atomics, and no sum depends on the number of multiprocessors, so the same call gives
the same bits. A clip with thousands of captions is slow, because one program adds them one by one.

Source: arXiv 2103.00020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, OPTIONS, check_argument, check_tensor, on_device
from .grouping import captions_of, check_groups, from_float64, to_float64

LARGEST_DEPTH = 8192
"""The largest joint dimension. A program holds whole rows in registers."""
_ELEMENTS = 65536 if INTERPRETED else 1024  # elements of a matrix that a program reads at once
_SUM_PROGRAMS = 2 if INTERPRETED else 128  # the order of additions depends on this number


def pair_products_reference(
    audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor, *, normalize: bool = False
) -> Tensor:
    """The definition of the products: any floating dtype, autograd."""
    if normalize:
        audio_MD, text_ND = (torch.nn.functional.normalize(x.double()) for x in (audio_MD, text_ND))
    return (audio_MD.double()[owner_N] * text_ND.double()).sum(1)


@triton.jit
def _at(row_R, stride, BD: tl.constexpr):
    """Offsets of the elements of rows."""
    return row_R.to(tl.int64)[:, None] * stride + tl.arange(0, BD)[None, :]


@triton.jit
def _mask(inside_R, D: tl.constexpr, BD: tl.constexpr):
    return inside_R[:, None] & (tl.arange(0, BD) < D)[None, :]


@triton.jit
def _load_rows(x, row_R, inside_R, stride, D: tl.constexpr, BD: tl.constexpr):
    """Rows in float64; 0 outside."""
    return to_float64(tl.load(x + _at(row_R, stride, BD), mask=_mask(inside_R, D, BD), other=0.0))


@triton.jit
def _store_rows(x, row_R, inside_R, value, D: tl.constexpr, BD: tl.constexpr):
    """Stores float64 rows in a matrix without gaps."""
    at = _at(row_R, D, BD)
    tl.store(x + at, from_float64(value, x.dtype.element_ty), mask=_mask(inside_R, D, BD))


@triton.jit
def _owners(owner, j_R, inside_R, M):
    """The row of each text. A wrong owner, which the caller reports, must not lead to memory elsewhere."""
    owner_R = tl.load(owner + j_R, mask=inside_R, other=0)
    return tl.minimum(tl.maximum(owner_R, 0), M - 1).to(tl.int32)


@triton.jit
def _norm(x):
    """Euclidean norms of rows, at least 1e-12 as in torch.nn.functional.normalize."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@triton.jit(do_not_specialize=["M", "N"])
def _pair_kernel(
    audio,
    text,
    owner,
    wide_audio,
    wide_text,
    audio_norm,
    text_norm,
    dot,
    M,
    N,
    stride_audio,
    stride_text,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    COPY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Products of pairs; with COPY also the embeddings, normalised or not, and their norms."""
    program = tl.program_id(0)
    programs = (N + BR - 1) // BR
    if program < programs:
        j_R = program * BR + tl.arange(0, BR)
        inside_R = j_R < N
        i_R = _owners(owner, j_R, inside_R, M)
        x = _load_rows(audio, i_R, inside_R, stride_audio, D, BD)
        y = _load_rows(text, j_R, inside_R, stride_text, D, BD)
        dot_R = tl.sum(x * y, 1)
        if NORMALIZE:
            norm_R = _norm(y)
            dot_R = dot_R / (_norm(x) * norm_R)
            tl.store(text_norm + j_R, norm_R, mask=inside_R)
            y = y * (1.0 / norm_R)[:, None]
        if COPY:
            _store_rows(wide_text, j_R, inside_R, y, D, BD)
        tl.store(dot + j_R, dot_R, mask=inside_R)
    else:
        i_R = (program - programs) * BR + tl.arange(0, BR)
        inside_R = i_R < M
        x = _load_rows(audio, i_R, inside_R, stride_audio, D, BD)
        if NORMALIZE:
            norm_R = _norm(x)
            tl.store(audio_norm + i_R, norm_R, mask=inside_R)
            x = x * (1.0 / norm_R)[:, None]
        _store_rows(wide_audio, i_R, inside_R, x, D, BD)


@triton.jit
def _store_gradient(
    d_x, row_R, inside_R, g, x, norm, stride, D: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Stores the gradient of rows, from the gradient g of the rows after normalisation."""
    if NORMALIZE:
        unit = _load_rows(x, row_R, inside_R, stride, D, BD)
        g = g - tl.sum(g * unit, 1)[:, None] * unit
        g = g * (1.0 / tl.load(norm + row_R, mask=inside_R, other=1.0))[:, None]
    _store_rows(d_x, row_R, inside_R, g, D, BD)


@triton.jit(do_not_specialize=["M", "N"])
def _pair_gradient_kernel(
    d_wide_audio,
    d_wide_text,
    d_audio,
    d_text,
    audio,
    text,
    audio_norm,
    text_norm,
    owner,
    order,
    offset,
    captioned,
    d_dot,
    d_sums,
    M,
    N,
    stride_audio,
    stride_text,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SINGLE: tl.constexpr,
    NEEDS_AUDIO: tl.constexpr,
    NEEDS_TEXT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Gradients of embeddings: those of the negative pairs (d_wide_*) plus those of pairs and sums."""
    program = tl.program_id(0)
    programs = (N + BR - 1) // BR
    if not NEEDS_TEXT:
        programs = 0
    d_D = tl.arange(0, BD)
    if program < programs:
        if NEEDS_TEXT:
            j_R = program * BR + tl.arange(0, BR)
            inside_R = j_R < N
            i_R = _owners(owner, j_R, inside_R, M)
            d_dot_R = tl.load(d_dot + j_R, mask=inside_R, other=0.0)
            g = _load_rows(d_wide_text, j_R, inside_R, D, D, BD)
            g += d_dot_R[:, None] * _load_rows(audio, i_R, inside_R, stride_audio, D, BD)
            if SMOOTH:
                g += tl.load(d_sums + 2 * D + d_D, mask=d_D < D, other=0.0)[None, :]
            _store_gradient(d_text, j_R, inside_R, g, text, text_norm, stride_text, D, BD, NORMALIZE)
    elif NEEDS_AUDIO:
        i_R = (program - programs) * BR + tl.arange(0, BR)
        inside_R = i_R < M
        first_R, count_R = captions_of(offset, i_R, inside_R, SINGLE)
        g = _load_rows(d_wide_audio, i_R, inside_R, D, D, BD)
        for k in range(0, tl.max(count_R, 0)):
            mask_R = k < count_R
            j_R = first_R + k
            if not SINGLE:
                j_R = tl.load(order + j_R, mask=mask_R, other=0)
            d_dot_R = tl.load(d_dot + j_R, mask=mask_R, other=0.0)
            g += d_dot_R[:, None] * _load_rows(text, j_R, mask_R, stride_text, D, BD)
        if SMOOTH:
            captioned_R = tl.load(captioned + i_R, mask=inside_R, other=0)
            g += tl.load(d_sums + d_D, mask=d_D < D, other=0.0)[None, :]
            g_D = tl.load(d_sums + D + d_D, mask=d_D < D, other=0.0)
            g += tl.where(captioned_R[:, None] != 0, g_D[None, :], 0.0)
        _store_gradient(d_audio, i_R, inside_R, g, audio, audio_norm, stride_audio, D, BD, NORMALIZE)


@triton.jit(do_not_specialize=["M", "N"])
def _sums_kernel(
    audio,
    text,
    weight,
    order,
    offset,
    captioned,
    sums,
    M,
    N,
    stride_audio,
    stride_text,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Partial sums (programs, 3, D) of audio rows, of those with captions, and of texts; `captioned` (M,)."""
    program = tl.program_id(0)
    step = tl.num_programs(0) * BR
    all_D = tl.zeros([BD], tl.float64)
    captioned_D = tl.zeros([BD], tl.float64)
    text_D = tl.zeros([BD], tl.float64)
    for start in range(program * BR, M, step):
        i_R = start + tl.arange(0, BR)
        inside_R = i_R < M
        first_R, count_R = captions_of(offset, i_R, inside_R, SINGLE)
        captioned_R = count_R > 0
        if WEIGHTED:
            largest_R = tl.zeros([BR], tl.float64)
            for k in range(0, tl.max(count_R, 0)):
                j_R = first_R + k
                if not SINGLE:
                    j_R = tl.load(order + j_R, mask=k < count_R, other=0)
                largest_R = tl.maximum(
                    largest_R, to_float64(tl.load(weight + j_R, mask=k < count_R, other=0.0))
                )
            captioned_R = largest_R > 0
        tl.store(captioned + i_R, captioned_R.to(tl.int8), mask=inside_R)
        x = _load_rows(audio, i_R, inside_R, stride_audio, D, BD)
        all_D += tl.sum(x, 0)
        captioned_D += tl.sum(tl.where(captioned_R[:, None], x, 0.0), 0)
    for start in range(program * BR, N, step):
        j_R = start + tl.arange(0, BR)
        text_D += tl.sum(_load_rows(text, j_R, j_R < N, stride_text, D, BD), 0)
    d_D = tl.arange(0, BD)
    at = sums + program * 3 * D + d_D
    tl.store(at, all_D, mask=d_D < D)
    tl.store(at + D, captioned_D, mask=d_D < D)
    tl.store(at + 2 * D, text_D, mask=d_D < D)


KERNELS = {"pair": _pair_kernel, "pair_gradient": _pair_gradient_kernel, "sums": _sums_kernel}
"""The kernels that budgets.py compiles. Each operator below launches one of them, and nothing else."""


def _depth(depth: int) -> dict[str, Any]:
    """The constants of a joint dimension, and the number of warps: about 8 elements a thread."""
    width = triton.next_power_of_2(depth)
    rows = max(1, _ELEMENTS // width)
    return {"D": depth, "BD": width, "BR": rows, "num_warps": 4 * max(1, width // 2048), **OPTIONS}


def _copied(x: Tensor, dtype: torch.dtype, normalize: bool) -> bool:
    """Whether the loss computes with a copy of the embeddings."""
    return normalize or x.dtype != dtype


@torch.library.custom_op("clsp_fast::pair_products", mutates_args=())
def _pair_products(
    audio: Tensor, text: Tensor, owner: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Products (N,); then copies of the embeddings in `dtype` and their norms, all empty if not needed."""
    results = _empty_products(audio, text, normalize, dtype)
    dot, wide_audio, wide_text, audio_norm, text_norm = results
    constants = _depth(audio.shape[1])
    copy = _copied(audio, dtype, normalize)
    programs = triton.cdiv(len(text), constants["BR"]) + copy * triton.cdiv(len(audio), constants["BR"])
    with on_device(audio):
        _pair_kernel[(programs,)](
            audio,
            text,
            owner,
            wide_audio,
            wide_text,
            audio_norm,
            text_norm,
            dot,
            len(audio),
            len(text),
            audio.stride(0),
            text.stride(0),
            COPY=copy,
            NORMALIZE=normalize,
            **constants,
        )
    return results


def _empty_products(
    audio: Tensor, text: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    copy = _copied(audio, dtype, normalize)
    copies = (x.new_empty(x.shape if copy else 0, dtype=dtype) for x in (audio, text))
    norms = (x.new_empty(len(x) if normalize else 0, dtype=torch.float64) for x in (audio, text))
    return text.new_empty(len(text), dtype=torch.float64), *copies, *norms


@_pair_products.register_fake
def _(audio, text, owner, normalize, dtype):  # type: ignore[no-untyped-def]
    return _empty_products(audio, text, normalize, dtype)


@torch.library.custom_op("clsp_fast::embedding_sums", mutates_args=())
def _embedding_sums(
    audio: Tensor, text: Tensor, weights: Tensor | None, order: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partial sums (programs, 3, D), and whether a row has a caption of positive weight, (M,) int8."""
    sums, captioned = _empty_sums(audio)
    with on_device(audio):
        _sums_kernel[(_SUM_PROGRAMS,)](
            audio,
            text,
            sums if weights is None else weights,
            captioned if order is None else order,
            captioned if offset is None else offset,
            captioned,
            sums,
            len(audio),
            len(text),
            audio.stride(0),
            text.stride(0),
            SINGLE=order is None,
            WEIGHTED=weights is not None,
            **_depth(audio.shape[1]),
        )
    return sums, captioned


def _empty_sums(audio: Tensor) -> tuple[Tensor, Tensor]:
    sums = audio.new_empty(_SUM_PROGRAMS, 3, audio.shape[1], dtype=torch.float64)
    return sums, audio.new_empty(len(audio), dtype=torch.int8)


@_embedding_sums.register_fake
def _(audio, text, weights, order, offset):  # type: ignore[no-untyped-def]
    return _empty_sums(audio)


@torch.library.custom_op("clsp_fast::pair_gradients", mutates_args=("d_audio", "d_text"))
def _pair_gradients(
    d_wide_audio: Tensor | None,
    d_wide_text: Tensor | None,
    d_audio: Tensor | None,
    d_text: Tensor | None,
    audio: Tensor,
    text: Tensor,
    audio_norm: Tensor,
    text_norm: Tensor,
    owner: Tensor,
    order: Tensor | None,
    offset: Tensor | None,
    captioned: Tensor | None,
    d_dot: Tensor,
    d_sums: Tensor | None,
    normalize: bool,
) -> None:
    """Writes d_audio and d_text: d_wide_audio and d_wide_text plus the gradients of pairs and sums.

    Where d_wide_* is None, the gradients are added to d_audio or d_text in place. Where d_audio or d_text is
    None, the embeddings need no gradient.
    """
    constants = _depth(audio.shape[1])
    sides = ((text, d_text), (audio, d_audio))
    programs = sum(triton.cdiv(len(x), constants["BR"]) for x, d_x in sides if d_x is not None)
    if not programs:
        return
    d_wide_audio = d_audio if d_wide_audio is None else d_wide_audio
    d_wide_text = d_text if d_wide_text is None else d_wide_text
    with on_device(audio):
        _pair_gradient_kernel[(programs,)](
            *(d_dot if x is None else x for x in (d_wide_audio, d_wide_text, d_audio, d_text)),
            audio,
            text,
            audio_norm,
            text_norm,
            owner,
            *(owner if x is None else x for x in (order, offset, captioned)),
            d_dot,
            d_dot if d_sums is None else d_sums,
            len(audio),
            len(text),
            audio.stride(0),
            text.stride(0),
            SINGLE=order is None,
            NEEDS_AUDIO=d_audio is not None,
            NEEDS_TEXT=d_text is not None,
            NORMALIZE=normalize,
            SMOOTH=d_sums is not None,
            **constants,
        )


@_pair_gradients.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        audio: Tensor,
        text: Tensor,
        owner: Tensor,
        order: Tensor | None,
        offset: Tensor | None,
        weights: Tensor | None,
        dtype: torch.dtype,
        normalize: bool,
        smooth: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dot, wide_audio, wide_text, *norms = _pair_products(audio, text, owner, normalize, dtype)
        if not _copied(audio, dtype, normalize):
            wide_audio, wide_text = audio.view_as(audio), text.view_as(text)
        sums = captioned = None
        if smooth:
            parts, captioned = _embedding_sums(wide_audio, wide_text, weights, order, offset)
            sums = parts.sum(0)
        # Rows that were only widened are read from the narrow matrix, which takes less time.
        rows = (wide_audio, wide_text) if normalize else (audio, text)
        ctx.save_for_backward(*rows, *norms, owner, order, offset, captioned)
        ctx.normalize, ctx.dtype = normalize, audio.dtype
        ctx.set_materialize_grads(False)
        return wide_audio, wide_text, dot, sums

    @staticmethod
    def backward(
        ctx: Any,
        d_wide_audio: Tensor | None,
        d_wide_text: Tensor | None,
        d_dot: Tensor | None,
        d_sums: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        audio, text = saved[:2]
        if d_dot is None:
            d_dot = text.new_zeros(len(text), dtype=torch.float64)
        if d_sums is not None:
            d_sums = d_sums.contiguous()
        wide_gradients, gradients = [], []
        for x, g, needed in zip(
            (audio, text), (d_wide_audio, d_wide_text), ctx.needs_input_grad, strict=False
        ):
            if not needed:
                g = None
            elif g is None:
                g = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
            else:
                g = g.contiguous()
            in_place = g is None or g.dtype == ctx.dtype
            wide_gradients.append(None if in_place else g)
            gradients.append(g if in_place else g.new_empty(g.shape, dtype=ctx.dtype))
        _pair_gradients(*wide_gradients, *gradients, *saved, d_dot.contiguous(), d_sums, ctx.normalize)
        return *gradients, None, None, None, None, None, None, None


class Products(NamedTuple):
    """Results of `pair_products`.

    Attributes:
        audio_MD, text_ND: the embeddings for the rest of the loss.
        dot_N: float64, the product of each text and its audio.
        sums_3D: float64, sums of all audio rows, of audio rows with captions, and of texts; None unless
            smoothing needs them.
    """

    audio_MD: Tensor
    text_ND: Tensor
    dot_N: Tensor
    sums_3D: Tensor | None


def pair_products(
    audio_MD: Tensor,
    text_ND: Tensor,
    owner_N: Tensor,
    *,
    groups: tuple[Tensor, Tensor] | None = None,
    weights_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    smooth: bool = False,
) -> Products:
    """The products of positive pairs, and the embeddings for the rest of the loss. Differentiable once.

    Compute the rest of the loss from the returned embeddings. The backward pass changes their gradients in
    place, so no other code may hold these gradients.

    Args:
        audio_MD: floating (M, D), M >= 1 and 1 <= D <= LARGEST_DEPTH.
        text_ND: (N, D), N >= 1, same dtype and device.
        owner_N: int64 (N,), the audio row of each text.
        groups: order and offsets of `group_by_owner`; None if text j is the only text of row j, for all rows.
        weights_N: floating (N,); a row whose captions all have weight 0 counts as a row without captions.
        dtype: of the returned embeddings, which are widened to it; default: that of audio_MD.
        normalize: whether rows are scaled to unit norm. The products have the digits of the rows before that.
        smooth: whether to compute the sums of embeddings.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a shape or device is wrong. The values on the device are not checked.
    """
    _check_pairs(audio_MD, text_ND, owner_N, groups, weights_N)
    audio_MD, text_ND = (x if x.stride(1) == 1 else x.contiguous() for x in (audio_MD, text_ND))
    order, offset = (None, None) if groups is None else (x.contiguous() for x in groups)
    weights_N = None if weights_N is None else weights_N.detach().contiguous()
    options = (order, offset, weights_N, dtype or audio_MD.dtype, normalize, smooth)
    products = _Products.apply(audio_MD, text_ND, owner_N.contiguous(), *options)  # type: ignore[no-untyped-call]
    return Products(*products)


def _check_pairs(
    audio_MD: Tensor,
    text_ND: Tensor,
    owner_N: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    weights_N: Tensor | None,
) -> None:
    for name, x in (("audio_MD", audio_MD), ("text_ND", text_ND)):
        check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.ndim != 2 or 0 in x.shape or x.shape[1] > LARGEST_DEPTH:
            raise ValueError(
                f"{name} must be a floating, non-empty matrix of at most {LARGEST_DEPTH} columns, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    (rows, depth), device, texts = audio_MD.shape, audio_MD.device, len(text_ND)
    check_argument("text_ND", text_ND, audio_MD.dtype, (texts, depth), device)
    check_argument("owner_N", owner_N, torch.int64, (texts,), device)
    check_argument("weights_N", weights_N, None, (texts,), device)
    check_groups(groups, rows, texts, device)
