"""Prompts: placeholders, lines without values, messages, and files of users."""

from __future__ import annotations

from pathlib import Path

import pytest

from clsp_fast.captioning.prompt import Prompt, read_prompt


def test_placeholders_take_values_and_lines_without_a_value_are_left_out() -> None:
    prompt = Prompt("p", "Known: {tags}.\nBoth: {tags} and {text}\nJSON: {not_known} {} {X}\n\n{text}\n")
    filled = "Both:  and hello\nJSON: {not_known} {} {X}\n\nhello"
    assert prompt.messages({"tags": "", "text": "hello"}) == [("user", filled)]
    assert prompt.messages({"tags": "{text}", "text": "x"})[0][1].startswith(
        "Known: {text}.\nBoth: {text} and x"
    )


def test_headings_begin_messages() -> None:
    prompt = Prompt("p", "[system]\nBe brief.\n\n[user]\nSay [user] {text}\n[user]\n{text}")
    assert prompt.messages({"text": ""}) == [("system", "Be brief.")]
    assert prompt.messages({"text": "a"}) == [
        ("system", "Be brief."),
        ("user", "Say [user] a"),
        ("user", "a"),
    ]
    assert Prompt("p", "{tags}").messages({"tags": ""}) == []


def test_the_prompt_of_the_package_and_its_digest() -> None:
    prompt = read_prompt("generate", None, {"tags"})
    with_tags, without = (prompt.messages({"tags": tags})[0][1] for tags in ("accent: Scottish", ""))
    assert "correct. Work it into the description: accent: Scottish." in with_tags
    assert "{" not in with_tags + without
    assert len(with_tags.splitlines()) == len(without.splitlines()) + 1
    assert len(prompt.digest) == 16
    assert prompt.digest != Prompt(prompt.name, prompt.text + " ").digest


def test_files_of_users_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    for data, match in (
        (b" \n", "is empty; expected a prompt"),
        (b"caf\xe9", "is not UTF-8"),
        (b"Judge this.", r"lacks \{caption\}, \{text\}; see .*prompts.*generate\.txt"),
        (b"\x1f\x8b\x00", "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            read_prompt("generate", path, {"text", "caption"})
    path.write_bytes("\ufeffSay {text}\r\n{caption}\r\n".encode())
    assert read_prompt("generate", path, {"text", "caption"}).text == "Say {text}\n{caption}\n"
    with pytest.raises(FileNotFoundError, match="expected a prompt"):
        read_prompt("generate", tmp_path / "none", set())
