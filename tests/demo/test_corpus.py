"""The demo corpus: files, labels, captions, splits, determinism, and repair of a damaged corpus."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from clsp_fast import demo
from clsp_fast.demo import DemoConfig, DemoCorpus, engines, signal, text

SMALL = DemoConfig(clips=6, validation_clips=3, test_clips=3, transfer_clips=2, workers=2)
SYNTH = DemoConfig(clips=8, validation_clips=2, test_clips=2, workers=2, engines=("synth",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    """Made by all installed engines."""
    return demo.prepare(tmp_path_factory.mktemp("demo") / "corpus", SMALL)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    """Made by the engine synth, and large enough to compare labels with the sound."""
    config = dataclasses.replace(SYNTH, clips=60)
    return demo.prepare(tmp_path_factory.mktemp("demo") / "synthetic", config)


def read(manifest: Path | None) -> list[dict[str, Any]]:
    assert manifest is not None
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "corpus.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples(manifest: Path, clip: dict[str, Any]) -> np.ndarray:
    return soundfile.read(manifest.parent / clip["audio"])[0]


def test_counts_fields_and_audio(corpus: DemoCorpus) -> None:
    wanted = {"train": 6, "validation": 3, "test": 3, "transfer": 2}
    for split, count in wanted.items():
        manifest = getattr(corpus, split)
        if split == "transfer" and corpus.engines == ("synth",):
            assert manifest is None
            continue
        clips = read(manifest)
        assert len({clip["id"] for clip in clips}) == count
        for clip in clips:
            info = soundfile.info(manifest.parent / clip["audio"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert info.frames == round(clip["duration_s"] * 16000)
            assert 0.8 < clip["duration_s"] < 5
            assert clip["gender"] == clip["tags"]["sex"]
            assert clip["speaker"].startswith(clip["tags"]["engine"])
            assert 1 <= len(clip["global_captions"]) <= 2
            assert 5 <= len(clip["finegrained_captions"]) <= 6
            assert all(isinstance(value, str) for value in clip["tags"].values())


def test_each_engine_speaks_in_train_validation_and_test(corpus: DemoCorpus) -> None:
    for manifest in (corpus.train, corpus.validation, corpus.test):
        counts = [sum(c["tags"]["engine"] == engine for c in read(manifest)) for engine in corpus.engines]
        assert max(counts) - min(counts) <= 1
    if corpus.transfer is not None:
        assert {clip["tags"]["engine"] for clip in read(corpus.transfer)} == {"synth"}
        assert "synth" not in corpus.engines


def test_captions_claim_what_the_tags_say(corpus: DemoCorpus, synthetic: DemoCorpus) -> None:
    for clip in read(corpus.train) + read(synthetic.train):
        globals_, fines = clip["claims"]["global"], clip["claims"]["fine"]
        assert len(globals_) == len(clip["global_captions"])
        assert len(fines) == len(clip["finegrained_captions"])
        assert all(demo.satisfies(clip["tags"], claims) for claims in globals_ + fines)
        assert all(1 <= len(c) <= 4 and ">" not in "".join(c.values()) for c in globals_)
        changes = {a: label for a, label in clip["tags"].items() if ">" in label}
        assert all(demo.satisfies(claims, changes) for claims in fines)  # all mention all changes
        assert "engine" not in {attribute for claims in globals_ + fines for attribute in claims}


def test_labels_agree_with_the_sound(synthetic: DemoCorpus) -> None:
    levels = {"quiet": (-45, -34), "normal": (-32, -23), "loud": (-22, -10)}
    spreads = {"monotone": (0, 1.2), "normal": (0.9, 2.5), "lively": (2.2, 9)}
    clear: dict[str, list[float]] = {"normal": [], "whisper": []}
    checked = 0
    for clip in read(synthetic.train):
        tags, part = clip["tags"], signal.measured(samples(synthetic.train, clip)).whole
        if any(">" in label for label in tags.values()):
            continue
        low, high = levels[tags["loudness"]]
        assert low < part.level_db < high
        clear.setdefault(tags["quality"], []).append(part.clear_voice)
        assert tags["quality"] == "normal" or not {"pitch", "liveliness"} & set(tags)
        if "pitch" in tags:
            edges = {"male": (105, 133), "female": (190, 235)}[tags["sex"]]
            assert np.digitize(part.f0_hz, edges) == ["low", "medium", "high"].index(tags["pitch"])
            checked += 1
        if "liveliness" in tags:
            low, high = spreads[tags["liveliness"]]
            assert low < part.f0_sd < high
    assert checked > 15
    assert np.mean(clear["whisper"]) < 0.2 < 0.5 < np.mean(clear["normal"])


def test_splits_share_neither_voices_nor_words(corpus: DemoCorpus) -> None:
    speakers = [{c["speaker"] for c in read(m)} for m in (corpus.train, corpus.validation, corpus.test)]
    assert not speakers[0] & speakers[1]
    assert not speakers[0] & speakers[2]
    assert not speakers[1] & speakers[2]
    sentences = [set(text.sentences(split)) for split in ("train", "validation", "test")]
    assert not sentences[0] & (sentences[1] | sentences[2])
    assert not sentences[1] & sentences[2]
    assert all(len(s) > 80 for s in sentences)


@pytest.mark.multiproc
def test_workers_change_nothing(tmp_path: Path, corpus: DemoCorpus) -> None:
    by_one = demo.prepare(tmp_path / "by one", dataclasses.replace(SMALL, workers=1))
    assert contents(by_one.folder) == contents(corpus.folder)
    assert by_one.fingerprint == corpus.fingerprint


@pytest.mark.multiproc
def test_a_seed_changes_everything(tmp_path: Path) -> None:
    first = demo.prepare(tmp_path / "a", SYNTH)
    second = demo.prepare(tmp_path / "b", dataclasses.replace(SYNTH, seed=1))
    assert first.fingerprint != second.fingerprint
    a, b = contents(first.folder), contents(second.folder)
    assert all(a[name] != b[name] for name in a)


@pytest.mark.multiproc
def test_a_complete_corpus_is_kept_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepared = demo.prepare(tmp_path / "c", SYNTH, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12)
    before, calls[:] = contents(prepared.folder), []
    assert demo.prepare(tmp_path / "c", SYNTH, progress=lambda *c: calls.append(c)) == prepared
    assert not calls
    damages = (
        lambda: next((prepared.folder / "audio" / "train").iterdir()).unlink(),
        lambda: prepared.train.write_bytes(prepared.train.read_bytes()[:-40]),
        lambda: (prepared.folder / "corpus.json").unlink(),
    )
    for damage in damages:
        damage()
        assert demo.prepare(tmp_path / "c", SYNTH) == prepared
        assert contents(prepared.folder) == before
    assert not list(tmp_path.glob(".c*"))


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no demo corpus"):
        demo.prepare(tmp_path, SYNTH)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def replace_pico(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Makes `source` the package py_nanotts of this process and its children.

    The engine pico uses this package. Besides pico, only synth is installed.
    """
    (folder / "py_nanotts.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    reasons = {"espeak": "not installed", "hibari": "not installed"}
    monkeypatch.setattr(engines, "unavailable", lambda name: reasons.get(name, ""))
    monkeypatch.setattr(engines, "package_version", lambda name: "0")


CRASHING = """
import os, pathlib
import numpy as np
class NanoTTS:
    def speak(self, text, **kw):
        mark = pathlib.Path(__file__).with_name("mark")
        if {always} or not mark.exists():
            mark.touch()
            os.abort()
        t = np.arange(24000) / 16000
        return (8000 * np.sign(np.sin(2 * np.pi * 150 * t))).astype("<i2").tobytes()
"""


@pytest.mark.multiproc
def test_a_crash_is_tried_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DemoConfig(
        clips=2, validation_clips=1, test_clips=1, transfer_clips=0, workers=1, engines=("pico",)
    )
    replace_pico(monkeypatch, tmp_path, CRASHING.format(always=False))
    assert len(read(demo.prepare(tmp_path / "ok", config).train)) == 2
    assert (tmp_path / "mark").exists()
    (tmp_path / "py_nanotts.py").write_text(CRASHING.format(always=True))
    with pytest.raises(RuntimeError, match="engine pico failed twice: exit code -6"):
        demo.prepare(tmp_path / "fails", config)
    assert not (tmp_path / "fails").exists()
    assert not list(tmp_path.glob(".fails*"))


@pytest.mark.multiproc
def test_missing_and_broken_engines_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pico(monkeypatch, tmp_path, "raise ImportError('no such symbol')")
    prepared = demo.prepare(tmp_path / "left", dataclasses.replace(SYNTH, engines=None))
    assert prepared.engines == ("synth",)
    assert prepared.transfer is None
    description = demo.describe(prepared)
    assert "without espeak: not installed" in description
    assert "without pico: does not start" in description
    assert "no such symbol" in description
    assert "synthetic" in description
    with pytest.raises(RuntimeError, match="engine pico does not start"):
        demo.prepare(tmp_path / "asked", dataclasses.replace(SYNTH, engines=("pico",)))
    with pytest.raises(ValueError, match="engine hibari cannot be used: not installed"):
        demo.prepare(tmp_path / "asked", dataclasses.replace(SYNTH, engines=("hibari",)))


@pytest.mark.parametrize(
    "bad",
    [
        {"clips": 0},
        {"test_clips": -1},
        {"transfer_clips": -1},
        {"workers": 0},
        {"engines": ()},
        {"engines": ("festival",)},
        {"engines": ("synth", "synth")},
        {"seed": -1},
    ],
)
def test_config_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DemoConfig(**bad)
