"""Manifests of JSON lines, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip, tags_of
from clsp_fast.data.manifest import Problem, iterate_manifest, read_manifest, read_source


def write(folder: Path, *rows: object, name: str = "m.jsonl") -> Path:
    path = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


GOOD = {
    "id": "a",
    "audio": "clips/a.wav",
    "start_s": 1.5,
    "duration_s": 2,
    "channel": 1,
    "global_captions": ["A man speaks."],
    "finegrained_captions": ["A man speaks slowly, then fast.", " Slow, then fast. "],
    "speaker": "s1",
    "gender": "male",
    "tags": {"speed": "slow>fast", "age": 40, "accent": None},
    "claims": {"global": [{"gender": "male"}], "fine": [{"speed": "slow>fast"}, {}]},
}


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_reads_every_field(tmp_path: Path, name: str) -> None:
    manifest = read_manifest(write(tmp_path, GOOD, "", name=name))
    (clip,) = manifest.clips
    assert not manifest.problems
    assert (clip.id, clip.audio) == ("a", str(tmp_path / "clips/a.wav"))
    assert (clip.start_s, clip.duration_s, clip.channel) == (1.5, 2.0, 1)
    assert clip.captions == Captions(
        ("A man speaks.",), ("A man speaks slowly, then fast.", "Slow, then fast.")
    )
    assert clip.tags == {"speed": "slow>fast", "age": "40", "speaker": "s1", "gender": "male"}
    assert clip.claims["fine"] == ({"speed": "slow>fast"}, {})


def test_audio_and_one_caption_are_enough(tmp_path: Path) -> None:
    (clip,) = read_manifest(write(tmp_path, {"audio": "/x/b.flac", "captions": "One caption"})).clips
    assert clip.audio == "/x/b.flac"
    assert (clip.start_s, clip.duration_s, clip.channel) == (0.0, None, None)
    assert clip.captions == Captions((), ("One caption",))


BAD = [
    ("{", "not JSON"),
    ("[1]", "one JSON object"),
    ("[" * 100_000, ""),
    ({"captions": ["x"]}, '"audio" must be a path'),
    ({"audoi": "a.wav", "captions": ["x"]}, 'is "audoi" meant to be "audio"?'),
    ({"audio_filepath": "a.wav", "captions": ["x"]}, 'is "audio_filepath" meant to be "audio"?'),
    ({"audio": "a.wav", "text": "x"}, 'no captions; is "text" meant to be "captions"?'),
    ({"audio": "a.wav", "finegrained_caption": ["x"]}, 'meant to be "finegrained_captions"?'),
    ({"audio": "a.wav", "captions": [1]}, "list of strings"),
    ({"audio": "a.wav", "captions": ["x", " "]}, "empty caption"),
    ({"audio": "a.wav", "captions": ["x"], "duration_s": 0}, '"duration_s" must be seconds > 0'),
    ({"audio": "a.wav", "captions": ["x"], "start_s": -1}, '"start_s" must be seconds >= 0'),
    ({"audio": "a.wav", "captions": ["x"], "duration_s": float("nan")}, '"duration_s"'),
    ({"audio": "a.wav", "captions": ["x"], "channel": "left"}, '"channel"'),
    ({"audio": "a.wav", "captions": ["x"], "tags": [1]}, '"tags"'),
    ({"audio": "a.wav", "captions": ["x"], "claims": {"fine": [{}, {}]}}, '"claims"."fine"'),
    ({"type": "MixedCut", "id": "m", "tracks": []}, "MixedCut"),
    ({"type": "MonoCut", "recording": {"sources": [{"type": "url"}]}}, 'type "file"'),
    ({"type": "MonoCut", "recording": {"sources": [{"type": "file", "source": "a"}]}}, "no captions"),
    ({"type": "MonoCut", "recording": {"sources": {"type": "file"}}}, "not a line of a manifest"),
    (
        {
            "type": "MonoCut",
            "channel": 2,
            "recording": {"sources": [{"type": "file", "channels": [0, 1], "source": "a"}]},
        },
        '"channel" is 2, and the files of recording.sources hold [[0, 1]]',
    ),
    (
        {
            "type": "MultiCut",
            "channel": [0, 1],
            "recording": {"sources": [{"type": "file", "channels": [i], "source": "a"} for i in range(2)]},
        },
        "MultiCut.to_mono splits a cut",
    ),
    (
        {"type": "MonoCut", "recording": {"sources": [{"type": "file"}]}, "supervisions": [{"text": "a"}]},
        "not a line of a manifest",
    ),
    ({"type": "MonoCut", "recording": {"sources": ["a.wav"]}}, "not a line of a manifest"),
    (
        {"type": "MonoCut", "recording": {"sources": [{"type": "file", "source": "a"}], "transforms": [{}]}},
        "transforms may contain only Resample",
    ),
    ({"audio": "a.wav", "captions": ["half \ud83d"]}, "surrogate"),
    ({"audio": "a\ud83d.wav", "captions": ["x"]}, '"audio"'),
    ({"audio": "a" * 2**15 + ".wav", "captions": ["x"]}, '"audio" must be a path'),
    ({"audio": "a.wav", "captions": ["caf\udce9"]}, "bytes that are not UTF-8"),
    ({"id": "\ud83d", "audio": "a.wav", "captions": ["x"]}, '"id" must be text'),
    ({"audio": "a.wav", "captions": ["x"], "channel": 2**31}, '"channel" must be'),
    (
        {
            "type": "MonoCut",
            "recording": {"sources": [{"type": "file", "source": "a\ud83d"}]},
            "supervisions": [{"text": "a"}],
        },
        "recording.sources[0].source must be a path",
    ),
    (
        {
            "type": "MonoCut",
            "id": "\ud83d",
            "recording": {"sources": [{"type": "file", "source": "a"}]},
            "supervisions": [{"text": "a"}],
        },
        '"id" must be text',
    ),
    ('{"audio": "a.wav", "captions": ["x"], "start_s": ' + "9" * 400 + "}", ""),
    (GOOD, "is already used in line 1"),
    ({"audio": {"path": "b.wav", "sampling_rate": 16000}, "captions": ["x"]}, """write "audio": 'b.wav'"""),
    ({"audio": ["b.wav"], "captions": ["x"]}, """"audio" must be a path, got ['b.wav']"""),
    ({"audio": "a.wav", "captions": ["x"], "channel": "x" * 100_000}, '"channel" must be an integer'),
    ({"audio": "a.wav", "captions": ["x"], "start_s": "x" * 100_000}, '"start_s" must be seconds'),
    ({"audio": "a.wav", "captions": ["x"], "duration_s": ["x"] * 9999}, '"duration_s" must be seconds'),
    ({"audio": "a.wav", "captions": ["x"], "id": "\ud83d" * 9999}, '"id" must be text'),
    ({"audio": {"path": "b" * 9999}, "captions": ["x"]}, "\"audio\" must be a path, got {'path': 'bbb"),
    ({"type": "x" * 9999 + "Cut"}, "has no single recording"),
    (
        {
            "type": "MultiCut",
            "channel": [*range(9999)],
            "recording": {"sources": [{"type": "file", "channels": [*range(9998)], "source": "a"}]},
        },
        '"channel" is [0, 1',
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_costs_only_itself_and_says_why(tmp_path: Path, row: object, message: str) -> None:
    manifest = read_manifest(write(tmp_path, GOOD, row, GOOD | {"id": "c"}))
    assert [clip.id for clip in manifest.clips] == ["a", "c"]
    (problem,) = manifest.problems
    assert problem.line == 2
    assert message in problem.message
    assert len(problem.message) < 300


def test_a_byte_order_mark_and_null_ids_are_accepted(tmp_path: Path) -> None:
    rows = [
        {"id": None, "audio": "a.wav", "captions": ["x"]},
        {"id": None, "audio": "b.wav", "captions": ["y"]},
    ]
    path = write(tmp_path, *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    manifest = read_manifest(path)
    assert [clip.id for clip in manifest.clips] == ["m-1", "m-2"]


def test_a_file_without_clips_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_manifest(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="holds no usable clip: the file is empty"):
        read_manifest(write(tmp_path))
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_manifest(write(tmp_path, "oops"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"audio"' * 100)[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize("key", ["duration", "offset", "audio_filepath", "text", "caption", "speeker"])
def test_a_key_that_looks_like_another_is_named(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = {"duration": "duration_s", "offset": "start_s", "audio_filepath": "audio", "speeker": "speaker"}
    path = write(tmp_path, GOOD | {key: 3}, GOOD | {"id": "b", key: 1}, GOOD | {"id": "d"})
    manifest = read_manifest(path)
    assert (len(manifest.clips), manifest.problems) == (3, [])
    warning = f'warning: "{key}" in 2 lines is ignored; is it meant to be "{meant.get(key, "captions")}"?'
    assert manifest.warnings() == [warning]
    assert warning in manifest.describe().splitlines()
    read_source(str(path))
    assert capsys.readouterr().err == f"{path}: {warning}\n"


def test_unknown_keys_are_counted_without_a_warning(tmp_path: Path) -> None:
    user_keys = {"emotion": "calm", "\x1b[2J": 1, "\ud83d": 2}
    manifest = read_manifest(
        write(tmp_path, GOOD | user_keys, {"id": "b", "emotion": 2, "audio": "a", "captions": "x"})
    )
    assert (len(manifest.clips), manifest.problems, manifest.warnings()) == (2, [], [])
    last = manifest.describe().splitlines()[-1]
    assert last.startswith('not read: "emotion" in 2 lines, ')
    assert "'\\x1b[2J' in 1 line" in last
    last.encode()


def test_every_key_that_is_read_is_known(tmp_path: Path) -> None:
    row = {"audio": "a.wav", "short_captions": ["A man."], "long_captions": ["A man, hoarse."]}
    manifest = read_manifest(write(tmp_path, GOOD, row))
    assert manifest.clips[1].captions == Captions(("A man.",), ("A man, hoarse.",))
    assert manifest.unknown == {}


def test_describe_counts(tmp_path: Path) -> None:
    text = read_manifest(write(tmp_path, GOOD, "oops")).describe()
    assert "1 clip, 1 bad line\n" in text
    assert "3 captions of 3 to 6 words" in text


def test_an_id_that_is_long_and_used_twice_is_shortened(tmp_path: Path) -> None:
    row = GOOD | {"id": "i" * 100_000}
    (problem,) = read_manifest(write(tmp_path, row, row)).problems
    assert problem.message.endswith("... is already used in line 1")
    assert len(problem.message) < 200


def test_a_list_of_paths_is_no_manifest_and_the_fix_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    for text in ("a.wav\nb.wav\n", f"{tmp_path}/there\n", "my file.wav\n"):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(
            ValueError, match=r"list\.txt holds no usable clip; line 1: .*a list of paths \(embed"
        ):
            read_manifest(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_a_manifest_is_read_line_by_line(tmp_path: Path, name: str) -> None:
    rows = [{"id": f"c{i // 2}", "audio": f"{i}.wav"} for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    lines[2:2] = ["", "{"]
    data = "\n".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    read = list(iterate_manifest(path, need_captions=False))
    assert [number for number, _ in read] == [1, 2, 4, 5, 6]
    assert [clip.id for _, clip in read if isinstance(clip, Clip)] == ["c0", "c0", "c1", "c1"]
    assert [clip.line for _, clip in read if isinstance(clip, Problem)] == [4]
    assert list(iterate_manifest(path, need_captions=False, first_line=5)) == read[3:]
    assert all(isinstance(clip, Problem) for _, clip in iterate_manifest(path))


def test_reading_line_by_line_begins_before_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    data = gzip.compress(b'{"audio": "a.wav"}\n' * 200_000)
    path.write_bytes(data[: len(data) // 2])  # only the end of the file is damaged
    lines = iterate_manifest(path, need_captions=False)
    assert next(lines)[0] == 1
    with pytest.raises(ValueError, match="cannot be read"):
        list(lines)
    with pytest.raises(FileNotFoundError):
        next(iterate_manifest(tmp_path / "none"))


def test_a_list_of_tags_is_joined() -> None:
    assert tags_of({"mood": ["sad", "slow"], "age": 40, "none": None}) == {"mood": "sad, slow", "age": "40"}
