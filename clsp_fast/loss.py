"""The contrastive losses of CLSP as functions of embeddings.

Shape suffixes: M audio rows, N text rows, D joint dimension, B clips, K texts of one clip.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["softmax", "sigmoid"]


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
    group: dist.ProcessGroup | None = None,
    implementation: str = "reference",
) -> Tensor:
    """The dense definition of `contrastive_loss`, in plain torch: M x N logits, any floating dtype, autograd.

    Args, returns and errors are those of `contrastive_loss`; `implementation` is accepted and ignored.
    """
    del implementation
    owner_N = _check(audio_MD, text_ND, logit_scale, text_owner, weights, label_smoothing, kind)
    if group is not None:
        audio_MD, text_ND, owner_N, weights = _gather_batch(audio_MD, text_ND, owner_N, weights, group)
    dtype = torch.promote_types(audio_MD.dtype, torch.float32)
    logits_MN = logit_scale * (audio_MD.to(dtype) @ text_ND.to(dtype).T)
    if logit_bias is not None:
        logits_MN = logits_MN + logit_bias
    m, n = logits_MN.shape
    positive_MN = owner_N == torch.arange(m, device=owner_N.device)[:, None]
    if kind == "sigmoid":
        targets_MN = positive_MN.to(dtype) * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_MN, targets_MN)
    weights_N = torch.ones(n, device=owner_N.device) if weights is None else weights
    targets_MN = positive_MN * weights_N.to(dtype)
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
    group: dist.ProcessGroup | None = None,
    implementation: Literal["auto", "reference"] = "auto",
) -> Tensor:
    """Two-sided contrastive loss with any number of captions a clip.

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
        group: process group over which the batch is spread. Every rank then returns the loss of the
            concatenated batch, and gradients averaged over the ranks (what DDP does) equal those of a single
            process.
        implementation: "auto" takes the fastest that fits the inputs; "reference" is the dense definition.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: a shape, range or name is wrong; the message names the argument.
        TypeError: an argument has the wrong type or dtype.

    Source: arXiv 2601.03065 (multi-positive targets 1/2 + 1/2); arXiv 2103.00020; arXiv 2303.15343 (sigmoid).
    """
    if implementation not in ("auto", "reference"):
        raise ValueError(f'implementation must be "auto" or "reference", got {implementation!r}')
    return contrastive_loss_reference(
        audio_MD,
        text_ND,
        logit_scale,
        text_owner=text_owner,
        weights=weights,
        logit_bias=logit_bias,
        label_smoothing=label_smoothing,
        kind=kind,
        group=group,
    )


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
    dtype = torch.promote_types(audio_BD.dtype, torch.float32)
    logits_BK = logit_scale * torch.einsum("bd,bkd->bk", audio_BD.to(dtype), text_BKD.to(dtype))
    return (torch.logsumexp(logits_BK, dim=1) - logits_BK[:, 0]).mean()


def _check(
    audio_MD: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    text_owner: Tensor | None,
    weights: Tensor | None,
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
    if isinstance(logit_scale, Tensor) and logit_scale.ndim:
        raise ValueError(f"logit_scale must be a scalar, got shape {tuple(logit_scale.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f'kind must be "softmax" or "sigmoid", got {kind!r}')
    if weights is not None:
        _check_weights(weights, n, kind)
    return _check_owner(text_owner, m, n, audio_MD.device)


def _check_weights(weights: Tensor, n: int, kind: str) -> None:
    if kind == "sigmoid":
        raise ValueError('weights must be None with kind="sigmoid": every pair counts once')
    if weights.shape != (n,) or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating of shape ({n},), got {weights.dtype} {tuple(weights.shape)}"
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights must be finite and not negative")


def _check_owner(text_owner: Tensor | None, m: int, n: int, device: torch.device) -> Tensor:
    if text_owner is None:
        if n > m:
            raise ValueError(f"text_owner must be given when there are more texts ({n}) than clips ({m})")
        return torch.arange(n, device=device)
    if text_owner.dtype != torch.int64 or text_owner.shape != (n,):
        raise ValueError(
            f"text_owner must be int64 of shape ({n},), got {text_owner.dtype} {tuple(text_owner.shape)}"
        )
    if int(text_owner.min()) < 0 or int(text_owner.max()) >= m:
        raise ValueError(
            f"text_owner must lie in 0..{m - 1}, got {int(text_owner.min())}..{int(text_owner.max())}"
        )
    return text_owner.to(device)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; backward sums every rank's gradient of the local rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return torch.cat(_all_gather_rows(rows, sizes, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return torch.split(gradient, ctx.sizes)[dist.get_rank(ctx.group)], None, None


def _all_gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Gathers unequal shards: collectives want equal shapes, so shards travel padded to the longest."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shards, padded, group=group)
    return [shard[:size] for shard, size in zip(shards, sizes, strict=True)]


def _gather_batch(
    audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor, weights: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The concatenated batch of all ranks, with owners that count clips over all ranks."""
    local = torch.tensor([len(audio_MD), len(text_ND)], device=audio_MD.device)
    counts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, local, group=group)
    audio_sizes, text_sizes = (list(sizes) for sizes in zip(*(c.tolist() for c in counts), strict=True))
    first_clip = sum(audio_sizes[: dist.get_rank(group)])
    owners = torch.cat(_all_gather_rows(owner_N + first_clip, text_sizes, group))
    if weights is not None:
        weights = torch.cat(_all_gather_rows(weights, text_sizes, group))
    gather = cast("Any", _GatherRows.apply)
    return gather(audio_MD, audio_sizes, group), gather(text_ND, text_sizes, group), owners, weights
