"""The contrastive losses of CLSP as functions of embeddings.

The dense work, sums over all negative pairs, is an operator of `clsp_fast.negatives` (CPU) or
`clsp_fast.kernels.contrastive` (CUDA) that knows no labels. Positive pairs are few; `clsp_fast.positives`
adds them in float64 and O((M + N) D), as softplus(lse of negatives - lse of positives) and a term that is 0
for one caption: no digit of a small loss is lost, and no probability is rounded before 1 is subtracted from
it.

What is left is the rounding of the float32 logits of negative pairs and of their log-sum-exp, which is about
as large as they are. The relative error of a float32 gradient is at most (8 + 2 logit_scale) eps, with eps =
2^-23: 8.1e-6 at a scale of 30 and 2.5e-5 at 100. Where terms of opposite sign cancel, as they may in the
gradient of the scale, this is the error relative to the terms.

Shape suffixes: M audio rows, N text rows, D joint dimension, B clips, K texts of one clip.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.contrastive import negatives
from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.positives import Pairs, sigmoid_loss, softmax_loss
from clsp_fast.contrastive.sums import normalise

Kind = Literal["softmax", "sigmoid"]
Implementation = Literal["auto", "cpu", "triton", "reference"]


def contrastive_loss_reference(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    text_owner: Tensor | None = None,
    weights: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    kind: Kind = "softmax",
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
    implementation: str = "reference",
    workspace_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The dense definition of `contrastive_loss`, in plain torch: M x N logits, any floating dtype, autograd.

    Args, returns and errors are those of `contrastive_loss`; the last three are accepted and ignored.
    """
    del implementation, workspace_bytes, compute_dtype
    owner_N = _check(audio_MD, text_ND, logit_scale, text_owner, weights, logit_bias, label_smoothing, kind)
    if group is not None:
        audio_MD, text_ND, owner_N, weights = _gather_batch(audio_MD, text_ND, owner_N, weights, group)
    dtype = torch.promote_types(audio_MD.dtype, torch.float32)
    audio_MD, text_ND = (F.normalize(x.to(dtype)) if normalize else x.to(dtype) for x in (audio_MD, text_ND))
    logits_MN = logit_scale * (audio_MD @ text_ND.T) + (0.0 if logit_bias is None else logit_bias)
    m, n = logits_MN.shape
    positive_MN = owner_N == torch.arange(m, device=owner_N.device)[:, None]
    if kind == "sigmoid":
        targets_MN = positive_MN.to(dtype) * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_MN, targets_MN)
    targets_MN = positive_MN.to(dtype) * (1.0 if weights is None else weights.to(dtype))
    total_M = targets_MN.sum(1)
    captioned_M = total_M > 0
    targets_MN = targets_MN / torch.where(captioned_M, total_M, 1.0)[:, None]
    targets_MN = targets_MN * (1 - label_smoothing) + label_smoothing / n
    rows_M = -(targets_MN * F.log_softmax(logits_MN, dim=1)).sum(1)[captioned_M]
    columns = F.cross_entropy(logits_MN.T, owner_N, label_smoothing=label_smoothing)
    return (rows_M.sum() / max(1, rows_M.numel()) + columns) / 2


def contrastive_loss(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    text_owner: Tensor | None = None,
    weights: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    kind: Kind = "softmax",
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
    implementation: Implementation = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Two-sided contrastive loss with any number of captions a clip, in memory that does not grow with M x N.

    With s_ij = logit_scale <audio_i, text_j> + logit_bias, T_i the texts owned by audio i and w_ij their
    weights normalised over T_i, `kind="softmax"` is the mean of two terms,
    mean_i (lse_j s_ij - sum_{j in T_i} w_ij s_ij), over audio that has a caption of positive weight, and
    mean_j (lse_i s_ij - s_{owner(j), j}). `kind="sigmoid"` is the mean of -log sigmoid(+-s_ij) over all
    pairs.

    Args:
        audio_MD: floating, (M, D), usually of unit norm.
        text_ND: floating, (N, D), of the same device and dtype.
        logit_scale: scalar tensor or float, the multiplier itself (not its logarithm); may require gradient.
        text_owner: int64 (N,), text j describes audio text_owner[j]; default arange(N), which needs N <= M.
        weights: floating (N,), non-negative caption weights of the audio->text targets, normalised per audio;
            softmax only. Text->audio counts every text once.
        logit_bias: scalar added to all logits; matters to the sigmoid kind only.
        label_smoothing: in [0, 1): share of each target spread evenly over all candidates (over the two
            outcomes of a pair with kind="sigmoid").
        kind: "softmax" (CLIP, CLSP) or "sigmoid" (SigLIP).
        normalize: brings all rows to unit norm first.
        group: process group over which the batch is spread. Every rank then returns the loss of the
            concatenated batch, and gradients averaged over the ranks (what DDP does) equal those of a single
            process. Every rank needs a clip and a text, and `text_owner` counts its own clips. What travels
            is in `clsp_fast.gather`.
        implementation: "cpu" and "triton" are the fused operators (the latter for CUDA tensors, or for any
            under TRITON_INTERPRET=1); "reference" is the dense definition; "auto" takes the operator of the
            tensors' device, and the definition where there is none.
        workspace_bytes: most memory beside arguments, results, and float32 copies of embeddings that have 16
            bits or are normalised here. On the CPU, logits that fit are kept for the backward pass and
            others computed again; on CUDA, none are kept. Default: 256 MiB on the CPU, 512 MiB on CUDA. The
            CPU operator needs 15 MB at D = 512 whatever is asked for.
        compute_dtype: dtype of the matrix products on CUDA, default that of the embeddings; bfloat16 is what
            tensor cores are fast at. Rows that `normalize` made are rounded to it. Sums and gradients are in
            float32 (float64) in any case, and on the CPU so are the products; positive pairs are in float64.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings); differentiable once. The CPU operator's
        results do not depend on the number of threads.

    Raises:
        ValueError: a shape, range or name is wrong; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
        ImportError: implementation="triton" without triton.

    Source: arXiv 2601.03065 (multi-positive targets 1/2 + 1/2); arXiv 2103.00020; arXiv 2303.15343 (sigmoid).
    """
    owner_N = _check(audio_MD, text_ND, logit_scale, text_owner, weights, logit_bias, label_smoothing, kind)
    _check_options(workspace_bytes, compute_dtype)
    engine = _engine(implementation, audio_MD)
    with torch.autocast(audio_MD.device.type, enabled=False):
        if engine is None:
            same: dict[str, Any] = {"text_owner": text_owner, "weights": weights, "logit_bias": logit_bias}
            same |= {"label_smoothing": label_smoothing, "kind": kind, "normalize": normalize, "group": group}
            return contrastive_loss_reference(audio_MD, text_ND, logit_scale, **same)
        options: dict[str, Any] = {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
        if engine is not negatives:
            options["compute_dtype"] = compute_dtype or audio_MD.dtype
        pairs = _pairs(audio_MD, text_ND, logit_scale, logit_bias, owner_N, normalize, group)
        pairs = pairs._replace(in_order=text_owner is None and len(text_ND) == len(audio_MD))
        loss = _fused_loss(engine, pairs, weights, label_smoothing, kind, options)
        return loss.to(pairs.audio_MD.dtype)


class LossAndGradients(NamedTuple):
    """A contrastive loss and its gradients, each of its argument's shape and dtype.

    Attributes:
        loss: scalar.
        audio_MD: by the audio embeddings.
        text_ND: by the text embeddings.
        logit_scale: by the multiplier, a scalar.
        logit_bias: by the bias; None where none was given.
    """

    loss: Tensor
    audio_MD: Tensor
    text_ND: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def loss_and_grad(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    **options: Any,
) -> LossAndGradients:
    """`contrastive_loss` and its gradients at once, detached, for training with cached embeddings.

    Embed a large batch in parts without gradient, call this on all of it, and embed each part again with
    `part.backward(gradient of the part)`: the memory of the towers is that of a part.

    Args and errors are those of `contrastive_loss`, `options` its other keywords. With `group`, gradients are
    those that averaging over the ranks makes right.

    Source: arXiv 2101.06983 (gradient cache).
    """
    wide = torch.promote_types(audio_MD.dtype, torch.float32)
    with torch.inference_mode(False), torch.enable_grad():
        scalars = [
            x
            if isinstance(x, Tensor) and x.is_floating_point()
            else torch.as_tensor(x, dtype=wide, device=audio_MD.device)
            for x in (logit_scale, logit_bias)
            if x is not None
        ]
        # Embeddings that were made in inference mode can't be kept for a backward pass; their copies can.
        inputs = [
            (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            for x in (audio_MD, text_ND, *scalars)
        ]
        loss = contrastive_loss(*inputs[:3], logit_bias=inputs[3] if len(inputs) > 3 else None, **options)
        gradients = torch.autograd.grad(loss, inputs)
    by_audio, by_text, by_scale, *by_bias = gradients
    return LossAndGradients(loss.detach(), by_audio, by_text, by_scale, by_bias[0] if by_bias else None)


def hard_negative_loss(audio_BD: Tensor, text_BKD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Contrast of each clip with its own texts only: text 0 describes it, texts 1..K-1 are near misses.

    mean_i (lse_k s_ik - s_i0), s_ik = logit_scale <audio_i, text_ik>. The recipe's third stage adds 0.2 of
    it.

    Args:
        audio_BD: floating (B, D).
        text_BKD: floating (B, K, D), K >= 2, same dtype and device.
        logit_scale: scalar tensor or float, the multiplier itself.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: dtypes or devices differ.
    """
    if (
        text_BKD.ndim != 3
        or audio_BD.ndim != 2
        or text_BKD.shape[::2] != audio_BD.shape
        or text_BKD.shape[1] < 2
    ):
        raise ValueError(
            "audio_BD must have shape (B, D) and text_BKD (B, K >= 2, D), "
            f"got {tuple(audio_BD.shape)} and {tuple(text_BKD.shape)}"
        )
    if audio_BD.dtype != text_BKD.dtype or audio_BD.device != text_BKD.device:
        raise TypeError(
            "audio_BD and text_BKD must share dtype and device, "
            f"got {audio_BD.dtype} on {audio_BD.device} and {text_BKD.dtype} on {text_BKD.device}"
        )
    dtype = torch.promote_types(audio_BD.dtype, torch.float32)
    with torch.autocast(audio_BD.device.type, enabled=False):
        logits_BK = logit_scale * torch.einsum("bd,bkd->bk", audio_BD.to(dtype), text_BKD.to(dtype))
    # Not lse - s_0, whose digits cancel where the loss is small.
    return F.softplus(logits_BK[:, 1:].logsumexp(1) - logits_BK[:, 0], threshold=40.0).mean()


def _engine(implementation: str, audio_MD: Tensor) -> ModuleType | None:
    """The module that sums over negative pairs; None for the dense definition."""
    device = audio_MD.device.type
    if implementation not in ("auto", "cpu", "triton", "reference"):
        raise ValueError(
            f'implementation must be "auto", "cpu", "triton" or "reference", got {implementation!r}'
        )
    if implementation == "cpu" and device != "cpu":
        raise ValueError(f'implementation="cpu" needs tensors on the CPU, got {device}')
    if implementation == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'implementation="triton" needs CUDA tensors, got {device}; TRITON_INTERPRET=1 takes any'
        )
    has_dtype = audio_MD.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if implementation == "cpu" or (implementation == "auto" and device == "cpu" and has_dtype):
        return negatives
    if implementation == "reference" or (implementation == "auto" and device != "cuda"):
        return None
    try:
        launch = importlib.import_module("clsp_fast.kernels._launch")
    except ImportError as error:
        if implementation == "triton":
            fix = "implementation='triton' needs the extra: pip install 'clsp_fast[triton]'"
            raise ImportError(fix) from error
        return None
    fits = audio_MD.dtype != torch.float64 and launch.supports(audio_MD.device)
    if implementation == "auto" and not fits:
        return None
    return importlib.import_module("clsp_fast.kernels.contrastive")


def _check(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    text_owner: Tensor | None,
    weights: Tensor | None,
    logit_bias: Tensor | float | None,
    label_smoothing: float,
    kind: str,
) -> Tensor:
    """Validates the arguments of `contrastive_loss`; returns the owners, int64 (N,)."""
    for name, value in (("audio_MD", audio_MD), ("text_ND", text_ND)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(value.shape)}")
    m, n = len(audio_MD), len(text_ND)
    if audio_MD.shape[1] != text_ND.shape[1]:
        raise ValueError(
            f"text_ND must have {audio_MD.shape[1]} columns like audio_MD, got {text_ND.shape[1]}"
        )
    if audio_MD.dtype != text_ND.dtype or audio_MD.device != text_ND.device:
        raise TypeError(
            "audio_MD and text_ND must share dtype and device, "
            f"got {audio_MD.dtype} on {audio_MD.device} and {text_ND.dtype} on {text_ND.device}"
        )
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(scalar, Tensor) and scalar.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(scalar.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f'kind must be "softmax" or "sigmoid", got {kind!r}')
    if weights is not None:
        _check_weights(weights, n, kind, audio_MD.device)
    return _check_owner(text_owner, m, n, audio_MD.device)


def _check_options(workspace_bytes: int | None, compute_dtype: torch.dtype | None) -> None:
    if workspace_bytes is not None and not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be a whole number, got {workspace_bytes!r}")
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0, got {workspace_bytes}")
    if compute_dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"compute_dtype must be a floating dtype, got {compute_dtype}")


def _check_weights(weights: Tensor, n: int, kind: str, device: torch.device) -> None:
    if kind == "sigmoid":
        raise ValueError('weights must be None with kind="sigmoid": every pair counts once')
    if weights.shape != (n,) or not weights.is_floating_point() or weights.device != device:
        raise ValueError(
            f"weights must be floating of shape ({n},) on {device}, "
            f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
        )
    _demand(((weights >= 0) & weights.isfinite()).all(), "weights must be finite and not negative")


def _check_owner(text_owner: Tensor | None, m: int, n: int, device: torch.device) -> Tensor:
    if text_owner is None:
        if n > m:
            raise ValueError(f"text_owner must be given when there are more texts ({n}) than clips ({m})")
        return torch.arange(n, device=device)
    if text_owner.dtype != torch.int64 or text_owner.shape != (n,):
        raise ValueError(
            f"text_owner must be int64 of shape ({n},), got {text_owner.dtype} {tuple(text_owner.shape)}"
        )
    _demand(((text_owner >= 0) & (text_owner < m)).all(), f"text_owner must lie in 0..{m - 1}")
    return text_owner.to(device)


def _demand(condition: Tensor, message: str) -> None:
    """ValueError unless the condition holds; on CUDA the host does not wait, and the next kernel fails."""
    if condition.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def _scalar(x: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, dtype)
    return torch.full((), x, device=device, dtype=dtype)


def _pairs(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    owner_N: Tensor,
    normalize: bool,
    group: dist.ProcessGroup | None,
) -> Pairs:
    device, wide = audio_MD.device, torch.promote_types(audio_MD.dtype, torch.float32)
    # What 16-bit embeddings travel as; rows that are normalised here no longer fit.
    travels = wide if normalize else audio_MD.dtype
    shards = Shards.agree(group, len(audio_MD), len(text_ND), device, travels)
    raw = (audio_MD.detach(), text_ND.detach()) if normalize else None
    # Gradients of positive and negative pairs nearly cancel: they are added before they are rounded.
    audio_MD, text_ND = (normalise(x, wide) if normalize else x.to(wide) for x in (audio_MD, text_ND))
    scale = _scalar(logit_scale, device, wide)
    bias = _scalar(0.0 if logit_bias is None else logit_bias, device, wide)
    return Pairs(audio_MD, text_ND, scale, bias, owner_N, shards, raw)


def _fused_loss(
    engine: ModuleType,
    pairs: Pairs,
    weights: Tensor | None,
    label_smoothing: float,
    kind: Kind,
    options: dict[str, Any],
) -> Tensor:
    bias = pairs.bias
    if kind == "softmax":
        # It cancels; added to the logits, it would only take digits from them.
        pairs = pairs._replace(bias=torch.zeros_like(bias))
    pairs, positives = pairs.with_positives(means=label_smoothing > 0)
    if kind == "sigmoid":
        sums_M = engine.negative_softplus(*pairs.against_all_texts(), logit_bias=pairs.bias, **options)
        return sigmoid_loss(pairs, positives, sums_M, label_smoothing=label_smoothing)
    row_M, column_N = engine.negative_lse(*pairs.against_all_texts(), **options)
    column_N = pairs.shards.own_lse(column_N)
    loss = softmax_loss(pairs, positives, row_M, column_N, weights=weights, label_smoothing=label_smoothing)
    return loss + 0.0 * bias  # its gradient is 0


def _gather_batch(
    audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor, weights: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The concatenated batch of all ranks, with owners that count clips over all ranks."""
    shards = Shards.agree(group, len(audio_MD), len(text_ND), audio_MD.device, audio_MD.dtype)
    owner_N = shards.all_of_texts(owner_N + shards.first_clip)
    weights = None if weights is None else shards.all_of_texts(weights)
    return shards.all_audio(audio_MD), shards.all_texts(text_ND), owner_N, weights
