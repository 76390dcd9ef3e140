"""A contrastive batch that is spread over the ranks of a process group.

Every rank keeps its audio and gathers the texts of all ranks. Audio is sent only for the dense definition,
logits never. With W ranks and N texts in all, a rank receives N D elements of text in the caller's dtype, N
owners and, for the softmax kind, W N column sums. The backward pass reduce-scatters N D + W N elements in
float32. The texts are gathered in one step, not passed around in a ring: 32,768 texts of 512 bfloat16 numbers
are 32 MiB. A ring would hide their transfer, but launch W times as many kernels on smaller tiles.

Every rank computes the loss of the whole batch. The backward pass of a gathered tensor sums the gradients of
these W losses, which is W times the gradient. The average over the ranks, which DDP takes, is the gradient.

Shape suffixes: M audio rows, N text rows, D joint dimension, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """How a batch is spread over the ranks.

    Attributes:
        group: the ranks; None if the batch is not spread.
        clips: number of audio rows of each rank.
        texts: number of text rows of each rank.
        rank: index of this process in `clips` and `texts`.
        dtype: the dtype in which embeddings are sent.
    """

    group: dist.ProcessGroup | None
    clips: list[int]
    texts: list[int]
    rank: int
    dtype: torch.dtype

    @classmethod
    def agree(
        cls,
        group: dist.ProcessGroup | None,
        clips: int,
        texts: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Shards:
        """Exchanges the shards' sizes between the ranks. The host waits for no other exchange."""
        if group is None:
            return cls(None, [clips], [texts], 0, dtype)
        local = torch.tensor([clips, texts], device=device)
        counts = torch.empty(dist.get_world_size(group), 2, dtype=torch.int64, device=device)
        dist.all_gather(list(counts.unbind()), local, group=group)
        all_clips, all_texts = counts.T.tolist()
        return cls(group, all_clips, all_texts, dist.get_rank(group), dtype)

    @property
    def total_clips(self) -> int:
        return sum(self.clips)

    @property
    def total_texts(self) -> int:
        return sum(self.texts)

    @property
    def first_clip(self) -> int:
        """The index of this rank's first clip among the clips of all ranks."""
        return sum(self.clips[: self.rank])

    def all_texts(self, text_ND: Tensor) -> Tensor:
        """The embeddings of all ranks' texts, in rank order; differentiable."""
        return _gather(text_ND, self.texts, self.group, self.dtype) if self.group is not None else text_ND

    def all_audio(self, audio_MD: Tensor) -> Tensor:
        """The embeddings of all ranks' audio, in rank order; differentiable."""
        return _gather(audio_MD, self.clips, self.group, self.dtype) if self.group is not None else audio_MD

    def all_of_texts(self, x_N: Tensor) -> Tensor:
        """`x_N`, one number per text, gathered for the texts of all ranks, in rank order."""
        return _gather(x_N, self.texts, self.group, x_N.dtype) if self.group is not None else x_N

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in rank order; differentiable."""
        if self.group is None:
            return x
        return _gather(x[None], [1] * len(self.clips), self.group, x.dtype).sum(0)

    def lse_over_ranks(self, column_N: Tensor) -> Tensor:
        """For each text of this rank, the log-sum-exp over the audio of all ranks.

        `column_N` holds, for each text of all ranks, the log-sum-exp over the audio of this rank.
        """
        if self.group is None:
            return column_N
        column_WN = _gather(column_N[None], [1] * len(self.clips), self.group, column_N.dtype)
        local_WN = torch.split(column_WN, self.texts, dim=1)[self.rank]
        # If no rank has a negative pair of a text, the gradient of log-sum-exp would be NaN.
        empty_N = local_WN.isneginf().all(0)
        return local_WN.masked_fill(empty_N, 0.0).logsumexp(0).masked_fill(empty_N, -torch.inf)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, in rank order. The backward pass sums all ranks' gradients for the local rows.

    Rows are sent in `dtype`, which must represent them exactly. A 16-bit dtype does so for rows that were
    converted from it to float32.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup, dtype: torch.dtype
    ) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives need equal shapes, so every shard is padded to the longest.
        padded = _pad(rows.to(dtype).contiguous(), max(sizes))
        shards = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shards, padded, group=group)
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)]).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # A sum of gradients in 16 bits would lose too many digits.
        wide = gradients[0].to(torch.promote_types(gradients[0].dtype, torch.float32)).contiguous()
        local = wide.new_empty(max(ctx.sizes), *wide.shape[1:])
        shards = [_pad(shard, len(local)) for shard in torch.split(wide, ctx.sizes)]
        dist.reduce_scatter(local, shards, group=ctx.group)
        return local[: ctx.sizes[dist.get_rank(ctx.group)]].to(gradients[0].dtype), None, None, None


def _pad(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, [0] * (2 * rows.ndim - 1) + [size - len(rows)])


def _gather(rows: Tensor, sizes: list[int], group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, _GatherRows.apply(rows, sizes, group, dtype))  # type: ignore[no-untyped-call]
