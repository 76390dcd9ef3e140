"""The batch plan: a pure function that uses every clip once an epoch, for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsp_fast.data.sampler import BatchPlan


def make_plan(count: int, **changes) -> BatchPlan:
    durations = np.random.default_rng(count).uniform(0.5, 30, count)
    return BatchPlan(
        **{"durations_s": durations, "batch_seconds": 60.0, "batch_clips": 16, "buckets": 5, "seed": 1}
        | changes
    )


@settings(max_examples=1000, deadline=None)
@given(
    count=st.integers(1, 300),
    world=st.integers(1, 5),
    buckets=st.integers(1, 12),
    clips=st.integers(1, 20),
    epoch=st.integers(0, 10**6),
)
def test_the_ranks_together_see_every_clip_once(
    count: int, world: int, buckets: int, clips: int, epoch: int
) -> None:
    if count < world:
        with pytest.raises(ValueError, match="at least one clip per rank"):
            make_plan(count, world=world)
        return
    plan = make_plan(count, world=world, buckets=buckets, batch_clips=clips)
    seen = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        shares = [plan.batch(step, rank) for rank in range(world)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1
        seen += [int(i) for share in shares for i in share]
    assert sorted(seen) == list(range(count))


def test_two_plans_agree_and_epochs_and_seeds_differ() -> None:
    first, same_seed, other = make_plan(200), make_plan(200), make_plan(200, seed=2)
    steps = range(2 * first.steps_per_epoch)
    batches = [first.batch(step).tolist() for step in steps]
    assert batches == [same_seed.batch(step).tolist() for step in steps]
    assert batches != [other.batch(step).tolist() for step in steps]
    assert sorted(map(tuple, batches[: len(batches) // 2])) != sorted(
        map(tuple, batches[len(batches) // 2 :])
    )


def test_a_batch_has_at_most_the_requested_seconds_and_clips() -> None:
    plan = make_plan(2000)
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(step)
        longest = plan.durations_s[batch].max()
        assert len(batch) <= 16
        # The longest clip of a bucket decides how many clips a batch has, so they fit with their padding.
        assert len(batch) * longest <= 60.0 or len(batch) == 1


def test_clips_of_a_batch_are_of_similar_length() -> None:
    plan = make_plan(2000, buckets=10)
    ratios = [np.ptp(plan.durations_s[plan.batch(step)]) for step in range(plan.steps_per_epoch)]
    assert np.median(ratios) < 30 / 8


def test_a_spare_is_repeatable_and_from_no_bucket_of_longer_clips() -> None:
    plan = make_plan(500)
    drawn = [plan.spare(3, 0, 17, attempt) for attempt in range(8)]
    assert drawn == [plan.spare(3, 0, 17, attempt) for attempt in range(8)]
    assert max(int(plan.bucket[i]) for i in drawn) <= int(plan.bucket[17])
    assert len(set(drawn)) > 4


def test_a_plan_that_starts_at_a_later_step_begins_a_new_epoch() -> None:
    whole, later = make_plan(100), make_plan(100, start=5)
    steps = later.steps_per_epoch
    assert later.digest == whole.digest != make_plan(100, world=2).digest
    for epoch in range(3):
        seen = [later.batch(step).tolist() for step in range(5 + epoch * steps, 5 + (epoch + 1) * steps)]
        assert sorted(i for batch in seen for i in batch) == list(range(100))
        assert seen[0] not in [whole.batch(step).tolist() for step in range(5)]


def test_late_steps_are_reached_at_once() -> None:
    plan = make_plan(1000)
    assert len(plan.batch(10**6 * plan.steps_per_epoch + 3)) >= 1
