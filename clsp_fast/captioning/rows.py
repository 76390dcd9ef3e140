"""The rows of a manifest that `generate` was asked for, as ranges.

Its record (job.json) holds them, and every call adds its range. They are no setting of the job, because a
folder can take in one shard of the manifest after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import Problem, iterate_manifest

RowRange = tuple[int, float]
"""The first row, and the row after the last; infinity: up to the end of the manifest."""
ALL_ROWS: RowRange = (0, math.inf)


def union(ranges: Iterable[RowRange]) -> list[RowRange]:
    """The same rows as ranges in rising order that neither overlap nor touch."""
    joined: list[RowRange] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined


def rows_as_json(ranges: Iterable[RowRange]) -> list[list[int | None]]:
    """The form of job.json: [[0, 1000], [5000, null]], where null stands for the end of the manifest."""
    return [[first, None if math.isinf(end) else int(end)] for first, end in ranges]


def asked_rows(record: Mapping[str, Any]) -> list[RowRange]:
    """The rows of a job's record. All rows if it names none.

    Raises:
        ValueError: they are not in the form of `rows_as_json`.
    """
    if "rows" not in record:
        return [ALL_ROWS]
    try:
        ranges = [(int(first), math.inf if end is None else int(end)) for first, end in record["rows"]]
    except (TypeError, ValueError):
        ranges = []
    if not ranges or any(not 0 <= first < end for first, end in ranges):
        raise ValueError(f'job.json is damaged: "rows" must be like [[0, 1000]], got {record["rows"]}')
    return union(ranges)


def describe_rows(ranges: Iterable[Sequence[int | None]]) -> str:
    """Ranges as `rows_as_json` returns them in the form of --rows: "0:1000, 5000:", or "all"."""
    ranges = [*ranges]
    if ranges == [[0, None]]:
        return "all"
    return ", ".join(f"{first}:{'' if end is None else end}" for first, end in ranges)


def clips_of_rows(manifest: Path, ranges: Iterable[RowRange]) -> Iterator[tuple[int, Clip | Problem]]:
    """The lines of these rows that are not blank: the row, and its clip or what is wrong with it.

    Other lines are read, but not parsed. Each range reads the file from its beginning.
    """
    for first, end in ranges:
        for line, clip in iterate_manifest(manifest, need_captions=False, first_line=first + 1):
            if line > end:
                break
            yield line - 1, clip
