"""The text of captions: normalisation, and the words by which an audit judges them.

The words are in caption_words.json.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from pathlib import Path

from clsp_fast.data.tag_values import stated

_WORDS_FILE = Path(__file__).with_name("caption_words.json")
_APOSTROPHES = str.maketrans(
    dict.fromkeys("\u2019\u2018\u201b\u02bc\u02bb\u2032\u00b4\u0060\uff07\ua78c", "'")
)
_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»\uff02〝〞", '"'))
_ROUNDS = 8
"""Limit on the repetitions of `_round`, for a caption that is wrapped in many layers."""
_CLOSING = {")": "(", "]": "[", "】": "【", "\uff09": "\uff08"}
_OPENING = {*_CLOSING.values()}
# Direction marks, soft hyphens, zero-width spaces and controls; not the joiners that other scripts need.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\u00ad\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u2069\\ufeff]"
)
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
_MARKUP = re.compile(r"</?[a-z][a-z0-9]*\s*/?>", re.IGNORECASE)
_EMPHASIS = re.compile(r"\*+|~~+|(?<!\w)_+|_+(?!\w)")
_CODE = re.compile(r"(?<!\w)`+|`+(?!\w)")
_LINE_START = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+|>+[ \t]*|[-+•‣▪\u2013—][ \t]+|\d{1,2}[.)][ \t]+)", re.MULTILINE
)
_NOTE = re.compile(
    r"(?:^|(?<=[.!?;\n])\s?|[(\[]\s?)"
    r"(?:(?:notes?|n\.b\.|nb|disclaimer|explanation|remark) ?:|please note\b).*",
    re.IGNORECASE | re.DOTALL,
)
_LABELS = "(?:captions?|descriptions?|outputs?|answers?|responses?|summary|prompt|text)"
_KINDS = "final|global|short|long|fine-?grained|revised|rewritten|style|audio|speech|voice|normali[sz]ed"
_LABEL = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok)[ ,.!:]+)?"
    rf"(?:here(?:'s| is| are)[^:.]{{0,60}}\b{_LABELS}\b[^:.]{{0,60}}:"
    rf"|(?:the |an? |my )?(?:(?:{_KINDS})\s)*{_LABELS}(?: ?#?\d+)?\s*(?:[:=]|[-\u2013—]\s))\s*",
    re.IGNORECASE,
)
_QUOTED = (
    re.compile(r"\"([^\"]*)\"[,;]?([.!?]?)"),
    re.compile(r"'((?:[^']|(?<=\w)'(?=\w))*)'[,;]?([.!?]?)"),
)
_MARKS = re.compile(" ?[.,;:!?](?: ?[.,;:!?])*")
_MODIFIERS = r"(?:(?:standard|general|neutral)\s)?"


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """A list of caption_words.json."""
    return tuple(json.loads(_WORDS_FILE.read_text("utf-8"))[name])


def straight_apostrophes(text: str) -> str:
    """The text with ' in place of every other apostrophe or single quote."""
    return text.translate(_APOSTROPHES)


def normalise(caption: str, *, accent: str | None = None) -> str:
    """Normalises a global caption.

    Removes: brackets with their content, notes ("Note: ..."), labels ("Caption:", "Here is the caption:"),
    quotes around the whole caption, markdown and HTML tags, invisible characters, superfluous white space and
    punctuation. The caption then begins with a capital letter and ends with a full stop. Normalising twice
    gives the same as normalising once.

    Args:
        caption: any text.
        accent: the labelled accent, such as "Indian". It replaces another accent that the caption names
            ("a British accent", "British-accented"). None, or a label such as "unknown": the caption's accent
            stays.

    Returns:
        The caption; empty if no letter or digit is left.
    """
    text = unicodedata.normalize("NFC", caption)
    for _ in range(_ROUNDS):
        before, text = text, _sentence(_round(text), accent)
        if text == before:
            break
    return text


def _sentence(text: str, accent: str | None) -> str:
    """The text as a sentence with the labelled accent; empty if no letter or digit is left."""
    if not any(character.isalnum() for character in text):
        return ""
    text = _with_accent(text, accent)
    text = text[0].upper() + text[1:] if len(text[0].upper()) == 1 else text
    return text if text[-1] in ".!?…。\uff01\uff1f" else text.rstrip(" ,;:-\u2013—") + "."


def _round(text: str) -> str:
    """Removes one layer of everything that `normalise` removes."""
    text = _INVISIBLE.sub("", straight_apostrophes(_CODE.sub("", text)).translate(_QUOTES))
    text = re.sub(r"[^\S\n]*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text.strip()))
    text = _LINE_START.sub("", text)
    text = _EMPHASIS.sub("", _MARKUP.sub(" ", _LINK.sub(r"\1", text)))
    text = " ".join(_NOTE.sub(" ", _without_brackets(text)).split())
    label = _LABEL.match(text)
    text = text[label.end() :] if label else text
    for pattern in _QUOTED:
        if quoted := pattern.fullmatch(text):
            text = quoted[1] + quoted[2]
    text = _MARKS.sub(lambda match: _one_mark(match[0]), text)
    return text.strip().lstrip(",.;:!? ")


def _one_mark(marks: str) -> str:
    """The mark that stands for several: "?" or "!", then ".", then the first one."""
    return next((mark for mark in marks if mark in "?!"), "." if "." in marks else marks.strip()[0])


def _without_brackets(text: str) -> str:
    """Removes brackets with their content. If a bracket has no partner, only the bracket itself is removed,
    unless it begins a note."""
    if not (_OPENING & {*text} or _CLOSING.keys() & {*text}):
        return text
    kept: list[str] = []
    opened: list[int] = []
    for character in text:
        if character in _OPENING:
            opened.append(len(kept))
            kept.append(character)
        elif character not in _CLOSING:
            kept.append(character)
        elif opened:
            del kept[opened.pop() :]
            kept.append(" ")
    kept_text = _NOTE.sub(" ", "".join(kept))
    return "".join(" " if character in _OPENING else character for character in kept_text)


def _with_accent(text: str, accent: str | None) -> str:
    """The text with the labelled accent in place of each accent that it names."""
    label = " ".join((accent or "").replace("_", " ").split())
    if not stated(label) or not re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[' .-]){0,39}", label):
        return text
    label = re.sub(r"\s+accent(?:ed)?$", "", label, flags=re.IGNORECASE)
    if label.islower():
        label = label.upper() if label in ("uk", "us") else label.title()
    return _accent_pattern().sub(lambda match: _replaced_accent(match, label), text)


def _replaced_accent(match: re.Match[str], label: str) -> str:
    article = match["article"] or ""
    if article and not match["between"]:
        wanted = "an" if _begins_with_vowel(label) else "a"
        article = (wanted.capitalize() if article[0].isupper() else wanted) + " "
    return f"{article}{match['between']}{label}{match['end']}"


@functools.cache
def _accent_pattern() -> re.Pattern[str]:
    known = "|".join(
        r"\s+".join(map(re.escape, word.split())) for word in sorted(words("accents"), key=len, reverse=True)
    )
    accents = rf"(?:{known})(?:[\s/-]+(?:{known})){{0,3}}"
    return re.compile(
        rf"(?:\b(?P<article>an?)\s+)?(?P<between>{_MODIFIERS})\b(?:{accents})(?P<end>[\s-]+accent(?:s|ed)?)\b",
        re.IGNORECASE,
    )


def _begins_with_vowel(word: str) -> bool:
    """Whether "an" precedes the word: by its first sound, so that it is "a European" and "a Ugandan"."""
    return bool(re.match(r"[aio]|e(?!u)|u(?!ga|k\b|kr|ni|ru|s\b)", word, re.IGNORECASE))
