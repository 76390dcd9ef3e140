"""Spoken sentences of the demo corpus: the count of syllables."""

from __future__ import annotations

import pytest

from clsp_fast.demo import text


@pytest.mark.parametrize(
    ("phrase", "count"),
    [
        ("the water is cold", 5),
        ("she walked past the gate", 5),
        ("he carried the green bottle", 7),
        ("the musicians painted the wooden box once more", 12),
        ("a little apple", 5),
    ],
)
def test_syllables_of_a_phrase(phrase: str, count: int) -> None:
    assert text.syllables(phrase) == count
