"""Ratings that people gave: how well a caption fits a clip."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clsp_fast.checks import require
from clsp_fast.storage import textfile


class Rating(NamedTuple):
    """A row of the table; `value` is in [0, 5]."""

    clip: str
    caption: str
    category: str
    rater: str
    value: float


def read_ratings(path: Path) -> Iterator[Rating]:
    """The rows of a CSV table with the columns clip, caption, rater, rating and category.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a column or a value is missing or wrong; the
        message says where.
    """
    columns = ("clip", "caption", "category", "rater", "rating")
    expected = "a CSV table with the columns clip, caption, rater, rating and category"
    with textfile.open_text(path, expected, newline="") as text:
        try:
            rows = csv.DictReader(text.file)
            missing = set(columns) - set(rows.fieldnames or ())
            require(not missing, "its columns", "clip, caption, rater, rating, category", rows.fieldnames)
            for row in rows:
                if not all(row[column] for column in columns):
                    raise ValueError(f"row {rows.line_num}: each column must have a value")
                if not textfile.is_text(row["caption"]):
                    raise ValueError(
                        f"row {rows.line_num}: the caption is not UTF-8; save the table as UTF-8"
                    )
                value = float(row["rating"])
                require(0 <= value <= 5, f"row {rows.line_num}: rating", "in [0, 5]", value)
                yield Rating(row["clip"], row["caption"], row["category"], row["rater"], value)
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path}: {error}") from error
