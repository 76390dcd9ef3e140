"""The paths of recordings in a new manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from clsp_fast.data.audio_paths import AudioPaths


@pytest.mark.parametrize(
    ("source", "out", "audio", "expected"),
    [
        ("corpus", "corpus", "corpus/clips/a.wav", "clips/a.wav"),
        ("corpus", "corpus/work", "corpus/a.wav", "../a.wav"),
        ("corpus/lists", ".", "corpus/lists/../a.wav", "corpus/a.wav"),
        ("corpus", "work", "corpus/a.wav", "{here}/corpus/a.wav"),
        ("corpus", "corpus/work", "other/a.wav", "{here}/other/a.wav"),
        ("corpus", "link/work", "corpus/a.wav", "{here}/corpus/a.wav"),
    ],
)
def test_paths_are_relative_if_one_folder_holds_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str, audio: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("corpus/clips", "corpus/lists", "other", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    name = AudioPaths(Path(source), Path(out))(audio)
    assert name == expected.format(here=tmp_path.resolve())


def test_paths_that_no_file_can_have_are_kept(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for audio in (f"{tmp_path}/loop/a.wav", "/a\0b/c.wav"):
        assert AudioPaths(tmp_path / "lists", tmp_path / "work")(audio) == audio
