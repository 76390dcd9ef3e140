"""From measurements to labels: which number is called "slow", "high-pitched" or "whispered".

The demo corpus and `caption offline` share the bands of this file, so that the same word means the same
number on synthetic and on human speech. A value between two bands has no label: captions do not mention it.
Bandwidth and noise are measured, but no label describes them, because captions are about the voice alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from clsp_fast.captioning.measure import Measurement, Part, speaker_sex, voice_quality
from clsp_fast.captioning.wording import ATTRIBUTES, has_change

Band = tuple[float, float]
"""Lowest and highest value."""
MIN_VALUES = 50
"""An attribute with fewer values has the fixed bands, because quantiles of so few say little."""


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Which values of an attribute have which label."""

    pitch: Mapping[str, Mapping[str, Band]]
    """For each sex, the median F0 in Hz."""
    speed: Mapping[str, Band]
    """Syllables per second, from the first to the last sound of the voice, as `Part.syllables` counts."""
    liveliness: Mapping[str, Band]
    """Standard deviation of F0 in semitones."""
    loudness: Mapping[str, Band]
    """Level of the speech, dB relative to full scale."""


FIXED = Bands(
    pitch={
        "male": {"low": (50, 102), "medium": (108, 129), "high": (137, 600)},
        "female": {"low": (60, 186), "medium": (194, 228), "high": (242, 600)},
    },
    speed={"slow": (0.5, 3.15), "medium": (3.6, 4.5), "fast": (5.0, 15)},
    liveliness={"monotone": (0.0, 0.95), "normal": (1.1, 2.25), "lively": (2.6, 12)},
    loudness={"quiet": (-70, -35), "normal": (-31, -24), "loud": (-21, 3)},
)
"""The bands of the demo corpus."""

_MIN_S = 0.9  # a shorter stretch has no speed and no liveliness
_MIN_SYLLABLES = 3
_LONG_PAUSE_S, _MIN_PAUSES, _CONTINUOUS_S = 0.5, 2, 3.0
_TWO_PART_S, _THREE_PART_S = 1.6, 3.0  # shorter speech has no changes of this kind
_PITCH_CHANGE, _SPEED_CHANGE, _LOUDNESS_CHANGE = 5.0, 1.6, 12.0  # semitones, ratio, dB
_FASTER_BY = 4  # syllables: a faster half has at least so many more than the other
_CLEAR, _VOICED = 0.1, 0.3  # largest shares of a whisper
_WHISPERED = 0.06  # most of a whispered half that may be periodic
_MELODY = 2.1  # semitones: if F0 varies so much within each third, it moves all the time
_LOW, _MIDDLE, _HIGH = (0, 30), (40, 60), (70, 100)  # % of the clips with a low, a middle and a high value


def label(value: float, bands: Mapping[str, Band]) -> str:
    """The label of a value; empty if it is NaN or lies between two bands."""
    return next((name for name, (low, high) in bands.items() if low <= value <= high), "")


def labels(
    measurement: Measurement, bands: Bands = FIXED, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The labels of a clip, attribute -> label, of those attributes for which the evidence is strong.

    The sex is decided by `speaker_sex`, or by the manifest. Without a decision, the pitch has a label only if
    the label is the same for both sexes. Pitch and liveliness have a label only if the voice is neither
    whispered nor creaky, the speed only if it is known not to creak.

    Args:
        measurement: of a clip that `speech_problem` accepts.
        bands: values -> labels.
        known: labels that are known from elsewhere. They replace those that are measured.
    """
    known = known or {}
    part = measurement.whole
    quality = known.get("quality") or _quality(measurement)
    tags = {"quality": quality, "sex": sex_label(measurement, known)}
    if quality == "normal":
        tags["pitch"] = _pitch(measurement, bands, tags["sex"])
        if part.duration_s >= _MIN_S and ">" not in tags["pitch"]:
            tags["liveliness"] = label(part.f0_sd, bands.liveliness)
    if _has_syllables(quality):
        tags["speed"] = _speed(measurement, bands, quality)
    tags["loudness"] = _loudness(measurement, bands)
    tags["pauses"] = _pauses(part)
    tags |= known
    return {attribute: tags[attribute] for attribute in ATTRIBUTES if tags.get(attribute)}


def sex_label(measurement: Measurement, known: Mapping[str, str]) -> str:
    """The sex as known from elsewhere or, if the voice is neither whispered nor creaky, as measured.

    Empty if the evidence is weak, or if `known` has an empty entry.
    """
    if "sex" in known:
        return known["sex"]
    if (known.get("quality") or _quality(measurement)) != "normal":
        return ""
    return speaker_sex(measurement) or ""


def speech_problem(measurement: Measurement) -> str:
    """Why a recording cannot be captioned: "silent", "short" or "no_speech"; empty if it can."""
    part = measurement.whole
    if part.duration_s <= 0:
        return "silent"
    if part.duration_s - part.pause_s < 0.5:
        return "short"
    # Without its pauses, speech has at least a syllable every two seconds, and its level varies.
    rate = part.nuclei / _seconds_of_sound(part)
    steady = measurement.snr_db < 6 and rate < 1
    return "no_speech" if steady or rate < 0.5 else ""


def _has_syllables(quality: str) -> bool:
    """Whether the counted syllables are syllables: the pulses of a creaking voice are counted, too."""
    return bool(quality) and "creaky" not in quality


def _quality(measurement: Measurement) -> str:
    """The quality of the voice, or a change of it from one half to the other.

    The end of a sentence may lose its voice. It is a whisper only if hardly any of it is periodic.
    """
    whole = _voice(measurement.whole)
    if measurement.whole.duration_s < _TWO_PART_S:
        return whole
    halves = [(_voice(half), half) for half in measurement.halves]
    change = ">".join(name for name, _ in halves)
    clear = all(h.clear_voice < _WHISPERED and h.syllables() > 1 for name, h in halves if name == "whisper")
    return (change if clear else "") if has_change("quality", change) else whole


def _voice(part: Part) -> str:
    """The quality of a stretch. Hoarse and noisy voices, which are partly voiced, are no whispers."""
    quality = voice_quality(part) or ""
    unclear = quality == "whisper" and (part.clear_voice > _CLEAR or part.voiced > _VOICED)
    return "" if unclear else quality


def _pitch(measurement: Measurement, bands: Bands, sex: str) -> str:
    tables = [bands.pitch[sex]] if sex else [*bands.pitch.values()]
    change = _change_of_pitch(measurement)
    if change:
        crosses = all(_crosses(measurement, change, table["medium"]) for table in tables)
        return change if crosses else ""
    names = {label(measurement.whole.f0_hz, table) for table in tables}
    return names.pop() if len(names) == 1 else ""


def _change_of_pitch(measurement: Measurement) -> str:
    """A change of register. A lively melody, which also rises and falls, is none."""
    within = [third.f0_sd for third in measurement.thirds]
    if sum(within) / len(within) > _MELODY:
        return ""
    return _change(measurement, _semitones, _PITCH_CHANGE, ("low", "high"))


def _crosses(measurement: Measurement, change: str, medium: Band) -> bool:
    """Whether the thirds that a change calls low or high lie below or above the medium band."""
    names = change.split(">")
    thirds = measurement.thirds if len(names) == 3 else (measurement.thirds[0], measurement.thirds[-1])
    return all(
        third.f0_hz < medium[0] if name == "low" else third.f0_hz > medium[1]
        for name, third in zip(names, thirds, strict=True)
    )


def _syllables(measurement: Measurement, quality: str) -> float:
    """The syllables of a clip. If the quality changes, each half is counted by its own quality."""
    return sum(_in_halves(measurement, quality)) if ">" in quality else measurement.whole.syllables(quality)


def _in_halves(measurement: Measurement, quality: str) -> tuple[float, float]:
    """The syllables of the first and of the second half."""
    before, after = (quality.split(">") * 2)[:2]  # the same name twice if it does not change
    first, second = measurement.halves
    return first.syllables(before), second.syllables(after)


def _speed(measurement: Measurement, bands: Bands, quality: str) -> str:
    """The label of the speaking rate, or a change of it from one half to the other.

    There is none if the rate without the pauses has another label, or if the halves differ, but not clearly.
    A half with fewer than three syllables is no evidence of a slow half: the speaker may be silent in it.
    """
    part, count = measurement.whole, _syllables(measurement, quality)
    if part.duration_s < _MIN_S or count < _MIN_SYLLABLES:
        return ""
    rates = (count / part.duration_s, count / _seconds_of_sound(part))
    names = {label(rate, bands.speed) for rate in rates}
    if part.duration_s >= _TWO_PART_S:
        counts = _in_halves(measurement, quality)
        more = abs(counts[0] - counts[1])
        seconds = (_seconds_of_sound(half) for half in measurement.halves)
        slower, faster = sorted(n / s for n, s in zip(counts, seconds, strict=True))
        medium = bands.speed["medium"]
        if (
            more >= _FASTER_BY
            and min(counts) >= _MIN_SYLLABLES
            and faster >= _SPEED_CHANGE * slower
            and slower < medium[0]
            and faster > medium[1]
        ):
            return "slow>fast" if counts[0] < counts[1] else "fast>slow"
        if more >= _FASTER_BY - 1 and faster >= _SPEED_CHANGE * slower:
            return ""
    return names.pop() if len(names) == 1 else ""


def _seconds_of_sound(part: Part) -> float:
    return max(part.duration_s - part.pause_s, 0.1)


def _loudness(measurement: Measurement, bands: Bands) -> str:
    change = _change(measurement, _level, _LOUDNESS_CHANGE, ("quiet", "loud"))
    return change or label(measurement.whole.level_db, bands.loudness)


def _pauses(part: Part) -> str:
    if part.pauses >= _MIN_PAUSES and part.pause_s >= _LONG_PAUSE_S * part.pauses:
        return "long"
    return "continuous" if part.pauses == 0 and part.duration_s >= _CONTINUOUS_S else ""


def _level(part: Part) -> float:
    return part.level_db


def _semitones(part: Part) -> float:
    return 12 * math.log2(part.f0_hz) if part.f0_hz > 0 else math.nan


def _change(
    measurement: Measurement, value: Callable[[Part], float], smallest: float, names: tuple[str, str]
) -> str:
    """A change such as "low>high" or "low>high>low"; empty if there is none.

    The value must change by `smallest` from the first third to the last, and in the same direction from the
    first half to the second; or by `smallest` from the middle third to both others.
    """
    low, high = names
    first, middle, last = (value(third) for third in measurement.thirds)
    before, after = (value(half) for half in measurement.halves)
    seconds = measurement.whole.duration_s
    rise = last - first
    if seconds >= _TWO_PART_S and abs(rise) >= smallest and (after - before) * rise > 0:
        return f"{low}>{high}" if rise > 0 else f"{high}>{low}"
    if seconds >= _THREE_PART_S and min(middle - first, middle - last) >= smallest:
        return f"{low}>{high}>{low}"
    if seconds >= _THREE_PART_S and min(first - middle, last - middle) >= smallest:
        return f"{high}>{low}>{high}"
    return ""


class CorpusValues:
    """The values of a corpus, from whose quantiles its bands are made."""

    def __init__(self) -> None:
        self._f0_hz = {sex: array("d") for sex in FIXED.pitch}
        self._values = {attribute: array("d") for attribute in ("speed", "liveliness", "loudness")}

    def add(self, measurement: Measurement, known: Mapping[str, str]) -> None:
        """Adds a clip. Arguments: as for `labels`."""
        part = measurement.whole
        quality = known.get("quality") or _quality(measurement)
        if quality == "normal":
            if sex := sex_label(measurement, known):
                self._f0_hz[sex].append(part.f0_hz)
            self._values["liveliness"].append(part.f0_sd)
        count = _syllables(measurement, quality)
        if _has_syllables(quality) and part.duration_s >= _MIN_S and count >= _MIN_SYLLABLES:
            self._values["speed"].append(count / part.duration_s)
        self._values["loudness"].append(part.level_db)

    def bands(self) -> Bands:
        """The lowest 30 %, the middle 20 % and the highest 30 % of the clips have a label.

        The gaps are never smaller than what a listener notices. No word means its opposite: a voice that
        `FIXED` calls low is never called high, for instance. Loudness is the exception, because the level
        depends on the microphone. An attribute with fewer than `MIN_VALUES` has the bands of `FIXED`.
        """
        pitch = {sex: _quantile_bands(self._f0_hz[sex], FIXED.pitch[sex], ratio=1.06) for sex in FIXED.pitch}
        return Bands(
            pitch=pitch,
            speed=_quantile_bands(self._values["speed"], FIXED.speed, ratio=1.1),
            liveliness=_quantile_bands(self._values["liveliness"], FIXED.liveliness, ratio=1.2),
            loudness=_quantile_bands(self._values["loudness"], FIXED.loudness, difference=3.0),
        )


def _quantile_bands(
    values: Iterable[float], fixed: Mapping[str, Band], *, ratio: float = 1.0, difference: float = 0.0
) -> Mapping[str, Band]:
    """Three bands. The outer ones begin at least `ratio` or `difference` away from the median."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < MIN_VALUES:
        return fixed
    median = float(np.median(known))
    below, above = (float(q) for q in np.percentile(known, [_LOW[1], _HIGH[0]]))
    below, above = min(below, median / ratio - difference), max(above, median * ratio + difference)
    inner = (float(np.percentile(known, _MIDDLE[0])), float(np.percentile(known, _MIDDLE[1])))
    low, middle, high = fixed
    if not difference:
        below, above = min(below, fixed[middle][1]), max(above, fixed[middle][0])
    lowest, highest = min(fixed[low][0], float(known.min())), max(fixed[high][1], float(known.max()))
    return {low: (lowest, below), middle: inner, high: (above, highest)}
