"""Caption sampling in the two stages: which captions, how often, and without captions of one kind."""

from __future__ import annotations

import pytest

from clsp_fast.data.captions import Captions, stage1, stage2

FULL = Captions(("g0", "g1"), ("f0", "f1", "f2"))


def test_stage1_draws_every_fine_caption_and_no_other() -> None:
    drawn = {stage1([FULL], [7], seed=1, step=step)[0][0] for step in range(100)}
    assert drawn == set(FULL.fine_captions)


def test_stage1_takes_a_global_caption_where_there_is_no_fine_one() -> None:
    assert stage1([Captions(("g",), ())], [0], seed=1, step=0) == [["g"]]


@pytest.mark.parametrize(("step", "probability"), [(0, 0.05), (5000, 0.275), (10_000, 0.5), (10**6, 0.5)])
def test_stage2_draws_two_fine_captions_as_often_as_the_recipe(step: int, probability: float) -> None:
    fine = 0
    for seed in range(2000):
        first, second = stage2([FULL], [3], seed=seed, step=step)
        fine += first[0].startswith("f")
        assert second[0].startswith("f")
        assert first != second
    # Four standard deviations of a binomial share.
    assert abs(fine / 2000 - probability) < 4 * (probability * (1 - probability) / 2000) ** 0.5


def test_stage2_chooses_kinds_for_the_whole_batch_and_captions_for_each_clip() -> None:
    for step in range(0, 10_000, 500):
        first, second = stage2([FULL] * 64, range(64), seed=5, step=step)
        assert len({text[0] for text in first}) == 1  # the first letter names the kind
        assert len(set(second)) > 1


@pytest.mark.parametrize(
    ("captions", "allowed"),
    [
        (Captions((), ("f",)), {("f", "f")}),
        (Captions(("g",), ()), {("g", "g")}),
        (Captions(("g",), ("f",)), {("g", "f")}),
        (Captions(("g0", "g1"), ()), {("g0", "g1"), ("g1", "g0")}),
        (Captions((), ("f0", "f1")), {("f0", "f1"), ("f1", "f0")}),
    ],
)
def test_stage2_falls_back_to_the_captions_that_a_clip_has(
    captions: Captions, allowed: set[tuple[str, str]]
) -> None:
    for step in (0, 10**6):
        drawn = {tuple(t[0] for t in stage2([captions], [1], seed=s, step=step)) for s in range(200)}
        assert drawn == allowed


def test_the_captions_of_a_clip_do_not_depend_on_the_other_clips() -> None:
    alone = stage1([FULL], [9], seed=2, step=4)[0][0]
    together = stage1([FULL] * 3, [1, 9, 5], seed=2, step=4)[0][1]
    assert alone == together
