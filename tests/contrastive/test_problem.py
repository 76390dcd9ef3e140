"""A checked problem has the defaults filled in, and cannot change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from clsp_fast.contrastive.problem import Problem, check_problem

ARGUMENTS: dict[str, Any] = {
    "text_owner": None,
    "weights": None,
    "logit_bias": None,
    "label_smoothing": 0.0,
    "kind": "softmax",
    "normalize": False,
    "group": None,
}


def make_problem(clips: int, texts: int, **changes: Any) -> Problem:
    return check_problem(torch.zeros(clips, 4), torch.zeros(texts, 4), 10.0, **ARGUMENTS | changes)


def test_defaults_are_filled_in() -> None:
    problem = make_problem(5, 3)
    assert problem.owner_N.tolist() == [0, 1, 2]
    assert problem.bias == 0.0


@pytest.mark.parametrize(
    ("clips", "texts", "owner", "expected"),
    [
        (3, 3, None, True),
        (4, 3, None, False),
        (3, 3, [0, 1, 2], False),
    ],
)
def test_equal_sizes_without_owners_mean_one_caption_each(
    clips: int, texts: int, owner: list[int] | None, expected: bool
) -> None:
    text_owner = None if owner is None else torch.tensor(owner)
    assert make_problem(clips, texts, text_owner=text_owner).one_caption_each == expected


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_computation_is_in_float32_or_wider(given: torch.dtype, computed: torch.dtype) -> None:
    x_MD = torch.zeros(2, 3, dtype=given)
    assert check_problem(x_MD, x_MD, 1.0, **ARGUMENTS).dtype == computed


def test_a_problem_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_problem(2, 2).smoothing = 0.5  # type: ignore[misc]
