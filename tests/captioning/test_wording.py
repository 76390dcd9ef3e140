"""Words of captions: claims, grammar, rules and prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from clsp_fast import demo
from clsp_fast.captioning import wording
from clsp_fast.captioning.wording import ATTRIBUTES

FORBIDDEN = {
    "no",
    "not",
    "neither",
    "nor",
    "without",
    "lacking",
    "never",
    "cannot",
    "speakers",
    "rather",
    "free",
}
SEXES = re.compile(r"\b(wom[ae]n|m[ae]n|female|male|lady|gentleman|she|her|he|his)\b", re.IGNORECASE)


def drawn_tags(rng: np.random.Generator) -> dict[str, str]:
    """Random tags: any attributes, any labels, sometimes changes."""
    tags = {a: str(rng.choice(labels)) for a, labels in ATTRIBUTES.items() if rng.random() < 0.7}
    for attribute in ("pitch", "speed", "loudness"):
        low, high = ATTRIBUTES[attribute][0], ATTRIBUTES[attribute][-1]
        changes = [f"{low}>{high}", f"{high}>{low}", f"{low}>{high}>{low}", f"{high}>{low}>{high}"]
        if rng.random() < 0.2:
            tags[attribute] = str(rng.choice(changes))
    return tags if tags.keys() - {"sex"} else tags | {"speed": "slow"}


def many_captions(count: int = 400) -> Iterator[tuple[dict[str, str], wording.Captions]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        tags = drawn_tags(rng)
        yield tags, wording.captions(tags, rng)


def test_satisfies_is_neither_too_lax_nor_too_strict() -> None:
    tags = {"sex": "female", "speed": "slow>fast", "loudness": "loud"}
    assert demo.satisfies(tags, {"sex": "female", "speed": "slow>fast"})
    assert demo.satisfies(tags, {})
    assert not demo.satisfies(tags, {"speed": "slow"})
    assert not demo.satisfies(tags, {"speed": "fast>slow"})
    assert not demo.satisfies(tags, {"speed": "slow>fast>slow"})
    assert not demo.satisfies(tags, {"pitch": "low"})  # not measured: cannot be claimed
    assert not demo.satisfies(tags, {"sex": "female", "loudness": "quiet"})


def test_captions_claim_what_the_tags_say_and_are_distinct() -> None:
    for tags, captions in many_captions():
        claims = captions.global_claims + captions.fine_claims
        texts = captions.global_captions + captions.fine_captions
        assert len(texts) == len(claims) == len(set(texts))
        assert all(claim and wording.satisfies(tags, claim) for claim in claims)
        assert 1 <= len(captions.global_captions) <= 2
        assert all(len(claim) <= 4 for claim in captions.global_claims if not has_change(claim))
        changes = {a: label for a, label in tags.items() if ">" in label}
        assert all(wording.satisfies(claim, changes) for claim in captions.fine_claims)


def has_change(claims: dict[str, str]) -> bool:
    return any(">" in label for label in claims.values())


def test_more_is_written_where_more_is_known() -> None:
    rng = np.random.default_rng(1)
    counts = []
    tags: dict[str, str] = {}
    for attribute in ("speed", "sex", "quality", "pitch", "loudness", "liveliness", "pauses"):
        tags[attribute] = ATTRIBUTES[attribute][0]
        counts.append(len(wording.captions(tags, rng).fine_captions))
    assert counts[0] == 5
    assert counts[-1] == 14
    assert counts == sorted(counts)
    assert len(wording.captions(tags, rng, fine=6).fine_captions) == 6
    fine_claims = wording.captions(tags, rng).fine_claims
    assert len({tuple(claims) for claims in fine_claims}) > 4  # further captions make other claims


def test_captions_use_no_forbidden_words_and_are_long_enough() -> None:
    for _, captions in many_captions():
        for text in captions.global_captions + captions.fine_captions:
            assert not set(re.findall(r"[a-z]+", text.lower())) & FORBIDDEN, text
            assert 32 <= len(text) <= 768
            assert not re.search(r"[~{}|\n]", text)
            assert text[0].isupper()
            assert text.endswith(".")


def test_without_a_known_sex_no_caption_mentions_one() -> None:
    mentioned = 0
    for tags, captions in many_captions():
        for text, claims in zip(
            captions.global_captions + captions.fine_captions,
            captions.global_claims + captions.fine_claims,
            strict=True,
        ):
            assert bool(SEXES.search(text)) == ("sex" in claims), text
            mentioned += "sex" in claims
            assert "sex" in tags or "sex" not in claims
    assert mentioned > 1000


def test_they_takes_plural_verbs() -> None:
    rng = np.random.default_rng(2)
    tags = {"speed": "slow>fast>slow", "pitch": "low>high", "loudness": "quiet", "quality": "normal>whisper"}
    texts = [wording.compose(tags, rng) for _ in range(600)]
    after_they = {m[1] for text in texts for m in re.finditer(r"\b[Tt]hey (\w+)", text)}
    after_speaker = {
        m[1] for text in texts for m in re.finditer(r"[;,.] (?:and )?[Tt]he speaker (\w+)", text)
    }
    assert {"raise", "speed", "get", "drop"} <= after_they
    assert {"raises", "speeds", "gets", "drops"} <= after_speaker
    assert not {verb for verb in after_they if verb.endswith("s")}
    assert not {verb for verb in after_speaker if not verb.endswith("s")}
    assert any("they" in t and " and then slow down" in t for t in texts)


def test_changes_from_the_beginning_come_first_and_only_one_says_start() -> None:
    rng = np.random.default_rng(3)
    tags = {"speed": "slow>fast", "loudness": "loud>quiet", "quality": "whisper>normal", "pitch": "low>high"}
    starts = 0
    for _ in range(600):
        text = wording.compose(tags, rng)
        start = re.findall(r"\b(?:starts?|begins?)\b", text)
        assert len(start) <= 1, text
        if start:
            assert re.search(rf"\b(she|he|they|speaker) {start[0]}\b", text, re.IGNORECASE), text
            starts += 1
    assert starts > 100


def test_captions_claim_only_what_is_measured() -> None:
    unmeasured = re.compile(
        r"force|power|booming|top of|under \w+ breath|one breath|timbre|(low|high|deep) in|clear|clean|smooth"
        r"|taking \w+ time|middle height|(?<!whispered )(?<!\w-pitched )\bvoice with\b"
        r"|speech of an? \w*voice\b|wom[ae]n speaker|\bman speaker",
        re.IGNORECASE,
    )
    prompts = [p for task in wording.prompts().values() for label in task.values() for p in label]
    written = [text for _, c in many_captions() for text in c.global_captions + c.fine_captions]
    assert not [text for text in prompts + written if unmeasured.search(text)]


def test_no_phrase_uses_the_label_of_another_attribute() -> None:
    for attribute, task in wording.prompts().items():
        others = {label for a, labels in ATTRIBUTES.items() if a != attribute for label in labels}
        for label, sentences in task.items():
            words = {word for text in sentences for word in re.findall(r"[a-z-]+", text.lower())}
            assert not words & (others - {label, "long", "continuous"}), label


@pytest.mark.parametrize("tags", [{}, {"sex": "female"}, {"engine": "espeak"}])
def test_nothing_to_describe_is_refused(tags: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="tags must hold one of"):
        wording.captions(tags, np.random.default_rng(0))


def test_only_changes_are_described_as_changes() -> None:
    captions = wording.captions({"loudness": "quiet>loud"}, np.random.default_rng(0))
    assert captions.global_claims == [{"loudness": "quiet>loud"}] * len(captions.global_claims)
    assert len(captions.fine_captions) == 5


def test_prompts_use_the_captions_words_but_no_caption() -> None:
    rng = np.random.default_rng(0)
    written: set[str] = set()
    for _ in range(600):
        tags = {a: str(rng.choice(labels)) for a, labels in ATTRIBUTES.items()}
        captions = wording.captions(tags, rng)
        written.update(captions.global_captions + captions.fine_captions)
    words = {word for caption in written for word in re.findall(r"[a-z-]+", caption.lower())}
    tasks = wording.prompts()
    assert {a: tuple(task) for a, task in tasks.items()} == ATTRIBUTES
    assert demo.prompts() == {a: tasks[a] for a in ATTRIBUTES if a != "pauses"}
    for task in tasks.values():
        for label in task.values():
            assert len(label) >= 3
            assert not set(label) & written
            unknown = {w for p in label for w in re.findall(r"[a-z-]+", p.lower())} - words
            assert not unknown
