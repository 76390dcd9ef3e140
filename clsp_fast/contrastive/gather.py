"""A contrastive batch that is spread over the ranks of a process group.

Every rank keeps its audio and sees all texts; logits and audio never travel. One of W ranks, with N texts
over all ranks, receives N D elements of text in the caller's dtype, N owners and, for the softmax kind, W N
column sums. The backward pass reduce-scatters N D + W N elements in float32. The texts are gathered in one
step, not passed around in a ring: 32,768 texts of 512 bfloat16 numbers are 32 MiB. A ring would hide their
transfer, but launch W times as many kernels on smaller tiles.

Every rank's loss is that of the whole batch, so the backward pass of a gathered tensor sums the gradients of
all ranks by a shard. That is world_size times the gradient; averaging over the ranks undoes it.

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
        group: the ranks; None for a batch in one place.
        clips: audio rows of each rank.
        texts: text rows of each rank.
        rank: the number of this process in these lists.
        dtype: embeddings travel in it.
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
        """Tells all ranks the sizes of all shards. It is the only exchange for which the host waits."""
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
        """One number for each text, of all ranks' texts, in rank order."""
        return _gather(x_N, self.texts, self.group, x_N.dtype) if self.group is not None else x_N

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in rank order; differentiable."""
        if self.group is None:
            return x
        return _gather(x[None], [1] * len(self.clips), self.group, x.dtype).sum(0)

    def lse_over_ranks(self, column_N: Tensor) -> Tensor:
        """Log-sum-exp of this rank's texts over the rows of all ranks.

        `column_N` is the log-sum-exp of all ranks' texts over the rows of this rank.
        """
        if self.group is None:
            return column_N
        column_WN = _gather(column_N[None], [1] * len(self.clips), self.group, column_N.dtype)
        local_WN = torch.split(column_WN, self.texts, dim=1)[self.rank]
        # Where no rank has a negative pair, the gradient of log-sum-exp would be NaN.
        empty_N = local_WN.isneginf().all(0)
        return local_WN.masked_fill(empty_N, 0.0).logsumexp(0).masked_fill(empty_N, -torch.inf)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks in rank order; the backward pass sums every rank's gradients by the local rows.

    Rows travel in `dtype`. It must hold them without loss, as 16 bits hold rows that were widened from 16
    bits.
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
        # 16 bits are too few for sums of gradients.
        wide = gradients[0].to(torch.promote_types(gradients[0].dtype, torch.float32)).contiguous()
        local = wide.new_empty(max(ctx.sizes), *wide.shape[1:])
        shards = [_pad(shard, len(local)) for shard in torch.split(wide, ctx.sizes)]
        dist.reduce_scatter(local, shards, group=ctx.group)
        return local[: ctx.sizes[dist.get_rank(ctx.group)]].to(gradients[0].dtype), None, None, None


def _pad(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, [0] * (2 * rows.ndim - 1) + [size - len(rows)])


def _gather(rows: Tensor, sizes: list[int], group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, _GatherRows.apply(rows, sizes, group, dtype))  # type: ignore[no-untyped-call]
