"""The filter: what it keeps, in which order, what it writes, and its counts."""

from __future__ import annotations

import json
import math
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from caption_jobs import CLIP, failure, good, make_verdicts, make_work

from clsp_fast import __version__, caption
from clsp_fast.captioning.answers import ANSWERS, custom_id
from clsp_fast.captioning.filter import CAPTIONS, COUNTS, FilterConfig, filter
from clsp_fast.captioning.rules import default_rules
from clsp_fast.console import INCOMPLETE
from clsp_fast.data.manifest import iterate_manifest, read_manifest


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / CAPTIONS).read_text().splitlines()]


def counts_of(work: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((work / COUNTS).read_text())
    return values


def test_kept_captions_are_sorted_by_length_and_reasons_are_counted(tmp_path: Path) -> None:
    texts = [
        good("Ann", 300),
        good("Bea", 150),
        "short",
        good("Cid") + "\nMore.",
        good("She does not shout and"),
        good("The first speaker"),
        good('He says "hello" and'),
        good("x", 800),
        "<think>no</think>",
        None,
        good("BEA", 150),
        f"<think>Is there no hurry?</think>\n{good('Dan', 200)}",
    ]
    work = make_work(tmp_path, [CLIP], {0: texts})
    assert filter(FilterConfig(work=work)) == 0
    (line,) = lines_of(work)
    assert line["finegrained_captions"] == [good("BEA", 150), good("Dan", 200), good("Ann", 300)]
    counts = counts_of(work)
    assert counts["candidates"] == {"total": 12, "kept": 3, "dropped": 9}
    once = dict.fromkeys(("newline", "negation", "speakers", "quotation", "long", "repeated", "short"), 1)
    assert counts["first_reasons"] == {"empty": 2} | once
    assert counts["all_reasons"] == counts["first_reasons"]
    assert counts["candidates_per_clip"] == {"12": 1}
    assert counts["captions_per_clip"] == {"3": 1}
    assert sum(counts["characters"]["all"].values()) == 10
    assert counts["characters"]["kept"] == {"4": 1, "6": 1, "9": 1}


def test_a_candidate_with_several_faults_counts_once_as_first(tmp_path: Path) -> None:
    work = make_work(tmp_path, [CLIP], {0: ['no "speakers"\n here', good("Ann")]})
    assert filter(FilterConfig(work=work)) == 0
    counts = counts_of(work)
    assert counts["first_reasons"] == {"short": 1}
    assert counts["all_reasons"] == dict.fromkeys(
        ("negation", "newline", "quotation", "short", "speakers"), 1
    )


def test_truncated_candidates_are_dropped(tmp_path: Path) -> None:
    work = make_work(tmp_path, [CLIP], {0: [good("Ann"), good("Bea")]}, reasons=["length", "stop"])
    assert filter(FilterConfig(work=work)) == 0
    assert lines_of(work)[0]["finegrained_captions"] == [good("Bea")]
    assert counts_of(work)["first_reasons"] == {"truncated": 1}


def test_keep_limits_the_captions_and_min_captions_the_clips(tmp_path: Path) -> None:
    texts = {0: [good("Ann", 130 + i) for i in range(20)], 1: [good("Bea")]}
    work = make_work(tmp_path, [CLIP, CLIP | {"id": "b"}], texts)
    assert filter(FilterConfig(work=work)) == 0
    assert [len(line["finegrained_captions"]) for line in lines_of(work)] == [14, 1]
    assert counts_of(work)["first_reasons"] == {"surplus": 6}
    assert filter(FilterConfig(work=work, keep=5, min_captions=2, longest=True)) == 0
    (line,) = lines_of(work)
    assert [len(text) for text in line["finegrained_captions"]] == [149, 148, 147, 146, 145]
    counts = counts_of(work)
    assert counts["first_reasons"] == {"surplus": 15, "too few in the clip": 1}
    assert counts["clips"] == {"total": 2, "kept": 1, "without captions": 1}
    assert counts["candidates"] == {"total": 21, "kept": 5, "dropped": 16}


def test_clips_without_answers_or_captions_are_left_out(tmp_path: Path) -> None:
    clips = [CLIP | {"id": name} for name in "abcd"]
    work = make_work(tmp_path, clips, {1: [good("Ann")], 2: ["short"]})
    with (work / "generate" / ANSWERS).open("a") as file:
        file.write(json.dumps(failure(custom_id("generate", 0, "a"))) + "\n")
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    assert [line["id"] for line in lines_of(work)] == ["b"]
    expected = {"total": 4, "kept": 1, "without captions": 1, "without answer": 2}
    assert counts_of(work)["clips"] == expected
    assert counts_of(work)["audio_s"] == {"total": 8.0, "asked": 8.0, "kept": 2.0}


def test_only_the_rows_that_were_asked_for_are_counted(tmp_path: Path) -> None:
    """A shard, then a second one in the same folder, and clips that were too long to be sent."""
    clips: list[dict[str, Any]] = [CLIP | {"id": f"c{i}"} for i in range(100)]
    clips[12]["duration_s"], clips[13] = 40.0, {"no": "audio"}
    texts = {row: [good("Ann")] for row in (10, 11, 50)}
    work = make_work(tmp_path, clips, texts, asked=(10, 15), max_clip_s=30.0)
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    counts = counts_of(work)
    assert counts["rows"] == [[10, 15]]
    assert counts["clips"] == {"total": 5, "kept": 2, "too long": 1, "bad lines": 1, "without answer": 1}
    assert counts["audio_s"] == {"total": 46.0, "asked": 6.0, "kept": 4.0}
    make_work(tmp_path, clips, texts, asked=(50, 52), max_clip_s=30.0)
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    counts = counts_of(work)
    assert counts["rows"] == [[10, 15], [50, 52]]
    assert (counts["clips"]["total"], counts["clips"]["without answer"]) == (7, 2)
    assert counts["audio_s"] == {"total": 50.0, "asked": 10.0, "kept": 6.0}
    assert [line["id"] for line in lines_of(work)] == ["c10", "c11", "c50"]


def test_clips_without_a_stated_duration_are_too_long_as_for_generate(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name, seconds in (("a", 31), ("b", 2)):
        soundfile.write(tmp_path / f"clips/{name}.wav", np.zeros(seconds * 8000), 8000)
    clips: list[dict[str, Any]] = [{"audio": f"clips/{name}.wav"} for name in "abc"]
    clips += [clips[0] | {"id": "end", "start_s": 20.0}, CLIP | {"id": "d"}]
    work = make_work(tmp_path, clips, {4: [good("Ann")]}, max_clip_s=30.0)
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    assert counts_of(work)["clips"] == {"total": 5, "kept": 1, "too long": 1, "without answer": 3}


def test_verdicts_drop_candidates_by_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [good(name) for name in ("Ann", "Bea", "Cid", "Dan", "Eve")]
    work = make_work(tmp_path, [CLIP], {0: [*texts, "short"]})
    assert filter(FilterConfig(work=work)) == 0
    assert lines_of(work)[0]["provenance"]["fine"]["verifier"] is None
    verdicts = {(0, 0): [], (0, 1): ["absence"], (0, 2): ["background", "absence"], (0, 3): None}
    make_verdicts(work, verdicts)
    capsys.readouterr()
    assert filter(FilterConfig(work=work)) == 3
    assert "1 candidates have no verdict yet: run `verify` again" in capsys.readouterr().err
    (line,) = lines_of(work)
    assert line["finegrained_captions"] == [good("Ann")]
    counts = counts_of(work)
    # Candidate 3 has an answer that is no verdict, and candidate 4 none.
    expected = {"unverified": 1, "without verdict": 1, "short": 1}
    expected |= {"verifier: absence": 1, "verifier: background": 1}
    assert counts["first_reasons"] == expected
    assert counts["all_reasons"] == expected | {"verifier: absence": 2}
    assert line["provenance"]["fine"]["verifier"] == {
        "model": "verify-model",
        "prompt_digest": "verify-digest",
        "seed": 3,
    }


def test_the_result_does_not_depend_on_the_order_of_answers(tmp_path: Path) -> None:
    clips = [CLIP | {"id": f"c{i}"} for i in range(30)]
    texts = {i: [good(f"Ann {i}", 130 + (7 * i + j) % 50) for j in range(i % 4)] for i in range(30)}
    order = [row for row in texts if texts[row]]
    results = []
    for seed in range(3):
        random.Random(seed).shuffle(order)
        work = make_work(tmp_path, clips, texts, work=tmp_path / f"work{seed}", order=order)
        verdicts = [(row, n) for row in order for n in range(len(texts[row]))]
        random.Random(seed).shuffle(verdicts)
        make_verdicts(work, {key: ["absence"] if sum(key) % 5 == 0 else [] for key in verdicts})
        assert filter(FilterConfig(work=work)) == INCOMPLETE
        results.append(((work / CAPTIONS).read_bytes(), (work / COUNTS).read_bytes()))
    assert results[0] == results[1] == results[2]


def test_global_captions_keep_their_provenance(tmp_path: Path) -> None:
    captions = ["A woman speaks slowly and calmly, in a low voice."]
    made = {"by": "tags", "seed": 3}
    clips = [
        CLIP | {"id": "a", "global_captions": captions, "provenance": {"written_by": "tags", "global": made}},
        CLIP | {"id": "b", "captions": captions, "provenance": {"fine": made}},
        CLIP | {"id": "c", "global_captions": captions},
        CLIP | {"id": "d", "global_captions": ["short"], "provenance": made},
    ]
    work = make_work(tmp_path, clips, {row: [good("Ann")] for row in range(4)})
    assert filter(FilterConfig(work=work)) == 0
    for row, line in enumerate(lines_of(work)):
        assert line["provenance"]["fine"]["by"] == "generate"
        assert line["provenance"]["written_by"] == "filter"
        assert line["provenance"].get("global") == (made if row == 0 else None)


def test_lines_keep_the_clip_and_say_where_captions_come_from(tmp_path: Path) -> None:
    clip = CLIP | {
        "start_s": 1.5,
        "channel": 1,
        "speaker": "s1",
        "gender": "female",
        "tags": {"accent": "Indian", "speed": "slow"},
        "global_captions": [
            "A woman (laughs) speaks with a British accent .",
            "short",
            "Caption: a woman speaks slowly, in a low and warm voice",
            "A woman speaks slowly and calmly, in a low voice.",
        ],
        "claims": {"global": [{"speed": "a"}, {"speed": "b"}, {"speed": "c"}, {"speed": "d"}]},
        "finegrained_captions": ["an earlier caption"],
    }
    work = make_work(tmp_path, [clip], {0: [good("Ann")]})
    assert filter(FilterConfig(work=work)) == 0
    (line,) = lines_of(work)
    assert line.pop("provenance")["fine"] == {
        "by": "generate",
        "version": __version__,
        "model": "generate-model",
        "prompt_digest": "generate-digest",
        "seed": 3,
        "sampling": {"temperature": 0.6},
        "rules": "1",
        "rules_digest": default_rules().digest,
        "verifier": None,
    }
    assert line == {
        "id": "a",
        "audio": "../clips/a.wav",
        "start_s": 1.5,
        "duration_s": 2.0,
        "channel": 1,
        "speaker": "s1",
        "gender": "female",
        "tags": {"accent": "Indian", "speed": "slow"},
        "global_captions": [
            "A woman speaks with an Indian accent.",
            "A woman speaks slowly, in a low and warm voice.",
        ],
        "finegrained_captions": [good("Ann")],
        "claims": {"global": [{"speed": "a"}, {"speed": "c"}]},
    }
    assert counts_of(work)["global_captions"] == {"kept": 2, "short": 1, "surplus": 1}
    manifest = read_manifest(work / CAPTIONS)
    assert not manifest.problems
    assert not manifest.unknown
    assert Path(manifest.clips[0].audio).resolve() == (tmp_path / "clips/a.wav").resolve()
    assert manifest.clips[0].tags["gender"] == "female"


def test_audio_paths_lead_to_the_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work folders beside, within and around the corpus, behind a link, and a relative manifest."""
    corpus, outside = tmp_path / "corpus", tmp_path / "elsewhere" / "deep"
    for folder in (corpus / "clips", outside):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(outside)
    recordings = [corpus / "clips/a.wav", corpus / "b \u00e9.wav", outside / "c.wav"]
    for path in recordings:
        path.touch()
    clips = [
        {"id": "a", "audio": "clips/a.wav"},
        {"id": "b", "audio": "./clips/../b \u00e9.wav"},
        {"id": "c", "audio": str(outside / "c.wav")},
    ]
    texts = {row: [good("Ann")] for row in range(3)}
    monkeypatch.chdir(tmp_path)
    for work in (corpus / "work", tmp_path, tmp_path / "link/work", Path("corpus/other"), outside / "w"):
        made = make_work(Path("corpus"), clips, texts, work=work)
        assert filter(FilterConfig(work=made)) == 0
        read = [clip for _, clip in iterate_manifest(made / CAPTIONS)]
        for clip, path in zip(read, recordings, strict=True):
            assert Path(clip.audio).samefile(path)  # type: ignore[union-attr]
        relative = [not Path(line["audio"]).is_absolute() for line in lines_of(made)]
        nested = "corpus" in str(work) or work == tmp_path
        assert relative[:2] == [nested, nested]
        (made / "generate" / "job.json").unlink()


def test_lhotse_cuts_become_lines(tmp_path: Path) -> None:
    cut = {
        "id": "cut-1",
        "type": "MonoCut",
        "start": 0.5,
        "duration": 1.5,
        "channel": 0,
        "recording": {
            "id": "r",
            "sources": [{"type": "file", "channels": [0], "source": "r.wav"}],
            "sampling_rate": 16000,
            "num_samples": 32000,
            "duration": 2.0,
        },
        "supervisions": [{"speaker": "s", "gender": "M", "text": "hello", "custom": {"accent": "Welsh"}}],
    }
    (tmp_path / "r.wav").touch()
    work = make_work(tmp_path, [cut], {0: [good("Ann")]})
    assert filter(FilterConfig(work=work)) == 0
    (line,) = lines_of(work)
    assert (line["id"], line["audio"], line["start_s"], line["duration_s"]) == ("cut-1", "../r.wav", 0.5, 1.5)
    assert (line["speaker"], line["gender"], line["tags"]) == ("s", "M", {"accent": "Welsh"})


def test_bad_lines_are_counted_and_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    clips = [{"no": "audio"}, CLIP | {"audio": "caf\udce9.wav"}]
    work = make_work(tmp_path, clips, {1: [good("Ann")]})
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    assert counts_of(work)["clips"]["bad lines"] == 1
    assert read_manifest(work / CAPTIONS).clips[0].audio.endswith("caf\udce9.wav")


def test_without_captions_an_earlier_manifest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = make_work(tmp_path, [CLIP], {0: ["short"]})
    (work / CAPTIONS).write_text("earlier\n")
    with pytest.raises(SystemExit) as done:
        caption.main(["filter", str(work)])
    assert done.value.code == 1
    assert "was not written: no clip has captions" in capsys.readouterr().err
    assert (work / CAPTIONS).read_text() == "earlier\n"
    assert counts_of(work)["first_reasons"] == {"short": 1}


def test_repeated_ids_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [CLIP | {"id": name} for name in "abab"] + [CLIP | {"id": "c"}]
    texts = {0: [good("Ann")], 1: ["short"], 2: [good("Bea")], 3: [good("Cid")], 4: [good("Dan")]}
    work = make_work(tmp_path, clips, texts)
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    shown = capsys.readouterr()
    assert "repeated ids: 1" in shown.out
    assert "left out: 1 clips with the id of an earlier clip; give each line of" in shown.err
    # The first "b" has no captions, so that the second one is kept.
    lines = [(line["id"], line["finegrained_captions"][0][:3]) for line in lines_of(work)]
    assert lines == [("a", "Ann"), ("b", "Cid"), ("c", "Dan")]
    counts = counts_of(work)
    assert counts["clips"] == {"total": 5, "kept": 3, "without captions": 1, "repeated ids": 1}
    assert counts["candidates"] == {"total": 4, "kept": 3, "dropped": 1}
    manifest = read_manifest(work / CAPTIONS)
    assert (len(manifest.clips), manifest.problems) == (3, [])


def test_clips_without_some_of_their_answers_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = make_work(tmp_path, [CLIP], {0: [good("Ann")]})
    record = json.loads((work / "generate/job.json").read_text())
    (work / "generate/job.json").write_text(json.dumps(record | {"parts": 2}))
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    assert "answered in part: 1" in capsys.readouterr().out
    assert counts_of(work)["partly_answered"] == 1


def test_rules_of_a_user_and_limits(tmp_path: Path) -> None:
    work = make_work(tmp_path, [CLIP], {0: ["A man without haste speaks.", good("Ann")]})
    rules = tmp_path / "rules.json"
    rules.write_text('{"version": "mine", "words": {"haste": ["hasty"]}, "quotation_marks": ""}')
    assert filter(FilterConfig(work=work, rules=rules, min_characters=10, max_characters=100)) == 0
    (line,) = lines_of(work)
    assert line["finegrained_captions"] == ["A man without haste speaks."]
    assert line["provenance"]["fine"]["rules"] == "mine"
    assert counts_of(work)["first_reasons"] == {"long": 1}
    assert counts_of(work)["rules"]["min_characters"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep must be an integer > 0"),
        ({"keep": 3, "min_captions": 4}, r"min_captions must be in \[1, 3\]"),
        ({"rules": Path("none.json")}, r"none\.json"),
        ({"manifest": Path("none.jsonl")}, r"none\.jsonl does not exist"),
        ({"min_characters": 1000}, "min_characters must be <= max_characters"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    work = make_work(tmp_path, [CLIP], {0: [good("Ann")]})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        filter(FilterConfig(work=work, **change))


def test_a_folder_without_a_job_and_a_changed_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no job"):
        filter(FilterConfig(work=tmp_path))
    work = make_work(tmp_path, [CLIP], {0: [good("Ann")]})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="has changed since `generate` read it"):
        filter(FilterConfig(work=work))


def test_the_manifest_that_generate_read_is_never_replaced(tmp_path: Path) -> None:
    work = make_work(tmp_path, [{"audio": "a.wav"}], {0: [good("a")]})
    source = (tmp_path / "m.jsonl").read_bytes()
    (work / "captions.jsonl").write_bytes(source)
    with pytest.raises(ValueError, match=r"captions\.jsonl is the manifest that generate read"):
        filter(FilterConfig(work=work, manifest=work / "captions.jsonl"))
    assert (work / "captions.jsonl").read_bytes() == source


def test_filter_says_if_verify_had_other_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = make_work(tmp_path, [CLIP], {0: [good("Ann"), good("Bea", 120)]})
    make_verdicts(work, {(0, 0): []}, rules_digest=default_rules().digest)
    assert filter(FilterConfig(work=work)) == 0
    assert "verdict" not in capsys.readouterr().err
    assert filter(FilterConfig(work=work, min_characters=100)) == 3
    message = capsys.readouterr().err
    digest = default_rules().digest
    assert (
        f"1 candidates have no verdict, maybe because `verify` last ran with other rules ({digest})"
        in message
    )
    assert "run both with the same --rules, --min-characters and --max-characters" in message


def test_a_verifier_that_has_not_answered_is_no_verifier(tmp_path: Path) -> None:
    work = make_work(tmp_path, [CLIP], {0: [good("Ann")]})
    make_verdicts(work, {})
    assert filter(FilterConfig(work=work)) == 0
    assert lines_of(work)[0]["provenance"]["fine"]["verifier"] is None


def test_verdicts_on_other_candidates_are_refused(tmp_path: Path) -> None:
    """The folder of `generate` was deleted and made again with the same settings."""
    work = make_work(tmp_path, [CLIP], {0: [good("Ann")]})
    make_verdicts(work, {(0, 0): []})
    shutil.rmtree(work / "generate")
    make_work(tmp_path, [CLIP], {0: [good("Bea")]})
    with pytest.raises(ValueError, match=r"belong to other candidates .* delete .* and run `verify`"):
        filter(FilterConfig(work=work))


def test_late_rows_need_no_more_memory_than_early_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array over all rows would hold 2.4 MB for the answers and 96 MB for the verdicts."""
    rules = default_rules()  # reading them takes more memory than the rest
    monkeypatch.setattr("clsp_fast.captioning.filter.read_rules", lambda *_, **__: rules)
    peaks = []
    for first in (0, 300_000):
        folder = tmp_path / str(first)
        folder.mkdir()
        clips = [CLIP | {"id": f"c{i}"} for i in range(20)]
        rows = range(first, first + 20)
        work = make_work(
            folder, clips, {row: [good("Ann")] for row in rows}, blank_lines=first, asked=(first, math.inf)
        )
        make_verdicts(work, {(row, 0): [] for row in rows})
        tracemalloc.start()
        assert filter(FilterConfig(work=work)) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(lines_of(work)) == 20
    assert peaks[0] > 10_000
    assert peaks[1] < peaks[0] + 1_500_000
