"""The demo corpus: what it promises about files, labels, captions, splits, determinism and repair."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from clsp_fast import demo
from clsp_fast.demo import DemoConfig, DemoCorpus, engines, signal, text
from clsp_fast.demo import corpus as making

SMALL = DemoConfig(clips=6, validation_clips=3, test_clips=3, transfer_clips=2, workers=2)
SYNTH = DemoConfig(clips=8, validation_clips=2, test_clips=2, workers=2, engines=("synth",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    """By the engines that are installed."""
    return demo.prepare(tmp_path_factory.mktemp("demo") / "corpus", SMALL)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    """By numpy alone, large enough to compare labels with."""
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
        assert all(demo.satisfies(claims, changes) for claims in fines)  # no fine caption leaves a change out
        assert "engine" not in {attribute for claims in globals_ + fines for attribute in claims}


def test_satisfies_is_neither_too_lax_nor_too_strict() -> None:
    tags = {"sex": "female", "speed": "slow>fast", "loudness": "loud"}
    assert demo.satisfies(tags, {"sex": "female", "speed": "slow>fast"})
    assert demo.satisfies(tags, {})
    assert not demo.satisfies(tags, {"speed": "slow"})
    assert not demo.satisfies(tags, {"speed": "fast>slow"})
    assert not demo.satisfies(tags, {"pitch": "low"})  # not measured: cannot be claimed
    assert not demo.satisfies(tags, {"sex": "female", "loudness": "quiet"})


def test_labels_agree_with_the_sound(synthetic: DemoCorpus) -> None:
    levels = {"quiet": (-45, -34), "normal": (-32, -23), "loud": (-22, -10)}
    spreads = {"monotone": (0, 1.2), "normal": (0.9, 2.5), "lively": (2.2, 9)}
    voiced: dict[str, list[float]] = {"normal": [], "whisper": []}
    checked = 0
    for clip in read(synthetic.train):
        tags, x = clip["tags"], samples(synthetic.train, clip)
        if any(">" in label for label in tags.values()):
            continue
        low, high = levels[tags["loudness"]]
        assert low < signal.active_level_db(x) < high
        track = signal.f0_track(x)
        f0_hz, spread = signal.f0_statistics(track)
        voiced.setdefault(tags["quality"], []).append(float(np.mean(track > 0)))
        assert tags["quality"] == "normal" or not {"pitch", "liveliness"} & set(tags)
        if "pitch" in tags:
            edges = {"male": (105, 133), "female": (190, 235)}[tags["sex"]]
            assert np.digitize(f0_hz, edges) == ["low", "medium", "high"].index(tags["pitch"])
            checked += 1
        if "liveliness" in tags:
            low, high = spreads[tags["liveliness"]]
            assert low < spread < high
    assert checked > 15
    assert np.mean(voiced["whisper"]) < 0.3 < 0.5 < np.mean(voiced["normal"])


def test_splits_share_neither_voices_nor_words(corpus: DemoCorpus) -> None:
    speakers = [{c["speaker"] for c in read(m)} for m in (corpus.train, corpus.validation, corpus.test)]
    assert not speakers[0] & speakers[1]
    assert not speakers[0] & speakers[2]
    assert not speakers[1] & speakers[2]
    sentences = [set(text.sentences(split)) for split in ("train", "validation", "test")]
    assert not sentences[0] & (sentences[1] | sentences[2])
    assert not sentences[1] & sentences[2]
    assert all(len(s) > 80 for s in sentences)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_voices_of_an_engine_are_split(name: str) -> None:
    if engines.unavailable(name):
        engine: Any = engines.make("synth", 0)
    else:
        engine = engines.make(name, 0)
    for sex in ("female", "male"):
        train, validation, test = (
            {str(v) for v in engine.voices(sex, s)} for s in ("train", "validation", "test")
        )
        assert train
        assert validation
        assert test
        assert not train & validation
        assert not (train | validation) & test


@pytest.mark.multiproc
def test_workers_change_nothing(tmp_path: Path, corpus: DemoCorpus) -> None:
    again = demo.prepare(tmp_path / "again", dataclasses.replace(SMALL, workers=1))
    assert contents(again.folder) == contents(corpus.folder)
    assert again.fingerprint == corpus.fingerprint


def test_what_lies_in_memory_changes_nothing() -> None:
    # By itself Pico reads memory that it has not set, and speaks otherwise from the third time on.
    if engines.unavailable("pico"):
        pytest.skip("py-nanotts is not installed")
    code = """
import hashlib
from clsp_fast.demo.engines import Pico
pico = Pico()
print(*{hashlib.sha256(pico._say("The same sentence.", "en-US", 1.0, 1.0)).hexdigest() for _ in range(6)})
"""
    environment = making._child_environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert len(done.stdout.split()) == 1


@pytest.mark.multiproc
def test_a_seed_changes_everything(tmp_path: Path) -> None:
    first = demo.prepare(tmp_path / "a", SYNTH)
    second = demo.prepare(tmp_path / "b", dataclasses.replace(SYNTH, seed=1))
    assert first.fingerprint != second.fingerprint
    a, b = contents(first.folder), contents(second.folder)
    assert all(a[name] != b[name] for name in a)


@pytest.mark.multiproc
def test_found_complete_or_made_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = demo.prepare(tmp_path / "c", SYNTH, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12)
    before, calls[:] = contents(made.folder), []
    assert demo.prepare(tmp_path / "c", SYNTH, progress=lambda *c: calls.append(c)) == made
    assert not calls
    damages = (
        lambda: next((made.folder / "audio" / "train").iterdir()).unlink(),
        lambda: made.train.write_bytes(made.train.read_bytes()[:-40]),
        lambda: (made.folder / "corpus.json").unlink(),
    )
    for damage in damages:
        damage()
        assert demo.prepare(tmp_path / "c", SYNTH) == made
        assert contents(made.folder) == before
    assert not list(tmp_path.glob(".c*"))


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no demo corpus"):
        demo.prepare(tmp_path, SYNTH)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Make `source` the py_nanotts package, of this process and its children, and the only one installed."""
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
    pretend(monkeypatch, tmp_path, CRASHING.format(always=False))
    assert len(read(demo.prepare(tmp_path / "ok", config).train)) == 2
    assert (tmp_path / "mark").exists()
    (tmp_path / "py_nanotts.py").write_text(CRASHING.format(always=True))
    with pytest.raises(RuntimeError, match="engine pico failed twice: exit code -6"):
        demo.prepare(tmp_path / "fails", config)
    assert not (tmp_path / "fails").exists()
    assert not list(tmp_path.glob(".fails*"))


@pytest.mark.multiproc
def test_missing_and_broken_engines_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tmp_path, "raise ImportError('no such symbol')")
    made = demo.prepare(tmp_path / "left", dataclasses.replace(SYNTH, engines=None))
    assert made.engines == ("synth",)
    assert made.transfer is None
    said = demo.describe(made)
    assert "without espeak: not installed" in said
    assert "without pico: does not start" in said
    assert "no such symbol" in said
    assert "synthetic" in said
    with pytest.raises(RuntimeError, match="engine pico does not start"):
        demo.prepare(tmp_path / "asked", dataclasses.replace(SYNTH, engines=("pico",)))
    with pytest.raises(ValueError, match="engine hibari cannot be used: not installed"):
        demo.prepare(tmp_path / "asked", dataclasses.replace(SYNTH, engines=("hibari",)))


def test_only_the_pinned_hibari_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "package_version", lambda name: "0.3.0")
    assert "only 0.2.1 is supported" in engines.unavailable("hibari")
    assert not engines.unavailable("pico")


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


def test_prompts_use_the_captions_words_but_no_caption() -> None:
    rng = np.random.default_rng(0)
    said: set[str] = set()
    for _ in range(600):
        tags = {a: str(rng.choice(labels)) for a, labels in text.ATTRIBUTES.items()}
        captions = text.captions(tags, rng)
        said.update(captions.global_captions + captions.fine_captions)
    words = {word for caption in said for word in re.findall(r"[a-z-]+", caption.lower())}
    tasks = demo.prompts()
    assert {a: tuple(task) for a, task in tasks.items()} == text.ATTRIBUTES
    for task in tasks.values():
        for label in task.values():
            assert len(label) >= 3
            assert not set(label) & said
            unknown = {w for p in label for w in re.findall(r"[a-z-]+", p.lower())} - words
            assert not unknown
    assert not words & {"no", "not", "neither", "nor", "without", "lacking", "never"}


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("the water is cold", 5),
        ("she walked past the gate", 5),
        ("he carried the green bottle", 7),
        ("the musicians painted the wooden box once more", 12),
        ("a little apple", 5),
    ],
)
def test_syllables(word: str, count: int) -> None:
    assert text.syllables(word) == count


@pytest.mark.parametrize("ratio", [320 / 441, 2 / 3, 0.87, 1.21])
def test_resample_keeps_a_tone(ratio: float) -> None:
    t = np.arange(9000)
    y = signal.resample(np.sin(2 * np.pi * 0.05 * t), ratio)
    assert len(y) == round(9000 * ratio)
    expected = np.sin(2 * np.pi * 0.05 * np.arange(len(y)) / ratio)
    half_a_sample = np.pi * 0.05 / min(ratio, 1.0)  # the length is a whole number, so the scale is rounded
    assert np.max(np.abs(y - expected)[400:-400]) < half_a_sample + 0.01


@pytest.mark.parametrize("f0_hz", [80.0, 131.0, 290.0])
def test_pitch_is_found_and_taken_away(f0_hz: float) -> None:
    t = np.arange(16000) / 16000
    voice = sum(np.cos(2 * np.pi * k * f0_hz * t) / k for k in range(1, int(3000 / f0_hz)))
    x = signal.set_level(np.asarray(voice), -25.0)
    median, spread = signal.f0_statistics(signal.f0_track(x))
    assert abs(median / f0_hz - 1) < 0.02
    assert spread < 0.2
    assert abs(signal.active_level_db(x) + 25) < 0.2
    whispered = signal.whisper(x, np.random.default_rng(0))
    assert np.mean(signal.f0_track(whispered) > 0) < 0.1
    assert len(whispered) == len(x)
    crept = signal.creak(x, 55.0, np.random.default_rng(0))
    assert signal.f0_statistics(signal.f0_track(crept))[0] < 0.95 * f0_hz


@pytest.mark.parametrize("rate", [2.5, 4.0, 6.5])
def test_syllables_are_heard(rate: float) -> None:
    t = np.arange(32000) / 16000
    x = (1.05 - np.cos(2 * np.pi * rate * t)) * np.random.default_rng(0).standard_normal(32000)
    assert abs(signal.syllable_nuclei(x) - 2 * rate) <= 1


def test_intonation_is_widened_and_flattened() -> None:
    t = np.arange(32000) / 16000
    phase = 2 * np.pi * np.cumsum(150 * 2 ** (2 * np.sin(2 * np.pi * 1.5 * t) / 12)) / 16000
    x = np.asarray(sum(np.cos(k * phase) / k for k in range(1, 15)))
    spreads = [
        signal.f0_statistics(signal.f0_track(signal.scale_intonation(x, factor)))[1]
        for factor in (0.0, 1.0, 2.0)
    ]
    assert spreads[0] < 0.5 * spreads[1]
    assert spreads[2] > 1.5 * spreads[1]
