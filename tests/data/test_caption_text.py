"""Normalisation of captions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clsp_fast.data.caption_text import normalise, words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man speaks softly.", "A man speaks softly."),
        ("  a man\u00a0speaks\r\nsoftly ", "A man speaks softly."),
        ("A man (laughs) speaks [softly] .", "A man speaks."),
        ("A man ((very) old) speaks", "A man speaks."),
        ("A man (calm speaks", "A man calm speaks."),
        ("A man speaks) softly", "A man speaks softly."),
        ("(Note: the accent is unclear.) A man speaks.", "A man speaks."),
        ("A man speaks. Note: the accent is unclear.", "A man speaks."),
        ("A man speaks. Please note that this is a guess.", "A man speaks."),
        ("A man speaks (Note: cut off", "A man speaks."),
        ("She sings high notes: clear ones.", "She sings high notes: clear ones."),
        ("Caption: a man speaks", "A man speaks."),
        ("**Caption:** A man speaks", "A man speaks."),
        ("Sure! Here is the caption: 'A man speaks.'", "A man speaks."),
        ('Here\'s a revised caption for the clip:\n\n"A man speaks"', "A man speaks."),
        ("The final caption 2 - a man speaks", "A man speaks."),
        ("Here is a man who speaks", "Here is a man who speaks."),
        ("“A man\u2019s voice”.", "A man's voice."),
        ("'a man's voice'", "A man's voice."),
        ("'Yes' and 'no' in a man's voice", "'Yes' and 'no' in a man's voice."),
        ("# A man\n- speaks *softly* and `slowly`", "A man speaks softly and slowly."),
        ("1. A man speaks", "A man speaks."),
        ("> a __man__ speaks <b>softly</b><br/>", "A man speaks softly."),
        ("A [man](http://x.y/z) speaks", "A man speaks."),
        ("snake_case stays", "Snake_case stays."),
        ("A man speaks , softly ,, and slowly ;.", "A man speaks, softly, and slowly."),
        ("A man speaks...", "A man speaks."),
        ("Does a man speak?!", "Does a man speak?"),
        ("a 2.5 s clip", "A 2.5 s clip."),
        ("He speaks at 10:30", "He speaks at 10:30."),
        ("\u200fرجل يتكلم\u200e", "رجل يتكلم."),
        ("男の人が話す。", "男の人が話す。"),
        ("cafe\u0301 talk", "Café talk."),
        ("(laughs)", ""),
        ("[...] \u200b ***", ""),
        ("Note: nothing", ""),
        ("", ""),
    ],
)
def test_what_is_removed(caption: str, expected: str) -> None:
    assert normalise(caption) == expected


@pytest.mark.parametrize(
    ("caption", "accent", "expected"),
    [
        ("A man with a British accent.", "Indian", "A man with an Indian accent."),
        ("A man with an Indian accent.", "Scottish", "A man with a Scottish accent."),
        ("An american english accent.", "Northern Irish", "A Northern Irish accent."),
        ("A British-accented voice.", "indian", "An Indian-accented voice."),
        ("A strong Irish accent.", "Welsh", "A strong Welsh accent."),
        ("An American accent.", "European", "A European accent."),
        ("A British accent.", "us", "A US accent."),
        ("A British accent.", "south_african", "A South African accent."),
        ("A British accent.", "Indian accent", "An Indian accent."),
        ("Indian and British accents.", "Welsh", "Indian and Welsh accents."),
        ("A British man with an accent.", "Welsh", "A British man with an accent."),
        ("A polish of her tone.", "Welsh", "A polish of her tone."),
        ("A British accent.", None, "A British accent."),
        ("A British accent.", "unknown", "A British accent."),
        ("A British accent.", "accent 3", "A British accent."),
        ("A british accent.", "British", "A British accent."),
        (r"A British accent.", r"\1", "A British accent."),
    ],
)
def test_the_labelled_accent_is_forced(caption: str, accent: str | None, expected: str) -> None:
    assert normalise(caption, accent=accent) == expected


@given(st.text(max_size=200))
@example("((\"'")
@example('*"(*"*)*')
@example("1. 1. 1. a")
def test_normalising_twice_is_normalising_once(caption: str) -> None:
    text = normalise(caption)
    assert normalise(text) == text


PIECES = [
    "(",
    ")",
    "[",
    "]",
    '"',
    "'",
    "*",
    "_",
    "`",
    ".",
    ",",
    ":",
    " ",
    "\n",
    "- ",
    "1. ",
    "Note: ",
    "Caption: ",
]


@given(st.lists(st.sampled_from([*PIECES, "a man", "speaks", "with a British accent"]), max_size=14))
def test_normalising_marks_twice_is_normalising_once(pieces: list[str]) -> None:
    text = normalise("".join(pieces), accent="Indian")
    assert normalise(text, accent="Indian") == text


@given(st.text(max_size=200))
def test_a_result_is_empty_or_a_sentence_in_one_line(caption: str) -> None:
    text = normalise(caption)
    assert not text or (any(c.isalnum() for c in text) and text == " ".join(text.split()))
    assert not set("[]()") & set(text)


UNITS = [
    "'a ",
    "(",
    "(a",
    "(a)",
    "[a](",
    ". ",
    "\n",
    "_a",
    "*",
    "here is a",
    ",;:",
    "<a",
    "british ",
    "a. Note",
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_caption_of_any_length_is_normalised_quickly(unit: str) -> None:
    normalise(unit * (2**18 // len(unit)), accent="Indian")


def test_lists_of_words_are_lower_case_and_sorted() -> None:
    for name in ("accents", "female", "male", "placeholders", "placeholder_words"):
        assert all(word == word.lower().strip() for word in words(name))
