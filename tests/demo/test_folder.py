"""The folder of a corpus: what is kept, what is replaced, and what other processes do to it meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from clsp_fast.demo.folder import CorpusFolder, wav_bytes


def write_corpus(folder: Path, name: str) -> None:
    """A corpus of one clip."""
    (folder / "audio").mkdir(parents=True)
    (folder / "audio" / "a.wav").write_bytes(bytes(wav_bytes(0.5)))
    raw = json.dumps({"audio": "audio/a.wav", "duration_s": 0.5}).encode() + b"\n"
    (folder / "train.jsonl").write_bytes(raw)
    digests = {"train": hashlib.sha256(raw).hexdigest()}
    summary = {"fingerprint": "f", "manifests": digests, "name": name}
    (folder / "corpus.json").write_text(json.dumps(summary))


@pytest.fixture
def place(tmp_path: Path) -> CorpusFolder:
    return CorpusFolder(
        path=tmp_path / "kept", kind="corpus", summary="corpus.json", splits=("train",), fingerprint="f"
    )


def test_a_corpus_that_another_process_made_meanwhile_is_kept(place: CorpusFolder) -> None:
    def fill(folder: Path) -> None:
        write_corpus(folder, "late")
        write_corpus(place.path, "early")

    assert place.make(1000, fill)["name"] == "early"
    assert [path.name for path in place.path.parent.iterdir()] == ["kept"]


def test_an_incomplete_corpus_is_replaced(place: CorpusFolder) -> None:
    write_corpus(place.path, "old")
    assert place.read() is not None
    (place.path / "audio" / "a.wav").write_bytes(b"")
    assert place.read() is None
    place.refuse_other_files()
    assert place.make(1000, lambda folder: write_corpus(folder, "new"))["name"] == "new"


def test_an_incomplete_result_is_an_error_and_other_files_are_refused(place: CorpusFolder) -> None:
    with pytest.raises(RuntimeError, match="was changed while it was made"):
        place.make(1000, lambda folder: None)
    (place.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no corpus"):
        place.refuse_other_files()


def test_folders_of_killed_runs_are_removed_after_some_hours(place: CorpusFolder) -> None:
    stale, recent = (place.path.parent / f".kept.making-{n}" for n in (1, 2))
    for folder in (stale, recent):
        folder.mkdir()
    os.utime(stale, (0, 0))
    place.make(1000, lambda folder: write_corpus(folder, "new"))
    assert not stale.exists()
    assert recent.exists()
