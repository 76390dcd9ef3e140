"""The schema of answers, and the reasons for which answers are refused."""

from __future__ import annotations

import json

import pytest

from clsp_fast.captioning import json_answers
from clsp_fast.captioning.json_answers import BadAnswer


def test_a_schema_requires_every_key_in_the_given_order_and_no_other() -> None:
    schema = json_answers.object_schema({"b": {"type": "boolean"}, "a": {"type": "integer"}})
    assert schema["required"] == list(schema["properties"]) == ["b", "a"]
    assert schema["additionalProperties"] is False
    form = json_answers.response_format("verdict", schema)
    assert form["type"] == "json_schema"
    assert form["json_schema"] == {"name": "verdict", "strict": True, "schema": schema}


def test_captions_of_a_prompt_have_the_names_that_the_answer_uses() -> None:
    text = json_answers.captions_as_text(["A low voice.", "A high voice."])
    assert text == "caption_1:\nA low voice.\n\ncaption_2:\nA high voice."
    assert json_answers.caption_keys(2) == ["caption_1", "caption_2"]


@pytest.mark.parametrize(
    "text", ['{"a": 1}', ' \n{"a": 1}\n', '```json\n{"a": 1}\n```', '```\n{\n "a": 1}\n```\n']
)
def test_an_object_is_read_plain_or_from_a_code_block(text: str) -> None:
    assert json_answers.parse_object(text) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n", "not a JSON object"),
        ("I cannot help with that.", "not a JSON object"),
        ("[true]", "not a JSON object"),
        ('{"a": 1', "not a JSON object"),
        ('Here it is: {"a": 1}', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "not a JSON object"),
    ],
)
def test_other_answers_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(BadAnswer, match=rf"^{reason}$"):
        json_answers.parse_object(text)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BadAnswer, match=r"^key missing$"):
        json_answers.member({"a": True}, "b", json_answers.as_flag)


@pytest.mark.parametrize("value", [0, 1, "true", None, [], 1.0])
def test_a_flag_is_true_or_false_and_nothing_else(value: object) -> None:
    assert json_answers.as_flag(True) is True
    with pytest.raises(BadAnswer, match=r"^wrong type$"):
        json_answers.as_flag(value)


def test_an_integer_is_a_whole_number_in_the_range() -> None:
    allowed = range(1, 6)
    assert [json_answers.as_integer(value, allowed) for value in (1, 2, 3, 4, 5, 4.0)] == [1, 2, 3, 4, 5, 4]
    for value in (0, 6, -1, 4.5, 10**400, json.loads("NaN"), json.loads("Infinity")):
        with pytest.raises(BadAnswer, match=r"^out of range$"):
            json_answers.as_integer(value, allowed)
    for value in ("4", True, None, [4]):
        with pytest.raises(BadAnswer, match=r"^wrong type$"):
            json_answers.as_integer(value, allowed)


def test_an_entry_must_be_an_object() -> None:
    assert json_answers.as_object({"a": 1}) == {"a": 1}
    with pytest.raises(BadAnswer, match=r"^wrong type$"):
        json_answers.as_object([1])
