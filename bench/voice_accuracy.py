"""Compares the measurements of `clsp_fast.captioning.measure` with Praat's, and with known truth.

    python -m bench.voice_accuracy FOLDER ... [--clips 500] [--only REGEX] [--female REGEX] [--male REGEX]
        [--json FILE]

A folder is a demo corpus, whose manifests state sex and voice quality, or any folder of recordings. In the
latter, --only selects paths, and --female and --male are regular expressions for the paths of speakers of
known sex. Praat runs through praat-parselmouth with its own definitions of everything: pitch, intensity,
harmonicity (cross-correlation), formants (Burg), and the recipe of de Jong and Wempe for syllables. Intervals
are 95 % bootstrap intervals over clips.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from clsp_fast import audio
from clsp_fast.captioning.measure import Measurement, measure, sex_score, speaker_sex, voice_quality

SUFFIXES = {".wav", ".flac", ".ogg"}
RESAMPLES = 300
SHORTEST_S, LONGEST_S = 0.7, 15.0
VOICED_SHARE = 0.2  # of the speech, according to Praat: F0, HNR and formants are compared for such clips


@dataclass(frozen=True)
class Recording:
    """A file, and what is known about it."""

    path: str
    truth: dict[str, str] = field(default_factory=dict)  # "sex" and "quality", where known


@dataclass(frozen=True)
class Row:
    """One recording, measured by both."""

    recording: Recording
    ours: Measurement
    praat: dict[str, float]


def find_recordings(
    folder: Path, count: int, female: str | None, male: str | None, only: str = ""
) -> list[Recording]:
    """At most `count` recordings of a folder, drawn with a fixed seed."""
    manifests = [path for path in sorted(folder.glob("*.jsonl")) if path.stem != "train"]
    recordings = []
    if manifests:
        for path in manifests:
            for line in map(json.loads, path.read_text().splitlines()):
                tags = {key: line["tags"][key] for key in ("sex", "quality") if key in line["tags"]}
                truth = {key: value for key, value in tags.items() if ">" not in value}
                recordings.append(Recording(str(folder / line["audio"]), truth))
    else:
        patterns = {"female": female, "male": male}
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        for path in [path for path in paths if re.search(only, path)]:
            sexes = [sex for sex, pattern in patterns.items() if pattern and re.search(pattern, path)]
            recordings.append(Recording(path, {"sex": sexes[0]} if len(sexes) == 1 else {}))
    return random.Random(0).sample(recordings, min(count, len(recordings)))


def measure_with_praat(waveform: np.ndarray) -> dict[str, float]:
    """F0, level, syllables, HNR and formants, each by Praat's usual recipe."""
    import parselmouth

    sound = parselmouth.Sound(waveform.astype(np.float64), 16_000)
    pitch = sound.to_pitch_ac(time_step=0.01, pitch_floor=60, pitch_ceiling=600)
    f0 = pitch.selected_array["frequency"]
    if np.count_nonzero(f0) >= 8:  # the second range is that of the voice
        low, high = np.percentile(f0[f0 > 0], [25, 75])
        floor = max(50.0, 0.75 * low)
        pitch = sound.to_pitch_ac(
            time_step=0.01, pitch_floor=floor, pitch_ceiling=max(min(700.0, 1.9 * high), 2 * floor)
        )
        f0 = pitch.selected_array["frequency"]
    times, voiced = pitch.xs(), f0 > 0
    intensity = sound.to_intensity(minimum_pitch=50, time_step=0.01)
    level = intensity.values[0]
    sounding = level > np.percentile(level, 99) - 25
    values = {
        "level_db": float(10 * np.log10(np.mean(10 ** (level[sounding] / 10)))) - 94,
        "syllables": float(_nuclei(level, intensity.xs(), times, voiced)),
        "speech_s": float(np.ptp(np.flatnonzero(sounding)) + 1) * 0.01,
        "voiced_s": float(np.count_nonzero(voiced)) * 0.01,
    }
    if np.count_nonzero(voiced) < 8:
        return values
    median = float(np.median(f0[voiced]))
    semitones = 12 * np.log2(f0[voiced] / median)
    values |= {"f0_hz": median, "f0_sd": float(np.std(semitones[np.abs(semitones) < 9]))}
    harmonicity = sound.to_harmonicity_cc(time_step=0.01, minimum_pitch=60)
    ratios = np.array([harmonicity.get_value(time) for time in times[voiced]])
    ratios = ratios[np.isfinite(ratios) & (ratios > -100)]
    if len(ratios):
        values["hnr_db"] = float(np.mean(ratios))
    burg = sound.to_formant_burg(time_step=0.01, max_number_of_formants=5, maximum_formant=5200)
    for k in range(1, 5):
        formant = np.array([burg.get_value_at_time(k, time) for time in times[voiced]])
        formant = formant[np.isfinite(formant)]
        if len(formant) >= 8:
            values[f"F{k}"] = float(np.median(formant))
    return values


def _nuclei(level: np.ndarray, at: np.ndarray, times: np.ndarray, voiced: np.ndarray) -> int:
    """Voiced peaks of the intensity, within 25 dB of the top, with dips of 2 dB between them."""
    floor = np.percentile(level, 99) - 25
    peaks: list[int] = []
    for i in range(1, len(level) - 1):
        if level[i] > floor and level[i - 1] < level[i] >= level[i + 1]:
            if peaks and min(level[i], level[peaks[-1]]) - level[peaks[-1] : i + 1].min() < 2:
                if level[i] > level[peaks[-1]]:
                    peaks[-1] = i
            else:
                peaks.append(i)
    return sum(bool(voiced[np.argmin(np.abs(times - at[i]))]) for i in peaks)


def measure_both(recordings: Sequence[Recording]) -> list[Row]:
    """Measures the recordings that can be read and have a suitable length."""
    loaded = audio.load_batch([recording.path for recording in recordings], num_threads=1)
    usable = [
        (recording, waveform)
        for recording, waveform in zip(recordings, loaded, strict=True)
        if isinstance(waveform, np.ndarray) and SHORTEST_S <= len(waveform) / 16_000 <= LONGEST_S
    ]
    ours = measure([waveform for _, waveform in usable], num_threads=1)
    return [
        Row(recording, measurement, measure_with_praat(waveform))
        for (recording, waveform), measurement in zip(usable, ours, strict=True)
    ]


# Figures. Each takes rows and returns a number; rows without the values are left out beforehand.


def rank_correlation(pairs: np.ndarray) -> float:
    """Spearman's correlation of (n, 2) pairs."""
    ranks = []
    for column in pairs.T:
        _, index, counts = np.unique(column, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - counts / 2)[index])  # ties get their mean rank
    return float(np.corrcoef(*ranks)[0, 1])


def f1(pairs: np.ndarray) -> float:
    """F1 of (n, 2) flags: truth, prediction."""
    truth, predicted = pairs[:, 0] > 0, pairs[:, 1] > 0
    return 2 * float(np.sum(truth & predicted)) / max(1.0, float(np.sum(truth) + np.sum(predicted)))


def balanced(pairs: np.ndarray) -> float:
    """Mean over the truth's two classes of the share that was predicted correctly."""
    right = pairs[:, 0] == pairs[:, 1]
    return float(np.mean([np.mean(right[pairs[:, 0] == label]) for label in np.unique(pairs[:, 0])]))


def share(pairs: np.ndarray) -> float:
    """Share of the flags in the first column."""
    return float(np.mean(pairs[:, 0]))


def figure(pairs: Sequence[Sequence[float]], statistic: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """A statistic of (n, 2) pairs with its 95 % bootstrap interval; pairs with NaN are left out."""
    values = np.array([pair for pair in pairs if all(map(math.isfinite, pair))], np.float64)
    if len(values) < 10:
        return {"n": len(values), "value": None, "interval": None}
    rng = np.random.default_rng(0)
    resampled = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(RESAMPLES)]
    interval = [round(float(bound), 4) for bound in np.nanpercentile(resampled, [2.5, 97.5])]
    return {"n": len(values), "value": round(statistic(values), 4), "interval": interval}


def agreement_with_praat(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How closely the measurements follow Praat's."""
    voiced = [row for row in rows if is_voiced(row)]

    def pairs(ours: Callable[[Measurement], float], praat: str) -> list[tuple[float, float]]:
        chosen = rows if praat == "level_db" else voiced
        return [(ours(row.ours), row.praat.get(praat, math.nan)) for row in chosen]

    def within(limit: float) -> Callable[[np.ndarray], float]:
        return lambda values: float(np.mean(np.abs(values[:, 0] / values[:, 1] - 1) <= limit))

    def median_difference(values: np.ndarray) -> float:
        return float(np.median(values[:, 0] - values[:, 1]))

    f0 = pairs(lambda m: m.whole.f0_hz, "f0_hz")
    level, hnr = pairs(lambda m: m.whole.level_db, "level_db"), pairs(lambda m: m.whole.hnr_db, "hnr_db")
    rate = [(row.ours.whole.syllables_per_s, syllables_per_s(row.praat)) for row in voiced]
    figures = {
        "F0 median within 5 %": figure(f0, within(0.05)),
        "F0 median rank correlation": figure(f0, rank_correlation),
        "F0 spread rank correlation": figure(pairs(lambda m: m.whole.f0_sd, "f0_sd"), rank_correlation),
        "syllable rate rank correlation": figure(rate, rank_correlation),
        "level rank correlation": figure(level, rank_correlation),
        "level, median difference in dB": figure(level, median_difference),
        "HNR rank correlation": figure(hnr, rank_correlation),
        "HNR, median difference in dB": figure(hnr, median_difference),
    }
    for k in range(4):
        formant = pairs(lambda m, k=k: m.formants_hz[k], f"F{k + 1}")  # type: ignore[misc]
        figures[f"F{k + 1} within 10 %"] = figure(formant, within(0.1))
        figures[f"F{k + 1} rank correlation"] = figure(formant, rank_correlation)
    return figures


def is_voiced(row: Row) -> bool:
    """Whether Praat's F0 can serve as a reference: there is voice, neither whispered nor creaky."""
    normal = row.recording.truth.get("quality", "normal") == "normal"
    return normal and row.praat["voiced_s"] > VOICED_SHARE * row.praat["speech_s"]


def syllables_per_s(praat: dict[str, float]) -> float:
    """Syllables per second of the stretch from the first to the last loud frame."""
    return praat["syllables"] / max(praat["speech_s"], 0.1)


def agreement_with_truth(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Sex and voice quality against what is known."""
    sexes = [row for row in rows if "sex" in row.recording.truth]
    decided = [row for row in sexes if speaker_sex(row.ours)]
    female = [(row.recording.truth["sex"] == "female", speaker_sex(row.ours) == "female") for row in decided]
    voiced = [row for row in sexes if math.isfinite(sex_score(row.ours))]
    by_f0 = [(row.recording.truth["sex"] == "female", row.ours.whole.f0_hz > 173) for row in voiced]
    by_score = [(row.recording.truth["sex"] == "female", sex_score(row.ours) > 0) for row in voiced]
    qualities = [row for row in rows if "quality" in row.recording.truth]
    figures = {
        "sex, balanced accuracy where decided": figure(female, balanced),
        "sex, share undecided": figure([(speaker_sex(row.ours) is None, 0) for row in sexes], share),
        "sex, balanced accuracy by F0 alone": figure(by_f0, balanced),
        "sex, balanced accuracy by the sign of the score": figure(by_score, balanced),
    }
    for quality in ("whisper", "creaky"):
        flags = [
            (row.recording.truth["quality"] == quality, voice_quality(row.ours.whole) == quality)
            for row in qualities
        ]
        figures[f"{quality} F1"] = figure(flags, f1)
    unknown = [(voice_quality(row.ours.whole) is None, 0) for row in qualities]
    figures["quality, share undecided"] = figure(unknown, share)
    modal = [row for row in qualities if row.recording.truth["quality"] == "normal"]
    for quality in ("whisper", "creaky"):
        wrong = [(voice_quality(row.ours.whole) == quality, 0) for row in modal]
        figures[f"normal voices called {quality}"] = figure(wrong, share)
    return figures


def report(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Prints and returns the figures of some recordings."""
    figures = agreement_with_praat(rows) | agreement_with_truth(rows)
    figures = {key: value for key, value in figures.items() if value["value"] is not None}
    print(f"\n{name}: {len(rows)} clips")
    for key, value in figures.items():
        low, high = value["interval"]
        print(f"  {key:52} {value['value']:8.3f}  [{low:.3f}, {high:.3f}]  n = {value['n']}", flush=True)
    return {"clips": len(rows), "figures": figures}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=500, help="of each folder")
    parser.add_argument("--only", default="", help="regular expression for the paths of the recordings")
    parser.add_argument("--female", help="regular expression for the paths of women")
    parser.add_argument("--male", help="regular expression for the paths of men")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    commit, changed = machine.commit()
    described = machine.describe()
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit,
        "changed": changed,
        "machine": machine.line(described),
        "folders": {},
    }
    print(machine.line(described))
    everything: list[Row] = []
    with ProcessPoolExecutor(options.workers) as pool:
        for folder in options.folders:
            recordings = find_recordings(folder, options.clips, options.female, options.male, options.only)
            batches = [recordings[i : i + 16] for i in range(0, len(recordings), 16)]
            rows = [row for batch in pool.map(measure_both, batches) for row in batch]
            result["folders"][folder.name] = report(folder.name, rows)
            everything += rows
    if len(options.folders) > 1:
        result["folders"]["all"] = report("all", everything)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
