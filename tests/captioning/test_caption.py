"""The command `caption`: help, wrong options, and files that cannot be read or written."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from sample_data import write_rows

from clsp_fast import caption
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.verify import VerifyConfig


def run(*words: str | Path) -> int | str | None:
    """The exit code of the command, or its last words."""
    with pytest.raises(SystemExit) as ended:
        caption.main([str(word) for word in words])
    return ended.value.code


@pytest.mark.parametrize(
    ("name", "positional"),
    [
        ("offline", "SOURCE OUT"),
        ("tags", "MANIFEST OUT"),
        ("generate", "MANIFEST WORK"),
        ("verify", "WORK"),
        ("filter", "WORK"),
        ("judge", "MANIFEST WORK"),
        ("report", "WORK"),
    ],
)
def test_help_names_the_positional_arguments(
    name: str, positional: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--help") == 0
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert re.search(rf"caption {name} (\[[^\]]*\] )+{positional}($| \[)", usage)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("offline a b.jsonl --num-threads 0", "--num-threads must be an integer > 0, got 0"),
        ("offline a b.jsonl --longest-s nan", "--longest-s must be in (0.5, 3600], got nan"),
        ("offline a b.json", "OUT must be a file whose name ends in .jsonl, got 'b.json'"),
        ("tags a a.jsonl --seed -1", "--seed must be in [0, 2^63), got -1"),
        ("generate a b", "--server.model must be the name of a model, got ''"),
        ("verify b", "--server.model must be the name of a model, got ''"),
        ("judge a b --server.model m --server.concurrency 0", "--server.concurrency must be an integer > 0"),
        ("generate a b --server.model m --sampling.top-p 2", "--sampling.top-p must be in (0, 1], got 2.0"),
        ("generate a b --server.model m --decode-threads 0", "--decode-threads must be an integer > 0"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_typed(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words.split()) == 2
    assert capsys.readouterr().err.startswith(f"clsp_fast.caption: {message}")


def test_the_parsed_values_arrive_in_the_original_classes() -> None:
    unchecked = caption._unchecked(VerifyConfig)
    server = type(unchecked(work=Path("w")).server)
    parsed = unchecked(work=Path("w"), server=server(model="m", retries=3), seed=5)
    config = caption._checked(VerifyConfig, parsed)
    assert type(config) is VerifyConfig
    assert type(config.server) is ServerConfig
    assert config == VerifyConfig(work=Path("w"), server=ServerConfig(model="m", retries=3), seed=5)


def test_a_file_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "tags": {"pitch": "low"}}])
    file = tmp_path / "file"
    file.touch()
    for name in ("tags", "offline"):
        text = str(run(name, source, file / "out.jsonl"))
        assert text.startswith(f"clsp_fast.caption: {file}: ")
        assert text.endswith("; give another path")
    answers = tmp_path / "none.jsonl"
    words = ("generate", source, tmp_path / "w", "--server.model", "m", "--answers", answers)
    assert run(*words) == f"clsp_fast.caption: {answers}: No such file or directory; check the path"
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out.jsonl")
    expected = "out.jsonl: Permission denied; change its permissions, or give another path"
    assert caption._describe_os_error(denied) == expected
    assert caption._describe_os_error(FileNotFoundError("x does not exist")) == "x does not exist"
