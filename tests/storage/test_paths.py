"""Paths that cannot be read cost only themselves, in every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from forbidden_paths import refuse_forbidden_paths
from sample_data import MakeClips, write_rows

from clsp_fast import data, embed, evaluate, score
from clsp_fast.config import DataConfig
from clsp_fast.data import __main__ as data_command
from clsp_fast.data.manifest import read_manifest
from clsp_fast.model import CLSP
from clsp_fast.storage import paths
from clsp_fast.storage.embedding_folder import Embeddings
from clsp_fast.tokenizer import Tokenizer

BAD_PATHS = {
    "a name of 304 characters": "x" * 300 + ".wav",
    "a path of 8,000 characters": "deep/" * 1600 + "a.wav",
    "missing": "missing.wav",
    "in a file": "00000.wav/a.wav",
    "a broken link": "broken.wav",
    "a loop of links": "loop.wav",
    "two links in a loop": "one.wav",
    "beneath a loop": "loop.wav/a.wav",
    "a folder": "folder.wav",
    "a named pipe": "pipe.wav",
    "NUL": "a\0b.wav",
    "not UTF-8": "caf\udce9.wav",
    "forbidden": "forbidden/a.wav",
}


@pytest.fixture
def clips(tmp_path: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two good recordings and everything that can be wrong with a path."""
    folder = tmp_path / "clips"
    make_clips(folder, 2)
    (folder / "broken.wav").symlink_to("nowhere.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "one.wav").symlink_to("two.wav")
    (folder / "two.wav").symlink_to("one.wav")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    refuse_forbidden_paths(monkeypatch)
    return folder


def test_bad_paths_are_no_files_and_have_a_named_problem(clips: Path) -> None:
    for why, name in BAD_PATHS.items():
        path = clips / name
        assert not paths.is_file(path), why
        assert paths.is_dir(path) == (why == "a folder")
        assert paths.exists(path) == (why in ("a folder", "a named pipe"))
        assert paths.problem(path), why
    good = clips / "00000.wav"
    assert (paths.is_file(good), paths.is_dir(good), paths.exists(good), paths.problem(good)) == (
        True, False, True, "",
    )  # fmt: skip
    assert (
        paths.problem(clips / BAD_PATHS["a name of 304 characters"]) == "cannot be opened: File name too long"
    )
    assert paths.problem(clips / "broken.wav") == "is a link that leads nowhere"
    assert paths.problem(clips / "forbidden/a.wav") == "cannot be opened: Permission denied"


def lines(clips: Path, **keys: Any) -> list[dict[str, Any]]:
    names = ["00000.wav", *BAD_PATHS.values(), "00001.wav"]
    return [{"audio": str(clips / name), "id": str(i)} | keys for i, name in enumerate(names)]


@pytest.mark.parametrize("kind", ["manifest", "list"])
def test_embed(kind: str, clips: Path, tmp_path: Path, model_folder: Path) -> None:
    rows = lines(clips)
    source = write_rows(tmp_path / "m.jsonl", rows)
    if kind == "list":
        source = tmp_path / "list"
        source.write_bytes(os.fsencode("".join(row["audio"] + "\n" for row in rows)))
    words = [str(source), str(tmp_path / "out"), "--model", str(model_folder), "--device", "cpu"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            embed.main(words)
        assert stop.value.code == 3
    lines_of_index = Embeddings(tmp_path / "out").lines(0)
    assert [line["audio"] for line in lines_of_index] == [row["audio"] for row in rows]
    assert [line.get("error", "") for line in lines_of_index] == ["", *["open"] * len(BAD_PATHS), ""]


def test_score(clips: Path, tmp_path: Path, model_folder: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "id"} for row in lines(clips, caption="A calm voice.")]
    rows += [{"audio": rows[0]["audio"], "other": row["audio"]} for row in rows]
    source, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "scores.jsonl"
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            score.main([str(source), str(out), "--model", str(model_folder), "--device", "cpu"])
        assert stop.value.code == 3
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["score" in row for row in scored] == 2 * [True, *[False] * len(BAD_PATHS), True]
    # A line with NUL is refused before its recording is opened.
    assert sum("[open]" in row.get("error", "") for row in scored) == 2 * (len(BAD_PATHS) - 1)


def test_evaluate(clips: Path, tmp_path: Path, model_folder: Path) -> None:
    rows = lines(clips, captions=["A calm voice."], mood="calm")
    source, out = write_rows(tmp_path / "m.jsonl", rows), tmp_path / "out"
    words = ["--model", str(model_folder), "--device", "cpu", "--out", str(out), "--resamples", "5"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["retrieval", str(source), *words])
    assert stop.value.code == 3
    results = json.loads((out / "results.json").read_text())
    assert results["n"] == 2
    assert len(results["bad"]) == len(BAD_PATHS)
    assert all("[open]" in reason for reason in results["bad"].values())


def test_validate(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "m.jsonl", lines(clips, captions=["A calm voice."]))
    for words in (["validate", str(source)], ["validate", str(source), "--decode"]):
        with pytest.raises(SystemExit) as stop:
            data_command.main(words)
        assert stop.value.code == 1
        output = capsys.readouterr().out
        assert f"{len(BAD_PATHS)} findings" in output
        assert all(f"clip {i + 1}: " in output for i in range(len(BAD_PATHS)))
    assert output.count("[open]\n") == len(BAD_PATHS)


def test_train(clips: Path, tmp_path: Path) -> None:
    rows = lines(clips, captions=["A calm voice."])
    rows += [row | {"id": f"again {i}"} for i in range(20) for row in (rows[0], rows[-1])]
    read = read_manifest(write_rows(tmp_path / "m.jsonl", rows))
    config = DataConfig(batch_seconds=1e4, buckets=1, min_seconds=0.05)
    encode = Tokenizer.train(["A calm voice."] * 9, 300).encode_batch
    loader = data.Loader(read.clips, lambda texts: encode(texts, 20), config, seed=0, stage1_steps=10)
    assert loader.left_out == {}
    batch = loader.batch(0)
    assert loader.bad == {str(i + 1): "open" for i in range(len(BAD_PATHS))}
    assert "0" in batch.ids


def test_an_id_that_is_not_utf8_is_trained_on(clips: Path, tmp_path: Path) -> None:
    rows = [{"audio": str(clips / "00000.wav"), "captions": ["A calm voice."]}] * 3
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    read = read_manifest(write_rows(Path(name), rows))
    encode = Tokenizer.train(["A calm voice."] * 9, 300).encode_batch
    config = DataConfig(min_seconds=0.05)
    loader = data.Loader(read.clips, lambda texts: encode(texts, 20), config, seed=0, stage1_steps=10)
    loader.resume(1, loader.state())
    assert len(loader.batch(0).ids) == 3


# Runs as a user who may not open the files. It imports and loads everything before it becomes that user.
LOCKED = """
import contextlib, json, os, sys
from clsp_fast import CLSP
from clsp_fast.data import __main__ as data_command
from clsp_fast.storage import folders
model = CLSP.from_pretrained(sys.argv[1])
names = json.loads(sys.argv[2])
model.encode_audio(names[:1])
with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
    data_command.main(["validate", "good.jsonl", "--decode"])
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in names[1:-1]:
    try:
        open(name, "rb")
    except PermissionError:
        continue
    sys.exit(f"{name} can be opened")
errors = {}
model.encode_audio(names, errors=errors)
scan = folders.scan("clips")
print(json.dumps([{i: str(error.reason) for i, error in errors.items()}, scan.recordings, scan.warnings()]))
data_command.main(["validate", "m.jsonl", "--decode"])
"""


@pytest.mark.multiproc
def test_files_that_the_system_itself_refuses(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    first, last = make_clips(tmp_path / "clips", 2)
    samples, rate = soundfile.read(first)
    (tmp_path / "clips/closed").mkdir()
    names = [f"clips/{name}" for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "closed/a.wav")]
    for name in names:
        soundfile.write(tmp_path / name, samples, rate)
        (tmp_path / name).chmod(0)
    names = ["clips/00000.wav", *names, "clips/00001.wav"]
    write_rows(tmp_path / "m.jsonl", [{"audio": name, "captions": ["A voice."]} for name in names])
    write_rows(tmp_path / "good.jsonl", [{"audio": names[0], "captions": ["A voice."]}])
    # The paths are relative, because folders above may be closed to that user, too.
    for path, mode in ((tmp_path, 0o755), (tmp_path / "clips", 0o755), (first, 0o644), (last, 0o644)):
        path.chmod(mode)
    (tmp_path / "clips/closed").chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOCKED, str(model_folder), json.dumps(names)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (tmp_path / "clips/closed").chmod(0o755)
    assert done.returncode == 1, done.stderr  # there are findings
    errors, recordings, warnings = json.loads(done.stdout.splitlines()[0])
    assert errors == {str(i): "open" for i in range(1, 6)}
    assert recordings == sorted([*names[:-2], "clips/closed", names[-1]])
    assert warnings == ["cannot be read: clips/closed: Permission denied"]
    assert "5 findings" in done.stdout
    assert done.stdout.count("[open]\n") == 5


def test_encode_audio_reports_every_bad_path(clips: Path, tiny: CLSP) -> None:
    errors: dict[int, Any] = {}
    tiny.encode_audio([clips / name for name in ("00000.wav", *BAD_PATHS.values())], errors=errors)
    assert [str(errors[i + 1].reason) for i in range(len(BAD_PATHS))] == ["open"] * len(BAD_PATHS)
