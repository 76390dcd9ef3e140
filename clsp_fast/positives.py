"""From sums over negative pairs to a contrastive loss: what the positive pairs add, exactly, in O((M + N) D).

Everything is in float32 or float64. A text's loss is softplus(lse of its negatives - s), to full relative
accuracy however small it is, and so is an audio's with one text.

Shape suffixes: M audio rows, N text rows of this rank, D joint dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clsp_fast.gather import Shards
from clsp_fast.sums import dots, of_owner, softplus, sum_by_owner, total


class Pairs(NamedTuple):
    """What logits s_ij = scale <audio_i, text_j> + bias are made of.

    Attributes:
        audio_MD: this rank's audio.
        text_ND: this rank's texts.
        scale: scalar of the computation's dtype.
        bias: scalar.
        owner_N: int64, the audio row of each text.
        shards: who else has a part of the batch.
    """

    audio_MD: Tensor
    text_ND: Tensor
    scale: Tensor
    bias: Tensor
    owner_N: Tensor
    shards: Shards

    def against_all_texts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's audio, all ranks' texts, the scale, and owners counting from this rank's first clip."""
        first = self.shards.first_clip
        owner_N = self.shards.all_of_texts(self.owner_N + first) - first
        return self.audio_MD, self.shards.all_texts(self.text_ND), self.scale, owner_N

    def with_positives(self, *, means: bool) -> tuple[Pairs, Positives]:
        """These pairs, for all that is computed from them, and their positives; means only if asked for."""
        shards, mean_text_D, mean_audio_D = self.shards, None, None
        if means:
            mean_text_D = shards.sum(self.text_ND.sum(0)) / shards.total_texts
            mean_audio_D = shards.sum(self.audio_MD.sum(0)) / shards.total_clips
        found = dots(self.audio_MD, self.text_ND, self.owner_N, mean_text_D, mean_audio_D)
        passed = self._replace(  # embeddings that need no gradient stay such
            audio_MD=found.audio_MD if self.audio_MD.requires_grad else self.audio_MD,
            text_ND=found.text_ND if self.text_ND.requires_grad else self.text_ND,
        )
        return passed, Positives(
            self._logits(found.pair_N),
            None if found.mean_M is None else self._logits(found.mean_M),
            None if found.mean_N is None else self._logits(found.mean_N),
        )

    def _logits(self, cosines: Tensor) -> Tensor:
        return self.scale * cosines + self.bias


class Positives(NamedTuple):
    """Logits that belong to one audio or text each.

    Attributes:
        pair_N: s of each text and its audio.
        mean_M: mean s of each audio over the texts of all ranks.
        mean_N: mean s of each text over the audio of all ranks.
    """

    pair_N: Tensor
    mean_M: Tensor | None
    mean_N: Tensor | None


def softmax_loss(
    pairs: Pairs,
    positives: Positives,
    row_M: Tensor,
    column_N: Tensor,
    *,
    weights: Tensor | None,
    label_smoothing: float,
    in_order: bool,
) -> Tensor:
    """The two-sided loss of `contrastive_loss`.

    Args:
        pairs: the embeddings.
        positives: theirs; with means if there is smoothing.
        row_M: log-sum-exp of each audio row's negatives.
        column_N: log-sum-exp of each own text's negatives, over the rows of all ranks.
        weights: of the texts, or None.
        label_smoothing: as of `contrastive_loss`.
        in_order: whether text j is the only one of audio j, and there are no weights.
    """
    shards, pair_N = pairs.shards, positives.pair_N
    columns_N = softplus(column_N - pair_N)
    if positives.mean_N is not None:
        columns_N = columns_N + label_smoothing * (pair_N - positives.mean_N)
    if in_order:
        rows_M, targets_M = softplus(row_M[: len(pair_N)] - pair_N), pair_N
        captioned_M, captioned = None, row_M.new_full((), len(pair_N))
    else:
        rows_M, targets_M, captioned_M = _row_losses(row_M, pair_N, pairs.owner_N, weights)
        captioned = captioned_M.sum().to(row_M.dtype)
    if positives.mean_M is not None:
        rows_M = rows_M + label_smoothing * (targets_M - positives.mean_M[: len(targets_M)])
    if captioned_M is not None:
        rows_M = torch.where(captioned_M, rows_M, 0.0)
    captioned = shards.sum(captioned).clamp(min=1)
    return shards.sum(total(rows_M) / captioned + total(columns_N) / shards.total_texts) / 2


def sigmoid_loss(pairs: Pairs, positives: Positives, sums_M: Tensor, *, label_smoothing: float) -> Tensor:
    """The pairwise loss of `contrastive_loss` from sums (M,) of softplus over each audio row's negatives."""
    shards = pairs.shards
    loss = total(sums_M) + total(softplus(-positives.pair_N))
    if positives.mean_M is not None:
        of_all = total(positives.mean_M) * shards.total_texts
        loss = loss + label_smoothing * (total(positives.pair_N) - of_all / 2)
    return shards.sum(loss) / (shards.total_clips * shards.total_texts)


def _row_losses(
    row_M: Tensor, positive_N: Tensor, owner_N: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_j s_ij - sum_j w_ij s_ij of each audio, sum_j w_ij s_ij, and whether it has a text with a weight.

    With a the heaviest text of audio i, the first is
    log(1 + exp(negatives - s_ia) + sum_{j != a} exp(s_ij - s_ia)) + sum_j w_ij (s_ia - s_ij):
    nothing cancels when the model is sure of a.
    """
    clips, index_N = len(row_M), torch.arange(len(owner_N), device=owner_N.device)
    zeros_M = torch.zeros_like(row_M)
    weight_N = (
        torch.ones_like(positive_N) if weights is None else _relative(weights, owner_N, clips, row_M.dtype)
    )
    total_M = sum_by_owner(weight_N, owner_N, clips)
    captioned_M = total_M > 0
    share_N = weight_N / of_owner(torch.where(captioned_M, total_M, 1.0), owner_N)

    # Weights are relative to the heaviest.
    candidate_N = torch.where(weight_N == 1, index_N, 0)
    anchor_M = torch.zeros_like(row_M, dtype=torch.int64).scatter_reduce(0, owner_N, candidate_N, "amax")
    anchor_score_M = of_owner(positive_N, anchor_M)
    above_N = positive_N - of_owner(anchor_score_M, owner_N)

    negatives_M = row_M - anchor_score_M
    shift_M = zeros_M.scatter_reduce(0, owner_N, above_N.detach(), "amax").maximum(negatives_M.detach())
    others_N = torch.where(anchor_M[owner_N] == index_N, 0.0, (above_N - shift_M[owner_N]).exp())
    others_M = (negatives_M - shift_M).exp() + sum_by_owner(others_N, owner_N, clips)
    lse_M = shift_M + torch.log1p(others_M + torch.expm1(-shift_M))
    target_M = sum_by_owner(share_N * above_N, owner_N, clips)
    return lse_M - target_M, target_M + anchor_score_M, captioned_M


def _relative(weights: Tensor, owner_N: Tensor, clips: int, dtype: torch.dtype) -> Tensor:
    """Weights over the largest of their audio, which has 1; so that no sum of finite weights is infinite."""
    wide_N = weights.to(torch.promote_types(weights.dtype, dtype))
    most_M = wide_N.new_zeros(clips).scatter_reduce(0, owner_N, wide_N, "amax")
    return (wide_N / torch.where(most_M > 0, most_M, 1.0)[owner_N]).to(dtype)
