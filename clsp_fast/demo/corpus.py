"""Makes the demo corpus in a folder: shards made by child processes, manifests and a summary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clsp_fast.demo import engines
from clsp_fast.demo.folder import Child, CorpusFolder, run_children, usable_cores, wav_bytes

_GENERATOR = 7  # to be increased when a change of the code changes the clips
_SHARD_CLIPS = 250
_SUMMARY = "corpus.json"
_TYPICAL_S = 2.0
_SPLITS = ("train", "validation", "test", "transfer")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Size and sources of the demo corpus."""

    clips: int = 3000
    """Clips of the train split, about two seconds each."""
    validation_clips: int = 200
    """Clips of the validation split, whose voices and sentences do not occur in the train split."""
    test_clips: int = 200
    """Clips of the test split, whose voices and sentences do not occur in the other two."""
    transfer_clips: int = 100
    """Clips by an engine that speaks in no other split; 0 leaves the split out."""
    seed: int = 0
    """Seed of all random numbers."""
    workers: int | None = None
    """Number of parallel processes; it changes no clip. None: one for each usable core, at most 16."""
    engines: tuple[str, ...] | None = None
    """Names from engines.ENGINES; None: all whose packages are installed, or "synth" if none is."""

    def __post_init__(self) -> None:
        for name in ("clips", "validation_clips", "test_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.transfer_clips < 0 or self.seed < 0:
            raise ValueError(f"transfer_clips and seed must be >= 0, got {self.transfer_clips}, {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be None or at least 1, got {self.workers}")
        if self.engines is not None:
            unknown = [e for e in self.engines if e not in engines.ENGINES]
            if unknown or not self.engines or len(set(self.engines)) != len(self.engines):
                raise ValueError(
                    f"engines must be None or distinct names from {engines.ENGINES}, got {self.engines}"
                )


@dataclass(frozen=True)
class DemoCorpus:
    """A complete corpus on disk."""

    folder: Path
    train: Path
    """Manifest of the train split, one JSON object a line."""
    validation: Path
    test: Path
    transfer: Path | None
    """None if there is no transfer split: every engine speaks in the others, or no clips were requested."""
    engines: tuple[str, ...]
    """Engines that speak in train, validation and test."""
    fingerprint: str
    """Hash of the configuration, the generator's version and the engines' versions."""


def prepare(
    folder: Path, config: DemoConfig = DemoConfig(), *, progress: Callable[[int, int], None] | None = None
) -> DemoCorpus:
    """Makes the corpus in `folder`, unless the folder holds it already.

    The corpus is made beside `folder` and moved there when it is complete. Another demo corpus, or an
    incomplete one, is replaced.

    Args:
        folder: where the corpus is kept; its parent is created.
        config: size, seed and engines.
        progress: called with (clips made, all clips) about five times a second.

    Raises:
        ValueError: an engine of `config.engines` is not installed, or `folder` holds other files.
        RuntimeError: an engine failed twice on the same shard; the message ends with the engine's last line.
        files.DiskFull: there is no room for the corpus; nothing of it is left behind.
    """
    speakers, missing = _installed_engines(config)
    place = CorpusFolder(
        path=Path(folder).absolute(),
        kind="demo corpus",
        summary=_SUMMARY,
        splits=_SPLITS,
        fingerprint=_fingerprint(config, speakers),
    )
    summary = place.read()
    if summary is None:
        place.refuse_other_files()
        clips = config.clips + config.validation_clips + config.test_clips + config.transfer_clips
        fill = partial(
            _make_corpus,
            config=config,
            speakers=speakers,
            missing=missing,
            fingerprint=place.fingerprint,
            progress=progress,
        )
        summary = place.make(clips * wav_bytes(_TYPICAL_S), fill)
    return _corpus(place, summary)


def describe(corpus: DemoCorpus) -> str:
    """A few lines about a corpus: clips per split, engines that spoke, engines that are missing and why."""
    summary = json.loads((corpus.folder / _SUMMARY).read_text())
    counts = ", ".join(f"{count} {split}" for split, count in summary["clips"].items())
    lines = [f"demo corpus (synthetic speech): {counts}; voices by {', '.join(corpus.engines)}"]
    lines += [f"  without {name}: {reason}" for name, reason in summary["missing"].items()]
    return "\n".join(lines)


def _installed_engines(config: DemoConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """(engines whose packages are installed, reasons why the others are missing)."""
    reasons = {name: engines.unavailable(name) for name in engines.ENGINES}
    if config.engines is not None:
        for name in config.engines:
            if reasons[name]:
                raise ValueError(f"engine {name} cannot be used: {reasons[name]}")
        return config.engines, {}
    present = tuple(name for name, reason in reasons.items() if not reason and name != "synth")
    return present or ("synth",), {name: reason for name, reason in reasons.items() if reason}


def _working_engines(
    speakers: Sequence[str], missing: dict[str, str], config: DemoConfig, folder: Path
) -> list[str]:
    """The installed engines that start. For the others, a reason is added to `missing`."""
    working = []
    probes = {name: Child({"probe": name}, folder / f"probe-{name}") for name in speakers}
    for name, child in probes.items():
        if child.process.wait() == 0:
            working.append(name)
        elif config.engines is not None:
            raise RuntimeError(f"engine {name} does not start: {child.failure()}")
        else:
            missing[name] = f"does not start: {child.failure()}"
    return working or ["synth"]


def _fingerprint(config: DemoConfig, speakers: Iterable[str]) -> str:
    values = dataclasses.asdict(config)
    del values["workers"]
    values["engines"] = {name: engines.package_version(name) for name in speakers}
    text = json.dumps({"generator": _GENERATOR, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _corpus(place: CorpusFolder, summary: Mapping[str, Any]) -> DemoCorpus:
    manifests = {split: place.path / f"{split}.jsonl" for split in summary["manifests"]}
    return DemoCorpus(
        folder=place.path,
        train=manifests["train"],
        validation=manifests["validation"],
        test=manifests["test"],
        transfer=manifests.get("transfer"),
        engines=tuple(summary["engines"]),
        fingerprint=place.fingerprint,
    )


def _plan_shards(config: DemoConfig, speakers: Sequence[str]) -> list[dict[str, Any]]:
    """Shards of all splits: every engine has an equal part of train, validation and test."""
    sizes = {"train": config.clips, "validation": config.validation_clips, "test": config.test_clips}
    parts = [
        (split, name, clips // len(speakers) + (i < clips % len(speakers)))
        for split, clips in sizes.items()
        for i, name in enumerate(speakers)
    ]
    if "synth" not in speakers:
        parts.append(("transfer", "synth", config.transfer_clips))
    shards: list[dict[str, Any]] = []
    for split, name, clips in parts:
        count = math.ceil(clips / _SHARD_CLIPS)
        for k in range(count):
            size = clips // count + (k < clips % count)
            shards.append({"split": split, "engine": name, "clips": size, "number": len(shards)})
    return shards


def _make_corpus(
    folder: Path,
    *,
    config: DemoConfig,
    speakers: Sequence[str],
    missing: dict[str, str],
    fingerprint: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    work = folder / "work"
    work.mkdir()
    speakers = _working_engines(speakers, missing, config, work)
    shards = _plan_shards(config, speakers)
    for split in {shard["split"] for shard in shards}:
        (folder / "audio" / split).mkdir(parents=True)
    workers = config.workers or min(usable_cores(), 16)
    lines = _run_shards(shards, config.seed, workers, work, progress)
    manifests, clips = {}, {}
    for split in _SPLITS:
        split_lines = [line for shard in shards if shard["split"] == split for line in lines[shard["number"]]]
        if not split_lines:
            continue
        order = np.random.default_rng(config.seed).permutation(len(split_lines))
        raw = b"".join(split_lines[i] for i in order)
        (folder / f"{split}.jsonl").write_bytes(raw)
        manifests[split], clips[split] = hashlib.sha256(raw).hexdigest(), len(split_lines)
    shutil.rmtree(work)
    summary = {
        "about": "synthetic speech made by clsp_fast.demo; style labels were measured",
        "fingerprint": fingerprint,
        "engines": {name: engines.package_version(name) for name in speakers},
        "missing": missing,
        "config": dataclasses.asdict(config),
        "clips": clips,
        "manifests": manifests,
    }
    (folder / _SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def _run_shards(
    shards: Sequence[dict[str, Any]],
    seed: int,
    workers: int,
    work: Path,
    progress: Callable[[int, int], None] | None,
) -> dict[int, list[bytes]]:
    """Makes all shards, `workers` at a time; returns the manifest lines of each shard by its number."""
    audio = work.parent / "audio"
    total = sum(shard["clips"] for shard in shards)
    lines: dict[int, list[bytes]] = {}

    def start(job: dict[str, Any]) -> Child:
        stem = work / f"{job['number']}-{job['attempt']}"
        return Child({**job, "seed": seed, "audio": str(audio)}, stem)

    def end(child: Child) -> dict[str, Any] | None:
        job = child.job
        if child.process.returncode == 0:
            lines[job["number"]] = child.lines.read_bytes().splitlines(keepends=True)
            return None
        failure = child.failure()
        if job["attempt"]:
            raise RuntimeError(f"engine {job['engine']} failed twice: {failure}")
        return {**job, "attempt": 1}  # with other random numbers, the engine may not crash

    def report(made: int) -> None:
        if progress is not None:
            progress(made, total)

    # The largest shards come first, so that no large one runs alone at the end.
    jobs = sorted(({**s, "attempt": 0} for s in shards), key=lambda s: (s["clips"], s["engine"] == "hibari"))
    run_children(jobs, start, end, workers=workers, pause_s=0.05 if total < 100 else 0.2, progress=report)
    return lines
