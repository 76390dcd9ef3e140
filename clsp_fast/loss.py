"""The contrastive losses of CLSP as functions of embeddings.

A loss is computed in three parts. `check_problem` checks the arguments. An engine sums over the M N - N
negative pairs: `clsp_fast.contrastive.negatives` on the CPU, `clsp_fast.kernels.contrastive` on CUDA.
`clsp_fast.contrastive.positives`, or `triton_positives` on CUDA, adds the N positive pairs in float64.
docs/derivation.md derives the formulas.

On the CPU, the relative error of a float32 gradient is at most (8 + 2 logit_scale) eps, with eps = 2^-23:
8.1e-6 at a scale of 30 and 2.5e-5 at 100. The gradient of the scale is a sum in which terms of opposite sign
may cancel. There, the bound applies to the error divided by the sum of the terms' absolute values. On CUDA, a
float32 product is made of three TF32 products, which adds about 1e-6 to a cosine.

Shape suffixes: M audio rows, N text rows, D joint dimension, B clips, K texts of one clip.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.arguments import require_same_kind, require_scalar
from clsp_fast.contrastive import negatives, positives
from clsp_fast.contrastive.engine import Engine, Implementation, check_options, choose_engine
from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.problem import (
    Kind,
    Problem,
    check_embeddings,
    check_problem,
    check_scalars,
    check_values,
)
from clsp_fast.contrastive.sums import without_overflow


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

    Arguments, result and errors are those of `contrastive_loss`. `implementation`, `workspace_bytes` and
    `compute_dtype` are ignored.
    """
    del implementation, workspace_bytes, compute_dtype
    problem = check_problem(
        audio_MD,
        text_ND,
        logit_scale,
        text_owner=text_owner,
        weights=weights,
        logit_bias=logit_bias,
        label_smoothing=label_smoothing,
        kind=kind,
        normalize=normalize,
        group=group,
    )
    return _dense_loss(problem)


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
    """Two-sided contrastive loss for any number of captions per clip. Its memory does not grow with M x N.

    The logits are s_ij = logit_scale <audio_i, text_j> + logit_bias. T_i is the set of texts that describe
    audio i, and w_ij are their weights, divided by their sum over T_i.
    `kind="softmax"` is the mean of two terms. mean_i (lse_j s_ij - sum_{j in T_i} w_ij s_ij) runs over the
    audio rows that have a caption of positive weight, and mean_j (lse_i s_ij - s_{owner(j), j}) over all
    texts. `kind="sigmoid"` is a mean over all pairs: of -log sigmoid(s_ij) for positive pairs, and of
    -log sigmoid(-s_ij) for negative pairs.

    Args:
        audio_MD: floating (M, D); rows usually have unit norm.
        text_ND: floating (N, D), same dtype and device.
        logit_scale: scalar tensor or float, the multiplier itself (not its logarithm); may require gradient.
            With kind="softmax" on CUDA, the forward pass may compute all logits three times if logit_scale
            max |audio_i| max |text_j| exceeds about 146 (docs/derivation.md, section 4).
        text_owner: int64 (N,): text j describes audio text_owner[j]; default arange(N), which needs N <= M.
        weights: floating (N,), finite and non-negative; softmax only. They are the caption weights of the
            audio->text targets, and are normalised per audio. In text->audio, every text counts once.
        logit_bias: scalar added to all logits. kind="softmax" ignores it (it cancels); its gradient is 0.
        label_smoothing: in [0, 1): share of each target that is spread evenly over all candidates (with
            kind="sigmoid", over the two outcomes of a pair).
        kind: "softmax" (CLIP, CLSP) or "sigmoid" (SigLIP).
        normalize: whether to scale all rows to unit norm first.
        group: process group over which the batch is spread. Every rank needs a clip and a text, and returns
            the loss of the concatenated batch. The average of the ranks' gradients, which DDP computes, is
            that of a single process. `text_owner` holds indices of this rank's clips.
        implementation: "cpu" and "triton" are the engines. "triton" needs CUDA tensors, or any tensors with
            TRITON_INTERPRET=1. "reference" is the dense definition. "auto" takes the engine of the tensors'
            device, or the definition if no engine supports the tensors.
        workspace_bytes: bound of temporary memory (docs/derivation.md, section 6); default: 256 MiB on the
            CPU, 2 GiB on CUDA, but 544 MiB on consumer cards.
        compute_dtype: dtype of the operands of matrix products on CUDA: bfloat16, float16 or float32;
            default: that of the embeddings. Rows are rounded to it after `normalize`. The CPU engine ignores
            it. Sums are in float32 (float64 for float64 embeddings), positive pairs in float64.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings); differentiable once. The CPU engine's results
        do not depend on the number of threads.

    Raises:
        ValueError: a shape, range or name is wrong; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
        ImportError: implementation="triton", and triton is not installed.

    Source: arXiv 2601.03065 (multi-positive targets 1/2 + 1/2); arXiv 2103.00020; arXiv 2303.15343 (sigmoid).
    """
    problem = check_problem(
        audio_MD,
        text_ND,
        logit_scale,
        text_owner=text_owner,
        weights=weights,
        logit_bias=logit_bias,
        label_smoothing=label_smoothing,
        kind=kind,
        normalize=normalize,
        group=group,
    )
    check_options(compute_dtype, workspace_bytes)
    engine = choose_engine(implementation, audio_MD)
    with torch.autocast(audio_MD.device.type, enabled=False):
        if engine is None:
            return _dense_loss(problem)
        return _fused_loss(problem, engine, compute_dtype or audio_MD.dtype, workspace_bytes)


class LossAndGradients(NamedTuple):
    """A contrastive loss and its gradients. A gradient has the shape and dtype of its argument.

    Attributes:
        loss: scalar.
        audio_MD: gradient with respect to the audio embeddings.
        text_ND: gradient with respect to the text embeddings.
        logit_scale: gradient with respect to the multiplier, a scalar.
        logit_bias: gradient with respect to the bias; None if no bias was given.
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
    """`contrastive_loss` and its gradients in one call, detached, for training with a gradient cache.

    Embed a large batch in parts without gradient, and call this function on all embeddings. Then embed each
    part a second time, with gradient, and call `embeddings.backward(gradient)` with the part's rows of the
    gradient. So the towers need memory for one part only.

    Arguments and errors are those of `contrastive_loss`; `options` are its other keywords. With `group`,
    the average of these gradients over the ranks is the gradient of the whole batch.

    Source: arXiv 2101.06983 (gradient cache).
    """
    check_embeddings(audio_MD, text_ND)
    check_scalars(logit_scale, logit_bias)
    wide = torch.promote_types(audio_MD.dtype, torch.float32)
    with torch.inference_mode(False), torch.enable_grad():
        scalars = [
            x
            if isinstance(x, Tensor) and x.is_floating_point()
            else torch.as_tensor(x, dtype=wide, device=audio_MD.device)
            for x in (logit_scale, logit_bias)
            if x is not None
        ]
        # Autograd cannot save tensors that were made in inference mode, but it can save copies of them.
        inputs = [
            (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            for x in (audio_MD, text_ND, *scalars)
        ]
        loss = contrastive_loss(*inputs[:3], logit_bias=inputs[3] if len(inputs) > 3 else None, **options)
        gradients = torch.autograd.grad(loss, inputs)
    d_audio, d_text, d_scale, *d_bias = gradients
    return LossAndGradients(loss.detach(), d_audio, d_text, d_scale, d_bias[0] if d_bias else None)


def hard_negative_loss(audio_BD: Tensor, text_BKD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Contrasts each clip with K texts: text 0 describes the clip, texts 1..K-1 are its hard negatives.

    The loss is mean_i (lse_k s_ik - s_i0), with s_ik = logit_scale <audio_i, text_ik>. The third stage of the
    CLSP recipe adds 0.2 times this loss.

    Args:
        audio_BD: floating (B, D).
        text_BKD: floating (B, K, D), K >= 2, same dtype and device.
        logit_scale: scalar tensor or float, the multiplier itself.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: the shapes do not fit together, or the batch is empty.
        TypeError: an argument has the wrong type or dtype, or dtypes or devices differ.
    """
    require_same_kind("audio_BD", audio_BD, "text_BKD", text_BKD)
    require_scalar("logit_scale", logit_scale)
    fits = audio_BD.ndim == 2 and text_BKD.ndim == 3 and text_BKD.shape[::2] == audio_BD.shape
    if not fits or 0 in audio_BD.shape or text_BKD.shape[1] < 2:
        raise ValueError(
            "audio_BD must have shape (B, D) and text_BKD (B, K >= 2, D), neither empty, "
            f"got {tuple(audio_BD.shape)} and {tuple(text_BKD.shape)}"
        )
    dtype = torch.promote_types(audio_BD.dtype, torch.float32)
    with torch.autocast(audio_BD.device.type, enabled=False):
        logits_BK = logit_scale * torch.einsum("bd,bkd->bk", audio_BD.to(dtype), text_BKD.to(dtype))
    # The same loss as lse_k s_ik - s_i0, in which a small loss would lose its digits.
    return F.softplus(logits_BK[:, 1:].logsumexp(1) - logits_BK[:, 0], threshold=40.0).mean()


def _dense_loss(problem: Problem) -> Tensor:
    """The definition, from M x N logits."""
    check_values(problem)
    audio_MD, text_ND, owner_N, weights = _all_ranks(problem)
    dtype, smoothing = problem.dtype, problem.smoothing
    audio_MD, text_ND = audio_MD.to(dtype), text_ND.to(dtype)
    if problem.normalize:
        rows = (without_overflow(x, dtype) for x in (audio_MD, text_ND))
        audio_MD, text_ND = (F.normalize(x) for x in rows)
    logits_MN = problem.scale * (audio_MD @ text_ND.T)
    m, n = logits_MN.shape
    positive_MN = owner_N == torch.arange(m, device=owner_N.device)[:, None]
    if problem.kind == "sigmoid":
        targets_MN = positive_MN.to(dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_MN + problem.bias, targets_MN)
    targets_MN = positive_MN.to(dtype)
    if weights is not None:
        # Weights are first divided by the clip's largest: their sum could overflow, and float32 rounds tiny
        # float64 weights to 0.
        targets_MN = positive_MN * weights
        largest_M1 = targets_MN.detach().amax(1, keepdim=True)
        targets_MN = (targets_MN / torch.where(largest_M1 > 0, largest_M1, 1.0)).to(dtype)
    total_M = targets_MN.sum(1)
    captioned_M = total_M > 0
    targets_MN = targets_MN / torch.where(captioned_M, total_M, 1.0)[:, None]
    targets_MN = targets_MN * (1 - smoothing) + smoothing / n
    rows_M = -(targets_MN * F.log_softmax(logits_MN, dim=1)).sum(1)[captioned_M]
    columns = F.cross_entropy(logits_MN.T, owner_N, label_smoothing=smoothing)
    loss = (rows_M.sum() / max(1, rows_M.numel()) + columns) / 2
    return (loss + problem.ignored_bias).to(dtype)


def _all_ranks(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Audio, texts, owners and weights of the whole batch; owners are indices of all ranks' clips."""
    audio_MD, text_ND, owner_N, weights = problem.audio_MD, problem.text_ND, problem.owner_N, problem.weights
    if problem.group is None:
        return audio_MD, text_ND, owner_N, weights
    shards = Shards.agree(problem.group, len(audio_MD), len(text_ND), audio_MD.device, audio_MD.dtype)
    owner_N = shards.all_of_texts(owner_N + shards.first_clip)
    weights = None if weights is None else shards.all_of_texts(weights)
    return shards.all_audio(audio_MD), shards.all_texts(text_ND), owner_N, weights


def _fused_loss(
    problem: Problem, engine: Engine, compute_dtype: torch.dtype, workspace_bytes: int | None
) -> Tensor:
    """The loss from an engine's sums over negative pairs and from the float64 positive pairs."""
    module = _module_of_positives(problem, engine)
    pairs, positive_products = module.make_pairs(problem)
    operands = pairs.against_all_texts()
    if problem.kind == "sigmoid":
        sums_M = engine.negative_softplus(
            *operands, logit_bias=pairs.bias, compute_dtype=compute_dtype, workspace_bytes=workspace_bytes
        )
        loss = module.sigmoid_loss(pairs, positive_products, sums_M)
    else:
        row_M, column_N = engine.negative_lse(
            *operands, compute_dtype=compute_dtype, workspace_bytes=workspace_bytes
        )
        column_N = pairs.shards.lse_over_ranks(column_N)
        loss = module.softmax_loss(pairs, positive_products, row_M, column_N)
    return cast(Tensor, loss.to(problem.dtype))


def _module_of_positives(problem: Problem, engine: Engine) -> ModuleType:
    """The module for positive pairs: by kernels if the engine uses kernels, otherwise by torch."""
    if engine is not negatives:
        triton_positives = importlib.import_module("clsp_fast.contrastive.triton_positives")
        if triton_positives.supports(problem):
            return triton_positives
    check_values(problem)
    return positives
