"""Words of the demo corpus: claims, prompts and syllables."""

from __future__ import annotations

import re

import numpy as np
import pytest

from clsp_fast import demo
from clsp_fast.demo import text


def test_satisfies_is_neither_too_lax_nor_too_strict() -> None:
    tags = {"sex": "female", "speed": "slow>fast", "loudness": "loud"}
    assert demo.satisfies(tags, {"sex": "female", "speed": "slow>fast"})
    assert demo.satisfies(tags, {})
    assert not demo.satisfies(tags, {"speed": "slow"})
    assert not demo.satisfies(tags, {"speed": "fast>slow"})
    assert not demo.satisfies(tags, {"pitch": "low"})  # not measured: cannot be claimed
    assert not demo.satisfies(tags, {"sex": "female", "loudness": "quiet"})


def test_prompts_use_the_captions_words_but_no_caption() -> None:
    rng = np.random.default_rng(0)
    written: set[str] = set()
    for _ in range(600):
        tags = {a: str(rng.choice(labels)) for a, labels in text.ATTRIBUTES.items()}
        captions = text.captions(tags, rng)
        written.update(captions.global_captions + captions.fine_captions)
    words = {word for caption in written for word in re.findall(r"[a-z-]+", caption.lower())}
    tasks = demo.prompts()
    assert {a: tuple(task) for a, task in tasks.items()} == text.ATTRIBUTES
    for task in tasks.values():
        for label in task.values():
            assert len(label) >= 3
            assert not set(label) & written
            unknown = {w for p in label for w in re.findall(r"[a-z-]+", p.lower())} - words
            assert not unknown
    assert not words & {"no", "not", "neither", "nor", "without", "lacking", "never"}


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
