"""The CPU engine: sums over the negative pairs of a contrastive batch. For CUDA, see kernels/contrastive.py.

    s_ij = logit_scale <audio_i, text_j> + logit_bias over pairs with text_owner[j] != i

csrc/contrastive.h computes the sums, and docs/derivation.md derives them. The forward pass takes 2 M N D
operations. The backward pass takes 4 M N D, and up to 2 M N D more to recompute logits that were not kept. If
a gradient is needed, the forward pass keeps the rows of logits that fit into `workspace_bytes` together with
the memory of a pass (15 MB at D = 512). Everything is computed in the dtype of the embeddings, float32 or
float64. The order of additions depends neither on the number of threads nor on the workspace.

Shape suffixes: M audio rows, N text rows, D joint dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from clsp_fast import _C

DEFAULT_WORKSPACE_BYTES = 256 << 20
"""Fits 95 % of the logits of 8,192 x 8,192 pairs in float32; the rest is recomputed."""


def negative_lse(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the negative pairs of every row and every column; -inf if there are none.

    Args:
        audio_MD: float32 or float64 (M, D) on the CPU; M may be 0. `contrastive_loss` converts 16-bit
            embeddings to float32, so that gradients of positive and negative pairs are added before they are
            rounded to 16 bits.
        text_ND: (N, D), same dtype; N may be 0.
        logit_scale: scalar.
        text_owner_N: int64 (N,). A text whose value is outside 0..M-1 has negative pairs only.
        logit_bias: scalar added to all logits.
        compute_dtype: ignored, because the CPU computes products in the embeddings' dtype.
        workspace_bytes: bound of the memory for all but arguments and results, default 256 MiB.

    Returns:
        (M,) and (N,), same dtype; differentiable once in all floating arguments.

    Raises:
        TypeError: the embeddings have another dtype.
    """
    del compute_dtype
    row_M, column_N, _ = _sum(
        audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, "softmax", workspace_bytes
    )
    return row_M, column_N


def negative_softplus(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    *,
    logit_bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Sum of log(1 + exp s_ij) over the negative pairs of every row, (M,).

    Arguments and errors are those of `negative_lse`.
    """
    del compute_dtype
    row_M, _, _ = _sum(audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, "sigmoid", workspace_bytes)
    return row_M


def _sum(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the operator. Logits are kept only if a gradient is needed."""
    if audio_MD.dtype not in (torch.float32, torch.float64) or text_ND.dtype != audio_MD.dtype:
        raise TypeError(
            "audio_MD and text_ND must both be float32 or both float64, "
            f"got {audio_MD.dtype} and {text_ND.dtype}"
        )
    bias = logit_scale.new_zeros(()) if logit_bias is None else logit_bias
    needs_gradient = any(x.requires_grad for x in (audio_MD, text_ND, logit_scale, bias))
    kept = 0
    if needs_gradient and torch.is_grad_enabled():
        workspace_bytes = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        elements = workspace_bytes // audio_MD.itemsize
        kept = _kept_logits(len(audio_MD), len(text_ND), audio_MD.shape[1], elements)
    sums: tuple[Tensor, Tensor, Tensor] = _sum_negatives(
        audio_MD, text_ND, logit_scale, text_owner_N, bias, kind, kept
    )
    return sums


def _kept_logits(m: int, n: int, d: int, elements: int) -> int:
    """Number of logits to keep: as many rows of tiles as `elements` holds beside the memory of a pass."""
    if m == 0 or n == 0:
        return 0
    tile_rows, tile_columns, panel_rows, panel_columns = _C.LOGIT_TILES
    tiles_m, tiles_n = -(-m // tile_rows), -(-n // tile_columns)
    panel_rows = min(panel_rows, tiles_m * tile_rows)
    panel_columns = min(panel_columns, tiles_n * tile_columns)
    working = 2 * (panel_rows + panel_columns) * (d + 31) + panel_rows * panel_columns
    row_of_tiles = tiles_n * tile_rows * tile_columns
    return max(0, min(tiles_m, (elements - working) // row_of_tiles)) * row_of_tiles


def _extension_arguments(
    kind: str, audio_MD: Tensor, text_ND: Tensor, logit_scale: Tensor, text_owner_N: Tensor, bias: Tensor
) -> tuple[str, NDArray[Any], NDArray[Any], NDArray[Any], float, float]:
    audio, text, owner = (x.contiguous().numpy() for x in (audio_MD, text_ND, text_owner_N))
    return kind, audio, text, owner, float(logit_scale), float(bias)


@torch.library.custom_op("clsp_fast::sum_negatives", mutates_args=(), device_types="cpu")
def _sum_negatives(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    logit_bias: Tensor,
    kind: str,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums, column sums (empty for the sigmoid kind), and the logits kept for the backward pass."""
    sums: tuple[Tensor, Tensor, Tensor] = _make_sums(
        audio_MD, text_ND, logit_scale, text_owner_N, logit_bias, kind, kept
    )
    if 0 in (len(audio_MD), len(text_ND)):  # the extension needs at least one row of each
        for empty_sum in sums:
            empty_sum.fill_(-math.inf if kind == "softmax" else 0.0)
        return sums
    _C.sum_negatives(
        *_extension_arguments(kind, audio_MD, text_ND, logit_scale, text_owner_N, logit_bias),
        (sums[0].numpy(), sums[1].numpy()),
        sums[2].numpy(),
        num_threads=torch.get_num_threads(),
    )
    return sums


@_sum_negatives.register_fake
def _make_sums(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    logit_bias: Tensor,
    kind: str,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = len(text_ND) if kind == "softmax" else 0
    return audio_MD.new_empty(len(audio_MD)), audio_MD.new_empty(columns), audio_MD.new_empty(kept)


@torch.library.custom_op("clsp_fast::sum_negatives_backward", mutates_args=(), device_types="cpu")
def _sum_negatives_backward(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    logit_bias: Tensor,
    kind: str,
    sums: list[Tensor],
    gradients: list[Tensor],
    kept: Tensor,
    needs_audio: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to audio, text, scale and bias, each in the dtype of its argument.

    The gradient of an embedding that needs none is empty, and its product is not computed.
    """
    d_inputs: tuple[Tensor, Tensor, Tensor, Tensor] = _make_gradients(
        audio_MD,
        text_ND,
        logit_scale,
        text_owner_N,
        logit_bias,
        kind,
        sums,
        gradients,
        kept,
        needs_audio,
        needs_text,
    )
    d_audio_MD, d_text_ND, d_scale, d_bias = d_inputs
    if 0 in (len(audio_MD), len(text_ND)):
        for gradient in d_inputs:
            gradient.zero_()
        return d_inputs
    scale, bias = _C.sum_negatives_backward(
        *_extension_arguments(kind, audio_MD, text_ND, logit_scale, text_owner_N, logit_bias),
        tuple(x.numpy() for x in sums),
        tuple(x.contiguous().numpy() for x in gradients),
        kept.numpy(),
        d_audio_MD.numpy(),
        d_text_ND.numpy(),
        num_threads=torch.get_num_threads(),
    )
    return d_audio_MD, d_text_ND, d_scale.fill_(scale), d_bias.fill_(bias)


@_sum_negatives_backward.register_fake
def _make_gradients(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    text_owner_N: Tensor,
    logit_bias: Tensor,
    kind: str,
    sums: list[Tensor],
    gradients: list[Tensor],
    kept: Tensor,
    needs_audio: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The gradient of the scale needs one of the products, even if no embedding needs a gradient.
    return (
        audio_MD.new_empty(audio_MD.shape if needs_audio or not needs_text else 0),
        text_ND.new_empty(text_ND.shape if needs_text else 0),
        logit_scale.new_empty(()),
        logit_bias.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.kind, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_row_M: Tensor | None, d_column_N: Tensor | None, _: Tensor | None) -> Any:
    *inputs, row_M, column_N, kept = ctx.saved_tensors
    gradients = [
        torch.zeros_like(sums) if gradient is None else gradient
        for sums, gradient in ((row_M, d_row_M), (column_N, d_column_N))
    ]
    needs = ctx.needs_input_grad[:2]
    d_audio, d_text, d_scale, d_bias = _sum_negatives_backward(
        *inputs, ctx.kind, [row_M, column_N], gradients, kept, *needs
    )
    d_audio, d_text = (x if need else None for x, need in zip((d_audio, d_text), needs, strict=True))
    return d_audio, d_text, d_scale, None, d_bias, None, None


_sum_negatives.register_autograd(_backward, setup_context=_setup_context)
