"""The contrastive loss from sums over negative pairs: adds the positive pairs, in O((M + N) D).

docs/derivation.md, section 2, derives the formulas. T_i is the set of texts that have a share w_ij > 0 of
the target of audio i. accepted_i is the log-sum-exp of s_ij over T_i, and rejected_i the log-sum-exp over all
other texts. The loss of row i is

    lse_j s_ij - sum_j w_ij s_ij = softplus(rejected_i - accepted_i) + sum_j w_ij (accepted_i - s_ij)

Neither term is negative, and the second is exactly 0 if T_i is a single text. So a small loss is never the
difference of large numbers. It keeps its digits, and so do its gradients, for any number of texts and any
weights. A text j has one positive, with logit s. Its loss is softplus(rejected_j - s).

Logits of positive pairs, and all that is computed from them, are float64. Embeddings, their gradients and
sums over negative pairs are in `Problem.dtype`.

Shape suffixes: M audio rows, N text rows of this rank, D joint dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clsp_fast.contrastive.gather import Shards
from clsp_fast.contrastive.problem import Problem
from clsp_fast.contrastive.sums import (
    cross_entropy_by_owner,
    dots,
    lse_by_owner,
    normalise,
    of_owner,
    softplus,
    sum_by_owner,
    total,
    without_overflow,
)


class Pairs(NamedTuple):
    """The operands of the logits s_ij = scale <audio_i, text_j> + bias, in `Problem.dtype`.

    Attributes:
        problem: the checked arguments.
        audio_MD: this rank's audio, normalised if `problem.normalize` is true.
        text_ND: this rank's texts, normalised if `problem.normalize` is true.
        scale: scalar.
        bias: scalar; None for the softmax kind, where it cancels and would only cost digits of the logits.
        shards: how much of the batch each rank has.
    """

    problem: Problem
    audio_MD: Tensor
    text_ND: Tensor
    scale: Tensor
    bias: Tensor | None
    shards: Shards

    def against_all_texts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's audio, all ranks' texts, the scale, and owners relative to this rank's first clip."""
        owner_N, first = self.problem.owner_N, self.shards.first_clip
        if self.shards.group is not None:
            owner_N = self.shards.all_of_texts(owner_N + first) - first
        return self.audio_MD, self.shards.all_texts(self.text_ND), self.scale, owner_N


class Positives(NamedTuple):
    """The logits of positive pairs, and the mean logits that label smoothing needs.

    Attributes:
        pair_N: float64, the logit of each text and its audio.
        mean_M: mean logit of each audio over the texts of all ranks; None without smoothing.
        mean_N: mean logit of each text over the audio of all ranks; None without smoothing.
    """

    pair_N: Tensor
    mean_M: Tensor | None
    mean_N: Tensor | None


def make_pairs(problem: Problem) -> tuple[Pairs, Positives]:
    """The embeddings in `Problem.dtype`, and the logits of their positive pairs.

    Compute the rest of the loss from the embeddings in `Pairs`. The backward pass of `dots` then adds the
    gradients of the positive pairs in place to the gradients of the rest.
    """
    audio_MD, text_ND, dtype = problem.audio_MD, problem.text_ND, problem.dtype
    # 16-bit embeddings are sent as they are. 16 bits cannot represent rows that are normalised here.
    sent_dtype = dtype if problem.normalize else audio_MD.dtype
    if problem.normalize:
        audio_MD, text_ND = (without_overflow(x, dtype) for x in (audio_MD, text_ND))
    shards = Shards.agree(problem.group, len(audio_MD), len(text_ND), audio_MD.device, sent_dtype)
    raw = (audio_MD.detach(), text_ND.detach()) if problem.normalize else None
    # Gradients of positive and negative pairs nearly cancel, so they are added before rounding to 16 bits.
    if problem.normalize:
        audio_MD, text_ND = normalise(audio_MD, dtype), normalise(text_ND, dtype)
    else:
        audio_MD, text_ND = audio_MD.to(dtype), text_ND.to(dtype)
    scale = as_scalar(problem.scale, audio_MD)
    bias = as_scalar(problem.bias if problem.kind == "sigmoid" else 0.0, audio_MD)
    mean_text_D = mean_audio_D = None
    if problem.smoothing > 0:
        mean_text_D = shards.sum(text_ND.sum(0)) / shards.total_texts
        mean_audio_D = shards.sum(audio_MD.sum(0)) / shards.total_clips
    owner_N = None if problem.one_caption_each else problem.owner_N
    products = dots(audio_MD, text_ND, owner_N, mean_text_D, mean_audio_D, raw)
    # All results of `dots` require a gradient if any input does. Embeddings that need none are not replaced.
    audio_MD = products.audio_MD if audio_MD.requires_grad else audio_MD
    text_ND = products.text_ND if text_ND.requires_grad else text_ND
    pairs = Pairs(problem, audio_MD, text_ND, scale, bias if problem.kind == "sigmoid" else None, shards)
    return pairs, Positives(
        scale * products.pair_N + bias,
        None if products.mean_M is None else scale * products.mean_M + bias,
        None if products.mean_N is None else scale * products.mean_N + bias,
    )


def as_scalar(x: Tensor | float, like: Tensor) -> Tensor:
    """A scalar tensor of the dtype and on the device of `like`."""
    if isinstance(x, Tensor):
        return x.to(like.device, like.dtype)
    return torch.full((), x, device=like.device, dtype=like.dtype)


def softmax_loss(pairs: Pairs, positives: Positives, row_M: Tensor, column_N: Tensor) -> Tensor:
    """The loss with kind="softmax".

    Args:
        pairs: the embeddings and the checked arguments.
        positives: the logits of positive pairs, and mean logits if there is smoothing.
        row_M: log-sum-exp of each audio row's negatives.
        column_N: log-sum-exp of the negatives of each text of this rank, over the rows of all ranks.
    """
    problem, shards, pair_N = pairs.problem, pairs.shards, positives.pair_N
    columns_N = softplus(column_N - pair_N)
    if positives.mean_N is not None:
        columns_N = columns_N + problem.smoothing * (pair_N - positives.mean_N)
    if problem.one_caption_each and problem.weights is None:
        rows_M, targets_M, captioned_M = softplus(row_M - pair_N), pair_N, torch.ones_like(pair_N)
    else:
        rows_M, targets_M, captioned_M = _row_losses(row_M, pair_N, problem.owner_N, problem.weights)
    if positives.mean_M is not None:
        rows_M = rows_M + problem.smoothing * captioned_M * (targets_M - positives.mean_M)
    captioned = shards.sum(captioned_M.sum()).clamp(min=1)
    loss = shards.sum(total(rows_M) / captioned + total(columns_N) / shards.total_texts) / 2
    return loss + problem.ignored_bias


def sigmoid_loss(pairs: Pairs, positives: Positives, sums_M: Tensor) -> Tensor:
    """The loss with kind="sigmoid", from sums (M,) of softplus over each audio row's negatives."""
    shards = pairs.shards
    loss = total(sums_M) + total(softplus(-positives.pair_N))
    if positives.mean_M is not None:
        sum_of_logits = total(positives.mean_M) * shards.total_texts
        loss = loss + pairs.problem.smoothing * (total(positives.pair_N) - sum_of_logits / 2)
    return shards.sum(loss) / (shards.total_clips * shards.total_texts)


def _row_losses(
    row_M: Tensor, pair_N: Tensor, owner_N: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each audio row: the loss lse_j s_ij - sum_j w_ij s_ij, the target logit sum_j w_ij s_ij, and 1.

    All three are 0 for a row that has no caption of positive weight.
    """
    clips = len(row_M)
    share_N, captioned_M = _shares(weights, owner_N, clips, pair_N)
    if weights is not None:
        # A caption of weight 0 counts as a negative of its clip.
        index_M = torch.arange(clips, device=owner_N.device)
        row_M = lse_by_owner(
            torch.cat([row_M.to(pair_N.dtype), pair_N]),
            torch.cat([torch.ones_like(captioned_M), share_N == 0]),
            torch.cat([index_M, owner_N]),
            clips,
        )
    accepted_M = lse_by_owner(pair_N, share_N > 0, owner_N, clips)
    # Without this, a clip that has neither captions nor negatives would compute inf - inf.
    accepted_M = torch.where(captioned_M, accepted_M, 0.0)
    rows_M = softplus(row_M - accepted_M) + cross_entropy_by_owner(pair_N, share_N, owner_N, clips)
    targets_M = sum_by_owner(share_N * pair_N, owner_N, clips)
    return torch.where(captioned_M, rows_M, 0.0), targets_M, captioned_M.to(pair_N.dtype)


def _shares(weights: Tensor | None, owner_N: Tensor, clips: int, like_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N,) divided by their sum over each audio's texts, and whether that sum is positive (M,)."""
    if weights is None:
        weight_N = torch.ones_like(like_N)
    else:
        # Weights are first divided by the audio's largest: a sum of finite weights could overflow.
        wide_N = weights.to(like_N.dtype)
        largest_M = wide_N.new_zeros(clips).scatter_reduce(0, owner_N, wide_N, "amax")
        weight_N = wide_N / torch.where(largest_M > 0, largest_M, 1.0)[owner_N]
    total_M = sum_by_owner(weight_N, owner_N, clips)
    captioned_M = total_M > 0
    return weight_N / of_owner(torch.where(captioned_M, total_M, 1.0), owner_N), captioned_M
