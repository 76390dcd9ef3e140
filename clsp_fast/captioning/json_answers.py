"""Answers that must be JSON: the schema that a request asks for, and the check of the answer.

A server that honours `response_format` answers in this form only. Other servers answer in any form, so every
answer is checked, and a bad one is named by its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)


class BadAnswer(ValueError):
    """An answer that does not have the requested form. The message is a reason that can be counted."""


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of these properties and no others, in this order."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def response_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The value of `response_format` in a chat request whose answer must follow the schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": dict(schema)}}


def captions_as_text(captions: Sequence[str]) -> str:
    """Captions under the names that `caption_keys` gives them, for a prompt."""
    names = caption_keys(len(captions))
    return "\n\n".join(f"{name}:\n{caption}" for name, caption in zip(names, captions, strict=True))


def caption_keys(count: int) -> list[str]:
    """Names of the captions in a prompt and in its answer: "caption_1", "caption_2", ..."""
    return [f"caption_{i + 1}" for i in range(count)]


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that is the whole answer, or the whole content of a Markdown code block.

    Raises:
        BadAnswer: "not a JSON object".
    """
    text = text.strip()
    fence = _FENCE.match(text)
    try:
        value = json.loads(fence[1] if fence else text)
    except (ValueError, RecursionError):
        raise BadAnswer("not a JSON object") from None
    if not isinstance(value, dict):
        raise BadAnswer("not a JSON object")
    return value


def member(values: Mapping[str, Any], key: str, check: Callable[[object], Value]) -> Value:
    """The value of a key after `check`, which raises BadAnswer for a wrong one.

    Raises:
        BadAnswer: "key missing", or what `check` raises.
    """
    if key not in values:
        raise BadAnswer("key missing")
    return check(values[key])


def as_object(value: object) -> dict[str, Any]:
    """The value, if it is a JSON object; otherwise BadAnswer."""
    if not isinstance(value, dict):
        raise BadAnswer("wrong type")
    return value


def as_flag(value: object) -> bool:
    """The value, if it is true or false; otherwise BadAnswer."""
    if not isinstance(value, bool):
        raise BadAnswer("wrong type")
    return value


def as_integer(value: object, allowed: range) -> int:
    """The value, if it is a whole number in this range; otherwise BadAnswer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswer("wrong type")
    if value not in allowed:
        raise BadAnswer("out of range")
    return int(value)
