"""From sums over negative pairs to a contrastive loss: what the positive pairs add, exactly, in O((M + N) D).

Everything is in float32 or float64. A text's loss is softplus(lse of its negatives - s), to full relative
accuracy however small it is, and so is an audio's with one text.

Shape suffixes: M audio rows, N text rows of this rank, D joint dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast.gather import Shards

_TEXTS_AT_ONCE = 512


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

    def with_positives(self) -> tuple[Pairs, Tensor]:
        """These pairs, for all that is computed from them, and s of each text and its audio, (N,)."""
        *own, dots_N = _PairDots.apply(self.audio_MD, self.text_ND, self.owner_N)  # type: ignore[no-untyped-call]
        return self._replace(audio_MD=own[0], text_ND=own[1]), self.scale * dots_N + self.bias

    def row_means(self) -> Tensor:
        """Mean of s over the texts of all ranks, (M,)."""
        return self._means(self.audio_MD, self.text_ND, self.shards.total_texts)

    def column_means(self) -> Tensor:
        """Mean of s over the audio of all ranks, (N,)."""
        return self._means(self.text_ND, self.audio_MD, self.shards.total_clips)

    def _means(self, rows: Tensor, others: Tensor, count: int) -> Tensor:
        sum_D = self.shards.sum(others.sum(0, dtype=self.scale.dtype))
        return self.scale * (rows.to(self.scale.dtype) @ (sum_D / count)) + self.bias


def softmax_loss(
    pairs: Pairs,
    positive_N: Tensor,
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
        positive_N: s of each own text and its audio.
        row_M: log-sum-exp of each audio row's negatives.
        column_N: log-sum-exp of each own text's negatives, over the rows of all ranks.
        weights: of the texts, or None.
        label_smoothing: as of `contrastive_loss`.
        in_order: whether text j is the only one of audio j, and there are no weights.
    """
    shards = pairs.shards
    columns_N = _softplus(column_N - positive_N)
    if label_smoothing:
        columns_N = columns_N + label_smoothing * (positive_N - pairs.column_means())
    if in_order:
        rows_M, targets_M = _softplus(row_M[: len(positive_N)] - positive_N), positive_N
        captioned_M, captioned = None, row_M.new_full((), len(positive_N))
    else:
        rows_M, targets_M, captioned_M = _row_losses(row_M, positive_N, pairs.owner_N, weights)
        captioned = captioned_M.sum().to(row_M.dtype)
    if label_smoothing:
        rows_M = rows_M + label_smoothing * (targets_M - pairs.row_means()[: len(targets_M)])
    if captioned_M is not None:
        rows_M = torch.where(captioned_M, rows_M, 0.0)
    captioned = shards.sum(captioned).clamp(min=1)
    return shards.sum(_sum(rows_M) / captioned + _sum(columns_N) / shards.total_texts) / 2


def sigmoid_loss(pairs: Pairs, positive_N: Tensor, sums_M: Tensor, *, label_smoothing: float) -> Tensor:
    """The pairwise loss of `contrastive_loss` from sums (M,) of softplus over each audio row's negatives."""
    shards = pairs.shards
    total = _sum(sums_M) + _sum(_softplus(-positive_N))
    if label_smoothing:
        of_all = _sum(pairs.row_means()) * shards.total_texts
        total = total + label_smoothing * (_sum(positive_N) - of_all / 2)
    return shards.sum(total) / (shards.total_clips * shards.total_texts)


def _row_losses(
    row_M: Tensor, positive_N: Tensor, owner_N: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_j s_ij - sum_j w_ij s_ij of each audio, sum_j w_ij s_ij, and whether it has a text with a weight.

    With a the heaviest text of audio i, the first is
    log(1 + exp(negatives - s_ia) + sum_{j != a} exp(s_ij - s_ia)) + sum_j w_ij (s_ia - s_ij):
    nothing cancels when the model is sure of a.
    """
    zeros_M, index_N = torch.zeros_like(row_M), torch.arange(len(owner_N), device=owner_N.device)
    weight_N = torch.ones_like(positive_N) if weights is None else weights.to(positive_N.dtype)
    total_M = _add_by_owner(zeros_M, owner_N, weight_N)
    captioned_M = total_M > 0
    share_N = weight_N / torch.where(captioned_M, total_M, 1.0)[owner_N]

    heaviest_M = zeros_M.scatter_reduce(0, owner_N, weight_N, "amax")
    candidate_N = torch.where(weight_N == heaviest_M[owner_N], index_N, 0)
    anchor_M = torch.zeros_like(row_M, dtype=torch.int64).scatter_reduce(0, owner_N, candidate_N, "amax")
    anchor_score_M = positive_N[anchor_M]
    above_N = positive_N - anchor_score_M[owner_N]

    negatives_M = row_M - anchor_score_M
    shift_M = torch.maximum(negatives_M, zeros_M.scatter_reduce(0, owner_N, above_N, "amax")).detach()
    others_N = torch.where(anchor_M[owner_N] == index_N, 0.0, (above_N - shift_M[owner_N]).exp())
    others_M = _add_by_owner((negatives_M - shift_M).exp(), owner_N, others_N)
    lse_M = shift_M + torch.log1p(others_M + torch.expm1(-shift_M))
    target_M = _add_by_owner(zeros_M, owner_N, share_N * above_N)
    return lse_M - target_M, target_M + anchor_score_M, captioned_M


def _add_by_owner(x_M: Tensor, owner_N: Tensor, y_N: Tensor) -> Tensor:
    """x with each y added to its owner's element; unlike index_add, in a fixed order on CUDA too."""
    return x_M.index_put((owner_N,), y_N, accumulate=True)


class _PairDots(torch.autograd.Function):
    """The embeddings as they came, and <audio of text j, text j>; keeps only its arguments.

    What is made of the embeddings behind this sends its gradients through here, where those of the dots are
    added in place: the two together need no more memory than the former. Nobody else holds them, since
    nobody else has seen what this returned.
    """

    @staticmethod
    def forward(
        ctx: Any, audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(audio_MD, text_ND, owner_N)
        parts = zip(*(torch.split(x, _TEXTS_AT_ONCE) for x in (text_ND, owner_N)), strict=True)
        dots = [audio_MD.index_select(0, owner).mul_(text).sum(1) for text, owner in parts]
        return audio_MD.view_as(audio_MD), text_ND.view_as(text_ND), torch.cat(dots)

    @staticmethod
    def backward(
        ctx: Any, d_audio_MD: Tensor, d_text_ND: Tensor, d_dots_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        audio_MD, text_ND, owner_N = ctx.saved_tensors
        needs_audio, needs_text, _ = ctx.needs_input_grad
        for start in range(0, len(text_ND), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            d_dots_P1, owner_P = d_dots_N[part, None], owner_N[part]
            if needs_text:
                d_text_ND[part].addcmul_(d_dots_P1, audio_MD.index_select(0, owner_P))
            if not needs_audio:
                continue
            # Unlike index_add, this adds in a fixed order on CUDA too; on the CPU that is the slow way.
            if d_audio_MD.is_cuda:
                d_audio_MD.index_put_((owner_P,), d_dots_P1 * text_ND[part], accumulate=True)
            else:
                d_audio_MD.index_add_(0, owner_P, d_dots_P1 * text_ND[part])
        return d_audio_MD if needs_audio else None, d_text_ND if needs_text else None, None


def _softplus(x: Tensor) -> Tensor:
    # Beyond the threshold torch returns x; 40 keeps that exact in float64.
    return F.softplus(x, threshold=40.0)


def _sum(x_N: Tensor) -> Tensor:
    """Sum whose order does not depend on the number of threads, as torch's of long CPU vectors does."""
    if x_N.is_cuda or len(x_N) <= 1024:
        return x_N.sum()
    return F.pad(x_N, (0, -len(x_N) % 1024)).view(-1, 1024).sum(1).sum()
