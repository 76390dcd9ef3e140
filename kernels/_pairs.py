"""The code that both kinds of loss share: logits, checks, and gradients from panels of G = dL/ds.

The two gradient products are derived in docs/derivation.md, section 3.

Shape suffixes: M audio rows, N text rows, D joint dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    DTYPES,
    check_tensor,
    mask_positives,
    on_device,
    operand,
    panel_rows,
    score_arguments,
    target_of,
    tile_grid,
)

DEFAULT_WORKSPACE_BYTES = 2 << 30
SMALL_CARD_WORKSPACE_BYTES = 544 << 20
"""The default for target 89. It fits 8,440 rows of G in 16 bits and their products at N = 32,768, D = 512."""
# Multiprocessors of each target's usual card. They are constants, so that results depend on the target alone.
_MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}
# The tile of the library's products that this module counts with: rows and columns.
_PRODUCT_TILE = (128, 256)

LOG2_E = tl.constexpr(1.4426950408889634)
_FLOAT16_LARGEST = 2.0**13
"""In fp16, the largest incoming gradient is scaled to this. An element of G is at most 2 / ln 2 as large."""
COMBINED_TILES = 8
"""Number of tiles whose partial sums one step of a loop adds."""
COMBINED_LANES = 128
"""Number of rows or columns whose partial sums one program adds."""


@triton.jit
def logits(score, scale, bias, owner_N, masked, row, M, BM: tl.constexpr, less=0.0):
    """Base-2 logits of a tile of scores, minus `less`; -inf where the pair is not negative.

    `owner_N` and `masked` are the results of `positives_of_tile`. Call it before the product, so that its
    loads run at the same time as those of the product.
    """
    s = score * (tl.load(scale) * LOG2_E) + (tl.load(bias) * LOG2_E - less)
    if masked:
        s = mask_positives(s, owner_N, row, M, float("-inf"), BM)
    return s


@triton.jit
def store_gradients(panel, stride, g, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """Stores a tile g (BM, BN) of G, fp32, at (row, column) of a panel, rounded to the panel's dtype.

    `panel` points to bf16, fp16 or fp32 rows that are `stride` elements apart; row and column are int32.
    The panel has whole tiles, so elements beyond M and N, which are 0, are stored too. No mask is needed, and
    a thread stores 16 bytes at a time.
    """
    row_M = tl.arange(0, BM)
    corner = panel + row.to(tl.int64) * stride + column
    at = (corner + (row_M % 8).to(tl.int64) * stride)[:, None] + tl.arange(0, BN)[None, :]
    # This term is the same for all threads of a warp, so it is computed once for the warp.
    at += ((row_M // 8).to(tl.int64) * (8 * stride))[:, None]
    tl.store(at, g.to(panel.dtype.element_ty))


def check_operands(
    audio: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    owner: Tensor,
    logit_bias: Tensor | float | None,
    compute_dtype: torch.dtype | None,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype, int]:
    """Checks the arguments and returns the operators' arguments, scalars as fp32 tensors on the device."""
    for name, x in (("audio_MD", audio), ("text_ND", text), ("text_owner_N", owner)):
        check_tensor(name, x)
    if audio.ndim != 2 or text.ndim != 2 or audio.shape[1] != text.shape[1] or audio.shape[1] == 0:
        raise ValueError(
            "audio_MD and text_ND must be matrices with the same, positive number of columns, "
            f"got {tuple(audio.shape)} and {tuple(text.shape)}"
        )
    if audio.dtype != text.dtype or audio.dtype not in DTYPES or (compute_dtype or audio.dtype) not in DTYPES:
        raise TypeError(
            "audio_MD and text_ND must share a dtype; it and compute_dtype must be bfloat16, float16 or "
            f"float32, got {audio.dtype}, {text.dtype} and {compute_dtype}"
        )
    if owner.dtype != torch.int64 or owner.shape != text.shape[:1]:
        error = ValueError if owner.dtype == torch.int64 else TypeError
        raise error(
            f"text_owner_N must be int64 of shape ({len(text)},), got {owner.dtype} {tuple(owner.shape)}"
        )
    if not audio.device == text.device == owner.device:
        raise ValueError(
            "audio_MD, text_ND and text_owner_N must be on one device, "
            f"got {audio.device}, {text.device} and {owner.device}"
        )
    scalars = []
    for name, value in (
        ("logit_scale", logit_scale),
        ("logit_bias", 0.0 if logit_bias is None else logit_bias),
    ):
        if isinstance(value, Tensor):
            scalar = value.to(audio.device, torch.float32)
        else:
            scalar = torch.full((), value, dtype=torch.float32, device=audio.device)
        if scalar.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(scalar.shape)}")
        scalars.append(scalar)
    compute_dtype = compute_dtype or audio.dtype
    if workspace_bytes is None:
        small = target_of(audio.device) == 89
        workspace_bytes = SMALL_CARD_WORKSPACE_BYTES if small else DEFAULT_WORKSPACE_BYTES
    return audio, text, scalars[0], scalars[1], owner.contiguous(), compute_dtype, workspace_bytes


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs and, for `negative_lse`, the results."""
    *tensors, ctx.compute_dtype, ctx.workspace_bytes = inputs
    results = output if isinstance(output, tuple) else ()
    ctx.save_for_backward(*tensors, *results)


def input_gradients(ctx: Any, operator: Callable[..., Any], *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that a backward operator computes; None for an input that needs no gradient."""
    needs = ctx.needs_input_grad[:4]
    d_inputs = operator(
        *ctx.saved_tensors, *gradients, ctx.compute_dtype, ctx.workspace_bytes, needs[0], needs[1]
    )
    return *(g if need else None for g, need in zip(d_inputs, needs, strict=True)), None, None, None


def empty_gradients(
    audio: Tensor, text: Tensor, scale: Tensor, needs_audio: bool, needs_text: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results of a backward operator. The gradient of an embedding that needs none is empty."""
    d_audio, d_text = (
        x.new_empty(x.shape if needed else 0) for x, needed in ((audio, needs_audio), (text, needs_text))
    )
    return d_audio, d_text, scale.new_empty(()), scale.new_empty(())


def gain_of(dtype: torch.dtype, *gradients: Tensor) -> Tensor:
    """The factor by which G is multiplied before it is stored: 1, except in fp16.

    In fp16 it makes the largest element at most 2^15, because small elements would underflow without it.
    """
    one = gradients[0].new_ones(())
    if dtype != torch.float16:
        return one
    largest = torch.stack([d.abs().max() if len(d) else one * 0 for d in gradients]).max()
    return torch.where(largest > 0, _FLOAT16_LARGEST / largest, one)


def product_rows(rows: int, row_bytes: int, workspace_bytes: int, step: int, depth: int, target: int) -> int:
    """Number of rows of each panel of G, so that the products dX = G Y of all panels take the fewest waves.

    A wave is one tile of a product on every multiprocessor. Of equally good numbers, the smallest is chosen.
    """
    fewest = -(-rows // panel_rows(rows, row_bytes, workspace_bytes, step))

    def waves(panels: int) -> int:
        tiles = triton.cdiv(triton.cdiv(rows, panels), _PRODUCT_TILE[0]) * triton.cdiv(
            depth, _PRODUCT_TILE[1]
        )
        return panels * triton.cdiv(tiles, _MULTIPROCESSORS[target])

    panels = min(range(fewest, 4 * fewest + 1), key=lambda number: (waves(number), -number))
    return triton.cdiv(rows, panels * step) * step


def products(
    kernel: str,
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    gain: Tensor,
    write: Callable[[Tensor, tuple[int], dict[str, Any], Tensor, Tensor], None],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    needs_audio: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient products dX = scale G Y and dY = scale G^T X, and d_scale = sum <X, G Y>.

    `write` launches `kernel`, which fills a panel: some rows of G, multiplied by `gain`. A panel and its fp32
    product with Y (D values per row) fit into `workspace_bytes`. The panel's buffer has whole tiles.
    """
    m, n = len(audio), len(text)
    d_audio = audio.new_zeros(audio.shape if needs_audio else 0)
    d_text = text.new_zeros(text.shape if needs_text else 0, dtype=torch.float32)
    d_scale = scale.new_zeros((), dtype=torch.float64)
    factor = scale / gain
    if m and n:
        with on_device(audio), torch.autocast(audio.device.type, enabled=False):
            x, y = operand(audio, compute_dtype), operand(text, compute_dtype)
            arguments = score_arguments(kernel, x, y)
            stride = triton.cdiv(n, arguments["BN"]) * arguments["BN"]
            row_bytes = stride * x.itemsize + 4 * audio.shape[1]
            rows = product_rows(
                m, row_bytes, workspace_bytes, arguments["BM"], audio.shape[1], target_of(audio.device)
            )
            buffer = x.new_empty(rows, stride)
            for first in range(0, m, rows):
                stop = min(first + rows, m)
                grid, position = tile_grid(arguments, first, stop)
                write(buffer, grid, arguments | position, x, y)
                panel = buffer[: stop - first, :n]
                # d_scale follows from either product: from this one, unless only the text needs a gradient.
                if needs_audio or not needs_text:
                    product = add_product(None, panel, y)
                    if needs_audio:
                        torch.mul(product, factor, out=d_audio[first:stop])
                    d_scale += _sum(product.mul_(x[first:stop]))
                    del product  # so that the next panel's product does not need more memory
                if needs_text:
                    add_product(d_text, panel.T, x[first:stop])
            if needs_text and not needs_audio:
                del buffer, panel  # so that the next products fit into the workspace
                step = max(rows, workspace_bytes // (4 * audio.shape[1]))
                for first in range(0, n, step):
                    d_scale += _sum(d_text[first : first + step] * y[first : first + step])
    return d_audio, d_text.mul_(factor).to(text.dtype), (d_scale / gain).to(torch.float32)


def _sum(product: Tensor) -> Tensor:
    """Sums each row in fp32, then the rows' sums in float64. A float64 sum of all would copy the matrix."""
    return product.sum(1).sum(dtype=torch.float64)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, or a b if total is None. Sums are in fp32 for operands of any dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
