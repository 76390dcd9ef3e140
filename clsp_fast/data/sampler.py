"""Which clips are in each step's batch on each rank: a pure function of the durations and the step.

So a resumed run needs no state of the sampler except `start`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_STREAM_ORDER, _STREAM_SPARE = 11, 12


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Batches of clips of similar durations. In each epoch every clip is in exactly one batch of one rank.

    In a step all ranks take the same number of clips from the same bucket. Only the batches of an epoch's
    remainder may mix buckets, and differ by one clip between ranks. So no clip is dropped or repeated.

    Attributes:
        durations_s: float (N,), seconds of each clip.
        batch_seconds: audio per rank and step. Each clip counts as long as the longest of its bucket,
            because clips are padded.
        batch_clips: at most this many clips per rank and step.
        buckets: number of duration buckets; their borders are quantiles of the durations.
        seed: seed of the run.
        world: number of ranks.
        start: step with which the plan's first epoch begins.
        bucket: int64 (N,), the bucket of each clip.
        sizes: for each bucket, the clips of a full batch on all ranks.

    Raises:
        ValueError: fewer clips than ranks.
    """

    durations_s: NDArray[np.float64]
    batch_seconds: float
    batch_clips: int
    buckets: int
    seed: int
    world: int = 1
    start: int = 0
    bucket: Ids = field(init=False, repr=False)
    sizes: tuple[int, ...] = field(init=False, repr=False)
    _cuts: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    _cache: dict[int, tuple[Ids, Ids]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.durations_s)
        if count < self.world:
            raise ValueError(
                f"the data must hold at least one clip per rank: {count} clips, {self.world} ranks"
            )
        edges = np.quantile(self.durations_s, np.linspace(0, 1, min(self.buckets, count) + 1)[1:])
        upper = np.unique(edges)
        bucket = np.searchsorted(upper, self.durations_s).clip(max=len(upper) - 1)
        per_rank = np.clip(self.batch_seconds // np.maximum(upper, 1e-3), 1, self.batch_clips)
        sizes = tuple(int(size) * self.world for size in per_rank)
        object.__setattr__(self, "bucket", bucket.astype(np.int64))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "_cuts", tuple(self._cut(np.bincount(bucket, minlength=len(upper)))))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; all epochs have the same number."""
        return len(self._cuts)

    @cached_property
    def digest(self) -> str:
        """A hash of the plan without `start`."""
        digest = hashlib.blake2b(self.bucket.data, digest_size=16)
        digest.update(repr((self.sizes, self.world, self.seed)).encode())
        return digest.hexdigest()

    def batch(self, step: int, rank: int = 0) -> Ids:
        """Indices of the clips of a rank in a step, int64; `step` counts from the start of the run."""
        epoch, within = divmod(step - self.start, self.steps_per_epoch)
        # A plan that continues a run after a change must not repeat an epoch's order from the earlier plan.
        # The earlier plan numbered its epochs below `start`, so this plan numbers them from `start` on.
        order, sequence = self._epoch(self.start + epoch)
        start, stop = self._cuts[sequence[within]]
        return order[start:stop][rank :: self.world]

    def spare(self, step: int, rank: int, clip: int, attempt: int) -> int:
        """A random clip to replace the unreadable `clip`, from its bucket or one of shorter clips. The same
        arguments give the same clip."""
        pool = np.flatnonzero(self.bucket <= self.bucket[clip])
        draw = np.random.default_rng((self.seed, _STREAM_SPARE, step, rank, clip, attempt))
        return int(pool[draw.integers(len(pool))])

    def _cut(self, counts: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(start, stop) of each batch in an epoch's order: full batches bucket by bucket, then the
        remainders."""
        cuts, start, remainder = [], 0, []
        for bucket, count in enumerate(counts):
            size = self.sizes[bucket]
            full = int(count) // size
            cuts += [(start + i * size, start + (i + 1) * size) for i in range(full)]
            start += full * size
            remainder += [bucket] * (int(count) - full * size)
        position = 0
        while position < len(remainder):
            # The last clip of a mixed batch is of its longest bucket, which has the smallest batches.
            stop = position + 1
            while stop < len(remainder) and stop + 1 - position <= self.sizes[remainder[stop]]:
                stop += 1
            cuts.append((start + position, start + stop))
            position = stop
        return self._without_starved_ranks(cuts)

    def _without_starved_ranks(self, cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Joins a batch that has fewer clips than there are ranks to the batch before it."""
        joined: list[tuple[int, int]] = []
        for start, stop in cuts:
            if joined and stop - start < self.world:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return joined

    def _epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """An epoch's order of clips (full batches by bucket, then the remainders) and order of batches."""
        if epoch not in self._cache:
            random = np.random.default_rng((self.seed, _STREAM_ORDER, epoch))
            order = random.permutation(len(self.durations_s))
            order = order[np.argsort(self.bucket[order], kind="stable")]
            counts = np.bincount(self.bucket, minlength=len(self.sizes))
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            within = np.arange(len(order)) - first[self.bucket[order]]
            remainder = within >= (counts // self.sizes * self.sizes)[self.bucket[order]]
            order = np.concatenate([order[~remainder], order[remainder]])
            self._cache.clear()
            self._cache[epoch] = (order.astype(np.int64), random.permutation(self.steps_per_epoch))
        return self._cache[epoch]
