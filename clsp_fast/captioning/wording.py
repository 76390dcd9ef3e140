"""The words of captions: attributes and labels, the phrases that describe them, and zero-shot prompts.

A clip has `tags`: attribute -> label, for all attributes that are known. A caption has `claims`: attribute ->
label, for all attributes that it mentions. `satisfies` compares the two. The label "a>b" means that the
attribute changes from a to b in the clip. Then the claim "a" is false, and so is the claim "b>a".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sex": ("female", "male"),
    "pitch": ("low", "medium", "high"),
    "speed": ("slow", "medium", "fast"),
    "liveliness": ("monotone", "normal", "lively"),
    "loudness": ("quiet", "normal", "loud"),
    "quality": ("normal", "whisper", "creaky"),
    "pauses": ("continuous", "long"),
}
"""Attribute -> labels. Only "pauses" has two labels with a range between them that has none."""
NEUTRAL = {
    "pitch": "medium",
    "speed": "medium",
    "liveliness": "normal",
    "loudness": "normal",
    "quality": "normal",
}


def satisfies(tags: Mapping[str, str], claims: Mapping[str, str]) -> bool:
    """Whether a caption's claims are true of a clip: every claimed attribute has exactly the claimed label.

    Args:
        tags: attribute -> label of the clip; an attribute that could not be measured is absent.
        claims: attribute -> label of the caption.
    """
    return all(tags.get(attribute) == label for attribute, label in claims.items())


# attribute -> label -> (phrases that follow "speaks", phrases that follow "with")
_PHRASINGS: dict[str, dict[str, tuple[str, str]]] = {
    "pitch": {
        "low": (
            "in a deep register|at a low pitch|in a low register",
            "a deep voice|a low pitch|a low-pitched tone|a deep register",
        ),
        "medium": (
            "in a middle register|at a mid-range pitch|at a middle pitch",
            "a mid-range pitch|a middle-pitched tone|a middle register",
        ),
        "high": (
            "in a high register|at a high pitch",
            "a high voice|a high pitch|a high-pitched tone|a high register",
        ),
    },
    "speed": {
        "slow": (
            "slowly|at a slow pace|unhurriedly|at a slow rate",
            "a slow pace|a leisurely tempo|slow, drawn-out words",
        ),
        "medium": (
            "at a moderate pace|at a measured speed",
            "a moderate pace|a moderate tempo|a measured rate",
        ),
        "fast": (
            "quickly|at a fast pace|rapidly|at a rapid rate",
            "a fast pace|a rapid tempo|quick, hurried words",
        ),
    },
    "liveliness": {
        "monotone": (
            "in a monotone|monotonously|on one flat note",
            "a flat intonation|a monotone melody|a monotonous delivery",
        ),
        "normal": ("with natural intonation|in a natural manner", "a natural melody|natural inflection"),
        "lively": (
            "animatedly|in a lively manner|expressively",
            "a lively intonation|an animated melody|an expressive, varied delivery",
        ),
    },
    "loudness": {
        "quiet": (
            "quietly|softly|faintly|at a soft volume",
            "a quiet sound|a soft, faint sound|a quiet volume",
        ),
        "normal": (
            "at a conversational level|at an ordinary loudness",
            "a conversational level|ordinary loudness",
        ),
        "loud": (
            "loudly|at a loud volume|at a loud level",
            "a loud sound|a loud volume|a loud level",
        ),
    },
    "quality": {
        "normal": (
            "in an ordinary voice|with ordinary phonation|in an everyday voice",
            "an ordinary voice|ordinary phonation|an everyday voice",
        ),
        "whisper": (
            "in a whisper|in a whispered voice|in a breathy whisper",
            "a whispered voice|whispering breath|a breathy whisper",
        ),
        "creaky": (
            "in a creaky voice|with vocal fry|in a creaking, gravelly voice",
            "a creaky voice|vocal fry|a rough, gravelly creak",
        ),
    },
    "pauses": {
        "continuous": (
            "in one go|in a continuous flow|in an unbroken flow",
            "an unbroken flow|a continuous flow|words that follow each other closely",
        ),
        "long": (
            "with long pauses|with long breaks between the phrases",
            "long pauses|long breaks between the phrases",
        ),
    },
}

# attribute -> "from>to" -> predicates of "she", "he" or "the speaker"; after "they", every "~s" is left out
_CHANGES: dict[str, dict[str, str]] = {
    "pitch": {
        "low>high": "raise~s {pos} pitch halfway|climb~s to a higher pitch"
        "|let~s the pitch rise towards the end",
        "high>low": "lower~s {pos} pitch halfway|sink~s to a lower pitch"
        "|let~s the pitch fall towards the end",
        "low>high>low": "raise~s {pos} pitch in the middle|let~s the pitch rise and then fall back",
        "high>low>high": "lower~s {pos} pitch in the middle|let~s the pitch fall and then rise back",
    },
    "speed": {
        "slow>fast": "speed~s up towards the end|accelerate~s halfway through"
        "|start~s slowly and get~s faster",
        "fast>slow": "slow~s down towards the end|decelerate~s halfway through"
        "|start~s quickly and get~s slower",
        "slow>fast>slow": "speed~s up in the middle|get~s faster and then slow~s down",
        "fast>slow>fast": "slow~s down in the middle|get~s slower and then speed~s up",
    },
    "loudness": {
        "quiet>loud": "get~s louder halfway through|start~s softly and grow~s louder"
        "|swell~s to a louder sound",
        "loud>quiet": "get~s quieter halfway through|start~s loudly and grow~s softer"
        "|fade~s to a quieter sound",
        "quiet>loud>quiet": "get~s louder in the middle|swell~s and then fade~s",
        "loud>quiet>loud": "get~s quieter in the middle|fade~s and then swell~s",
    },
    "quality": {
        "normal>whisper": "drop~s into a whisper|end~s whispering|turn~s to whispering halfway through",
        "whisper>normal": "come~s out of a whisper|begin~s whispering and then find~s {pos} voice",
        "normal>creaky": "drop~s into vocal fry|end~s creaking|turn~s creaky halfway through",
        "creaky>normal": "come~s out of vocal fry|begin~s creaking and then find~s {pos} voice",
    },
}

_MANNERS, _FEATURES = (
    {
        (attribute, label): tuple(phrases[i].split("|"))
        for attribute, by_label in _PHRASINGS.items()
        for label, phrases in by_label.items()
    }
    for i in range(2)
)
_CHANGE_WORDS = {
    (attribute, label): tuple(phrases.split("|"))
    for attribute, by_label in _CHANGES.items()
    for label, phrases in by_label.items()
}

_SUBJECTS = {
    "female": ("a woman", "a female speaker", "a lady"),
    "male": ("a man", "a male speaker", "a gentleman"),
    "": ("a speaker", "someone", "a person"),
}
_PRONOUNS = {
    "female": (("she", "her"),),
    "male": (("he", "his"),),
    "": (("the speaker", "their"), ("they", "their")),
}
_VERBS = ("speaks", "talks", "is speaking", "is talking", "says this")
_PLURAL_VERBS = ("speak", "talk", "are speaking", "are talking", "say this")
_PARTICIPLES = ("speaking", "talking")
_STARTS, _ENDS = ("start~s", "begin~s"), "end~s"
_JOINTS = ("; {}", ", and {}", ". {}")
_PATTERNS = 8
_FULL_CAPTIONS = 5
_MOST_FINE_CAPTIONS = 14
_FEWEST_CHARACTERS = 32  # the shortest global caption that the rules of `captioning.rules` accept
_ATTEMPTS = 20


@dataclass(frozen=True)
class Captions:
    """Captions of one clip. The claims are in the order of the captions."""

    global_captions: list[str]
    fine_captions: list[str]
    global_claims: list[dict[str, str]]
    fine_claims: list[dict[str, str]]


_Item = TypeVar("_Item")


def _pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: np.random.Generator, items: Iterable[_Item]) -> list[_Item]:
    pool = list(items)
    return [pool[i] for i in rng.permutation(len(pool)).tolist()]


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def compose(claims: Mapping[str, str], rng: np.random.Generator) -> str:
    """One to three sentences that make exactly these claims.

    Args:
        claims: attribute -> label of ATTRIBUTES, or a change for which `has_change` is true. Without "sex",
            the caption mentions neither a woman nor a man.
        rng: chooses order and words.
    """
    sex = claims.get("sex", "")
    subject, (pronoun, possessive) = _pick(rng, _SUBJECTS[sex]), _pick(rng, _PRONOUNS[sex])
    order = _shuffled(rng, (a for a in claims if a != "sex"))
    steady = [a for a in order if ">" not in claims[a]]
    changes = _changes([(a, claims[a]) for a in order if ">" in claims[a]], rng)
    manners = [_pick(rng, _MANNERS[a, claims[a]]) for a in steady]
    features = [_pick(rng, _FEATURES[a, claims[a]]) for a in steady]
    text = _sentence(subject, pronoun, manners, features, rng)
    if changes:
        text += f"{_pick(rng, _JOINTS).format(pronoun)} {_listing(changes)}"
    text = text.replace("~s", "" if pronoun == "they" else "s").replace("{pos}", possessive)
    return ". ".join(part[0].upper() + part[1:] for part in text.split(". ")) + "."


def _changes(labels: Iterable[tuple[str, str]], rng: np.random.Generator) -> list[str]:
    """A phrase for each change. At most one starts with "start" or "begin": it comes first, "end" last."""
    phrases: list[str] = []
    for label in labels:
        options = _CHANGE_WORDS[label]
        if any(phrase.startswith(_STARTS) for phrase in phrases):
            options = tuple(phrase for phrase in options if not phrase.startswith(_STARTS))
        phrases.append(_pick(rng, options))
    return sorted(phrases, key=lambda p: 0 if p.startswith(_STARTS) else 2 if p.startswith(_ENDS) else 1)


def _sentence(
    subject: str, pronoun: str, manners: Sequence[str], features: Sequence[str], rng: np.random.Generator
) -> str:
    """A sentence about attributes that do not change: manners[i] and features[i] describe attribute i."""
    verb = _pick(rng, _VERBS)
    if not manners:
        return f"{subject} {verb}"
    pattern = int(rng.random() * _PATTERNS)
    split = 1 + int(rng.random() * (len(manners) - 1))
    if pattern == 0:
        return f"{subject} {verb} {_listing(manners)}"
    if pattern == 1:
        return f"{subject} with {_listing(features)}"
    if pattern == 2:
        return f"this is {subject}, {_pick(rng, _PARTICIPLES)} {_listing(manners)}"
    if pattern == 3 or len(manners) == 1:
        return f"the speech of {subject}: {_listing(features)}"
    if pattern == 4:
        return f"{subject} {verb} {_listing(manners[:split])}, with {_listing(features[split:])}"
    if pattern == 5:
        return f"with {_listing(features[:split])}, {subject} {verb} {_listing(manners[split:])}"
    if pattern == 6:
        participle = _pick(rng, _PARTICIPLES)
        return f"{subject} with {_listing(features[:split])}, {participle} {_listing(manners[split:])}"
    second = _pick(rng, _PLURAL_VERBS if pronoun == "they" else _VERBS)
    return f"{subject} {verb} {_listing(manners[:split])}. {pronoun} {second} {_listing(manners[split:])}"


def _global_claims(tags: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Claims of a global caption: up to four attributes that do not change in the clip.

    Neutral labels are claimed, too. A model learns their words, such as "an ordinary voice", only from
    captions with few other claims. If every attribute changes, the changes are claimed.
    """
    constant = [a for a in ATTRIBUTES if ">" not in tags.get(a, ">") and a != "sex"]
    chosen = _shuffled(rng, constant)[: 1 + int(rng.random() * 3)]
    if "sex" in tags and (rng.random() < 0.8 or len(chosen) < 2):
        chosen.append("sex")
    return _with_needed_sex({a: tags[a] for a in ATTRIBUTES if a in (chosen if constant else tags)}, tags)


def _fine_claims(tags: Mapping[str, str], rng: np.random.Generator, *, full: bool) -> dict[str, str]:
    """Claims of a fine-grained caption: all known labels, except some of the neutral ones.

    If not `full`, it also leaves out one or two of the other attributes that do not change.
    """
    known = [a for a in ATTRIBUTES if a in tags]
    claims = {a: tags[a] for a in known if tags[a] != NEUTRAL.get(a) or rng.random() < 0.85}
    if not full:
        constant = [a for a, label in claims.items() if ">" not in label]
        for attribute in _shuffled(rng, constant)[: 1 + int(rng.random() * 2)]:
            if len(claims) > 2:
                del claims[attribute]
    return _with_needed_sex(claims or {a: tags[a] for a in known}, tags)


def _with_needed_sex(claims: dict[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Adds the sex where the claims would mislead without it. "A low voice" of a speaker whose sex is not
    mentioned is expected to be a man's, but a woman's low voice is higher than most men's voices."""
    usual = {"female": "high", "male": "low"}.get(tags.get("sex", ""), claims.get("pitch"))
    if claims.get("pitch", usual) == usual or "sex" in claims:
        return claims
    return {a: tags[a] for a in ATTRIBUTES if a in claims or a == "sex"}


def captions(tags: Mapping[str, str], rng: np.random.Generator, *, fine: int | None = None) -> Captions:
    """Writes one or two global captions and several fine-grained ones for a clip. All are distinct.

    The first five fine-grained captions mention nearly all labels. The others leave out one or two more.

    Args:
        tags: attribute -> label. The attributes of ATTRIBUTES are described; one besides "sex" must be
            present. Without "sex", no caption mentions it.
        rng: chooses attributes, order and words.
        fine: number of fine-grained captions; None: between 5 and 14, the more labels are known.

    Raises:
        ValueError: there is no label to describe.
    """
    known = {a: tags[a] for a in ATTRIBUTES if a in tags}
    if not known.keys() - {"sex"}:
        raise ValueError(f"tags must hold one of {', '.join(ATTRIBUTES)} besides sex, got {dict(tags)}")
    if fine is None:
        fine = min(_MOST_FINE_CAPTIONS, max(_FULL_CAPTIONS, 1 + 2 * len(known)))
    kinds = ["global"] * (1 + int(rng.random() * 2)) + ["full"] * min(fine, _FULL_CAPTIONS)
    kinds += ["part"] * (fine - _FULL_CAPTIONS)
    written: dict[str, tuple[str, dict[str, str]]] = {}
    for kind in kinds:
        for _ in range(_ATTEMPTS):
            claims = (
                _global_claims(known, rng)
                if kind == "global"
                else _fine_claims(known, rng, full=kind == "full")
            )
            text = compose(claims, rng)
            if text not in written and len(text) >= _FEWEST_CHARACTERS:
                written[text] = (kind, claims)
                break
    short = {text: claims for text, (kind, claims) in written.items() if kind == "global"}
    long = {text: claims for text, (kind, claims) in written.items() if kind != "global"}
    return Captions([*short], [*long], [*short.values()], [*long.values()])


def has_change(attribute: str, label: str) -> bool:
    """Whether captions have words for a change such as "slow>fast"."""
    return (attribute, label) in _CHANGE_WORDS


def prompts(attributes: Iterable[str] = tuple(ATTRIBUTES)) -> dict[str, dict[str, list[str]]]:
    """Zero-shot tasks: attribute -> label -> prompt sentences, whose embeddings are averaged.

    The prompts use the words of the captions. But each prompt names a single attribute, and captions name
    several. A task leaves out the clips whose attribute changes or was not measured: these have no label in
    `ATTRIBUTES[attribute]`.

    Args:
        attributes: the attributes that become tasks.
    """
    return {a: {label: _prompts(a, label) for label in ATTRIBUTES[a]} for a in attributes}


def _prompts(attribute: str, label: str) -> list[str]:
    if attribute == "sex":
        subjects = [subject[0].upper() + subject[1:] for subject in _SUBJECTS[label]]
        return [f"{subject} {verb}." for subject in subjects for verb in _VERBS[:2]]
    sentences = [f"A speaker {_VERBS[i % 2]} {m}." for i, m in enumerate(_MANNERS[attribute, label])]
    return sentences + [f"A speaker with {feature}." for feature in _FEATURES[attribute, label]]
