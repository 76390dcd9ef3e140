"""The rules of captions, and the cleaning of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsp_fast.captioning import rules
from clsp_fast.captioning.rules import (
    answer_fault,
    clean_answer,
    default_rules,
    read_rules,
)
from clsp_fast.data.caption_text import normalise

FILLER = "A woman speaks calmly and slowly in a warm, low voice; her tone grows brighter towards the end. "


def caption(words: str, length: int = 200) -> str:
    """A caption of `length` characters that holds the words."""
    text = f"{words} {FILLER * 8}"
    return text[:length]


def broken_rule(text: str) -> str | None:
    """The first rule that a caption breaks."""
    return next(iter(default_rules().broken(text)), None)


def test_limits_count_characters_not_bytes() -> None:
    for letter in ("a", "é", "語", "😀"):
        assert broken_rule(letter * 127) == "short"
        assert broken_rule(letter * 128) is None
        assert broken_rule(letter * 768) is None
        assert broken_rule(letter * 769) == "long"


@pytest.mark.parametrize(
    "words",
    [
        "There is no hurry",
        "no. It ends",
        "NOT fast",
        "neither high nor low",
        "nor low",
        "free from strain",
        "free\u00a0from strain",
        "Free  From strain",
        "with no haste",
        "without haste",
        "lacking haste",
        "calm rather than lively",
        "it isn't fast",
        "it isn\u2019t fast",
        "it isn\u02bct fast",
        "DOESN'T rise",
        "can't rise",
        "cannot rise",
        "a no-nonsense tone",
        "\uff4e\uff4f haste",
        "n\u00ado haste",
        "\u202bno\u202c haste",
        "(no)",
    ],
)
def test_a_negation_is_found(words: str) -> None:
    assert broken_rule(caption(words)) == "negation"
    assert broken_rule(caption(words[0].upper() + words[1:])) == "negation"


@pytest.mark.parametrize(
    "words",
    [
        "another notable knot",
        "nothing none never",
        "a north nose",
        "withouten",
        "freedom from strain",
        "her nota bene",
        "slackingly",
        "rather, then, than",
        "the speaker's voice",
        "loudspeakers",
        "the second, speaker",
        "it's the singers' habit",
        "the ant's",
    ],
)
def test_similar_words_are_kept(words: str) -> None:
    assert default_rules().broken(caption(words)) == ()


@pytest.mark.parametrize(
    "words", ["Two speakers", "the SPEAKERS' voices", "The first  speaker", "second speaker,"]
)
def test_several_speakers_are_found(words: str) -> None:
    assert broken_rule(caption(words)) == "speakers"


@pytest.mark.parametrize(
    "words",
    [
        'she says "hello" softly',
        "she says “hello there” softly",
        "she says «hello» softly",
        "she says 'hello there' softly",
        "she says \u2018I don\u2019t know\u2019 softly",
        "„Hallo“ says she",
        "「はい」",
    ],
)
def test_a_quotation_is_found(words: str) -> None:
    assert "quotation" in default_rules().broken(caption(words))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\u2029", "\x85", "\v", "\f"])
def test_a_line_end_is_found_except_at_the_ends(end: str) -> None:
    text = caption("A man speaks.")
    cleaned = clean_answer(f"{end}{text}{end}", "stop")
    assert cleaned == text
    assert broken_rule(text[:50] + end + text[50:]) == "newline"


def test_all_broken_rules_are_named_in_order() -> None:
    text = 'no\nspeakers "x"'
    assert default_rules().broken(text) == ("short", "newline", "negation", "speakers", "quotation")
    assert default_rules().names == ("short", "long", "newline", "negation", "speakers", "quotation")
    assert broken_rule(text) == "short"


@pytest.mark.parametrize("unit", ["'a ", "no ", "(", "\"'", "a'", "😀", "\u202e", "don't "])
def test_a_caption_of_a_megabyte_is_judged_quickly(unit: str) -> None:
    assert broken_rule(unit * (2**20 // len(unit))) == "long"


def test_thoughts_are_removed() -> None:
    assert clean_answer("<think>no\nhurry</think>\n\nA man. ", "stop") == "A man."
    assert clean_answer("<THINK></THINK>A man.", None) == "A man."
    assert clean_answer("hm, a man</think> A man.", "stop") == "A man."
    assert clean_answer("<think>a</think>A<think>c</think>man.", "stop") == "A man."
    assert clean_answer("A man.<think>was that good?", "stop") == "A man."
    assert clean_answer("<think>unfinished", "stop") is None


@pytest.mark.parametrize(
    ("text", "reason", "fault"),
    [
        ("A man.", "stop", None),
        ("A man.", "", None),
        ("A man.", None, None),
        ("A man.", "length", "truncated"),
        ("A man.", "content_filter", "refused"),
        ("", "stop", "empty"),
        (None, "stop", "empty"),
        (" \n ...", "stop", "empty"),
        ("<think>A man.</think>", "stop", "empty"),
    ],
)
def test_faults_of_answers(text: str | None, reason: str | None, fault: str | None) -> None:
    assert answer_fault(text, reason) == fault
    assert (clean_answer(text, reason) is None) == (fault is not None)


def test_global_captions_that_are_short_after_normalisation_are_dropped() -> None:
    text = "a man [laughs] speaks with a British accent"
    cases = [(text, None), ("x" * 31, None), ("x" * 30, "short")]
    cases += [("(Note: a man speaks in a low and calm voice)", "empty")]
    for caption, fault in cases:
        assert default_rules().broken_global(normalise(caption, accent="Indian")) == fault


def test_a_users_rules_replace_the_words_and_limits(tmp_path: Path) -> None:
    values = json.loads(rules.RULES_FILE.read_text("utf-8"))
    values["version"] = "mine"
    values["words"]["background"] = ["room *noise", "hum"]
    values["words"]["negation"].remove("without")
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(values))
    mine = read_rules(file, min_characters=10)
    assert mine.broken("without room  backnoise") == ("background",)
    assert mine.broken("human voices") == ()
    assert (mine.version, mine.min_characters) == ("mine", 10)
    assert mine.digest not in (read_rules(file).digest, default_rules().digest)
    assert default_rules().version == rules.RULES_VERSION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_characters": 0}, "min_characters must be an integer > 0"),
        ({"min_characters": 900}, "<= max_characters"),
        ({"words": {"negation": "no"}}, "words.negation must be a list of words"),
        ({"words": {"negation": [" "]}}, "words.negation must be a list of words"),
        ({"words": {"short": ["no"]}}, "not named 'short'"),
        ({"words": []}, "words must be an object"),
        ({"word": {}}, "nearest is 'words'"),
        ({"version": 1}, "version must be text"),
    ],
)
def test_errors_of_a_users_rules_name_file_and_key(tmp_path: Path, change: object, message: str) -> None:
    values = json.loads(rules.RULES_FILE.read_text("utf-8"))
    assert isinstance(change, dict)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message) as raised:
        read_rules(file)
    assert "mine.json" in str(raised.value)


def test_a_rules_file_that_is_missing_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_rules(tmp_path / "none.json")
    for text in ("{", "[]", "{}", "[" * 10_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            read_rules(tmp_path / "bad.json")


@given(st.text(max_size=300))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    cleaned = clean_answer(text, "stop")
    assert cleaned is None or clean_answer(cleaned, "stop") == cleaned


@given(st.text(max_size=300), st.sampled_from(["no", "without", "rather than", "isn't"]))
def test_a_negation_between_spaces_is_found_in_any_text(text: str, word: str) -> None:
    assert "negation" in default_rules().broken(f"{text} {word} {text}")
