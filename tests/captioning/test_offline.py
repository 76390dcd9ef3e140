"""The offline captioner: sources, captions, tags, recordings that are left out, and determinism."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
from sample_data import write_rows

from clsp_fast import __version__, caption, console
from clsp_fast.captioning import offline as offline_module
from clsp_fast.captioning import wording
from clsp_fast.captioning.labels import FIXED
from clsp_fast.captioning.offline import caption_offline, describe, left_out_file, offline
from clsp_fast.captioning.rules import default_rules
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import read_manifest

RATE_HZ = 16_000


def voice(
    f0_hz: float, rate: float = 4.0, level: float = 0.1, seconds: float = 1.5, tract: float = 1.0
) -> np.ndarray:
    """Syllables of a vowel. A long vocal tract (a man's) has `tract` 1, a short one more."""
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(f0_hz * (1 + 0.09 * np.sin(2 * np.pi * 0.8 * t))) / RATE_HZ
    x = np.zeros(len(t))
    for k in range(1, int(5000 / f0_hz)):
        hz = k * f0_hz
        gain = sum(1 / (1 + ((hz - tract * centre) / 90) ** 2) for centre in (500, 1500, 2500, 3500))
        x += gain * np.cos(k * phase) / (1 + hz / 1000)
    x *= 0.03 + 0.97 * (0.5 - 0.5 * np.cos(2 * np.pi * rate * t))
    x += 1e-3 * np.random.default_rng(0).standard_normal(len(t)) * np.std(x)
    return level * x / np.std(x)


def write(path: Path, x: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, RATE_HZ, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a deep and slow man, a high and fast woman, and a voice between the sexes."""
    folder = tmp_path_factory.mktemp("speech")
    write(folder / "man.wav", voice(90, rate=2.5))
    write(folder / "deep er/woman été.flac", voice(260, rate=6.0, tract=1.17, level=0.01))
    write(folder / "between.wav", voice(175, tract=1.08))
    return folder


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_folder_becomes_a_manifest_that_training_reads(
    tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "captions.jsonl"
    assert offline(str(speech), out, bands="fixed") == 0
    rows = read(out)
    assert list(rows) == ["between.wav", "deep er/woman été.flac", "man.wav"]
    man, woman, between = rows["man.wav"], rows["deep er/woman été.flac"], rows["between.wav"]
    assert man["tags"] == man["tags"] | {"sex": "male", "pitch": "low", "speed": "slow", "quality": "normal"}
    assert woman["tags"] == woman["tags"] | {
        "sex": "female",
        "pitch": "high",
        "speed": "fast",
        "loudness": "quiet",
    }
    assert "sex" not in between["tags"]
    assert man["measured"]["f0_hz"] == pytest.approx(90, rel=0.03)
    assert woman["measured"]["f0_hz"] == pytest.approx(260, rel=0.03)
    made = {"by": "offline", "version": __version__, "bands": "fixed", "seed": 0}
    assert man["provenance"] == {"written_by": "offline", "global": made, "fine": made}
    assert man["duration_s"] == 1.5
    content = read_manifest(out)
    assert not content.problems
    assert not content.unknown
    assert [Path(clip.audio) for clip in content.clips] == [speech / name for name in rows]
    printed = capsys.readouterr().out
    assert "captions for 3 clips" in printed
    assert "0 from the manifest, 2 measured, 1 left open" in printed
    assert "x real time" in printed
    assert not left_out_file(out).exists()


def test_captions_claim_what_the_tags_say_and_keep_the_rules(tmp_path: Path, speech: Path) -> None:
    caption_offline(str(speech), tmp_path / "a.jsonl", bands="fixed")
    for row in read(tmp_path / "a.jsonl").values():
        texts = row["global_captions"] + row["finegrained_captions"]
        claims = row["claims"]["global"] + row["claims"]["fine"]
        assert len(texts) == len(claims) == len(set(texts))
        assert 1 <= len(row["global_captions"]) <= 2
        assert 5 <= len(row["finegrained_captions"]) <= 14
        assert all(claim and wording.satisfies(row["tags"], claim) for claim in claims)
        assert not {rule for text in texts for rule in default_rules().broken(text)} - {"short"}
        assert not any(default_rules().broken_global(text) for text in row["global_captions"])
        if "sex" not in row["tags"]:
            assert not {word for text in texts for word in text.lower().split()} & {
                "man",
                "woman",
                "she",
                "he",
            }


@pytest.mark.multiproc
def test_the_result_does_not_depend_on_the_threads_and_changes_with_the_seed(
    tmp_path: Path, speech: Path
) -> None:
    results = []
    for threads, seed in ((1, 0), (3, 0), (1, 1)):
        out = tmp_path / f"{len(results)}.jsonl"
        caption_offline(str(speech), out, seed=seed, num_threads=threads)
        results.append(out.read_bytes())
    assert results[0] == results[1]
    first, other = (read(tmp_path / name) for name in ("0.jsonl", "2.jsonl"))
    for name, row in first.items():
        assert row["tags"] == other[name]["tags"]
        assert row["finegrained_captions"] != other[name]["finegrained_captions"]


def test_captions_of_a_clip_do_not_depend_on_the_other_clips(tmp_path: Path, speech: Path) -> None:
    paths = [str(speech / name) for name in ("man.wav", "between.wav")]
    (tmp_path / "two.txt").write_text("\n".join(paths))
    (tmp_path / "one.txt").write_text(paths[0])
    for name in ("two", "one"):
        caption_offline(str(tmp_path / f"{name}.txt"), tmp_path / f"{name}.jsonl", bands="fixed")
    assert read(tmp_path / "two.jsonl")[paths[0]] == read(tmp_path / "one.jsonl")[paths[0]]


def test_what_a_manifest_says_is_kept(
    tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    man = str(speech / "man.wav")
    rows = [
        {"id": "a", "audio": man, "speaker": "s1", "gender": "F", "tags": {"accent": "Czech"}},
        {"id": "b", "audio": man, "gender": "other", "tags": {"quality": "whisper"}},
        {
            "id": "c",
            "audio": man,
            "gender": "unknown",
            "start_s": 0.4,
            "duration_s": 1.0,
            "tags": {"speed": "brisk"},
        },
    ]
    out = tmp_path / "out.jsonl"
    offline(str(write_rows(tmp_path / "in.jsonl", rows)), out, bands="fixed")
    a, b, c = read(out).values()
    assert (a["speaker"], a["gender"], a["tags"]["sex"], a["tags"]["accent"]) == (
        "s1",
        "F",
        "female",
        "Czech",
    )
    assert "sex" not in b["tags"]
    assert b["tags"]["quality"] == "whisper"
    assert not {"pitch", "liveliness"} & set(b["tags"])
    assert c["tags"]["sex"] == "male"
    assert c["tags"]["speed"] == "brisk"  # kept, but captions have no words for it
    assert not any("speed" in claims for claims in c["claims"]["fine"])
    assert (c["start_s"], c["duration_s"]) == (0.4, 1.0)
    printed = capsys.readouterr().out
    assert "1 from the manifest, 1 measured, 1 left open" in printed
    assert 'captions have no words for the tag "speed" of 1 clip: it is kept, but not described' in printed


def test_captions_of_the_source_are_kept_unless_replaced(tmp_path: Path, speech: Path) -> None:
    man = str(speech / "man.wav")
    both = {"global_captions": ["A tired man."], "captions": ["A tired man sighs.", "He sighs."]}
    rows = [
        {"id": "both", "audio": man, **both},
        {"id": "one", "audio": man, "global_captions": ["A tired man."]},
    ]
    source = str(write_rows(tmp_path / "in.jsonl", rows))
    summary = caption_offline(source, tmp_path / "kept.jsonl", bands="fixed")
    assert summary.kept_captions == 2
    kept, one = read(tmp_path / "kept.jsonl").values()
    assert kept["global_captions"] == ["A tired man."]
    assert kept["finegrained_captions"] == ["A tired man sighs.", "He sighs."]
    assert kept["provenance"] == {"written_by": "offline"}
    assert one["global_captions"] == ["A tired man."]
    assert "global" not in one["claims"]
    assert len(one["finegrained_captions"]) == len(one["claims"]["fine"]) >= 5
    assert one["provenance"].keys() == {"written_by", "fine"}
    assert one["provenance"]["fine"]["by"] == "offline"
    caption_offline(source, tmp_path / "new.jsonl", bands="fixed", replace=True)
    for row in read(tmp_path / "new.jsonl").values():
        assert "A tired man." not in row["global_captions"]
        assert {row["provenance"][kind]["by"] for kind in ("global", "fine")} == {"offline"}
    assert not read_manifest(tmp_path / "kept.jsonl").problems


def test_kept_captions_keep_their_provenance(tmp_path: Path, speech: Path) -> None:
    made = {"by": "generate", "model": "m"}
    row = {"audio": str(speech / "man.wav"), "captions": ["A tired man sighs."], "provenance": {"fine": made}}
    both = row | {"global_captions": ["A tired man."], "provenance": made}
    source = str(write_rows(tmp_path / "in.jsonl", [row | {"id": "one"}, both | {"id": "both"}]))
    caption_offline(source, tmp_path / "kept.jsonl", bands="fixed")
    one, two = (line["provenance"] for line in read(tmp_path / "kept.jsonl").values())
    assert (one["fine"], one["global"]["by"]) == (made, "offline")
    assert two == {"written_by": "offline", "global": made, "fine": made}
    caption_offline(str(tmp_path / "kept.jsonl"), tmp_path / "second.jsonl", bands="fixed")
    lines = read(tmp_path / "second.jsonl").values()
    assert [line["provenance"] for line in lines] == [one, two]
    caption_offline(source, tmp_path / "second.jsonl", bands="fixed", replace=True)
    for line in read(tmp_path / "second.jsonl").values():
        assert line["provenance"]["fine"]["by"] == line["provenance"]["global"]["by"] == "offline"


def test_recordings_that_cannot_be_used_are_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    write(folder / "good.wav", voice(110))
    write(folder / "silent.wav", np.zeros(RATE_HZ))
    write(folder / "noise.wav", 0.1 * np.random.default_rng(0).standard_normal(2 * RATE_HZ))
    write(folder / "long.wav", voice(110, seconds=5.0))
    write(folder / "click.wav", np.concatenate([np.zeros(8000), voice(110, seconds=0.2), np.zeros(8000)]))
    (folder / "broken.wav").write_bytes(b"RIFF and then nothing")
    (folder / "empty.flac").write_bytes(b"")
    out = tmp_path / "out.jsonl"
    assert offline(str(folder), out, longest_s=4.0) == console.INCOMPLETE
    assert list(read(out)) == ["good.wav"]
    items = read(left_out_file(out))
    assert {name: item["reason"] for name, item in items.items()} == {
        "broken.wav": "format",
        "click.wav": "short",
        "empty.flac": "empty",
        "long.wav": "too_long",
        "noise.wav": "no_speech",
        "silent.wav": "silent",
    }
    assert items["long.wav"]["detail"] == (
        "lasts 5 s, more than the limit of 4 s; "
        "raise --longest-s, or name parts of it in a manifest with start_s and duration_s"
    )
    assert all(item["detail"] and item["audio"].startswith(str(folder)) for item in items.values())
    printed = capsys.readouterr().out
    assert "left out: 1 format" in printed
    assert str(left_out_file(out)) in printed
    (tmp_path / "one.txt").write_text(str(folder / "good.wav"))
    assert offline(str(tmp_path / "one.txt"), out) == 0
    assert not left_out_file(out).exists()


def test_bad_lines_and_repeated_recordings_are_counted(
    tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"audio": str(speech / "man.wav")}) + "\nnot json\n")
    assert offline(str(source), tmp_path / "out.jsonl") == console.INCOMPLETE
    printed = capsys.readouterr()
    assert f"{source}, line 2: not JSON" in printed.err
    assert f"1 bad line in {source}; see {left_out_file(tmp_path / 'out.jsonl')}" in printed.out
    item = read(left_out_file(tmp_path / "out.jsonl"))["line 2"]
    assert (item["audio"], item["reason"]) == ("", "bad_line")
    assert item["detail"].startswith("not JSON")
    (tmp_path / "list.txt").write_text(f"{speech / 'man.wav'}\n" * 2)
    summary = caption_offline(str(tmp_path / "list.txt"), tmp_path / "out.jsonl")
    assert [item.reason for item in summary.left_out] == ["repeated"]
    assert not read_manifest(tmp_path / "out.jsonl").problems


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    name = os.fsdecode(b"caf\xe9.wav")
    write(folder / "x.wav", voice(110)).rename(folder / name)
    caption_offline(str(folder), tmp_path / "out.jsonl")
    (clip,) = read_manifest(tmp_path / "out.jsonl").clips
    assert Path(clip.audio) == folder / name
    assert clip.id == "caf\\xe9.wav"


def test_paths_beside_the_manifest_are_relative(tmp_path: Path) -> None:
    write(tmp_path / "audio/x.wav", voice(110))
    caption_offline(str(tmp_path / "audio"), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")["x.wav"]["audio"] == "audio/x.wav"
    tmp_path.rename(tmp_path.with_name("moved"))
    (clip,) = read_manifest(tmp_path.with_name("moved") / "out.jsonl").clips
    assert Path(clip.audio).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be"),
        ({"bands": "relative"}, "bands must be"),
        ({"longest_s": 0.1}, "longest_s must be"),
        ({"num_threads": 0}, "num_threads must be"),
        ({"out": "captions.json"}, r"out must be a file whose name ends in \.jsonl"),
        ({"out": "folder.jsonl"}, r"folder\.jsonl is a folder"),
        ({"out": "other.jsonl"}, "was not written by this command"),
        ({"out": "filtered.jsonl"}, "was not written by this command"),
        ({"out": "source.jsonl"}, "is the source"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_lost(
    tmp_path: Path, speech: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "other.jsonl").write_text('{"audio": "precious.wav"}\n')
    provenance = {"written_by": "filter", "global": {"by": "offline"}}
    write_rows(tmp_path / "filtered.jsonl", [{"audio": "precious.wav", "provenance": provenance}])
    source = write_rows(tmp_path / "source.jsonl", [{"audio": str(speech / "man.wav")}])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        caption_offline(str(source), tmp_path / options.pop("out", "out.jsonl"), **options)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl") if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "my notes\n", '{"id": "a", "audio": "a.wav"}\n', None])
def test_a_foreign_list_of_left_out_recordings_is_kept(
    tmp_path: Path, speech: Path, content: str | None
) -> None:
    path = left_out_file(tmp_path / "out.jsonl")
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=r"out\.left-out\.jsonl, the list .* was not written by this command"
    ):
        caption_offline(str(speech), tmp_path / "out.jsonl")
    assert [*tmp_path.iterdir()] == [path]
    assert content is None or path.read_text() == content


def test_a_list_of_left_out_recordings_that_is_the_source_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "in" / "long.wav", voice(110, seconds=5.0))
    write(tmp_path / "in" / "man.wav", voice(110))
    caption_offline(str(tmp_path / "in"), tmp_path / "out.jsonl", longest_s=4.0)
    source = left_out_file(tmp_path / "out.jsonl")
    before = source.read_bytes()
    with pytest.raises(ValueError, match=r"out\.left-out\.jsonl is the source"):
        caption_offline(str(source), tmp_path / "out.jsonl")
    assert source.read_bytes() == before
    caption_offline(str(source), tmp_path / "more.jsonl")
    assert [*read(tmp_path / "more.jsonl")] == ["long.wav"]


def test_a_second_run_on_the_result_gives_the_same_result(tmp_path: Path, speech: Path) -> None:
    rows = [
        {"id": "a", "audio": str(speech / "man.wav"), "gender": "F", "tags": {"accent": "Czech"}},
        {"id": "b", "audio": str(speech / "man.wav"), "tags": {"quality": "whisper", "sex": "unknown"}},
        {"id": "c", "audio": str(speech / "between.wav"), "gender": "other", "tags": {"speed": "brisk"}},
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    first, second, other = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "other"))
    choices: tuple[Literal["corpus", "fixed"], ...] = ("corpus", "fixed")
    for bands in choices:
        caption_offline(str(source), first, bands=bands)
        caption_offline(str(first), second, bands=bands, replace=True)
        assert second.read_bytes() == first.read_bytes()
    assert read(first)["a"]["tags"]["sex"] == "female"
    assert "sex" not in read(first)["a"]["tags"]["measured_labels"]
    corrected = [*read(first).values()]
    for row in corrected:
        row["tags"]["loudness"] = "loud"
        row["tags"]["measured_labels"].remove("loudness")
    caption_offline(
        str(write_rows(tmp_path / "corrected.jsonl", corrected)), other, bands="fixed", replace=True
    )
    assert {row["tags"]["loudness"] for row in read(other).values()} == {"loud"}


def test_chunks_hold_about_ten_minutes() -> None:
    def sizes(durations: list[float | None], longest_s: float) -> list[int]:
        clips = [Clip(str(i), "a.wav", 0.0, s, None, Captions((), ())) for i, s in enumerate(durations)]
        return [len(chunk) for chunk in offline_module._chunks(clips, longest_s, 2)]

    assert sizes([None] * 25, 60.0) == [10, 10, 5]  # there is no such file
    assert sizes([None] * 3, 3600.0) == [1, 1, 1]
    assert sizes([5.0] * 200 + [None], 3600.0) == [120, 80, 1]
    assert sizes([4000.0, 1.0], 300.0) == [2]  # the long one will be left out
    assert sizes([0.6] * 600, 60.0) == [512, 88]


@pytest.mark.parametrize(("suffix", "size"), [("wav", 400), ("flac", 400), ("ogg", 400), ("mp3", 100)])
def test_chunks_hold_hundreds_of_short_files(tmp_path: Path, suffix: str, size: int) -> None:
    """The length of an MP3 file is estimated, and counts four times."""
    path = str(tmp_path / f"a.{suffix}")
    soundfile.write(path, voice(110), RATE_HZ)
    clips = [Clip(str(i), path, 0.0, None, None, Captions((), ())) for i in range(size + 20)]
    (first, *others) = (len(chunk) for chunk in offline_module._chunks(clips, 60.0, 2))
    assert size * 0.9 <= first <= size
    assert first + sum(others) == len(clips)
    half = [dataclasses.replace(clip, start_s=1.0) for clip in clips]
    assert len(next(offline_module._chunks(half, 60.0, 2))) == min(len(clips), 3 * first)


def test_chunks_of_long_files_stay_small(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(50 * RATE_HZ))
    clips = [Clip(str(i), str(tmp_path / "a.wav"), 0.0, None, None, Captions((), ())) for i in range(30)]
    assert [len(chunk) for chunk in offline_module._chunks(clips, 60.0, 2)] == [12, 12, 6]


def test_sources_without_speech_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "silent" / "a.wav", np.zeros(RATE_HZ))
    for name, message in (("empty", "names no recording"), ("gone", "gone"), ("silent", "1 silent")):
        with pytest.raises(SystemExit) as stopped:
            caption.main(["offline", str(tmp_path / name), str(tmp_path / "out.jsonl")])
        assert message in str(stopped.value)
        assert not (tmp_path / "out.jsonl").exists()
    assert str(tmp_path / "out.left-out.jsonl") in str(stopped.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.left-out.jsonl"]
    assert read(tmp_path / "out.left-out.jsonl")["a.wav"]["reason"] == "silent"


def test_the_command_returns_the_exit_code(
    tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "offline",
        str(speech / "man.wav"),
        str(tmp_path / "out.jsonl"),
        "--bands",
        "fixed",
        "--seed",
        "5",
    ]
    with pytest.raises(SystemExit) as stopped:
        caption.main(arguments)
    assert stopped.value.code == 0
    assert "captions for 1 clip;" in capsys.readouterr().out
    (row,) = read(tmp_path / "out.jsonl").values()
    assert row["provenance"]["fine"]["seed"] == 5


def test_an_interrupt_leaves_the_earlier_result(
    tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    offline(str(speech / "man.wav"), out)
    before = out.read_bytes()

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offline_module, "measure_rows", interrupt)
    assert offline(str(speech), out) == 130
    assert "was not written" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_the_summary_counts_every_label(tmp_path: Path, speech: Path) -> None:
    summary = caption_offline(str(speech), tmp_path / "out.jsonl", bands="fixed")
    assert all(sum(counts.values()) == summary.clips == 3 for counts in summary.labels.values())
    assert summary.labels["speed"] == {"slow": 1, "medium": 1, "fast": 1}
    assert summary.seconds == pytest.approx(4.5)
    text = describe(summary)
    assert "speed: " in text
    assert "bands of speed, syllables/s: slow 0.5 to 3.15" in text
    assert "fewer than" not in text


def test_fixed_bands_in_place_of_those_of_a_small_corpus_are_named(tmp_path: Path, speech: Path) -> None:
    summary = caption_offline(str(speech), tmp_path / "out.jsonl")
    lines = [line for line in describe(summary).splitlines() if line.startswith("bands of ")]
    assert len(lines) == 5
    assert all(line.endswith("; fixed, because fewer than 50 clips have a value") for line in lines)
    speed = {name: (low + 0.1, high) for name, (low, high) in FIXED.speed.items()}
    summary.bands = dataclasses.replace(FIXED, speed=speed)
    lines = [line for line in describe(summary).splitlines() if line.startswith("bands of ")]
    assert [line for line in lines if "fixed" not in line] == [line for line in lines if "speed" in line]


def test_a_sex_without_words_is_reported(tmp_path: Path, speech: Path) -> None:
    man = str(speech / "man.wav")
    rows = [{"id": sex, "audio": man, "tags": {"sex": sex}} for sex in ("alien", "other", "unknown", "f")]
    source = str(write_rows(tmp_path / "in.jsonl", rows))
    summary = caption_offline(source, tmp_path / "out.jsonl", bands="fixed")
    assert summary.foreign == {"sex": 1}
    assert 'no words for the tag "sex" of 1 clip' in describe(summary)
    assert read(tmp_path / "out.jsonl")["alien"]["tags"]["sex"] == "alien"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        offline_module._Spool(tmp_path / "gone")
    assert caught.value.filename == str(tmp_path / "gone")
