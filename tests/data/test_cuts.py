"""Cuts as users of lhotse have them: captions, channels, resampled recordings, cuts that reach beyond the
recording's end, Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import pytest
import soundfile
from sample_data import LFS_POINTER

from clsp_fast import audio, data, embed, train
from clsp_fast.audio import AudioError, Segment
from clsp_fast.config import DataConfig, EncodeConfig
from clsp_fast.data.captions import Captions
from clsp_fast.data.manifest import read_manifest, read_source
from clsp_fast.model import CLSP
from clsp_fast.storage.embedding_folder import Embeddings

POINTER = LFS_POINTER.encode()


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
    return written(folder, row)


def written(folder: Path, row: object) -> Path:
    (folder / "cuts.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "cuts.jsonl"


@pytest.mark.parametrize(
    "keys", [("short_captions", "long_captions"), ("global_captions", "finegrained_captions")]
)
def test_reads_what_lhotse_writes(tmp_path: Path, keys: tuple[str, str]) -> None:
    soundfile.write(tmp_path / "r.wav", np.zeros((32000, 2), np.float32), 16000)
    recording = lhotse.Recording.from_file(tmp_path / "r.wav")
    custom = {keys[0]: ["A woman."], keys[1]: ["A woman, quick.", "Quick."], "emotion": "calm"}
    supervision = lhotse.SupervisionSegment(
        "s", recording.id, 0, 1.5, speaker="p9", gender="F", custom=custom
    )
    cut = lhotse.MonoCut("cut-1", 0.25, 1.5, channel=1, recording=recording, supervisions=[supervision])
    lhotse.CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl.gz")
    (clip,) = read_manifest(tmp_path / "cuts.jsonl.gz").clips
    assert (clip.id, clip.start_s, clip.duration_s, clip.channel) == ("cut-1", 0.25, 1.5, 1)
    assert Path(clip.audio) == tmp_path / "r.wav"
    assert clip.captions == Captions(("A woman.",), ("A woman, quick.", "Quick."))
    assert clip.tags == {"speaker": "p9", "gender": "F", "emotion": "calm"}


def cut(*sources: tuple[list[int], str], channel: object = 0, **supervision: object) -> dict[str, object]:
    """A cut of a recording whose channels lie in these files."""
    files = [{"type": "file", "channels": channels, "source": name} for channels, name in sources]
    return {
        "type": "MonoCut",
        "id": "c",
        "start": 0,
        "duration": 1,
        "channel": channel,
        "recording": {"id": "r", "sources": files},
        "supervisions": [{"id": "s", "text": "He whispers."} | supervision],
    }


@pytest.mark.parametrize(
    ("custom", "expected"),
    [
        ({}, Captions((), ("He whispers.",))),
        ({"short_captions": ["A man."]}, Captions(("A man.",), ())),
        ({"global_captions": ["A man."]}, Captions(("A man.",), ())),
        ({"long_captions": ["A man, hoarse."]}, Captions((), ("A man, hoarse.",))),
    ],
)
def test_the_text_of_a_cut_is_its_caption_only_if_it_has_no_other_caption(
    tmp_path: Path, custom: dict[str, object], expected: Captions
) -> None:
    (clip,) = read_manifest(written(tmp_path, cut(([0], "r.wav"), custom=custom))).clips
    assert clip.captions == expected
    assert clip.channel is None


APART = (([0], "ch0.wav"), ([1], "ch1.wav"))


@pytest.mark.parametrize(
    ("sources", "channel", "expected"),
    [
        (APART, 0, ("ch0.wav", None)),
        (APART, 1, ("ch1.wav", None)),
        ((([0], "a.wav"), ([3, 1], "b.wav")), 1, ("b.wav", 1)),
        ((([0, 1], "a.wav"),), 1, ("a.wav", 1)),
        ((([0, 1], "a.wav"),), [0, 1], ("a.wav", None)),
        ((([0, 1], "a.wav"),), [1], ("a.wav", 1)),
    ],
)
def test_a_cut_is_read_from_the_file_of_its_channel(
    tmp_path: Path, sources: tuple[tuple[list[int], str]], channel: object, expected: tuple[str, int | None]
) -> None:
    (clip,) = read_manifest(written(tmp_path, cut(*sources, channel=channel))).clips
    assert (clip.audio, clip.channel) == expected


def test_the_channel_of_a_cut_is_the_one_that_lhotse_reads(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 16000)).astype(np.float32)
    for name, channels in (("a.wav", samples[:1]), ("b.wav", samples[1:3]), ("c.wav", samples[3:])):
        soundfile.write(tmp_path / name, channels.T, 16000, subtype="FLOAT")
    sources = [
        lhotse.audio.AudioSource("file", channels, str(tmp_path / name))
        for channels, name in (([0], "a.wav"), ([1, 2], "b.wav"), ([3], "c.wav"))
    ]
    recording = lhotse.Recording("r", sources, 16000, 16000, 1.0, channel_ids=[0, 1, 2, 3])
    supervision = lhotse.SupervisionSegment("s", "r", 0, 1, text="He whispers.")
    cuts = [
        lhotse.MonoCut(f"c{i}", 0, 1, channel=i, recording=recording, supervisions=[supervision])
        for i in range(4)
    ]
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    for lhotse_cut, clip in zip(cuts, read_manifest(tmp_path / "cuts.jsonl.gz").clips, strict=True):
        np.testing.assert_array_equal(
            audio.load(clip.audio, channel=clip.channel), lhotse_cut.load_audio()[0]
        )


def resample(target_hz: object, source: int = 44100) -> dict[str, Any]:
    return {"name": "Resample", "kwargs": {"source_sampling_rate": source, "target_sampling_rate": target_hz}}


def test_a_resampled_recording_is_read(tmp_path: Path, recording: Any) -> None:
    for changed in (recording.resample(16000), recording.resample(22050).resample(16000)):
        (clip,) = read_manifest(saved(tmp_path, changed)).clips
        assert len(audio.load(data.segment(clip))) == 24000


@pytest.mark.parametrize(("start", "duration", "read_s"), [(0, 3.0, None), (0, 1.0, 1.0), (0.5, 2.5, 2.5)])
def test_the_file_decides_how_long_a_resampled_recording_is(
    tmp_path: Path, recording: Any, start: float, duration: float, read_s: float | None
) -> None:
    row = json.loads(saved(tmp_path, recording.resample(16000), start=start, duration=duration).read_text())
    row["recording"] |= {"duration": 3.0, "num_samples": 48000}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(row) + "\n")
    (clip,) = read_manifest(tmp_path / "cuts.jsonl").clips
    assert (clip.start_s, clip.duration_s) == (start, read_s)
    if read_s is None:
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
        (
            [resample(16000), {"name": "Speed", "kwargs": {"factor": 1.1}}],
            "may contain only Resample, got 'Speed'",
        ),
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
    manifest = read_manifest(tmp_path / "cuts.jsonl")
    assert len(manifest.problems) == bool(message)
    assert all(message in problem.message and len(problem.message) < 250 for problem in manifest.problems)
    assert len(manifest.clips) == 2 - bool(message)


@pytest.mark.parametrize(
    ("over_s", "slack", "reason"),
    [(0.05, None, ""), (0.33, None, "truncated"), (0.33, 0.4, ""), (0.05, 0, "truncated")],
)
def test_how_far_a_clip_may_reach_beyond_the_end_is_an_option(
    tmp_path: Path, recording: Any, model_folder: Path, over_s: float, slack: float | None, reason: str
) -> None:
    path = saved(tmp_path, recording, duration=1.5 + over_s)
    changes = {} if slack is None else {"slack_seconds": slack}
    clips = read_manifest(path).clips
    features = data.ClipFeatures(DataConfig(**changes))
    (values,) = features.read(clips)
    assert list(features.bad.values()) == ([reason] if reason else [])
    assert (values is None) == bool(reason)
    config = embed.EmbedConfig(
        source=str(path), out=tmp_path / "out", model=str(model_folder), device="cpu", **changes
    )
    assert dict(embed.embed(config).failed) == ({reason: 1} if reason else {})
    assert Embeddings(tmp_path / "out").header.slack_seconds == config.slack_seconds
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
