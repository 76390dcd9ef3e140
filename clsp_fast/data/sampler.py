"""Which clips make up step s of epoch e on rank r: a pure function, so resuming needs no state.

A file of its own because it is pure arithmetic on durations; everything that touches files is in data.py.
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
    """Duration-bucketed batches; every clip exactly once an epoch over all ranks.

    All ranks draw from the same bucket in the same step and take equally many clips; only the remainder
    batch of an epoch may differ by one clip between ranks, so that no clip is dropped or repeated.

    Attributes:
        durations_s: float (N,), seconds of each clip.
        batch_seconds: audio per rank and step with padding, counted with each bucket's longest clip.
        batch_clips: at most this many clips per rank and step.
        buckets: quantiles of the durations.
        seed: seed of the run.
        world: number of ranks.
        start: step with which the first epoch begins.

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
        """Steps in which every clip is seen once; the same for all epochs."""
        return len(self._cuts)

    @cached_property
    def digest(self) -> str:
        """Equal for plans that differ in `start` at most."""
        known = hashlib.blake2b(self.bucket.data, digest_size=16)
        known.update(repr((self.sizes, self.world, self.seed)).encode())
        return known.hexdigest()

    def batch(self, step: int, rank: int = 0) -> Ids:
        """Clip indices, int64, of this rank in step `step` >= `start`, counted from the start of the run."""
        epoch, within = divmod(step - self.start, self.steps_per_epoch)
        # A plan that takes over has gone through fewer epochs than steps: this order is none of theirs.
        order, sequence = self._epoch(self.start + epoch)
        start, stop = self._cuts[sequence[within]]
        return order[start:stop][rank :: self.world]

    def spare(self, step: int, rank: int, clip: int, attempt: int) -> int:
        """A clip that may stand in for the unreadable `clip`: of its bucket or a shorter one, repeatable."""
        pool = np.flatnonzero(self.bucket <= self.bucket[clip])
        draw = np.random.default_rng((self.seed, _STREAM_SPARE, step, rank, clip, attempt))
        return int(pool[draw.integers(len(pool))])

    def _cut(self, counts: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(start, stop) of each batch in an epoch's order: full batches bucket by bucket, then what they
        left."""
        cuts, start, left = [], 0, []
        for bucket, count in enumerate(counts):
            size = self.sizes[bucket]
            full = int(count) // size
            cuts += [(start + i * size, start + (i + 1) * size) for i in range(full)]
            start += full * size
            left += [bucket] * (int(count) - full * size)
        position = 0
        while position < len(left):
            # The longest clip of a mixed batch decides its size: the sizes fall as the buckets rise.
            stop = position + 1
            while stop < len(left) and stop + 1 - position <= self.sizes[left[stop]]:
                stop += 1
            cuts.append((start + position, start + stop))
            position = stop
        return self._without_starved_ranks(cuts)

    def _without_starved_ranks(self, cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Joins a batch that has fewer clips than ranks with the one before it."""
        joined: list[tuple[int, int]] = []
        for start, stop in cuts:
            if joined and stop - start < self.world:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return joined

    def _epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """Clip order of an epoch (full batches' clips by bucket, then the remainders) and the batches'
        sequence."""
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
