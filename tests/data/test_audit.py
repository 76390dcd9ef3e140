"""The audit of captions: it finds each kind of mistake, and raises no false alarm on correct captions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsp_fast.captioning import wording
from clsp_fast.data import audit as audit_module
from clsp_fast.data.__main__ import main
from clsp_fast.data.audit import audit, caption_fault
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip

OTHER = {"female": "male", "male": "female"}


def corpus(count: int, seed: int = 0) -> list[Clip]:
    """Clips with random labels, and captions that fit them."""
    rng = np.random.default_rng(seed)
    clips = []
    for i in range(count):
        tags = {key: str(rng.choice(labels)) for key, labels in wording.ATTRIBUTES.items()}
        written = wording.captions(tags, rng)
        tags = tags | {"gender": tags["sex"], "speaker": f"s{i // 7}"}
        del tags["sex"]
        captions = Captions(tuple(written.global_captions), tuple(written.fine_captions))
        clips.append(Clip(f"clip{i:05d}", f"{i}.wav", 0.0, None, None, captions, tags))
    return clips


def shifted(clips: list[Clip], offset: int, first: int = 0) -> list[Clip]:
    """From `first` on, each clip has the captions of the clip `offset` rows further down."""
    return [
        dataclasses.replace(clip, captions=clips[(i + offset) % len(clips)].captions) if i >= first else clip
        for i, clip in enumerate(clips)
    ]


def with_fine(clip: Clip, *captions: str) -> Clip:
    return dataclasses.replace(clip, captions=Captions((), captions))


@pytest.mark.parametrize("count", [1, 2, 10, 40, 300])
@pytest.mark.parametrize("seed", [0, 1])
def test_correct_captions_raise_no_alarm(count: int, seed: int) -> None:
    result = audit(corpus(count, seed))
    assert (result.count, result.findings, result.warnings) == (0, [], [])


@pytest.mark.parametrize("count", [24, 300])
@pytest.mark.parametrize(("offset", "direction"), [(1, "1 below"), (-1, "1 above"), (2, "2 below")])
def test_shifted_captions_are_noticed(count: int, offset: int, direction: str) -> None:
    (warning,) = audit(shifted(corpus(count), offset)).warnings
    assert "captions seem to be shifted: of" in warning
    assert direction in warning


def test_a_shift_that_begins_at_a_lost_line_is_noticed() -> None:
    (warning,) = audit(shifted(corpus(300), -1, first=200)).warnings
    assert "shifted from clip 2" in warning
    assert "1 above" in warning


def test_the_sex_alone_shows_a_shift() -> None:
    clips = [dataclasses.replace(c, tags={"gender": c.tags["gender"][0].upper()}) for c in corpus(100)]
    assert audit(clips).warnings == []
    assert "shifted" in audit(shifted(clips, 1)).warnings[0]


def test_accents_show_a_shift() -> None:
    rng = np.random.default_rng(0)
    accents = [str(a) for a in rng.choice(["Scottish", "Indian", "South African", "Welsh"], 60)]
    clips = [
        Clip(f"c{i}", "a", 0.0, None, None, Captions((f"Speech {i} in a {a} accent.",), ()), {"accent": a})
        for i, a in enumerate(accents)
    ]
    assert audit(clips).warnings == []
    assert "shifted" in audit(shifted(clips, 1)).warnings[0]


def test_unrelated_captions_are_no_shift() -> None:
    for seed in range(5):
        clips = corpus(200, seed)
        order = np.random.default_rng(seed).permutation(len(clips))
        mixed = [
            dataclasses.replace(c, captions=clips[i].captions) for c, i in zip(clips, order, strict=True)
        ]
        assert not any("shifted" in warning for warning in audit(mixed).warnings)


def test_a_tag_that_captions_contradict_is_named() -> None:
    clips = [dataclasses.replace(c, tags={"gender": OTHER[c.tags["gender"]]}) for c in corpus(100)]
    (warning,) = audit(clips).warnings
    assert warning == "captions contradict the tag 'sex' in 100 of 100 clips whose captions mention it"


USELESS = """
label|N/A|n/a.|TODO|Caption:|(none)|[laughs]|...|()|\u200b.|NaN|**label**|A {emotion} voice|a ${tag} voice
a {{x}} voice|a <emotion> voice|a [insert accent] voice|The probability of a happy voice is 0.9.
The label is happy.|Lorem ipsum dolor sit amet.|A %s man|A man speaks, TODO|(Note: nothing is heard)
The caption says a man speaks.|pitch: N/A
"""
ORDINARY = """
A man speaks (softly).|A man who is labelled by no one, probably.|A 100% lively voice.|nana|¡Todo bien!
A woman speaks; please note her tone.|A sample of sorrow in her unknown, empty voice.|She costs $5.
"""


def listed(text: str) -> list[str]:
    return text.strip().replace("\n", "|").split("|")


@pytest.mark.parametrize("caption", listed(USELESS))
def test_useless_captions_are_findings(caption: str) -> None:
    clips = corpus(5)
    clips[3] = with_fine(clips[3], "A man speaks slowly.", caption)
    result = audit(clips)
    assert result.count == 1
    assert result.findings[0].startswith("clip clip00003: ")
    assert caption[:20] in result.findings[0] or "\\u200b" in result.findings[0]


@pytest.mark.parametrize("caption", listed(ORDINARY))
def test_ordinary_captions_are_no_findings(caption: str) -> None:
    assert caption_fault(caption) == ""


def test_the_list_of_measured_labels_is_no_label() -> None:
    clips = [
        with_fine(Clip(str(i), "a.wav", 0.0, None, None, Captions((), ()), {"measured_labels": name}), text)
        for i in range(40)
        for name, text in (("speed", "The loudness is low."), ("loudness", "The speed is low."))
    ]
    assert not [text for text in audit(clips).warnings if "measured_labels" in text or "fit" in text]


def test_lists_are_bounded() -> None:
    clips = [with_fine(clip, "label") for clip in corpus(1000)]
    result = audit(clips)
    assert result.count == 1000
    assert len(result.findings) == audit_module.MOST_SHOWN + 1
    assert result.findings[-1] == "and 980 more: a placeholder instead of a caption"
    clips = [
        with_fine(clip, *(f"A man speaks {i} {j}" for j in range(9))) for i, clip in enumerate(corpus(99))
    ]
    clips = [with_fine(clip, *clips[i % 3].captions.fine_captions) for i, clip in enumerate(clips)]
    assert len(audit(clips).warnings) < 10


def test_captions_of_many_clips_are_named() -> None:
    clips = corpus(200)
    clips = [
        with_fine(c, "A man speaks.", *c.captions.fine_captions) if i % 4 == 0 else c
        for i, c in enumerate(clips)
    ]
    (warning,) = audit(clips).warnings
    assert warning == "50 of 200 clips share a fine-grained caption: 'a man speaks.'"


def test_nearly_equal_captions_of_a_clip_are_named() -> None:
    clips = corpus(20)
    clips[7] = with_fine(clips[7], "A man speaks, slowly and low.", "a man speaks slowly and low")
    clips = clips[:10]
    (warning,) = audit(clips).warnings
    assert "hold two of nearly the same words; clip clip00007" in warning


def test_ids_of_other_clips_in_captions_are_named() -> None:
    clips = corpus(30)
    clips = [with_fine(c, f"{clips[i - 1].id}: a voice, number {i}") for i, c in enumerate(clips)]
    assert any("name the id of another clip 30 times" in w and "1 above" in w for w in audit(clips).warnings)
    clips = [with_fine(c, f"{c.id}: a voice, number {i}") for i, c in enumerate(clips)]
    assert not any("name the id" in warning for warning in audit(clips).warnings)


def run_validate(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as done:
        main(["validate", str(path)])
    return done.value.code, capsys.readouterr().out


def write_manifest(path: Path, clips: list[Clip]) -> Path:
    rows = [
        {
            "id": clip.id,
            "audio": "a.wav",
            "tags": dict(clip.tags),
            "global_captions": clip.captions.global_captions,
            "finegrained_captions": clip.captions.fine_captions,
        }
        for clip in clips
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "a.wav").touch()
    return path


def test_validate_fails_for_findings_and_not_for_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = corpus(40)
    code, shown = run_validate(write_manifest(tmp_path / "m.jsonl", clips), capsys)
    assert code == 0
    assert shown.endswith("\n0 findings\n")
    code, shown = run_validate(write_manifest(tmp_path / "m.jsonl", shifted(clips, 1)), capsys)
    assert code == 0
    assert "\nwarning: captions seem to be shifted" in shown
    assert shown.endswith("\n0 findings, 1 warning\n")
    clips[1] = with_fine(clips[1], "label")
    code, shown = run_validate(write_manifest(tmp_path / "m.jsonl", clips), capsys)
    assert code == 1
    assert "clip clip00001: a placeholder instead of a caption: 'label'" in shown
    assert shown.endswith("\n1 finding\n")


@given(
    st.lists(st.text(min_size=1, max_size=80), max_size=8), st.dictionaries(st.text(), st.text(), max_size=4)
)
def test_any_caption_and_tag_can_be_audited(captions: list[str], tags: dict[str, str]) -> None:
    clips = [
        Clip(str(i), "a", 0.0, None, None, Captions((text,), tuple(captions)), tags)
        for i, text in enumerate(captions)
    ]
    result = audit(clips)
    assert (result.count > 0) == bool(result.findings)
