"""Cuts as lhotse's users have them: resampled recordings, ends behind the recording, Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import pytest
import soundfile

from clsp_fast import audio, data, embed, train
from clsp_fast.audio import AudioError, Segment
from clsp_fast.config import DataConfig, EncodeConfig
from clsp_fast.data.manifest import read_manifest, read_source
from clsp_fast.model import CLSP
from clsp_fast.storage.embedding_folder import Embeddings

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 96044\n"


@pytest.fixture
def recording(tmp_path: Path) -> Any:
    """1.5 s at 44.1 kHz."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(66150)
    soundfile.write(tmp_path / "r.wav", samples, 44100)
    return lhotse.Recording.from_file(tmp_path / "r.wav")


def saved(folder: Path, recording: Any, **changes: Any) -> Path:
    """A file with one cut of the recording."""
    supervision = lhotse.SupervisionSegment("s", "r", 0, 1, text="He whispers.")
    cut = lhotse.MonoCut("c", 0, 1.5, 0, recording=recording, supervisions=[supervision])
    row = cut.to_dict() | changes
    (folder / "cuts.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "cuts.jsonl"


def resample(low: object, source: int = 44100) -> dict[str, Any]:
    return {"name": "Resample", "kwargs": {"source_sampling_rate": source, "target_sampling_rate": low}}


def test_a_resampled_recording_is_read(tmp_path: Path, recording: Any) -> None:
    for changed in (recording.resample(16000), recording.resample(22050).resample(16000)):
        (clip,) = read_manifest(saved(tmp_path, changed)).clips
        assert len(audio.load(data.segment(clip))) == 24000


@pytest.mark.parametrize(("start", "duration", "kept"), [(0, 3.0, None), (0, 1.0, 1.0), (0.5, 2.5, 2.5)])
def test_the_file_decides_how_long_a_resampled_recording_is(
    tmp_path: Path, recording: Any, start: float, duration: float, kept: float | None
) -> None:
    row = json.loads(saved(tmp_path, recording.resample(16000), start=start, duration=duration).read_text())
    row["recording"] |= {"duration": 3.0, "num_samples": 48000}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(row) + "\n")
    (clip,) = read_manifest(tmp_path / "cuts.jsonl").clips
    assert (clip.start_s, clip.duration_s) == (start, kept)
    if kept is None:
        assert len(audio.load(data.segment(clip))) == 24000
        del row["recording"]["transforms"]
        (tmp_path / "cuts.jsonl").write_text(json.dumps(row) + "\n")
        assert read_manifest(tmp_path / "cuts.jsonl").clips[0].duration_s == 3.0


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([resample(16000)], ""),
        (resample(48000), ""),
        ([resample(16000, 8000), {"name": "Resample"}], ""),
        ([resample(8000)], "Resample to 8000 Hz"),
        ([resample(16000), {"name": "Speed", "kwargs": {"factor": 1.1}}], "for Resample, got 'Speed'"),
        ([{"name": "Volume"}], "got 'Volume'"),
        ([{}], "got None"),
        (["Resample"], "got None"),
        ("Speed", "got None"),
        ([{"name": "x" * 5000}], "got 'xxx"),
    ],
)
def test_other_transforms_are_refused_by_name(
    tmp_path: Path, recording: Any, transforms: Any, message: str
) -> None:
    row = json.loads(saved(tmp_path, recording).read_text())
    row["recording"]["transforms"] = transforms
    good = {"audio": "r.wav", "captions": ["a"]}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    found = read_manifest(tmp_path / "cuts.jsonl")
    assert len(found.problems) == bool(message)
    assert all(message in problem.message and len(problem.message) < 250 for problem in found.problems)
    assert len(found.clips) == 2 - bool(message)


@pytest.mark.parametrize(
    ("over_s", "slack", "reason"),
    [(0.05, None, ""), (0.33, None, "truncated"), (0.33, 0.4, ""), (0.05, 0, "truncated")],
)
def test_what_is_forgiven_behind_the_end_is_an_option(
    tmp_path: Path, recording: Any, model_folder: Path, over_s: float, slack: float | None, reason: str
) -> None:
    path = saved(tmp_path, recording, duration=1.5 + over_s)
    changes = {} if slack is None else {"slack_seconds": slack}
    clips = read_manifest(path).clips
    features = data.ClipFeatures(DataConfig(**changes))
    (values,) = features.read(clips)
    assert list(features.bad.values()) == ([reason] if reason else [])
    assert (values is None) == bool(reason)
    made = embed.EmbedConfig(
        source=str(path), out=tmp_path / "out", model=str(model_folder), device="cpu", **changes
    )
    assert dict(embed.embed(made).failed) == ({reason: 1} if reason else {})
    assert Embeddings(tmp_path / "out").header.slack_seconds == made.slack_seconds
    errors: dict[int, AudioError] = {}
    model = CLSP.from_pretrained(model_folder)
    model.encode_audio([data.segment(clips[0])], errors=errors, **EncodeConfig(**changes).batching)
    assert [str(error.reason) for error in errors.values()] == ([reason] if reason else [])


def test_the_option_is_on_the_command_line_of_training() -> None:
    assert train.parse(["tiny", "--data.slack-seconds", "0.5"]).data.slack_seconds == 0.5
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="slack_seconds"):
            DataConfig(slack_seconds=value)
        with pytest.raises(ValueError, match="slack_seconds"):
            EncodeConfig(slack_seconds=value)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".WAV", ""])
def test_a_git_lfs_pointer_is_no_recording(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(POINTER)
    for source in (path, str(path), POINTER, Segment(path, 0.1, 0.5)):
        with pytest.raises(AudioError, match=r'Git LFS pointer.*"git lfs pull".*\[format\]'):
            audio.load(source)


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "list.txt"])
def test_a_git_lfs_pointer_is_no_list(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf'{name} .*a Git LFS pointer.*"git lfs pull"'):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_no_part_of_a_model(tmp_path: Path, tiny: CLSP, name: str) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf'{name} is a Git LFS pointer.*"git lfs pull"'):
        CLSP.from_pretrained(tmp_path)
