"""The recordings of a folder: links, loops, folders that cannot be read, and files that are left out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forbidden_paths import refuse_forbidden_paths
from sample_data import MakeClips

from clsp_fast import audio, embed
from clsp_fast.storage import folders


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def scanned(folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in folders.scan(folder).recordings]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make(
        tmp_path,
        "elsewhere/b.wav",
        "elsewhere/deep/c.flac",
        "v.wav",
        "folder/real/a.wav",
        "folder/.hidden/h.WAV",
    )
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "link.wav").symlink_to("../v.wav")
    (folder / "dangling.wav").symlink_to("no-such.wav")
    (folder / "unmounted").symlink_to("/no/such/disk")
    (folder / "notes.txt").symlink_to("no-such.txt")
    (folder / "self").symlink_to(".")
    (folder / "real/up").symlink_to("..")
    (folder / "endless").symlink_to("endless")
    (tmp_path / "elsewhere/back").symlink_to("../folder")
    assert scanned(folder) == [
        ".hidden/h.WAV", "dangling.wav", "endless", "link.wav", "linked/b.wav", "linked/deep/c.flac",
        "real/a.wav", "unmounted",
    ]  # fmt: skip
    assert folders.scan(folder).left_out == {".txt": 1}
    (folder / "twice").symlink_to("real")
    assert {"real/a.wav", "twice/a.wav"} <= set(scanned(folder))


def test_folders_that_link_to_each_other_do_not_multiply(tmp_path: Path) -> None:
    names = [f"{i:02d}" for i in range(12)]
    for name in names:
        make(tmp_path, f"{name}/a.wav")
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")
    listed = scanned(tmp_path)
    assert {f"{name}/a.wav" for name in names} <= set(listed)
    assert len(listed) <= 2 * 12 * 12


def test_a_forbidden_folder_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.wav", "forbidden/b.wav", "last/c.wav")
    refuse_forbidden_paths(monkeypatch)
    scan = folders.scan(tmp_path)
    assert [os.path.relpath(name, tmp_path) for name in scan.recordings] == [
        "a.wav",
        "forbidden",
        "last/c.wav",
    ]
    assert scan.warnings() == [f"cannot be read: {tmp_path / 'forbidden'}: Permission denied"]


def test_a_tree_that_is_deeper_than_any_path_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a.wav")
    for _ in range(25):
        Path("x" * 200).mkdir()
        os.chdir("x" * 200)
    scan = folders.scan(tmp_path)
    assert scan.recordings[0] == str(tmp_path / "a.wav")
    assert len(scan.recordings) == 2
    assert "File name too long" in scan.warnings()[0]


def test_files_that_are_left_out_are_counted_and_named(
    tmp_path: Path, model_folder: Path, make_clips: MakeClips, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips(tmp_path / "clips", 1)
    make(
        tmp_path / "clips",
        "b.webm",
        "deep/c.WEBM",
        "d.m4a",
        "e.json",
        "README",
        "f.\x1b[2J",
        "g." + "y" * 200,
    )
    words = [str(tmp_path / "clips"), str(tmp_path / "out"), "--model", str(model_folder), "--device", "cpu"]
    embed.main(words)
    printed = capsys.readouterr()
    assert "1 embeddings of 1 recordings" in printed.out
    assert "left out 7 files: 2 .webm, " in printed.err
    for part in (
        "1 .m4a",
        "1 .json",
        "1 without a suffix",
        "1 .\\x1b[2j",
        "1 .yyyyyyyyyyy...",
        "ffmpeg",
        "a list of",
    ):
        assert part in printed.err
    (tmp_path / "clips/00000.wav").unlink()
    with pytest.raises(SystemExit, match="names no recording"):
        embed.main(words)
    assert "left out 7 files" in capsys.readouterr().err


def test_files_with_every_suffix_of_recordings_are_used(tmp_path: Path, make_clips: MakeClips) -> None:
    (clip,) = make_clips(tmp_path / "clips", 1)
    for suffix in folders.AUDIO_SUFFIXES:
        for spelt in (suffix, suffix.upper()):
            (tmp_path / f"clips/a{spelt}").write_bytes(clip.read_bytes())
    clip.unlink()
    assert len(folders.scan(tmp_path / "clips").recordings) == 2 * len(folders.AUDIO_SUFFIXES)
    assert not folders.AUDIO_SUFFIXES & folders.CONVERT_SUFFIXES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.sph", "NIST"), ("a.au", "AU"), ("a.aifc", "AIFF"), ("a.caf", "CAF"),
        ("a.w64", "W64"), ("a.RF64", "RF64"), ("a.Wave", "WAV"), ("a.oga", "OGG"), ("a.MPGA", "MP3"),
        ("a.flac", "FLAC"),
    ],
)  # fmt: skip
def test_recordings_of_a_folder_are_decoded(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / name
    with file.open("wb") as stream:
        soundfile.write(stream, 0.1 * np.sin(np.arange(8000) / 9), 16000, format=kind)
    assert folders.scan(tmp_path).recordings == [str(file)]
    assert abs(len(audio.load(file)) - 8000) < 2000
