"""Commands print to terminals and pipes that take only ASCII."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_data import MakeClips, write_rows

from clsp_fast import console, embed, evaluate, score, search
from clsp_fast.data import __main__ as data_command

NAME = "caf\udce9 d\u00e9j\u00e0 \u58f0.wav"


class Ascii(io.TextIOWrapper):
    """A stream as PYTHONIOENCODING=ascii makes it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "ascii", "strict")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def ascii_streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Ascii, Ascii]:
    """Replaces standard output and standard error, which pytest has already replaced."""
    out, err = Ascii(), Ascii()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ascii_streams(monkeypatch)
    console.robust_streams()
    print(NAME)
    assert streams[0].text() == "caf\\udce9 d\\xe9j\\xe0 \\u58f0.wav\n"
    lenient = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
    for stream in (lenient, io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        console.robust_streams()
    assert lenient.errors == "surrogateescape"


@pytest.mark.parametrize(
    ("encoding", "errors", "after"),
    [
        ("ascii", "surrogateescape", "backslashreplace"),
        ("latin-1", "surrogateescape", "backslashreplace"),
        ("utf-8", "strict", "backslashreplace"),
        ("UTF8", "surrogateescape", "surrogateescape"),
        ("ascii", "namereplace", "namereplace"),
        ("ascii", "xmlcharrefreplace", "xmlcharrefreplace"),
        ("ascii", "replace", "replace"),
    ],
)
def test_only_what_would_fail_is_changed(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, after: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    console.robust_streams()
    assert stream.errors == after
    print(NAME)


def test_no_command_fails_because_of_a_name(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clip,) = make_clips(tmp_path / "clips", 1)
    os.link(clip, tmp_path / "clips" / NAME)
    bad = str(tmp_path / "clips" / f"no {NAME}")
    rows = [{"audio": str(path), "captions": ["Une voix calme."], "id": f"\u00e9{i}", "\u00e9": 1}
            for i, path in enumerate((clip, tmp_path / "clips" / NAME, bad))]  # fmt: skip
    manifest = write_rows(tmp_path / "caf\u00e9.jsonl", rows)
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"audio": row["audio"], "caption": "\u00e9"} for row in rows]
    )
    model = ["--model", str(model_folder), "--device", "cpu"]
    out = str(tmp_path / "out \u00e9")
    commands = (
        (data_command.main, ["validate", str(manifest)], 1),
        (data_command.main, ["validate", str(tmp_path / "none \udce9")], None),
        (embed.main, [str(manifest), out, *model], 3),
        (search.main, [out, "--text", "Une voix d\u00e9j\u00e0", "--clip", rows[1]["audio"], *model], 0),
        (search.main, [out, "--text", "Une voix", "--json", "--html", f"{out}/a.html", *model], 0),
        (search.main, [out, "--text", "caf\udce9", *model], None),
        (score.main, [str(pairs), "-", *model], 3),
        (evaluate.main, ["retrieval", str(manifest), "--out", out, "--resamples", "5", *model], 3),
        (embed.main, [str(tmp_path / NAME / "none"), out, *model], None),
    )
    streams = ascii_streams(monkeypatch)
    for main, words, code in commands:
        try:
            main(words)
        except SystemExit as stop:
            assert isinstance(stop.code, str) if code is None else stop.code == code, (words, stop.code)  # noqa: PT017
        else:
            assert code == 0, words
    printed = "".join(stream.text() for stream in streams)
    assert "caf\\udce9 d\\xe9j\\xe0 \\u58f0.wav" in printed
    assert "text: Une voix d\\xe9j\\xe0" in printed
    for line in streams[0].text().splitlines():
        if line.startswith("{"):
            json.loads(line)


def test_find_into_embed_under_an_ascii_locale(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    (clip,) = make_clips(tmp_path / "clips", 1)
    clip.rename(tmp_path / "clips" / NAME)
    words = f"find clips -type f | '{sys.executable}' -m clsp_fast.embed - out --model '{model_folder}'"
    root = str(Path(__file__).parent.parent)
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": root}
    done = subprocess.run(
        words, shell=True, cwd=tmp_path, env=os.environ | ascii_alone, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "out/index.jsonl").read_text("ascii").splitlines()
    assert os.fsencode(json.loads(index[1])["audio"]) == os.fsencode(f"clips/{NAME}")
    # An index made in a UTF-8 locale has letters that ASCII lacks.
    embed.main([str(tmp_path / "clips"), str(tmp_path / "other"), "--model", str(model_folder)])
    words = [sys.executable, "-m", "clsp_fast.search", "other", "--text", "x", "--model", str(model_folder)]
    environment = os.environ | ascii_alone | {"PYTHONIOENCODING": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"clips/caf\\udce9 d\\xe9j\\xe0 \\u58f0.wav" in done.stdout
