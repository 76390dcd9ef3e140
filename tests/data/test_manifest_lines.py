"""The lines that commands write, and the provenance of captions that is read from them."""

from __future__ import annotations

import json
from pathlib import Path

from sample_data import write_rows

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import KINDS, Clip, provenance_of
from clsp_fast.data.manifest import read_manifest
from clsp_fast.data.manifest_lines import first_row, manifest_line


def test_provenance_is_known_by_kind() -> None:
    both, fine = Captions(("A.",), ("B.",)), Captions((), ("B.",))
    by_kind = {"written_by": "tags", "global": {"by": "tags"}, "fine": {"by": "generate"}}
    assert provenance_of(by_kind, both) == {"global": {"by": "tags"}, "fine": {"by": "generate"}}
    assert provenance_of(by_kind, fine) == {"fine": {"by": "generate"}}
    assert provenance_of({"written_by": "tags"}, both) == {}
    assert provenance_of(None, both) == {}
    assert provenance_of({"by": "offline"}, both) == {kind: {"by": "offline"} for kind in KINDS}
    assert provenance_of("a paper", fine) == {"fine": "a paper"}


def test_clips_share_their_provenance(tmp_path: Path) -> None:
    made = {"by": "generate", "sampling": {"temperature": 0.6}}
    rows = [{"audio": "a.wav", "captions": ["B."], "provenance": {"fine": made}}] * 100
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    clips = read_manifest(manifest, need_captions=False).clips
    assert clips[0].provenance == {"fine": made}
    assert len({id(clip.provenance) for clip in clips}) == 1
    assert read_manifest(manifest).clips[0].provenance == {}  # training has no use for it


def test_a_line_that_is_read_again_gives_the_same_clip(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "audio": "b.wav",
        "start_s": 1.5,
        "duration_s": 2.0,
        "channel": 1,
        "speaker": "s",
        "gender": "F",
        "global_captions": ["A."],
        "finegrained_captions": ["B.", "C."],
        "tags": {"accent": "Indian"},
        "claims": {"fine": [{"accent": "Indian"}, {}]},
        "provenance": {"written_by": "tags", "fine": {"by": "generate"}},
    }
    (clip,) = read_manifest(write_rows(tmp_path / "m.jsonl", [row]), need_captions=False).clips
    line = manifest_line(
        clip,
        audio="b.wav",
        captions=clip.captions,
        claims=clip.claims,
        tags=clip.tags,
        made_by={"global": {"by": "hand"}},
        written_by="filter",
    )
    row["provenance"] = {"written_by": "filter", "global": {"by": "hand"}, "fine": {"by": "generate"}}
    assert line == row


def test_keys_without_a_value_are_left_out() -> None:
    clip = Clip("a", "a.wav", 0.0, None, None, Captions((), ("B.",)), provenance={"global": {"by": "hand"}})
    line = manifest_line(
        clip,
        audio="a.wav",
        captions=clip.captions,
        claims={"global": [], "fine": []},
        tags={},
        made_by={},
        written_by="tags",
        duration_s=3.0,
    )
    assert line == {
        "id": "a",
        "audio": "a.wav",
        "duration_s": 3.0,
        "finegrained_captions": ["B."],
        "provenance": {"written_by": "tags"},
    }


def test_the_first_row_of_any_file(tmp_path: Path) -> None:
    for text, row in ((json.dumps({"a": 1}) + "\n[]\n", {"a": 1}), ("[1]\n", {}), ("notes\n", {}), ("", {})):
        (tmp_path / "file").write_text(text)
        assert first_row(tmp_path / "file") == row
