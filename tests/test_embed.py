"""Bulk embedding: the same folder after any interruption, errors by recording, folders of other runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_as_exact, in_float64
from sample_data import MakeClips

from clsp_fast import embed as command
from clsp_fast.data.manifest import read_source
from clsp_fast.embed import EmbedConfig, embed
from clsp_fast.model import CLSP
from clsp_fast.storage import embedding_folder
from clsp_fast.storage.embedding_folder import Embeddings
from clsp_fast.storage.files import FolderInUse, lock_folder
from clsp_fast.storage.ranks import Ranks


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def run(source: Any, out: Path, model: Path, **options: Any) -> command.EmbedResult:
    return embed(EmbedConfig(source=str(source), out=out, model=str(model), device="cpu", **options))


@pytest.mark.parametrize("options", [{}, {"shard_format": "safetensors", "dtype": "float16"}])
def test_a_folder_holds_what_encode_audio_gives(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, options: dict[str, Any]
) -> None:
    paths = make_clips(tmp_path / "clips/deeper", 5)
    (tmp_path / "clips/deeper/00002.wav").write_text("no audio")
    (tmp_path / "clips/notes.txt").write_text("not a recording")
    result = run(tmp_path / "clips", tmp_path / "out", model_folder, shard_rows=3, **options)
    assert (result.clips, dict(result.failed), result.complete) == (5, {"format": 1}, False)
    embeddings = Embeddings(tmp_path / "out")
    assert (embeddings.clips, len(embeddings), len(embeddings.shards)) == (5, 4, 2)
    lines = embeddings.lines(0) + embeddings.lines(1)
    assert [line["audio"] for line in lines] == [str(path) for path in paths]
    assert lines[2]["error"] == "format"
    model = CLSP.from_pretrained(model_folder)
    exact = in_float64(model)
    for line, path in zip(lines, paths, strict=True):
        if "row" in line:
            row = np.array(embeddings.shards[line["shard"]][line["row"]], np.float32)
            expected, truth = (m.encode_audio([path])[0] for m in (model, exact))
            assert_as_exact(row, expected, truth, dtype=np.dtype(options.get("dtype", "float32")))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_complete_and_identical(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    originals = make_clips(tmp_path / "originals", 50)
    (tmp_path / "clips").mkdir()
    for i in range(2000):
        os.link(originals[i % 50], tmp_path / f"clips/{i:05d}.wav")
    (tmp_path / "clips/00777.wav").unlink()
    (tmp_path / "clips/00777.wav").write_text("no audio")
    words = [sys.executable, "-m", "clsp_fast.embed", str(tmp_path / "clips"), str(tmp_path / "killed")]
    words += ["--model", str(model_folder), "--shard-rows", "64", "--device", "cpu"]
    for parts in (3, 20):
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        waited = time.monotonic()
        try:
            while len(list((tmp_path / "killed/.parts").glob("0*.jsonl"))) < parts:
                assert process.poll() is None, "finished before it could be killed"
                assert time.monotonic() - waited < 120
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "killed/index.jsonl").exists()
        with pytest.raises(FileNotFoundError, match="same embed command again"):
            Embeddings(tmp_path / "killed")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "1999 embeddings of 2000" in done.stdout
    assert "1 format" in done.stderr
    run(tmp_path / "clips", tmp_path / "uninterrupted", model_folder, shard_rows=64)
    killed, uninterrupted = contents(tmp_path / "killed"), contents(tmp_path / "uninterrupted")
    assert set(killed) == {"index.jsonl", *(f"shard-{i:06d}.npy" for i in range(32))}
    assert killed == uninterrupted


def test_recordings_added_to_the_list_are_added_to_a_finished_folder(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_clips(tmp_path / "clips", 11)
    source = tmp_path / "list.txt"
    source.write_text("".join(f"{path}\n" for path in paths[:6]))
    run(source, tmp_path / "out", model_folder, shard_rows=4)
    units: list[int] = []
    real = command._Job.run
    monkeypatch.setattr(
        command._Job, "run", lambda job, unit, *rest: (units.append(unit), real(job, unit, *rest))[1]
    )
    run(source, tmp_path / "out", model_folder, shard_rows=4)
    assert units == []
    source.write_text("".join(f"{path}\n" for path in paths))
    run(source, tmp_path / "out", model_folder, shard_rows=4)
    assert units == [1, 2]
    run(source, tmp_path / "fresh", model_folder, shard_rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    (tmp_path / "out/shard-000001.npy").write_bytes(b"damaged")
    run(source, tmp_path / "out", model_folder, shard_rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_folder_of_another_model_list_or_setting_is_refused(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    make_clips(tmp_path / "clips", 5)
    run(tmp_path / "clips", tmp_path / "out", model_folder)
    other = CLSP.from_pretrained(model_folder)
    with torch.no_grad():
        other.audio_projection[1].bias[0] += 1e-3
    config = EmbedConfig(source=str(tmp_path / "clips"), out=tmp_path / "out", device="cpu")
    before = contents(tmp_path / "out")
    message = r"was begun with model \w{64}, not \w{64}; give the same --model and --precision, or choose"
    with pytest.raises(ValueError, match=message):
        embed(config, model=other)
    for precision in ("tf32", "bf16"):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "clips", tmp_path / "out", model_folder, precision=precision)
    for change in ({"dtype": "float16"}, {"long_audio": "whole"}, {"window_s": 10}, {"shard_rows": 3}):
        with pytest.raises(ValueError, match=f"was begun with {next(iter(change))}"):
            run(tmp_path / "clips", tmp_path / "out", model_folder, **change)
    (tmp_path / "clips/00003.wav").unlink()
    with pytest.raises(ValueError, match=r"another list: recording 4 was .*00003.wav', is .*00004.wav'"):
        run(tmp_path / "clips", tmp_path / "out", model_folder)
    (tmp_path / "clips/00004.wav").unlink()
    with pytest.raises(ValueError, match="longer list"):
        run(tmp_path / "clips", tmp_path / "out", model_folder)
    assert contents(tmp_path / "out") == before


def test_manifests_lists_and_streams_name_recordings(tmp_path: Path, make_clips: MakeClips) -> None:
    make_clips(tmp_path / "clips", 2)
    rows = [{"id": "a", "audio": "clips/00000.wav", "start_s": 0.1, "duration_s": 0.05}, {"audio": 3}]
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    clips, problems = read_source(str(tmp_path / "m.jsonl.gz"))
    assert [(c.id, c.start_s, c.duration_s) for c in clips] == [("a", 0.1, 0.05)]
    assert [p.line for p in problems] == [2]
    clips, _ = read_source("-", io.StringIO("x y.wav\n\nb.flac\n"))
    assert [(c.id, c.audio) for c in clips] == [("x y.wav", "x y.wav"), ("b.flac", "b.flac")]
    (tmp_path / "list").write_bytes(b"\xe9t\xe9.wav\r\n")
    clips, _ = read_source(str(tmp_path / "list"))
    assert os.fsencode(clips[0].audio) == b"\xe9t\xe9.wav"
    assert len(read_source(str(tmp_path / "clips/00000.wav"))[0]) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="names no recording"):
        read_source(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_source(str(tmp_path / "nothing"))


def test_names_that_are_not_utf8_survive(tmp_path: Path, model_folder: Path, make_clips: MakeClips) -> None:
    (path,) = make_clips(tmp_path / "clips", 1)
    path.rename(os.fsdecode(os.fsencode(tmp_path / "clips") + b"/\xe9t\xe9.wav"))
    assert run(tmp_path / "clips", tmp_path / "out", model_folder).complete
    (line,) = Embeddings(tmp_path / "out").lines(0)
    assert os.fsencode(line["audio"]).endswith(b"/\xe9t\xe9.wav")
    assert run(tmp_path / "clips", tmp_path / "out", model_folder).complete


def test_a_full_disk_loses_no_finished_shard(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clips(tmp_path / "clips", 9)
    real = embedding_folder.write_shard

    def full(file: Path, rows: Any) -> None:
        if "000002" in file.name:
            raise OSError(28, "No space left on device")
        real(file, rows)

    monkeypatch.setattr(embedding_folder, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "clips", tmp_path / "out", model_folder, shard_rows=3)
    monkeypatch.setattr(embedding_folder, "write_shard", real)
    assert len(list((tmp_path / "out/.parts").glob("0*.jsonl"))) == 2
    run(tmp_path / "clips", tmp_path / "out", model_folder, shard_rows=3)
    run(tmp_path / "clips", tmp_path / "fresh", model_folder, shard_rows=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_only_one_process_at_a_time_writes_to_a_folder(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips
) -> None:
    make_clips(tmp_path / "clips", 1)
    with lock_folder(tmp_path / "out"), pytest.raises(FolderInUse, match="in use by another process"):
        run(tmp_path / "clips", tmp_path / "out", model_folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{clips}", "{out}", "--model", "{tmp}/none"], "no such folder"),
        (["{tmp}/none", "{out}", "--model", "{model}"], "no such file or folder"),
        (["{clips}", "{out}", "--model", "{model}", "--device", "tpu9"], "device must be"),
        (["{clips}", "{clips}/00000.wav", "--model", "{model}"], "00000.wav"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, words: list[str], message: str
) -> None:
    make_clips(tmp_path / "clips", 1)
    names = {"clips": tmp_path / "clips", "out": tmp_path / "out", "model": model_folder, "tmp": tmp_path}
    with pytest.raises(SystemExit) as stop:
        command.main([word.format(**names) for word in words])
    assert message in str(stop.value.code)
    assert str(stop.value.code).startswith("clsp_fast.embed: ")


@pytest.mark.parametrize(
    "flags", [["--dtype", "int8"], ["--shard-rows", "0"], ["--window-s", "-1"], ["--nonsense"]]
)
def test_wrong_flags_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["a", "b", *flags])
    assert stop.value.code not in (0, None)
    capsys.readouterr()


def test_an_empty_source_is_no_folder() -> None:
    with pytest.raises(ValueError, match="source must be a manifest, folder, list, or -, got ''"):
        EmbedConfig(source="", out=Path("embeddings"))


def test_an_interrupt_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: EmbedConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "embed", interrupted)
    with pytest.raises(SystemExit) as stop:
        command.main(["clips", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


def test_the_command_reports_failures(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips(tmp_path / "clips", 2)
    words = [str(tmp_path / "clips"), str(tmp_path / "out"), "--model", str(model_folder), "--device", "cpu"]
    command.main(words)
    assert "2 embeddings of 2 recordings" in capsys.readouterr().out
    (tmp_path / "m.jsonl").write_text(f'{{"audio": "{tmp_path}/clips/00000.wav"}}\nnonsense\n')
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path / "m.jsonl"), str(tmp_path / "two"), *words[2:]])
    assert stop.value.code == 3
    printed = capsys.readouterr()
    assert "1 bad lines" in printed.err
    assert "line 2: not JSON" in printed.err


def test_only_the_first_process_decides_what_is_left_to_do(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [[0, 3] if isinstance(value, list) else Counter(), value]

    make_clips(tmp_path / "clips", 4)
    (tmp_path / "out/.parts").mkdir(parents=True)
    ranks = Second(1, 2, torch.device("cpu"), None)
    monkeypatch.setattr(command, "Ranks", SimpleNamespace(join=lambda device, wait_hours: nullcontext(ranks)))
    run(tmp_path / "clips", tmp_path / "out", model_folder, shard_rows=1)
    assert [part.name for part in (tmp_path / "out/.parts").iterdir()] == ["000003.jsonl"]


@pytest.mark.multiproc
def test_two_processes_share_the_work(tmp_path: Path, model_folder: Path, make_clips: MakeClips) -> None:
    paths = make_clips(tmp_path / "clips", 11)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["clsp_fast.embed", str(tmp_path / "clips"), str(tmp_path / "two"), "--model", str(model_folder)]
    words += ["--shard-rows", "2", "--device", "cpu"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "clips", tmp_path / "one", model_folder, shard_rows=2)
    one, two = Embeddings(tmp_path / "one"), Embeddings(tmp_path / "two")
    assert (tmp_path / "one/index.jsonl").read_bytes() == (tmp_path / "two/index.jsonl").read_bytes()
    rows = [np.concatenate([np.array(shard) for shard in folder.shards]) for folder in (one, two)]
    truth = in_float64(CLSP.from_pretrained(model_folder)).encode_audio(paths)
    assert_as_exact(rows[1], rows[0], truth)


def test_processes_wait_for_days_and_say_why_they_stop(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clips(tmp_path / "clips", 2)
    limits: list[float] = []

    def meet(url: str, timeout: timedelta) -> Iterator[tuple[torch.distributed.Store, int, int]]:
        limits.append(timeout / timedelta(hours=1))
        return iter([(torch.distributed.HashStore(), 0, 1)])

    def init(backend: str, timeout: timedelta, **_: object) -> None:
        assert timeout / timedelta(hours=1) == limits[-1]
        raise ConnectionError("no further")

    monkeypatch.setattr("clsp_fast.storage.ranks.rendezvous", meet)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options, expected in (({}, 168), ({"wait_hours": 500.5}, 500.5)):
        with pytest.raises(ConnectionError, match="no further"):
            run(tmp_path / "clips", tmp_path / "out", model_folder, **options)
        assert limits.pop() == expected
    monkeypatch.undo()

    def late(ranks: Ranks, value: object) -> list[object]:
        if value is None:
            raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")
        return [value]

    monkeypatch.setattr(Ranks, "gather", late)
    with pytest.raises(ConnectionError, match=r"over 0\.5 hours .*--wait-hours.*same command .*Timed out"):
        run(tmp_path / "clips", tmp_path / "out", model_folder, wait_hours=0.5)
    with pytest.raises(ValueError, match="wait_hours must be in"):
        run(tmp_path / "clips", tmp_path / "out", model_folder, wait_hours=0)
