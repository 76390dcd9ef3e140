"""The words of captions: attributes and labels, the phrases that describe them, and zero-shot prompts.

A clip has `tags`: attribute -> label, for all attributes that are known. A caption has `claims`: attribute ->
label, for all attributes that it mentions. `satisfies` compares the two. The label "a>b" means that the
attribute changes from a to b in the clip. Then the claim "a" is false, and so is the claim "b>a".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sex": ("female", "male"),
    "pitch": ("low", "medium", "high"),
    "speed": ("slow", "medium", "fast"),
    "liveliness": ("monotone", "normal", "lively"),
    "loudness": ("quiet", "normal", "loud"),
    "quality": ("normal", "whisper", "creaky"),
}
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
            "in a deep register|at a low pitch|deep in {pos} range",
            "a deep voice|a low pitch|a low-pitched tone|a dark, deep timbre",
        ),
        "medium": (
            "in a middle register|at a mid-range pitch",
            "a mid-range pitch|a middle-pitched tone|a voice of middle height",
        ),
        "high": (
            "in a high register|at a high pitch|high in {pos} range",
            "a high voice|a high pitch|a high-pitched tone|a bright, high timbre",
        ),
    },
    "speed": {
        "slow": (
            "slowly|at a slow pace|unhurriedly|taking {pos} time",
            "a slow pace|a leisurely tempo|slow, drawn-out words",
        ),
        "medium": (
            "at a moderate pace|at a measured speed",
            "a moderate pace|a moderate tempo|a measured rate",
        ),
        "fast": (
            "quickly|at a fast pace|rapidly|in a hurry",
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
            "quietly|softly|faintly",
            "a quiet sound|a soft, faint sound|little force",
        ),
        "normal": (
            "at a conversational level|at an ordinary loudness",
            "a conversational level|ordinary loudness",
        ),
        "loud": (
            "loudly|powerfully|at the top of {pos} voice",
            "a loud sound|a powerful, booming sound|great force",
        ),
    },
    "quality": {
        "normal": ("in a clear voice|with clean phonation", "a clear voice|clean, smooth phonation"),
        "whisper": (
            "in a whisper|in a whispered voice|under {pos} breath",
            "a whispered voice|whispering breath|a breathy whisper",
        ),
        "creaky": (
            "in a creaky voice|with vocal fry|in a creaking, gravelly voice",
            "a creaky voice|vocal fry|a rough, gravelly creak",
        ),
    },
}  # fmt: skip

# attribute -> "from>to" -> sentences that follow "she" or "he"
_CHANGES: dict[str, dict[str, str]] = {
    "pitch": {
        "low>high": "raises {pos} pitch halfway|climbs to a higher pitch|lets the pitch rise towards the end",
        "high>low": "lowers {pos} pitch halfway|sinks to a lower pitch|lets the pitch fall towards the end",
    },
    "speed": {
        "slow>fast": "speeds up towards the end|accelerates halfway through|starts slowly and gets faster",
        "fast>slow": "slows down towards the end|decelerates halfway through|starts quickly and gets slower",
    },
    "loudness": {
        "quiet>loud": "gets louder halfway through|starts softly and grows louder|swells to a louder sound",
        "loud>quiet": "gets quieter halfway through|starts loudly and grows softer|fades to a quieter sound",
    },
    "quality": {
        "normal>whisper": "drops into a whisper|ends whispering|turns to whispering halfway through",
        "whisper>normal": "comes out of a whisper|begins whispering, then finds {pos} voice",
        "normal>creaky": "drops into vocal fry|ends creaking|turns creaky halfway through",
        "creaky>normal": "comes out of vocal fry|begins creaking, then finds {pos} voice",
    },
}

_SUBJECTS = {
    "female": ("a woman", "a female speaker", "a lady", "a female voice", "a woman speaker"),
    "male": ("a man", "a male speaker", "a gentleman", "a male voice", "a man speaker"),
    "": ("a speaker", "someone", "a person", "a voice"),
}
_PRONOUNS = {"female": ("she", "her"), "male": ("he", "his"), "": ("the speaker", "their")}
_VERBS = ("speaks", "talks", "is speaking", "is talking", "says this")


@dataclass(frozen=True)
class Captions:
    """Captions of one clip. The claims are in the order of the captions."""

    global_captions: list[str]
    fine_captions: list[str]
    global_claims: list[dict[str, str]]
    fine_claims: list[dict[str, str]]


def _pick(rng: np.random.Generator, options: str | Sequence[str]) -> str:
    items = options.split("|") if isinstance(options, str) else options
    return items[int(rng.integers(len(items)))]


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _compose(claims: Mapping[str, str], rng: np.random.Generator) -> str:
    """One or two sentences that make exactly these claims."""
    sex = claims.get("sex", "")
    subject, (pronoun, possessive) = _pick(rng, _SUBJECTS[sex]), _PRONOUNS[sex]
    order = [str(a) for a in rng.permutation([a for a in claims if a != "sex"])]
    steady = [a for a in order if ">" not in claims[a]]
    changes = [_pick(rng, _CHANGES[a][claims[a]]) for a in order if ">" in claims[a]]
    manners = [_pick(rng, _PHRASINGS[a][claims[a]][0]) for a in steady]
    features = [_pick(rng, _PHRASINGS[a][claims[a]][1]) for a in steady]
    middle = int(rng.integers(1, len(steady))) if len(steady) > 1 else 1
    pattern = int(rng.integers(5))
    if not steady:
        text = f"{subject} {_pick(rng, _VERBS)}"
    elif pattern == 0:
        text = f"{subject} {_pick(rng, _VERBS)} {_listing(manners)}"
    elif pattern == 1:
        text = f"{subject} with {_listing(features)}"
    elif pattern == 2 and len(steady) > 1:
        text = f"{subject} {_pick(rng, _VERBS)} {_listing(manners[:middle])}"
        text += f", with {_listing(features[middle:])}"
    elif pattern == 3 and len(steady) > 1:
        text = f"with {_listing(features[:middle])}, {subject} {_pick(rng, _VERBS)}"
        text += f" {_listing(manners[middle:])}"
    else:
        text = f"the speech of {subject}: {_listing(features)}"
    if changes:
        joint = _pick(rng, ("; {}", ", and {}", ". {}")).format(pronoun)
        text += f"{joint} {_listing(changes)}"
    text = ". ".join(part[0].upper() + part[1:] for part in text.split(". "))
    return text.replace("{pos}", possessive) + "."


def _global_claims(tags: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Claims of a global caption: up to four attributes that do not change in the clip.

    Neutral labels are claimed, too. A model learns their words, such as "a clear voice", only from captions
    with few other claims.
    """
    constant = [a for a in ATTRIBUTES if ">" not in tags.get(a, ">") and a != "sex"]
    chosen = [str(a) for a in rng.permutation(constant)[: int(rng.integers(1, 4))]]
    if rng.random() < 0.8 or len(chosen) < 2:
        chosen.append("sex")
    return {a: tags[a] for a in ATTRIBUTES if a in chosen}


def _fine_claims(tags: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Claims of a fine-grained caption: all known labels, except some of the neutral ones."""
    known = [a for a in ATTRIBUTES if a in tags]
    return {a: tags[a] for a in known if tags[a] != NEUTRAL.get(a) or rng.random() < 0.85}


def captions(tags: Mapping[str, str], rng: np.random.Generator) -> Captions:
    """Writes one or two global and five or six fine-grained captions for a clip.

    Args:
        tags: attribute -> label; only the attributes of ATTRIBUTES are described, and "sex" must be present.
        rng: chooses attributes, order and words.
    """
    global_claims = [_global_claims(tags, rng) for _ in range(int(rng.integers(1, 3)))]
    fine_claims = [_fine_claims(tags, rng) for _ in range(int(rng.integers(5, 7)))]
    return Captions(
        global_captions=[_compose(claims, rng) for claims in global_claims],
        fine_captions=[_compose(claims, rng) for claims in fine_claims],
        global_claims=global_claims,
        fine_claims=fine_claims,
    )


def has_change(attribute: str, label: str) -> bool:
    """Whether captions have words for a change such as "slow>fast"."""
    return label in _CHANGES.get(attribute, {})


def prompts() -> dict[str, dict[str, list[str]]]:
    """Zero-shot tasks: attribute -> label -> prompt sentences, whose embeddings are averaged.

    The prompts use the words of the captions. But each prompt names a single attribute, and captions name
    several. A task leaves out the clips whose attribute changes or was not measured: these have no label in
    `ATTRIBUTES[attribute]`.
    """
    tasks: dict[str, dict[str, list[str]]] = {"sex": {}}
    for label in ATTRIBUTES["sex"]:
        subjects = [subject[0].upper() + subject[1:] for subject in _SUBJECTS[label]]
        tasks["sex"][label] = [f"{subject} {verb}." for subject in subjects for verb in _VERBS[:2]]
    for attribute, by_label in _PHRASINGS.items():
        tasks[attribute] = {}
        for label, (manners, features) in by_label.items():
            sentences_ = [f"A speaker {_VERBS[i % 2]} {m}." for i, m in enumerate(manners.split("|"))]
            sentences_ += [f"A speaker with {feature}." for feature in features.split("|")]
            tasks[attribute][label] = [s.replace("{pos}", "their") for s in sentences_]
    return tasks
