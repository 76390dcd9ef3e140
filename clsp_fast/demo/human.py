"""Human speech for training: fetched recordings become clips with offline captions, split by voice.

`prepare` cuts each recording at quiet points, measures it, and describes what it measured, like `caption
offline`. The recordings hold hardly any whispers or creaky voices, and few speakers. So it also makes changed
copies of clear clips:

| copy   | change                                              | what it teaches                        |
|--------|-----------------------------------------------------|----------------------------------------|
| rough  | the same words whispered, or creaky                 | voice quality, whatever the recording  |
| noisy  | noise and a narrow band; the labels stay            | a noisy or dull voice is not a whisper |
| warped | other speed: F0, formants and tempo change together | other heights and vocal tracts         |

The level of each clip is drawn at random, because the level of a file says more about its source than about
the speaker. Labels that are far more frequent than others of their attribute are left out of some clips, and
changes within a clip are not described: nearly all are the slower, softer end of a sentence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clsp_fast import audio
from clsp_fast.audio import AudioError
from clsp_fast.captioning import wording
from clsp_fast.captioning.labels import FIXED, label, labels, speech_problem
from clsp_fast.captioning.measure import Measurement, measure
from clsp_fast.demo import recordings
from clsp_fast.demo.clips import WANTED_LEVEL, creak_hz, write_wav
from clsp_fast.demo.folder import Child, CorpusFolder, run_children, usable_cores
from clsp_fast.demo.recordings import PACKAGES, FetchError, voice_of
from clsp_fast.demo.signal import (
    SAMPLE_RATE_HZ,
    Signal,
    active_level_db,
    creak,
    resample,
    set_level,
    tilt,
    whisper,
)
from clsp_fast.storage import files

_GENERATOR = 3  # to be increased when a change of the code changes the clips
_SUMMARY = "human.json"
_SPLITS = ("train", "test")
_BLOCK = 320
_LONGEST_S, _SHORTEST_S = 3.2, 0.7
_FAINTEST = 1e-3
# Most clips of one voice, and the share of the recordings that are used. With more of them, the demo corpus
# would be a small part of the training clips, and the model would lose what only that corpus teaches.
_MOST_CLIPS = {"festvox-ru": 150, "tuxpaint-stamps-default": 110}
_SHARE = {"fillets-ng-data-cs": 0.5, "fillets-ng-data-nl": 0.5}
HELD_OUT = ("tuxpaint/bg", "tuxpaint/ca", "tuxpaint/el", "tuxpaint/es")
"""Voices of the test split: two men (bg, ca) and two women. All that they say is left out of training."""
_TYPICAL_BYTES = 65_000
# Speeds at which a man's or a woman's clip is still heard as a man's or a woman's.
_SAME_SEX = {"male": (0.7, 1.06), "female": (0.95, 1.12)}
_CARTOON = (1.2, 1.9)
_MEASURED_DB = -25.0
_BALANCED = ("pitch", "speed", "liveliness")
_ALWAYS_KEPT = 50


@dataclass(frozen=True, kw_only=True)
class HumanConfig:
    """Sources and size of the human corpus."""

    recordings: Path | None = None
    """Folder of the packages: .deb files, or what was unpacked from them. None: apt-get fetches them."""
    seed: int = 0
    """Seed of all random numbers."""
    workers: int | None = None
    """Number of parallel processes; it changes no clip. None: one for each usable core, at most 4."""
    held_out: tuple[str, ...] = HELD_OUT
    """Voices that only the test split has, as `recordings.voice_of` names them. A name that ends in "/" means
    all voices whose names begin with it."""
    rough: float = 0.35
    """Share of clear clips that have a whispered or creaky copy."""
    noisy: float = 0.25
    """Share of clear clips that have a noisy copy."""
    warped: float = 0.45
    """Share of clear clips that have a warped copy."""

    def __post_init__(self) -> None:
        for name in ("rough", "noisy", "warped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be None or at least 1, got {self.workers}")


@dataclass(frozen=True)
class HumanCorpus:
    """A complete corpus on disk."""

    folder: Path
    train: Path
    """Manifest of the training voices, with the changed copies."""
    test: Path
    """Manifest of the held-out voices, without copies. The tags also hold what was measured."""
    fingerprint: str
    """Hash of the configuration and the generator's version."""


def prepare(
    folder: Path,
    config: HumanConfig = HumanConfig(),
    *,
    packages: Path | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> HumanCorpus:
    """Makes the corpus in `folder`, unless the folder holds it already.

    Args:
        folder: where the corpus is kept; it is made beside it, and moved there when it is complete.
        config: sources and seed.
        packages: where fetched packages are kept; None: `packages` beside `folder`.
        say: receives lines about downloads.
        progress: called with (recordings read, about how many there are).

    Raises:
        FetchError: the recordings cannot be fetched or read.
        ValueError: `folder` holds other files, or the recordings hold no usable clip.
        files.DiskFull: there is no room.
    """
    place = CorpusFolder(
        path=Path(folder).absolute(),
        kind="human corpus",
        summary=_SUMMARY,
        splits=_SPLITS,
        fingerprint=_fingerprint(config),
    )
    if place.read() is None:
        place.refuse_other_files()
        source = config.recordings
        if source is None:
            source = packages or place.path.parent / "packages"
            recordings.fetch(source, say=say)
        elif not source.is_dir():
            raise FetchError(f"there is no folder {source}; name the folder that holds the packages")
        fill = partial(
            _make_corpus, source=source, config=config, fingerprint=place.fingerprint, progress=progress
        )
        place.make(sum(p.recordings for p in PACKAGES.values()) * 2 * _TYPICAL_BYTES, fill)
    return HumanCorpus(place.path, place.path / "train.jsonl", place.path / "test.jsonl", place.fingerprint)


def describe(corpus: HumanCorpus) -> str:
    """A few lines about a corpus: clips, voices, packages with their licences, recordings left out."""
    summary = json.loads((corpus.folder / _SUMMARY).read_text())
    counts = ", ".join(f"{count} {split}" for split, count in summary["clips"].items())
    lines = [
        f"human speech, captions from measurements alone: {counts}; "
        f"{summary['voices']['train']} voices, and {summary['voices']['test']} that only the test has"
    ]
    for name, count in summary["recordings"].items():
        lines.append(
            f"  {name}: {count} recordings, {PACKAGES[name].about}; licence: {PACKAGES[name].licence}"
        )
    if summary["left_out"]:
        lines.append("  left out: " + ", ".join(f"{n} {reason}" for reason, n in summary["left_out"].items()))
    return "\n".join(lines)


def _fingerprint(config: HumanConfig) -> str:
    values = dataclasses.asdict(config)
    del values["workers"]
    values["recordings"] = None if config.recordings is None else str(config.recordings.absolute())
    text = json.dumps({"generator": _GENERATOR, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make_corpus(
    folder: Path,
    *,
    source: Path,
    config: HumanConfig,
    fingerprint: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    work = folder / "work"
    work.mkdir()
    (folder / "audio").mkdir()
    rows = _run_jobs(source, config, folder, progress)
    shutil.rmtree(work)
    left_out = Counter(row["left_out"] for row in rows if "left_out" in row)
    rows = [row for row in rows if "left_out" not in row]
    test = [row for row in rows if _is_held_out(row["speaker"], config) and not row["copy"]]
    train = [row for row in rows if not _is_held_out(row["speaker"], config)]
    for name, part in (("training", train), ("held-out", test)):
        if not part:
            raise ValueError(f"the recordings in {source} hold no usable clip of a {name} voice")
    _balance(train, np.random.default_rng(config.seed))
    manifests, clips = {}, {}
    kept = set[str]()
    for split, part in (("train", train), ("test", test)):
        lines = [line for row in part if (line := _line(row, config.seed, measured=split == "test"))]
        kept.update(line["audio"] for line in lines)
        raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        (folder / f"{split}.jsonl").write_bytes(raw)
        manifests[split], clips[split] = hashlib.sha256(raw).hexdigest(), len(lines)
    for path in (folder / "audio").iterdir():
        if f"audio/{path.name}" not in kept:
            path.unlink()
    summary = {
        "about": "human speech with captions from measurements; made by clsp_fast.demo.human",
        "fingerprint": fingerprint,
        "config": dataclasses.asdict(config) | {"recordings": str(source)},
        "recordings": Counter(row["package"] for row in rows if not row["copy"]),
        "voices": {"train": len({r["speaker"] for r in train}), "test": len({r["speaker"] for r in test})},
        "left_out": left_out,
        "clips": clips,
        "manifests": manifests,
    }
    (folder / _SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def _is_held_out(voice: str, config: HumanConfig) -> bool:
    return any(voice == name or (name.endswith("/") and voice.startswith(name)) for name in config.held_out)


def _run_jobs(
    source: Path, config: HumanConfig, folder: Path, progress: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    """Reads all packages, each in a process of its own; returns their rows in the order of `PACKAGES`."""
    shares = {name: getattr(config, name) for name in ("rough", "noisy", "warped", "seed")}
    total = sum(package.recordings for package in PACKAGES.values())
    children: dict[str, Child] = {}

    def start(job: dict[str, Any]) -> Child:
        name = job["package"]
        children[name] = Child(job, folder / "work" / name, module="human")
        return children[name]

    def end(child: Child) -> None:
        if child.process.returncode:
            raise FetchError(f"{child.job['package']} cannot be read: {child.failure()}")

    def report(made: int) -> None:
        if progress is not None:
            progress(min(total, made), total)

    jobs = [
        {"package": name, "source": str(source), "audio": str(folder / "audio"), **shares}
        for name in sorted(PACKAGES, key=lambda name: PACKAGES[name].recordings)
    ]
    workers = config.workers or min(usable_cores(), len(PACKAGES))
    run_children(jobs, start, end, workers=workers, pause_s=0.2, progress=report)
    rows = []
    for name in PACKAGES:
        rows += [json.loads(line) for line in children[name].lines.read_bytes().splitlines()]
    return [row for group in rows for row in group]


def run_job(job_file: str) -> None:
    """Entry point of a child process: makes the clips of one package.

    The job file is JSON: {"package", "source", "audio", "lines", "seed", "rough", "noisy", "warped"}. For
    each recording, the file `lines` gets a line with a list: a row for the clip and for each copy, or one row
    that says why the recording is left out.
    """
    job = json.loads(Path(job_file).read_text())
    try:
        with Path(job["lines"]).open("w") as lines:
            for rows in _package_rows(job):
                lines.write(json.dumps(rows) + "\n")
                lines.flush()
    except OSError as error:
        if error.errno not in files.DISK_FULL_CODES:
            raise
        sys.exit(error.errno)
    except FetchError as error:
        sys.exit(str(error))


def _package_rows(job: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    package = job["package"]
    most, share = _MOST_CLIPS.get(package, math.inf), _SHARE.get(package, 1.0)
    clips = Counter[str]()
    for recording in recordings.read(Path(job["source"]), package):
        voice, number = voice_of(package, recording.path), zlib.crc32(recording.path.encode())
        if number >= share * 2**32:
            continue
        if clips[voice.name] >= most:
            if package == "festvox-ru":  # one voice: the rest of the archive need not be unpacked
                break
            continue
        rng = np.random.default_rng([job["seed"], number])
        try:
            x = cut(audio.load(recording.content), rng)
        except AudioError as error:
            yield [{"left_out": str(error.reason)}]
            continue
        if len(x) < _SHORTEST_S * SAMPLE_RATE_HZ or np.abs(x).max() < _FAINTEST:
            yield [{"left_out": "too short or silent"}]
            continue
        name = f"{voice.name.replace('/', '-')}-{number:08x}"
        rows = [*_clip_rows(x, name, voice.sex, Path(job["audio"]), job, rng)]
        if "left_out" not in rows[0]:
            clips[voice.name] += 1
        yield [{"package": package, "speaker": voice.name, **row} for row in rows]


def _clip_rows(
    x: Signal, name: str, sex: str, folder: Path, shares: Mapping[str, Any], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Writes a clip and its copies, and yields their rows."""

    def write(y: Signal, copy: str, tags: dict[str, str], measured: Measurement) -> dict[str, Any]:
        """Sets a random level and writes the clip."""
        level_db = float(rng.uniform(*WANTED_LEVEL[str(rng.choice([*WANTED_LEVEL]))]))
        samples = write_wav(folder / f"{name}{copy}.wav", set_level(y, level_db))
        tags["loudness"] = label(level_db, FIXED.loudness)
        return {
            "id": f"{name}{copy}",
            "audio": f"audio/{name}{copy}.wav",
            "duration_s": samples / SAMPLE_RATE_HZ,
            "copy": copy,
            "tags": {a: tags[a] for a in wording.ATTRIBUTES if ">" not in (tags.get(a) or ">")},
            "measured": _measured(measured),
        }

    measured = _measure(x)
    if reason := speech_problem(measured):
        yield {"left_out": reason}
        return
    tags = labels(measured, known={"sex": sex} if sex else None)
    yield write(x, "", dict(tags), measured)
    if tags.get("quality") != "normal":
        return
    if rng.random() < shares["noisy"]:
        yield write(_noisy(x, rng), "-noisy", dict(tags), measured)
    if rng.random() < shares["rough"]:
        kind = "whisper" if rng.random() < 0.5 else "creaky"
        y = (
            whisper(x, rng)
            if kind == "whisper"
            else creak(x, float(rng.uniform(*creak_hz(tags.get("sex")))), rng)
        )
        y = y + _noise(y, float(rng.uniform(20, 50)), 0.0, rng)
        # Without the sex: where F0 says nothing, the demo corpus, whose voices vary more, teaches it better.
        rough_tags = {"quality": kind, "speed": tags.get("speed", ""), "pauses": tags.get("pauses", "")}
        yield write(y, f"-{kind}", rough_tags, measured)
    if rng.random() < shares["warped"] and "sex" in tags:
        speed = _speed(tags["sex"], rng)
        low, high = _SAME_SEX[tags["sex"]]
        y = resample(x, 1 / speed)
        if len(y) > 0.5 * SAMPLE_RATE_HZ:
            measured = _measure(y)
            known = {"sex": tags["sex"] if low <= speed <= high else "", "quality": "normal"}
            yield write(y, "-warped", labels(measured, known=known), measured)


def _measure(x: Signal) -> Measurement:
    return measure([set_level(x, _MEASURED_DB).astype(np.float32)], num_threads=1)[0]


def _speed(sex: str, rng: np.random.Generator) -> float:
    """How much faster a warped copy plays: a little, so that the sex remains, or as in cartoons."""
    if rng.random() < 0.6:
        low, high = _SAME_SEX[sex]
        return float(rng.uniform(low, high))
    return float(np.exp(rng.uniform(*np.log(_CARTOON))))


def _measured(measurement: Measurement) -> dict[str, float]:
    part = measurement.whole
    values = {
        "f0_hz": part.f0_hz,
        "syllables_per_s": part.syllables_per_s,
        "voiced": part.voiced,
        "hnr_db": part.hnr_db,
    }
    return {key: float(f"{value:.4g}") for key, value in values.items() if math.isfinite(value)}


def cut(waveform: npt.NDArray[np.floating[Any]], rng: np.random.Generator) -> Signal:
    """Cuts silence off both ends. Of a longer recording, a stretch of 2 to 3.2 s is left that begins and ends
    in a quiet moment."""
    x: Signal = waveform.astype(np.float64)
    level = _levels(x)
    if len(level) < 10:
        return x[:0]
    (active,) = np.nonzero(level > np.percentile(level, 95) - 35)
    margin = 2 * _BLOCK
    x = x[max(0, active[0] * _BLOCK - margin) : (active[-1] + 1) * _BLOCK + margin]
    if len(x) <= _LONGEST_S * SAMPLE_RATE_HZ:
        return x
    level = _levels(x)
    length = round(rng.uniform(2.0, _LONGEST_S) * SAMPLE_RATE_HZ / _BLOCK)
    starts = np.arange(len(level) - length + 1)
    first = np.mean([level[starts + k] for k in range(3)], axis=0)
    last = np.mean([level[starts + length - 1 - k] for k in range(3)], axis=0)
    start = int(np.argmin(np.maximum(first, last)))
    stretch: Signal = x[start * _BLOCK : (start + length) * _BLOCK]
    return stretch


def _levels(x: Signal) -> Signal:
    """Level in dB of each block of 20 ms."""
    count = len(x) // _BLOCK
    power: Signal = np.mean(np.square(x[: count * _BLOCK]).reshape(count, _BLOCK), axis=1)
    return np.asarray(10 * np.log10(power + 1e-10), np.float64)


def _noise(x: Signal, below_db: float, slope: float, rng: np.random.Generator) -> Signal:
    """Noise at a level below that of the speech; its spectrum has a slope in dB per octave."""
    noise = tilt(rng.standard_normal(len(x)), slope)
    return noise * 10 ** ((active_level_db(x) - below_db) / 20) / float(np.sqrt(np.mean(noise**2)))


def _noisy(x: Signal, rng: np.random.Generator) -> Signal:
    """A worse recording of the same voice: often a narrow band like a telephone's, and audible noise."""
    if rng.random() < 0.6:
        size = len(x) + 512
        hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ)
        low, high = rng.uniform(50, 300), rng.uniform(2200, 4000)
        response = (hz / low) ** 2 / np.sqrt(1 + (hz / low) ** 4) / np.sqrt(1 + (hz / high) ** 16)
        x = np.fft.irfft(np.fft.rfft(x, size) * response, size)[: len(x)]
    return x + _noise(x, float(rng.uniform(8, 30)), float(rng.uniform(-5, 1)), rng)


def _balance(rows: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Leaves labels out of some clips, so that none is much more frequent than the others of its attribute.
    The pitch is balanced for each sex.

    People speak livelier than the voices of the demo corpus. Without this step, "lively" would come to mean
    "recorded from a human", and hardly any clip would be called monotone. A label always keeps 50 clips:
    otherwise a single monotone clip would take the other labels from nearly all clips.
    """
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for attribute in _BALANCED:
            if value := row["tags"].get(attribute):
                sex = row["tags"].get("sex", "") if attribute == "pitch" else ""
                groups[attribute, sex][value].append(row)
    for (attribute, _), by_label in groups.items():
        counts = sorted(len(clips) for clips in by_label.values())
        second = counts[-2] if len(counts) > 1 else counts[0]
        most = max(_ALWAYS_KEPT, 3 * counts[0] if attribute == "liveliness" else math.ceil(1.5 * second))
        for clips in by_label.values():
            for i in rng.permutation(len(clips))[most:]:
                del clips[i]["tags"][attribute]


def _line(row: Mapping[str, Any], seed: int, *, measured: bool) -> dict[str, Any] | None:
    """The manifest's line of a clip; None if too little is known for captions."""
    tags = row["tags"]
    if len(tags) < 2 or not tags.keys() - {"sex"}:
        return None
    rng = np.random.default_rng([seed, zlib.crc32(row["id"].encode())])
    captions = wording.captions(tags, rng, fine=6)
    numbers = {key: str(value) for key, value in row["measured"].items()} if measured else {}
    return {
        "id": row["id"],
        "audio": row["audio"],
        "duration_s": row["duration_s"],
        "speaker": row["speaker"],
        "global_captions": captions.global_captions,
        "finegrained_captions": captions.fine_captions,
        "tags": {**tags, **numbers, "package": row["package"]},
        "claims": {"global": captions.global_claims, "fine": captions.fine_claims},
    }
