"""The rules that a caption must keep, and the cleaning of a language model's answer.

A rule has a name, under which `filter` counts the captions that it drops. The words and limits are in
rules.json, which a user can copy and edit (`--rules FILE`). The rules see words, not their sense: "a voice
devoid of warmth" is left to the verifier.

What counts as a negation: the listed words, in any case, between word borders. "another", "notable" and
"nothing" are other words. A contraction with "n't" (isn't, doesn't, can't) is the word "not" and counts, with
every kind of apostrophe; so does "cannot". A hyphen is a word border: "no-nonsense" counts, because a lost
candidate costs less than a statement of absence that is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsp_fast.checks import is_positive, reject_unknown_keys, require
from clsp_fast.data.caption_text import straight_apostrophes
from clsp_fast.storage import textfile

RULES_FILE = Path(__file__).with_name("rules.json")
RULES_VERSION = "1"
"""The version of rules.json. It is written to the provenance of each caption."""
TRUNCATED, EMPTY, REFUSED = "truncated", "empty", "refused"
"""Names of the faults of an answer: cut off at the token limit, without a caption, withheld by the server."""
_SHORT, _LONG, _NEWLINE, _QUOTATION = "short", "long", "newline", "quotation"
_RESERVED = {_SHORT, _LONG, _NEWLINE, _QUOTATION, TRUNCATED, EMPTY, REFUSED}
_LINE_ENDS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
# An opening mark follows no letter and a closing mark precedes none, so "don't" and "singers'" open nothing.
_SINGLE_QUOTES = re.compile(r"(?<![\w'])'(?=\w)(?:[^'\n]|(?<=\w)'(?=\w))+(?<=[\w.,!?…])'(?![\w'])")
_THOUGHT = re.compile(r"<(think|thinking|thought)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought)>", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<(?:think|thinking|thought)>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a caption must keep; the fields are the keys of rules.json."""

    version: str = RULES_VERSION
    """Any text. It is written to the provenance of each caption."""
    min_characters: int = 128
    """Fewest characters (code points) of a fine-grained caption."""
    max_characters: int = 768
    """Most characters of a fine-grained caption."""
    min_global_characters: int = 32
    """Fewest characters of a global caption, after normalisation."""
    max_global_captions: int = 2
    """Most global captions of a clip; the first ones are kept."""
    words: Mapping[str, tuple[str, ...]]
    """Name of a rule -> words and phrases that a caption must not contain. "*" stands for any letters."""
    quotation_marks: str
    """Characters that a caption must not contain. Unless empty, words in single quotes count, too."""

    def __post_init__(self) -> None:
        require(isinstance(self.version, str) and bool(self.version), "version", "text", self.version)
        for name in ("min_characters", "max_characters", "min_global_characters", "max_global_captions"):
            require(is_positive(getattr(self, name)), name, "an integer > 0", getattr(self, name))
        limits = (self.min_characters, self.max_characters)
        require(limits[0] <= limits[1], "min_characters", "<= max_characters", limits)
        require(isinstance(self.quotation_marks, str), "quotation_marks", "text", self.quotation_marks)
        require(isinstance(self.words, Mapping), "words", "an object of lists of words", self.words)
        for rule, words in self.words.items():
            require(bool(rule) and rule not in _RESERVED, "words", f"rules not named {rule!r}", rule)
            ok = isinstance(words, tuple) and all(isinstance(w, str) and w.strip(" *") for w in words)
            require(ok, f"words.{rule}", "a list of words", words)

    @functools.cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any word or limit."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @functools.cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {rule: _pattern(words) for rule, words in self.words.items() if words}

    @functools.cached_property
    def _marks(self) -> re.Pattern[str] | None:
        return re.compile(f"[{re.escape(self.quotation_marks)}]") if self.quotation_marks else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rules, in the order in which they are checked."""
        return (_SHORT, _LONG, _NEWLINE, *self.words, _QUOTATION)

    def broken(self, caption: str) -> tuple[str, ...]:
        """The names of all rules that a fine-grained caption breaks, in the order of `names`."""
        length = len(caption)
        text = _folded(caption)
        names = [_SHORT] if length < self.min_characters else [_LONG] if length > self.max_characters else []
        if _LINE_ENDS.search(caption):
            names.append(_NEWLINE)
        names += [rule for rule, pattern in self._patterns.items() if pattern.search(text)]
        if self._marks and (self._marks.search(caption) or ("'" in text and _SINGLE_QUOTES.search(text))):
            names.append(_QUOTATION)
        return tuple(names)

    def broken_global(self, caption: str) -> str | None:
        """EMPTY or "short" if a normalised global caption must be dropped."""
        if not caption:
            return EMPTY
        return _SHORT if len(caption) < self.min_global_characters else None


def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of any of the words between word borders. A space matches any white space."""
    alternatives = []
    for word in words:
        parts = re.split(r"(\*|\s+)", _folded(word.strip()))
        alternatives.append(
            "".join(r"\w*" if p == "*" else r"\s+" if p.isspace() else re.escape(p) for p in parts if p)
        )
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})(?!\w)")


def _folded(text: str) -> str:
    """The text for comparisons: one form for each letter and apostrophe, no case, no invisible characters."""
    text = straight_apostrophes(text)
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


@functools.cache
def default_rules() -> Rules:
    """The rules of rules.json."""
    return read_rules(None)


def read_rules(
    path: Path | None, *, min_characters: int | None = None, max_characters: int | None = None
) -> Rules:
    """Reads rules from a JSON file in the form of rules.json; None: rules.json itself.

    Args:
        path: the file.
        min_characters: replaces the file's limit; None: as in the file.
        max_characters: as `min_characters`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such JSON object; the message names the file and the key.
    """
    name = path or RULES_FILE
    text = textfile.read_text(name, "a JSON file of caption rules")
    try:
        values: Any = json.loads(text)
        require(isinstance(values, dict), "the file", "one JSON object", values)
        reject_unknown_keys(Rules, values)
        for key in ("words", "quotation_marks"):
            require(key in values, f'"{key}"', "in the file (copy captioning/rules.json and edit it)", None)
        if isinstance(values["words"], dict):
            values["words"] = {
                rule: tuple(words) if isinstance(words, list) else words
                for rule, words in values["words"].items()
            }
        limits = {"min_characters": min_characters, "max_characters": max_characters}
        return Rules(**values | {key: limit for key, limit in limits.items() if limit is not None})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from error


def clean_answer(text: str | None, finish_reason: str | None) -> str | None:
    """The caption in one answer of a language model; None if `answer_fault` names a fault.

    The thoughts between <think> and </think> are removed. Some servers send only the end of a thought, as
    its beginning is in their prompt. Then everything up to the last </think> is removed. White space at both
    ends is removed, and nothing else.

    Args:
        text: the answer; None: the server sent none.
        finish_reason: why the model stopped, as the server says: "stop", "length", "content_filter" or None.
    """
    return None if answer_fault(text, finish_reason) else _without_thoughts(text or "")


def answer_fault(text: str | None, finish_reason: str | None) -> str | None:
    """TRUNCATED, REFUSED or EMPTY if an answer holds no usable caption; otherwise None."""
    if finish_reason == "length":
        return TRUNCATED
    if finish_reason == "content_filter":
        return REFUSED
    caption = _without_thoughts(text or "")
    return None if any(character.isalnum() for character in caption) else EMPTY


def _without_thoughts(text: str) -> str:
    if "<" not in text:
        return text.strip()
    text = _THOUGHT.sub(" ", text)
    ends = list(_THOUGHT_END.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    start = _THOUGHT_START.search(text)
    return (text[: start.start()] if start else text).strip()
