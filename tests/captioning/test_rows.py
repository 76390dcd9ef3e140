"""Ranges of rows: their union, their form in job.json, and the clips that they hold."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_data import write_rows

from clsp_fast.captioning.rows import (
    ALL_ROWS,
    RowRange,
    asked_rows,
    clips_of_rows,
    describe_rows,
    rows_as_json,
    union,
)

ENDS = st.one_of(st.integers(1, 12), st.just(math.inf))
RANGES = st.lists(st.tuples(st.integers(0, 9), ENDS).map(lambda r: (r[0], r[0] + r[1])), min_size=1)


def rows_of(ranges: list[RowRange]) -> set[int]:
    return {row for row in range(40) if any(first <= row < end for first, end in ranges)}


@given(RANGES)
def test_a_union_holds_the_same_rows_in_separate_ranges(ranges: list[RowRange]) -> None:
    joined = union(ranges)
    assert rows_of(joined) == rows_of(ranges)
    assert all(left[1] < right[0] for left, right in pairwise(joined))
    assert asked_rows({"rows": rows_as_json(joined)}) == joined


def test_a_record_without_rows_means_all() -> None:
    assert asked_rows({}) == [ALL_ROWS]
    assert rows_as_json([(0, 1000), (5000, math.inf)]) == [[0, 1000], [5000, None]]
    assert describe_rows([[0, 1000], [5000, None]]) == "0:1000, 5000:"
    assert describe_rows([[0, None]]) == "all"


@pytest.mark.parametrize("rows", [[], None, 3, [[1]], [[3, 2]], [[-1, 2]], [["a", 2]], [[0, 1, 2]]])
def test_damaged_rows_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r'job\.json is damaged: "rows" must be like'):
        asked_rows({"rows": rows})


def test_the_clips_of_ranges_keep_their_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", [{"id": f"c{i}", "audio": f"{i}.wav"} for i in range(9)])
    path.write_text(path.read_text().replace('{"id": "c2"', "\n"))  # row 2 is blank, and row 3 is damaged
    clips = list(clips_of_rows(path, [(1, 5), (7, math.inf)]))
    assert [row for row, _ in clips] == [1, 3, 4, 7, 8, 9]
    assert [getattr(clip, "id", None) for _, clip in clips] == ["c1", None, "c3", "c6", "c7", "c8"]
