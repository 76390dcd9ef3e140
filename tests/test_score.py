"""Scores of pairs: right values, in order, resumable, sharded; errors stay in their lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_as_exact, in_float64
from sample_data import MakeClips, write_rows

from clsp_fast import score as command
from clsp_fast.model import CLSP
from clsp_fast.score import ScoreConfig, score
from clsp_fast.storage import embedding_folder

CAPTIONS = ("A calm voice.", "She whispers, fast.")


def run(pairs: Any, scores: Any, model: Path, **options: Any) -> command.ScoreResult:
    return score(ScoreConfig(pairs=str(pairs), scores=str(scores), model=str(model), device="cpu", **options))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path: Path, make_clips: MakeClips) -> Path:
    """Lines with descriptions, with other recordings, and with everything that can be wrong."""
    make_clips(tmp_path / "clips", 3)
    (tmp_path / "clips/text.wav").write_text("no audio")
    lines = [
        json.dumps({"id": "a", "audio": "clips/00000.wav", "caption": CAPTIONS[0]}),
        json.dumps({"audio": "clips/00000.wav", "caption": CAPTIONS[1], "mine": [1]}),
        json.dumps({"audio": "clips/00001.wav", "other": "clips/00000.wav"}),
        json.dumps({"audio": "clips/missing.wav", "caption": CAPTIONS[0]}),
        json.dumps({"audio": "clips/00002.wav", "other": "clips/text.wav"}),
        json.dumps({"audio": "clips/00002.wav"}),
        json.dumps({"audio": "clips/00002.wav", "caption": "a", "other": "b"}),
        json.dumps({"audio": 3, "caption": "a"}),
        json.dumps({"audio": "clips/00002.wav", "caption": "  "}),
        json.dumps({"audio": "clips/00002.wav", "caption": "half \ud800"}),
        "not JSON",
        "[" * 100_000,
        '{"audio": "' + "x" * embedding_folder.LONGEST_LINE + '"}',
        "",
        json.dumps({"audio": str(tmp_path / "clips/00002.wav"), "other": "clips/00002.wav"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


ERRORS = {
    4: "missing.wav",
    5: "text.wav",
    6: 'either "caption" or "other"',
    7: 'either "caption" or "other"',
    8: '"audio" must be a non-empty text',
    9: '"caption" must be a non-empty text',
    10: '"caption" must be',
    11: "Expecting value",
    12: "nested too deeply",
    13: "a line must be shorter than 1048576 bytes",
}


def cosines(model: CLSP, pairs: Path) -> dict[int, torch.Tensor]:
    """The cosine of each line that has no error."""
    audio = model.encode_audio([pairs.parent / f"clips/0000{i}.wav" for i in range(3)])
    text = model.encode_text(CAPTIONS)
    return {1: audio[0] @ text[0], 2: audio[0] @ text[1], 3: audio[1] @ audio[0], 15: audio[0] @ audio[0]}


def assert_scores(scored: dict[int, float], plain: dict[int, Any], truth: dict[int, Any]) -> None:
    """Asserts that scores are as exact as plain ones; each is the dot product of two unit embeddings."""
    assert scored.keys() == plain.keys() == truth.keys()
    vectors = [[float(scores[line]) for line in truth] for scores in (scored, plain, truth)]
    assert_as_exact(*vectors, size=2 * np.ones(len(truth)))


def test_scores_are_the_cosines_and_errors_stay_in_their_lines(
    pairs: Path, tmp_path: Path, model_folder: Path
) -> None:
    result = run(pairs, tmp_path / "out/scores.jsonl", model_folder, rows_at_once=4)
    assert result == (14, len(ERRORS), 0)
    rows = read(tmp_path / "out/scores.jsonl")
    assert [row["line"] for row in rows] == [*range(1, 14), 15]
    for row in rows:
        if row["line"] in ERRORS:
            assert ERRORS[row["line"]] in row["error"]
            assert "score" not in row
    assert rows[0]["id"] == "a"
    assert rows[1]["mine"] == [1]
    model = CLSP.from_pretrained(model_folder)
    expected, truth = (cosines(m, pairs) for m in (model, in_float64(model)))
    cosine = {row["line"]: row["score"] for row in rows if "score" in row}
    assert_scores(cosine, expected, truth)


def test_keys_that_would_be_overwritten_are_errors_of_their_lines(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    (clip,) = make_clips(tmp_path / "clips", 1)
    row = {"audio": str(clip), "caption": CAPTIONS[0]}
    rows = [row | {key: "mine"} for key in ("model", "line", "score", "error")] + [row]
    write_rows(tmp_path / "pairs.jsonl", rows)
    for before in (0, 5):
        result = run(tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl", model_folder)
        assert result == (5 - before, 4, before)
    *bad, good = read(tmp_path / "scores.jsonl")
    assert "score" in good
    for key, line in zip(("model", "line", "score", "error"), bad, strict=True):
        assert f"which the output has, got ['{key}']" in line["error"]


def test_an_unfinished_file_is_continued(pairs: Path, tmp_path: Path, model_folder: Path) -> None:
    run(pairs, tmp_path / "whole.jsonl", model_folder, rows_at_once=4)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (b"".join(lines[:4]), b"".join(lines[:8]) + lines[8][:10], whole):
        (tmp_path / "cut.jsonl").write_bytes(cut)
        result = run(pairs, tmp_path / "cut.jsonl", model_folder, rows_at_once=4)
        assert result.before == cut.count(b"\n")
        assert result.rows + result.before == 14
        assert result.failed == len(ERRORS)
        assert (tmp_path / "cut.jsonl").read_bytes() == whole


def test_scores_of_other_pairs_or_models_are_not_continued(
    pairs: Path, tmp_path: Path, model_folder: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    run(pairs, out, model_folder)
    before = out.read_bytes()
    for precision in ("tf32", "bf16"):
        with pytest.raises(ValueError, match=r"model \w{16}, not \w{16}; .* --precision, or"):
            run(pairs, out, model_folder, precision=precision)
    with pytest.raises(ValueError, match="line 2, does not belong to these pairs"):
        run(pairs, out, model_folder, shard="1/2")
    pairs.write_text(pairs.read_text().replace('"mine": [1]', '"mine": [2]'))
    with pytest.raises(ValueError, match="line 2, does not belong to these pairs"):
        run(pairs, out, model_folder)
    pairs.write_text("")
    with pytest.raises(ValueError, match="line 1, does not belong to these pairs"):
        run(pairs, out, model_folder)
    assert out.read_bytes() == before
    out.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        run(pairs, out, model_folder)


def test_shards_have_every_line_once(pairs: Path, tmp_path: Path, model_folder: Path) -> None:
    run(pairs, tmp_path / "whole.jsonl", model_folder)
    parts = []
    for i in (1, 2, 3):
        run(pairs, tmp_path / f"{i}.jsonl", model_folder, shard=f"{i}/3")
        parts += read(tmp_path / f"{i}.jsonl")
    parts.sort(key=lambda row: row["line"])
    truth = cosines(in_float64(CLSP.from_pretrained(model_folder)), pairs)
    whole = read(tmp_path / "whole.jsonl")
    assert_scores(
        *({row["line"]: row["score"] for row in rows if "score" in row} for rows in (parts, whole)), truth
    )
    for rows in (parts, whole):
        for row in rows:
            row.pop("score", None)
    assert parts == whole


def test_standard_streams(
    tmp_path: Path,
    model_folder: Path,
    make_clips: MakeClips,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    make_clips(tmp_path / "clips", 1)
    monkeypatch.chdir(tmp_path)
    row = {"audio": "clips/00000.wav", "caption": CAPTIONS[0]}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(row).encode())))
    with pytest.raises(SystemExit) as stop:
        command.main(["-", "-", "--model", str(model_folder), "--device", "cpu"])
    assert stop.value.code == 0
    printed = capfdbinary.readouterr()
    (row,) = [json.loads(line) for line in printed.out.splitlines()]
    assert -1 <= row["score"] <= 1
    assert b"1 lines, 0 failed" in printed.err


def test_a_closed_pipe_ends_the_command_quietly(pairs: Path, model_folder: Path) -> None:
    words = [sys.executable, "-m", "clsp_fast.score", str(pairs), "-", "--model", str(model_folder)]
    process = subprocess.Popen([*words, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    try:
        printed = process.stderr.read().decode()
        assert process.wait() == 1
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/2"}, r'shard must be "i/n", 1 <= i <= n, got \'0/2\''),
        ({"shard": "3/2"}, "shard must be"),
        ({"shard": "1"}, "shard must be"),
        ({"rows_at_once": 0}, "rows_at_once must be at least 1"),
        ({"precision": "fp8"}, "precision must be"),
        ({"long_audio": "cut"}, "long_audio must be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig(pairs="a", scores="b", **options)


def test_the_command_reports_failures(pairs: Path, tmp_path: Path, model_folder: Path) -> None:
    words = [str(pairs), str(tmp_path / "scores.jsonl"), "--model", str(model_folder), "--device", "cpu"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            command.main(words)
        assert stop.value.code == 3
    for bad, message in (
        (["none.jsonl", *words[1:]], "none.jsonl"),
        ([*words, "--model", "none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(bad)
        assert message in str(stop.value.code)
