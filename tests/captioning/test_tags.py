"""Captions from tags: they say what the tags say, and keep what a clip has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_data import write_rows

from clsp_fast import caption
from clsp_fast.captioning import wording
from clsp_fast.captioning.tags import TagsConfig, tags
from clsp_fast.data.audit import audit
from clsp_fast.data.manifest import read_manifest

FULL = {"gender": "F", "pitch": "high", "speed": "slow>fast", "accent": "South African", "emotion": "['sad']"}


def run(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[int, list[dict[str, Any]]]:
    source = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav"} | row for row in rows])
    code = tags(TagsConfig(manifest=source, out=tmp_path / "out.jsonl", **options))
    return code, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_captions_say_what_the_tags_say(tmp_path: Path) -> None:
    code, (line,) = run(tmp_path, {"id": "a", "speaker": "s", "tags": FULL})
    assert code == 0
    assert (line["gender"], line["speaker"], line["audio"]) == ("F", "s", "a.wav")
    assert line["tags"] == {k: v for k, v in FULL.items() if k != "gender"} | {"sex": "female"}
    assert len(line["finegrained_captions"]) >= 5
    for kind, key in (("global", "global_captions"), ("fine", "finegrained_captions")):
        for text, claims in zip(line[key], line["claims"][kind], strict=True):
            assert wording.satisfies(line["tags"], claims)
            assert ("South African" in text) == ("accent" in claims)
            assert "sad" not in text
    manifest = read_manifest(tmp_path / "out.jsonl")
    assert not manifest.problems
    assert not manifest.unknown
    assert audit(manifest.clips).count == 0


def test_other_tags_alone_are_enough(tmp_path: Path) -> None:
    _, (line,) = run(tmp_path, {"tags": {"accent": "Indian", "speaking_rate": "measured speed"}})
    assert line["global_captions"][0].startswith("Someone speaks. The ")
    assert any("The speaking rate is measured speed." in text for text in line["finegrained_captions"])
    _, (line,) = run(tmp_path, {"gender": "male"})
    assert line["finegrained_captions"] == ["A man speaks."]


def test_clips_without_usable_tags_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"tags": {"accent": "unknown", "pitch": "440 Hz"}}, {"tags": {"pitch": "low"}}, {"audio": 3}]
    code, lines = run(tmp_path, *rows)
    assert (code, len(lines)) == (3, 1)
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'm.jsonl'}, line 3: " in err
    assert "captions for 1 clip\n" in out
    assert "left out: 1 clip without a usable tag" in out
    assert "left out: 1 bad line\n" in out
    with pytest.raises(ValueError, match="no clip has a usable tag; expected one of sex, pitch"):
        run(tmp_path, rows[0])


def test_a_tag_without_words_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags_of_clips = [{"sex": "alien", "pitch": "440 Hz", "accent": "Martian"}, FULL | {"gender": "other"}]
    code, lines = run(tmp_path, *({"tags": given} for given in tags_of_clips), {"tags": {"sex": "alien"}})
    assert (code, len(lines)) == (3, 2)
    out = capsys.readouterr().out
    for tag in ("sex", "pitch"):
        assert f'no words for the tag "{tag}" of 1 clip: it is kept, but not described' in out
    assert '"gender"' not in out
    assert lines[0]["tags"]["sex"] == "alien"


def test_captions_of_a_clip_are_kept_unless_replaced(tmp_path: Path) -> None:
    row = {"id": "a", "tags": FULL, "global_captions": ["An earlier one."]}
    _, (line,) = run(tmp_path, row)
    assert line["global_captions"] == ["An earlier one."]
    assert "global" not in line["claims"]
    assert len(line["finegrained_captions"]) >= 5
    _, (line,) = run(tmp_path, row, replace=True)
    assert "An earlier one." not in line["global_captions"]
    _, (line,) = run(tmp_path, row | {"captions": ["Another earlier one."]})
    assert line["provenance"] == {"written_by": "tags"}


def test_kept_captions_keep_their_provenance(tmp_path: Path) -> None:
    made = {"by": "generate", "model": "m", "sampling": {"temperature": 0.6}}
    row = {"id": "a", "tags": FULL, "captions": ["An earlier one."], "claims": {"fine": [{"pitch": "high"}]}}
    _, (line,) = run(tmp_path, row | {"provenance": {"written_by": "filter", "fine": made}})
    assert line["provenance"].pop("global")["by"] == "tags"
    assert line["provenance"] == {"written_by": "tags", "fine": made}
    assert line["claims"]["fine"] == [{"pitch": "high"}]
    _, (line,) = run(tmp_path, row | {"provenance": made})  # of all captions of the clip
    assert line["provenance"]["fine"] == made
    assert line["provenance"]["global"]["by"] == "tags"
    _, (line,) = run(tmp_path, row)
    assert "fine" not in line["provenance"]
    _, (line,) = run(tmp_path, row | {"provenance": made}, replace=True)
    assert line["provenance"]["fine"]["by"] == "tags"
    both = row | {"global_captions": ["Another one."], "provenance": {"global": {"by": "hand"}, "fine": made}}
    _, (line,) = run(tmp_path, both)
    assert line["provenance"] == {"written_by": "tags", "global": {"by": "hand"}, "fine": made}


def test_captions_depend_on_the_seed_and_the_id_alone(tmp_path: Path) -> None:
    rows = [{"id": name, "tags": FULL} for name in "ab"]
    _, forwards = run(tmp_path, *rows)
    _, backwards = run(tmp_path, *rows[::-1])
    assert forwards == backwards[::-1]
    assert run(tmp_path, *rows, seed=1)[1] != forwards


def test_the_manifest_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "tags": FULL}])
    for out, message in ((source, "OUT must be another file"), (tmp_path / "o.json", "ends in .jsonl")):
        with pytest.raises(SystemExit) as done:
            caption.main(["tags", str(source), str(out)])
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def test_only_files_of_this_command_are_replaced(tmp_path: Path) -> None:
    first = run(tmp_path, {"tags": FULL})
    assert run(tmp_path, {"tags": FULL}) == first
    kept = {"tags": FULL, "captions": ["Written by hand."], "global_captions": ["By hand."]}
    assert run(tmp_path, kept) == run(tmp_path, kept)  # also where no line has captions of this command
    made = {"by": "tags"}
    for provenance in (None, made, {"written_by": "filter", "global": made, "fine": {"by": "generate"}}):
        row = {"audio": "b.wav", "captions": ["Written by hand."], "provenance": provenance}
        text = write_rows(tmp_path / "out.jsonl", [row]).read_text()
        with pytest.raises(ValueError, match=r"out\.jsonl exists and was not written by this command"):
            run(tmp_path, {"tags": FULL})
        assert (tmp_path / "out.jsonl").read_text() == text
