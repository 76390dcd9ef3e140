"""Lists of recordings with odd names stay lists; tables that look similar are recognised."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_textfile import read_sources

from clsp_fast.storage import text_kinds


@pytest.mark.parametrize(
    "name",
    [
        "caffeine/a.wav", "FORMS/a.wav", "ID3/a.wav", "RF64.wav", "BZh.wav", "MAC book/a.wav", "OggS.wav",
        "GIF89a.wav", "Smith, John.wav", "a|b.wav", "a;b.wav", "x.y,z.wav", "[live] a.wav", "<3.wav",
        "audio,path.wav", "version https.wav", "a.webm", "ÿû.wav", "\ufeffa.wav",
    ],
)  # fmt: skip
def test_odd_names_of_recordings_are_not_taken_for_another_format(name: str, tmp_path: Path) -> None:
    file = tmp_path / "list"
    file.write_text(f"{name}\nb.wav\n")
    assert name.lstrip("\ufeff") in read_sources(file)


def test_a_list_of_existing_files_needs_no_suffixes(tmp_path: Path) -> None:
    (tmp_path / "utterance one").touch()
    (tmp_path / "list").write_text(f"{tmp_path}/utterance one\nmissing\n")
    assert read_sources(tmp_path / "list") == [f"{tmp_path}/utterance one", "missing"]
    (tmp_path / "list").write_text("Dear diary,\ntoday I spoke.\n")
    with pytest.raises(ValueError, match="not a list of recordings: 'Dear diary,' is no file"):
        read_sources(tmp_path / "list")


@pytest.mark.parametrize(
    "names",
    [
        ["my file.wav", "your file.wav"], ["my file.wav"], ["01 Intro.wav", "02 Song.wav"],
        ["Smith, John.wav", "Doe, Jane.wav"], ["Smith, John.wav"], ["a;b.wav"], ["take 1.wav", "take 2.wav"],
        ["a b/1, c.wav", "a c/1, d.wav"], ["x|a.wav", "b.wav"], ["filename"], ["utt1 a.wav", "b.wav"],
    ],
)  # fmt: skip
def test_odd_names_are_lists_whether_the_files_exist_or_not(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join(f"{name}\n" for name in names)
    (tmp_path / "list").write_text(text)
    if names != ["filename"]:
        assert read_sources(tmp_path / "list") == names
    assert text_kinds.kind_of_text(text) == ""


@pytest.mark.parametrize(
    "name", ["utt1 a.wav", "happy,a.wav", "a.wav\t24000", "- a.wav", "filename", "x.wav,y"]
)
def test_an_existing_path_makes_a_list(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name, name.replace("a", "b")]
    (tmp_path / "list").write_text("".join(f"{name}\n" for name in names))
    (tmp_path / names[1]).touch()
    assert read_sources(tmp_path / "list") == names


def test_an_existing_path_in_a_column_makes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").touch()
    for line, kind in (("happy, a.wav", "a CSV table"), ("happy a.wav", "a Kaldi wav.scp")):
        (tmp_path / "list").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=kind):
            read_sources(tmp_path / "list")
