"""Values of tags that say nothing are recognised in the same way wherever tags are used."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_data import write_rows

from clsp_fast.captioning.generate import describe_tags
from clsp_fast.captioning.offline import known_labels
from clsp_fast.captioning.tags import TagsConfig, tags
from clsp_fast.data.audit import audit
from clsp_fast.data.caption_text import normalise
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.data.tag_values import is_unknown, sex_of, stated

UNKNOWN = ["", " ", "-", "?", "u", "unknown", "Unknown", "NaN", "n/a", "N/A", "none", "null", "<unk>"]
UNKNOWN += ["(unknown)", "not_specified", "Not  available", "unlabelled", "'None'"]
OTHER = ["other", "Others", "[other]"]


@pytest.mark.parametrize("value", [*UNKNOWN, *OTHER, "unknown, nan"])
def test_placeholders_are_neither_told_to_a_model_nor_written(value: str, tmp_path: Path) -> None:
    assert stated(value) == ""
    assert describe_tags({"accent": value, "mood": "sad"}, ("accent", "mood")) == "mood: sad"
    assert normalise("A man with a British accent.", accent=value) == "A man with a British accent."
    source = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "tags": {"accent": value}}])
    with pytest.raises(ValueError, match="no clip has a usable tag"):
        tags(TagsConfig(manifest=source, out=tmp_path / "out.jsonl"))


@pytest.mark.parametrize("value", UNKNOWN)
def test_an_unknown_sex_is_measured_and_another_one_is_left_open(value: str) -> None:
    assert is_unknown(value)
    clip = Clip("a", "a.wav", 0.0, None, None, Captions((), ()), {"gender": value})
    assert known_labels(clip) == {}
    for other in OTHER:
        assert not is_unknown(other)
        clip = Clip("a", "a.wav", 0.0, None, None, Captions((), ()), {"gender": other})
        assert known_labels(clip) == {"sex": ""}


def test_values_that_say_something_are_kept() -> None:
    assert stated("South\n African") == "South African"
    assert stated("sad, unknown, whispered") == "sad, whispered"
    assert stated("sad,unknown") == "sad"
    for value in ("Indian", "unknown language", "none of these", "British, Indian", "nanny", "US"):
        assert stated(value) == value
    assert [sex_of(value) for value in ("F", "woman", " Male", "BOY", "other", "unknown", "")] == [
        *("female", "female", "male", "male", "", "", ""),
    ]


def test_the_audit_expects_no_placeholder_in_captions() -> None:
    rows = [("angry", "An unknown person sighs."), ("unknown", "Someone sighs.")] * 40
    clips = [
        Clip(str(i), "a.wav", 0.0, None, None, Captions((), (text,)), {"mood": mood})
        for i, (mood, text) in enumerate(rows)
    ]
    assert not any("shifted" in line or "contradict" in line for line in audit(clips).warnings)
