"""The loader, whose batches are a function of the step, and `data validate`, which names every fault."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import lhotse
import numpy as np
import pytest
import soundfile
import torch
from sample_data import write_rows

from clsp_fast import data
from clsp_fast.config import DataConfig
from clsp_fast.data import DataError, Loader
from clsp_fast.data import __main__ as data_command
from clsp_fast.data.manifest import read_manifest
from clsp_fast.features import PADDING_VALUE
from clsp_fast.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 40 noise clips of 0.5 to 2 s, half of them without a stated duration."""
    root, random, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(1), []
    for i in range(40):
        seconds = random.uniform(0.5, 2.0)
        soundfile.write(root / f"{i}.wav", 0.1 * random.standard_normal(int(seconds * 16000)), 16000)
        row = {
            "id": str(i),
            "audio": f"{i}.wav",
            "global_captions": [f"clip {i}"],
            "finegrained_captions": [f"fine one of {i}", f"fine two of {i}"],
        }
        rows.append(row | ({"duration_s": seconds} if i % 2 else {}))
    return write_rows(root / "m.jsonl", rows)


def make_loader(
    path: Path,
    *,
    stage1_steps: int = 100,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    **changes,
) -> Loader:
    all_clips = read_manifest(path).clips
    tokenizer = Tokenizer.train([t for c in all_clips for texts in c.captions for t in texts], 300)
    settings = {"batch_clips": 6, "buckets": 2, "threads": 1, "augment": 1.0} | changes
    return Loader(
        all_clips,
        lambda texts: tokenizer.encode_batch(texts, 32),
        DataConfig(**settings),
        seed=3,
        stage1_steps=stage1_steps,
        rank=rank,
        world=world,
        device=device,
    )


def assert_equal(one: data.Batch, two: data.Batch) -> None:
    assert one.ids == two.ids
    assert one.bad == two.bad
    for name in ("features", "lengths", "token_ids", "attention_mask", "text_owner"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_batch_is_a_function_of_its_step(clips: Path) -> None:
    expected = {batch.step: batch for batch in make_loader(clips).batches(0, 20)}
    for changes in ({"cache_mb": 0}, {"threads": 2, "prefetch": 1}):
        for batch in make_loader(clips, **changes).batches(13, 20):
            assert_equal(batch, expected[batch.step])


def test_a_batch_has_the_documented_shapes_and_dtypes(clips: Path) -> None:
    loader = make_loader(clips, stage1_steps=1, augment=0.0)
    for batch, texts in ((loader.batch(0), 1), (loader.batch(1), 2)):
        count = len(batch.ids)
        assert batch.features.shape == (count, int(batch.lengths.max()), 128)
        assert batch.features.dtype == torch.float32
        assert batch.lengths.dtype == batch.token_ids.dtype == batch.text_owner.dtype == torch.int64
        assert batch.text_owner.tolist() == list(range(count)) * texts
        assert batch.token_ids.shape == batch.attention_mask.shape
        assert len(batch.token_ids) == count * texts
        assert batch.seconds == pytest.approx(float(batch.lengths.sum()) / 100)
        for row, length in zip(batch.features, batch.lengths.tolist(), strict=True):
            assert bool((row[length:] == PADDING_VALUE).all())
            assert float(row[:length].min()) > PADDING_VALUE


def test_captions_stay_with_their_clips(clips: Path) -> None:
    all_clips = read_manifest(clips).clips
    seen: list[list[str]] = []

    def encode(texts):
        seen.append(list(texts))
        return torch.zeros(len(texts), 2, dtype=torch.int64), torch.ones(len(texts), 2, dtype=torch.int64)

    loader = Loader(all_clips, encode, DataConfig(batch_clips=6, threads=1), seed=0, stage1_steps=2)
    for step in range(5):
        batch = loader.batch(step)
        for text, owner in zip(seen[-1], batch.text_owner.tolist(), strict=True):
            assert text.split()[-1] == batch.ids[owner]


def test_ranks_share_an_epoch(clips: Path) -> None:
    ranks = [make_loader(clips, rank=rank, world=3, batch_clips=3) for rank in range(3)]
    steps = ranks[0].plan.steps_per_epoch
    ids = [clip_id for loader in ranks for batch in loader.batches(0, steps) for clip_id in batch.ids]
    assert sorted(ids, key=int) == [str(i) for i in range(40)]


def test_limits_leave_clips_out_and_count_them(clips: Path) -> None:
    loader = make_loader(clips, min_seconds=1.0, max_seconds=1.5, batch_seconds=20)
    assert 1.0 <= loader.plan.durations_s.min() <= loader.plan.durations_s.max() <= 1.5
    assert len(loader.clips) + sum(loader.left_out.values()) == 40
    assert set(loader.left_out) == {"too_short", "too_long"}
    with pytest.raises(DataError, match="0 usable clips for 1 ranks"):
        make_loader(clips, min_seconds=9.0)


def test_a_wrong_guess_of_the_length_loses_no_audio(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(4 * 16000)
    noise[: 2 * 16000] *= 1e-4  # the bit rate varies, so a guess from the first frames is far off
    soundfile.write(tmp_path / "a.mp3", 0.1 * noise, 16000, bitrate_mode="VARIABLE")
    content = (tmp_path / "a.mp3").read_bytes()
    at = content.find(b"Xing") if b"Xing" in content else content.find(b"Info")
    assert at > 0
    (tmp_path / "a.mp3").write_bytes(content[:at] + b"Nope" + content[at + 4 :])
    (tmp_path / "m.jsonl").write_text('{"audio": "a.mp3", "captions": ["noise"]}\n')
    batch = make_loader(tmp_path / "m.jsonl", augment=0.0).batch(0)
    assert batch.lengths.item() >= 395


def test_with_a_zero_tail_only_the_longest_clip_is_reflected(clips: Path) -> None:
    reflect, zero = (make_loader(clips, tail=tail, augment=0.0).batch(0) for tail in ("reflect", "zero"))
    assert reflect.ids == zero.ids
    longest = int(reflect.lengths.argmax())
    for i, length in enumerate(reflect.lengths.tolist()):
        same = torch.equal(reflect.features[i, : length - 3], zero.features[i, : length - 3])
        assert same
        if i == longest:
            assert torch.equal(reflect.features[i], zero.features[i])
    assert not torch.equal(reflect.features, zero.features)


def damaged(clips: Path, folder: Path, count: int) -> Path:
    """The manifest with `count` further clips whose files are not audio."""
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(clips.parent / row["audio"])
    (folder / "x.wav").write_bytes(b"RIFF no audio")
    rows += [rows[0] | {"id": f"bad{i}", "audio": "x.wav", "duration_s": 1.0} for i in range(count)]
    return write_rows(folder / "m.jsonl", rows)


def test_unreadable_clips_have_the_same_replacements_every_time(clips: Path, tmp_path: Path) -> None:
    path = damaged(clips, tmp_path, 8)
    first = make_loader(path)
    steps = first.plan.steps_per_epoch
    expected = {batch.step: batch for batch in first.batches(0, steps)}
    assert set(first.bad.values()) == {"format"}
    assert sorted(first.bad) == [f"bad{i}" for i in range(8)]
    for batch in expected.values():
        assert len(batch.ids) == len(set(batch.ids)) == len(first.plan.batch(batch.step))
        assert not [clip_id for clip_id in batch.ids if clip_id.startswith("bad")]
    second = make_loader(path)
    for step in reversed(range(steps)):
        assert_equal(second.batch(step), expected[step])


def test_too_many_unreadable_clips_are_an_error_that_lists_them(clips: Path, tmp_path: Path) -> None:
    loader, bad = make_loader(damaged(clips, tmp_path, 20)), {}

    def read() -> None:
        for batch in loader.batches(0, 40):
            bad.update(batch.bad)
            loader.check_bad(bad)

    with pytest.raises(DataError, match=r"\d\d of 60 clips cannot be read.*bad\d+ \(format\)"):
        read()
    assert len(bad) > 10


def test_a_batch_without_a_readable_clip_is_empty(clips: Path, tmp_path: Path) -> None:
    path = damaged(clips, tmp_path, 3)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[40:]))
    batch = make_loader(path, stage1_steps=0).batch(0)
    assert batch.bad == {f"bad{i}": "format" for i in range(3)}
    assert batch.ids == batch.lengths.tolist() == batch.token_ids.tolist() == []
    assert batch.features.shape == (0, 0, 128)


def test_clips_whose_ids_end_alike_draw_different_captions(clips: Path, tmp_path: Path) -> None:
    row = json.loads(clips.read_text().splitlines()[1])
    row |= {
        "audio": str(clips.parent / row["audio"]),
        "finegrained_captions": [f"text {i}" for i in range(20)],
    }
    rows = [row | {"id": f"EN_B{i:05}_S00000_W000012"} for i in range(6)]
    batch = make_loader(write_rows(tmp_path / "m.jsonl", rows)).batch(0)
    assert len(batch.ids) == 6
    assert len({tuple(tokens) for tokens in batch.token_ids.tolist()}) > 3


def stored_state(loader: Loader) -> dict:
    """The loader's state after a checkpoint has stored it."""
    return json.loads(json.dumps(loader.state()))


def test_another_number_of_ranks_begins_a_new_epoch(clips: Path) -> None:
    before = [make_loader(clips, rank=rank, world=2) for rank in range(2)]
    done = before[0].plan.steps_per_epoch // 2
    assert done > 0
    alone = make_loader(clips)
    assert alone.resume(done, stored_state(before[0]))
    end = done + alone.plan.steps_per_epoch
    ids = [clip_id for batch in alone.batches(done, end) for clip_id in batch.ids]
    assert sorted(ids, key=int) == [str(i) for i in range(40)]
    resumed = make_loader(clips)
    assert not resumed.resume(done + 2, stored_state(alone))
    for step in range(done + 2, end + 2):
        assert_equal(resumed.batch(step), alone.batch(step))


def test_other_batches_begin_a_new_epoch_and_the_same_batches_continue_it(clips: Path) -> None:
    before, other, same = make_loader(clips), make_loader(clips, batch_clips=5), make_loader(clips, threads=2)
    assert other.resume(3, stored_state(before))
    assert not same.resume(3, stored_state(before))
    assert_equal(same.batch(3), before.batch(3))


def test_other_clips_of_the_same_lengths_begin_a_new_epoch(clips: Path) -> None:
    before, other = make_loader(clips), make_loader(clips)
    other.clips[0] = dataclasses.replace(other.clips[0], id="another")
    assert other.resume(3, stored_state(before))


def tensors(batch: data.Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_tensors_for_a_card_are_copied_into_page_locked_memory(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, loader = make_loader(clips), make_loader(clips, device=torch.device("cuda"))
    locked: list[torch.Tensor] = []

    def empty_like(value: torch.Tensor, *, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        locked.append(torch.zeros_like(value))
        return locked[-1]

    monkeypatch.setattr(torch, "empty_like", empty_like)
    batch = loader.batch(0)
    assert_equal(batch, plain.batch(0))
    assert [id(value) for value in tensors(batch).values()] == [id(value) for value in locked]
    assert len(locked) == 5


@pytest.mark.gpu
def test_batches_for_a_card_are_page_locked(clips: Path, cuda: torch.device) -> None:
    plain, loader = make_loader(clips), make_loader(clips, device=cuda)
    for batch in loader.batches(0, 3):
        assert all(value.is_pinned() for value in tensors(batch).values())
        assert_equal(batch, plain.batch(batch.step))


def test_reads_lhotse_cuts_like_a_manifest(clips: Path, tmp_path: Path) -> None:
    cuts = []
    for clip in read_manifest(clips).clips:
        recording = lhotse.Recording.from_file(clip.audio)
        captions = {"short_captions": list(clip.captions[0]), "long_captions": list(clip.captions[1])}
        supervision = lhotse.SupervisionSegment("s", recording.id, 0, recording.duration, custom=captions)
        cuts.append(recording.to_cut())
        cuts[-1].id = clip.id
        cuts[-1].supervisions = [supervision]
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    from_manifest, from_cuts = make_loader(clips), make_loader(tmp_path / "cuts.jsonl.gz")
    for step in range(4):
        assert_equal(from_manifest.batch(step), from_cuts.batch(step))


def test_validate_names_every_finding(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        data_command.main(["validate", str(clips)])
    assert done.value.code == 0
    assert "40 clips, 0 bad lines" in capsys.readouterr().out
    path = damaged(clips, tmp_path, 2)
    path.write_text(path.read_text() + '{"audio": "y.wav", "captions": ["gone"], "id": "gone"}\noops\n')
    with pytest.raises(SystemExit) as done:
        data_command.main(["validate", str(path)])
    shown = capsys.readouterr().out
    assert done.value.code == 1
    assert "line 44: not JSON" in shown
    assert "y.wav is missing" in shown
    assert "2 findings" in shown
    with pytest.raises(SystemExit) as done:
        data_command.main(["validate", str(path), "--decode"])
    shown = capsys.readouterr().out
    assert re.search(r"clip bad0: \S+\.wav: .+ \[format\]\n", shown)
    assert re.search(r"clip gone: \S*y\.wav: .+ \[open\]\n", shown)
    assert "4 findings" in shown
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl does not exist"):
        data_command.main(["validate", str(tmp_path / "nowhere.jsonl")])
