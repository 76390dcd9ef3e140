"""Words of captions: claims and prompts."""

from __future__ import annotations

import re

import numpy as np

from clsp_fast import demo
from clsp_fast.captioning import wording


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
        tags = {a: str(rng.choice(labels)) for a, labels in wording.ATTRIBUTES.items()}
        captions = wording.captions(tags, rng)
        written.update(captions.global_captions + captions.fine_captions)
    words = {word for caption in written for word in re.findall(r"[a-z-]+", caption.lower())}
    tasks = demo.prompts()
    assert {a: tuple(task) for a, task in tasks.items()} == wording.ATTRIBUTES
    for task in tasks.values():
        for label in task.values():
            assert len(label) >= 3
            assert not set(label) & written
            unknown = {w for p in label for w in re.findall(r"[a-z-]+", p.lower())} - words
            assert not unknown
    assert not words & {"no", "not", "neither", "nor", "without", "lacking", "never"}
