"""Full disks, quotas, limits of file sizes, and file systems without locks or fsync of folders."""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from sample_data import MakeClips, write_rows

from clsp_fast import demo, embed, evaluate, score, train
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.storage import files, log
from clsp_fast.training import checkpoint
from clsp_fast.training.checkpoint import Checkpoint

FAISS = "Error in void faiss::write_index(): 'ret == size' failed: write error in x (No space left on device)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full: /nowhere/x, needed about 3.0 MB"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "/elsewhere"),
            r"disk full \(quota\): /elsewhere: Disk",
        ),
        (OSError(errno.EDQUOT, "Quota", "/nowhere/.x.1.tmp/a"), r"disk full \(quota\): /nowhere/x, needed"),
        (OSError(errno.ENOSPC, "No space", "/nowhere/x/a"), "disk full: /nowhere/x, needed"),
        (OSError(errno.ENOSPC, "No space", "/nowhere/xy"), "disk full: /nowhere/xy: No space left"),
        (OSError(errno.EFBIG, "File too large"), "file size limit: /nowhere/x.*ulimit -f"),
        (OSError("1000000 requested and 262112 written"), "disk full: /nowhere/x"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full: /nowhere/x"),
        (SafetensorError("I/O error: File too large (os error 27)"), "file size limit: /nowhere/x"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), r"disk full \(quota\)"),
        (RuntimeError(FAISS), "disk full: /nowhere/x"),
        (Exception("No space left on device (os error 28)"), "disk full: /nowhere/x"),
    ],
)
def test_the_full_disk_errors_of_all_libraries_become_one(error: Exception, words: str) -> None:
    with (
        pytest.raises(files.DiskFull, match=words) as caught,
        files.naming_full_disk("/nowhere/x", 3_000_000),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.errno in files.DISK_FULL_CODES
    with pytest.raises(files.DiskFull) as outer, files.naming_full_disk("/nowhere"):
        raise caught.value
    assert outer.value is caught.value  # the path of the inner block stays


def test_free_space_is_that_of_the_files_folder_only(tmp_path: Path) -> None:
    for path, stated in ((tmp_path / "a", True), (tmp_path / "no/a", False), (None, False)):
        with pytest.raises(files.DiskFull) as caught, files.naming_full_disk(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert ("MB are free" in str(caught.value)) == stated
        assert ("standard output" in str(caught.value)) == (path is None)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ValueError("No space left on device"),
        SafetensorError("header too large"),
        RuntimeError("something else"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, files.naming_full_disk("/nowhere/x"):
        raise error
    assert caught.value is error


def test_a_file_that_does_not_fit_keeps_its_old_content(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.DiskFull, match=r"/a, needed about 1\.5 MB, [\d.,]+ MB are free"):
        files.replace_file(tmp_path / "a", fail, size=1_500_000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_name_of_any_length_is_written(tmp_path: Path) -> None:
    names = ["a" * 255, "b" * 251 + ".txt", "\u58f0" * 85, "caf\udce9" + "c" * 200, "d"]
    for name in names:
        files.write_text(tmp_path / name, name[:1])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {n: n[:1] for n in names}
    seen = list[str]()
    for name in names:
        files.replace_file(tmp_path / name, lambda path: (seen.append(path.name), path.touch())[1])
    assert len(set(seen)) == len(names)
    assert all(name.startswith(".") and name.endswith(".tmp") and len(name) < 40 for name in seen)


NO_FSYNC = ("EINVAL", "EOPNOTSUPP", "ENOTSUP", "ENOSYS")


def folder_sync_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """Makes fsync of folders fail. The list gets one entry for each attempt."""
    real, attempts = os.fsync, list[int]()

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            attempts.append(descriptor)
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return attempts


@pytest.mark.parametrize("name", [*NO_FSYNC, "EIO", "ENOSPC"])
def test_a_file_system_that_cannot_flush_folders_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    attempts = folder_sync_fails(monkeypatch, getattr(errno, name))
    made = Checkpoint(7, {"a": torch.ones(3)}, {}, {})
    if name in NO_FSYNC:
        checkpoint.save(tmp_path, made, keep=1)
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        assert newest.step == 7
    else:
        with pytest.raises(OSError, match="disk full" if name == "ENOSPC" else "Input/output error"):
            checkpoint.save(tmp_path, made, keep=1)
        assert list(tmp_path.iterdir()) == []
    assert attempts


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EINVAL", "EIO"])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def flock(*_: object) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr("fcntl.flock", flock)
    entered = False
    if name == "EIO":
        with pytest.raises(OSError, match="Input/output error"), files.lock_folder(tmp_path):
            entered = True
        assert not entered
    else:
        with pytest.warns(UserWarning, match=f"{tmp_path} cannot be locked"), files.lock_folder(tmp_path):
            entered = True
        assert entered


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted: {error}")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: Path, free: int) -> Path:
    """Fills a small file system until `free` bytes are left, or fewer if its blocks are larger."""
    at = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(bytes(at.f_bavail * at.f_frsize - free))
    return filler


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "tmp" in path.name or ".making" in path.name]


def embed_command(clips: Path, out: Path, model: Path) -> None:
    words = [str(clips), str(out), "--model", str(model), "--shard-rows", "4", "--device", "cpu"]
    embed.main(words)


@pytest.mark.parametrize("free", [0, 16384])
def test_embed_names_a_full_disk_and_continues_when_there_is_room(
    tmp_path: Path, small_disk: Path, model_folder: Path, make_clips: MakeClips, free: int
) -> None:
    make_clips(tmp_path / "clips", 12)
    filler, out = fill_disk(small_disk, free), small_disk / "out"
    with pytest.raises(SystemExit) as stop:
        embed_command(tmp_path / "clips", out, model_folder)
    message = str(stop.value.code)
    assert message.startswith(f"clsp_fast.embed: disk full: {out}"), message
    assert "\n" not in message
    assert leftovers(small_disk) == []
    filler.unlink()
    embed_command(tmp_path / "clips", out, model_folder)
    embed_command(tmp_path / "clips", tmp_path / "whole", model_folder)
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def train_words(tmp_path: Path, make_clips: MakeClips) -> list[str]:
    """The arguments of a short training run, without its folder."""
    rows = [
        {"audio": str(path), "captions": [f"voice {path.stem}"]} for path in make_clips(tmp_path / "c", 8)
    ]
    write_rows(tmp_path / "m.jsonl", rows)
    words = ["tiny", "--data.manifest", str(tmp_path / "m.jsonl"), "--data.min-seconds", "0.1"]
    words += ["--stage1-steps", "4", "--stage2-steps", "0", "--save-every", "2", "--log-every", "1"]
    return [*words, "--model.text.vocab-size", "300", "--device", "cpu", "--run"]


@pytest.mark.parametrize("free", [40_000, 3_000_000])
def test_train_names_a_full_disk_and_resumes_when_there_is_room(
    small_disk: Path, train_words: list[str], free: int
) -> None:
    filler, run = fill_disk(small_disk, free), small_disk / "run"
    with pytest.raises(SystemExit) as stop:
        train.main([*train_words, str(run)])
    message = str(stop.value.code)
    assert message.startswith(f"clsp_fast.train: disk full: {run}"), message
    assert "\n" not in message
    assert leftovers(small_disk) == []
    filler.unlink()
    train.main([*train_words, str(run)])
    assert [r["step"] for r in log.read_log(run / "log.jsonl") if r["kind"] == "train"] == [0, 1, 2, 3]
    assert (run / "model/model.safetensors").exists()


def full_from(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the flush of the `count`-th file and all later ones fail: many file systems report a full disk
    only then."""
    flush, attempts = files.flush, itertools.count(1)

    def fail(path: Path) -> None:
        if next(attempts) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(files, "flush", fail)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8])
def test_embed_continues_after_any_file_did_not_fit(
    tmp_path: Path,
    model_folder: Path,
    make_clips: MakeClips,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """Like the test with `small_disk`, for machines where that cannot be mounted."""
    make_clips(tmp_path / "clips", 12)  # a header, three shards and their parts, and the index
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_from(patch, count)
        with pytest.raises(SystemExit) as stop:
            embed_command(tmp_path / "clips", out, model_folder)
    assert re.fullmatch(rf"clsp_fast.embed: disk full: {out}.*MB are free: No space.*", str(stop.value.code))
    assert leftovers(out) == []
    embed_command(tmp_path / "clips", out, model_folder)
    embed_command(tmp_path / "clips", tmp_path / "whole", model_folder)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count", [1, 5, 10])
def test_train_resumes_after_any_file_did_not_fit(
    tmp_path: Path, train_words: list[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Like the test with `small_disk`, for machines where that cannot be mounted."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_from(patch, count)
        with pytest.raises(SystemExit) as stop:
            train.main([*train_words, str(run)])
    assert re.fullmatch(rf"clsp_fast.train: disk full: {run}.*MB are free: No space.*", str(stop.value.code))
    assert leftovers(run) == []
    train.main([*train_words, str(run)])
    assert [r["step"] for r in log.read_log(run / "log.jsonl") if r["kind"] == "train"] == [0, 1, 2, 3]
    assert (run / "model/model.safetensors").exists()


def test_the_log_names_a_full_disk_and_can_still_be_read(small_disk: Path) -> None:
    with log.RunLog(small_disk, first_step=0) as written:
        written.record("train", 0, loss=1.0)
    filler = fill_disk(small_disk, 0)
    text = "x" * (10_000 + 2 * os.statvfs(small_disk).f_frsize)  # more than fits in the log's last block
    with (
        pytest.raises(files.DiskFull, match=r"log\.jsonl"),
        log.RunLog(small_disk, first_step=0) as written,
    ):
        written.record("train", 0, loss=text)
    filler.unlink()
    with log.RunLog(small_disk, first_step=1) as written:
        written.record("train", 0, loss=text)
    with (
        pytest.raises(files.DiskFull, match=r"log\.jsonl"),
        log.RunLog(small_disk, first_step=1) as written,
    ):
        written.record("train", 1, loss="x" * 40_000_000)
    assert [record["step"] for record in log.read_log(small_disk / "log.jsonl")] == [0]


def test_the_demo_corpus_names_a_full_disk_and_leaves_nothing(small_disk: Path) -> None:
    config = demo.DemoConfig(clips=8, validation_clips=2, test_clips=2, workers=2, engines=("synth",))
    fill_disk(small_disk, 200_000)
    with pytest.raises(files.DiskFull, match=rf"disk full: {small_disk}/corpus, needed about 7\.2 MB"):
        demo.prepare(small_disk / "corpus", config)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_score_and_evaluate_name_a_full_disk(
    tmp_path: Path,
    small_disk: Path,
    model_folder: Path,
    make_clips: MakeClips,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = os.statvfs(small_disk).f_frsize
    clips = make_clips(tmp_path / "clips", 4)
    rows = [
        {"audio": str(path), "caption": "A calm voice. " * (block // 16), "captions": ["A voice."]}
        for path in clips
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    filler, scores = fill_disk(small_disk, block), small_disk / "s.jsonl"
    words = [str(tmp_path / "p.jsonl"), str(scores), "--model", str(model_folder), "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"clsp_fast.score: disk full: {scores}"):
        score.main(words)
    write_rows(tmp_path / "m.jsonl", [{"audio": str(p), "captions": ["a"]} for p in clips])
    retrieval = ["retrieval", str(tmp_path / "m.jsonl"), "--model", str(model_folder), "--device", "cpu"]
    retrieval += ["--resamples", "5", "--out", str(small_disk / "e")]
    with pytest.raises(SystemExit, match=f"clsp_fast.evaluate: disk full: {small_disk}/e"):
        evaluate.main(retrieval)
    assert leftovers(small_disk) == []
    filler.unlink()
    with pytest.raises(SystemExit) as stop:
        score.main(words)
    assert not stop.value.code
    assert len(scores.read_text().splitlines()) == 4
    replace_file = files.replace_file

    def full_for_pictures(file: Path, write_to: Callable[[Path], None], *, size: int | None = None) -> None:
        if file.suffix == ".png":
            fill_disk(small_disk, 0)
        replace_file(file, write_to, size=size)

    monkeypatch.setattr(files, "replace_file", full_for_pictures)
    with pytest.raises(SystemExit, match=f"disk full: {small_disk}/e/retrieval.png"):
        evaluate.main(retrieval)
    assert leftovers(small_disk) == []


def test_a_model_that_does_not_fit_is_named(small_disk: Path) -> None:
    model = CLSP(MODEL_PRESETS["tiny"])
    fill_disk(small_disk, 400_000)
    with pytest.raises(
        files.DiskFull, match=r"model\.safetensors, needed about \d\.\d MB, \d\.\d MB are free"
    ):
        model.save_pretrained(small_disk / "m")
    assert leftovers(small_disk) == []


def test_a_limit_of_file_sizes_is_named(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, train_words: list[str]
) -> None:
    make_clips(tmp_path / "clips", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(SystemExit, match=r"clsp_fast.embed: file size limit: .*ulimit -f"):
            embed_command(tmp_path / "clips", tmp_path / "out", model_folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(
            SystemExit, match=r"clsp_fast.train: file size limit: .*step-00000002, needed about"
        ):
            train.main([*train_words, str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path / "run") == leftovers(tmp_path / "out") == []


def test_a_folder_cannot_be_locked_twice(tmp_path: Path) -> None:
    with (
        files.lock_folder(tmp_path),
        pytest.raises(RuntimeError, match="in use by another"),
        files.lock_folder(tmp_path),
    ):
        pass
    with files.lock_folder(tmp_path):
        pass


def test_json_is_written_whole(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert (tmp_path / "a.json").read_text() == '{\n "x": [\n  1,\n  2\n ]\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "gone" / "a.txt"
    with pytest.raises(FileNotFoundError) as caught:
        files.write_text(file, "x")
    assert caught.value.filename == str(file)
