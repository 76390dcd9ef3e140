"""Clips of the demo corpus: a requested style becomes a waveform, its measured labels and its captions.

A separate process makes each shard (`run_job`), because engines can crash, and some keep state from one
sentence to the next.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clsp_fast.captioning import wording
from clsp_fast.captioning.labels import FIXED, label
from clsp_fast.captioning.measure import Part
from clsp_fast.captioning.wording import ATTRIBUTES
from clsp_fast.demo import engines
from clsp_fast.demo.engines import Manner, Voice
from clsp_fast.demo.signal import (
    SAMPLE_RATE_HZ,
    Signal,
    active_level_db,
    add_breath,
    creak,
    measured,
    set_level,
    tilt,
    trim,
    whisper,
)
from clsp_fast.demo.text import Split, sentences, syllables
from clsp_fast.storage import files

LABELLED = ("sex", "pitch", "speed", "liveliness", "loudness", "quality")
"""The attributes of `captioning.wording.ATTRIBUTES` that clips of the demo corpus have."""
_Ranges = dict[str, tuple[float, float]]
# label -> range from which the requested value is drawn, well inside the band of `captioning.labels.FIXED`
_WANTED_SPEED: _Ranges = {"slow": (2.2, 3.0), "medium": (3.7, 4.35), "fast": (5.4, 7.0)}
_WANTED_PITCH: dict[str, _Ranges] = {
    "male": {"low": (80, 98), "medium": (111, 126), "high": (140, 159)},
    "female": {"low": (162, 180), "medium": (198, 222), "high": (250, 292)},
}
_TYPICAL_F0_HZ = {"male": (60, 164), "female": (150, 340)}  # other values have no label
WANTED_LEVEL: _Ranges = {"quiet": (-42, -36.5), "normal": (-30, -25), "loud": (-20, -16)}
_EFFORT_TILT = {"quiet": -1.5, "normal": 0.0, "loud": 1.5}  # dB per octave: loud voices are brighter
# The engines' voices are far clearer than those of people: their median harmonics-to-noise ratio is 14 dB,
# that of human recordings 6 to 11 dB. Breath in a share of the normal voices tells them from whispers.
_BREATHY, _BREATH_DB = 0.6, (5.0, 16.0)
_CREAK_HZ = {"male": (42.0, 60.0), "female": (48.0, 75.0)}


def creak_hz(sex: str | None) -> tuple[float, float]:
    """Range of the pulse rates of a creaky voice."""
    return _CREAK_HZ.get(sex or "", (42.0, 75.0))


@dataclass(frozen=True)
class _Style:
    """The labels that a clip should get."""

    sex: str
    pitch: str
    speed: str
    liveliness: str
    loudness: str
    quality: str


def run_job(job_file: str) -> None:
    """Entry point of a child process: makes the clips of one shard, or only starts an engine as a test.

    The job file is JSON: {"probe": engine} or {"engine", "split", "clips", "number", "attempt", "seed",
    "audio", "lines"}. Waveforms go to audio/<split>/, and a manifest line for each clip to the file `lines`.
    If the disk is full, the exit code says so (one of `files.DISK_FULL_CODES`), because there may be
    no room for a message.
    """
    try:
        _run_job(json.loads(Path(job_file).read_text()))
    except OSError as error:
        if error.errno not in files.DISK_FULL_CODES:
            raise
        sys.exit(error.errno)


def _run_job(job: Mapping[str, Any]) -> None:
    if "probe" in job:
        engines.make(job["probe"], 0)
        return
    seeds = np.random.SeedSequence([job["seed"], job["number"], job["attempt"]])
    speaker = _Speaker(job["engine"], job["split"], np.random.default_rng(seeds))
    with Path(job["lines"]).open("w") as lines:
        for i, (style, change) in enumerate(speaker.styles(job["clips"])):
            name = f"{job['engine']}-{job['split']}-{job['number']:02d}-{i:04d}"
            x, clip = speaker.clip(style, change)
            audio = Path(job["audio"]) / job["split"] / f"{name}.wav"
            samples = write_wav(audio, x)
            line = {
                "id": name,
                "audio": f"audio/{job['split']}/{name}.wav",
                "duration_s": samples / SAMPLE_RATE_HZ,
            }
            lines.write(json.dumps({**line, **clip}) + "\n")
            lines.flush()


class _Gain:
    """Correction factors: to obtain a value, request this value times the factor from an engine.

    There is a factor for each voice and manner. It is a running average over clips. A new voice begins with
    the average of all voices.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def get(self, voice: str, manner: str) -> float:
        """The factor for a voice in a manner."""
        return self._known.get((voice, manner), self._known.get(("", manner), 1.0))

    def learn(self, voice: str, manner: str, gain: float) -> None:
        """Updates the averages with the factor that was right for a clip."""
        for key in ((voice, manner), ("", manner)):
            self._known[key] = gain if key not in self._known else 0.6 * self._known[key] + 0.4 * gain


class _Speaker:
    """One engine with the voices and the sentences of one split."""

    def __init__(self, engine: str, split: str, rng: np.random.Generator) -> None:
        part: Split = "test" if split == "transfer" else split  # type: ignore[assignment]
        self._name = engine
        self._engine = engines.make(engine, int(rng.integers(2**31)))
        self._voices = {sex: self._engine.voices(sex, part) for sex in ATTRIBUTES["sex"]}
        self._rng = rng
        self._sentences = sentences(part)
        self._syllables = np.array([syllables(text) for text in self._sentences])
        self._rate_gain, self._f0_gain = _Gain(), _Gain()

    def styles(self, count: int) -> Iterator[tuple[_Style, _Style | None]]:
        """`count` styles. One in five has a second style, for a clip that changes from one to the other.

        Labels have equal shares, except for quality: 7 normal to 3 whisper to 3 creaky. Whispered and creaky
        clips have normal liveliness.
        """

        def deck(labels: Sequence[str]) -> list[str]:
            cards = np.resize(self._rng.permutation(np.asarray(labels)), count)
            return [str(card) for card in self._rng.permutation(cards)]

        qualities = deck(["normal"] * 7 + ["whisper"] * 3 + ["creaky"] * 3)
        drawn = zip(
            deck(ATTRIBUTES["sex"]),
            deck(ATTRIBUTES["pitch"]),
            deck(ATTRIBUTES["speed"]),
            deck(ATTRIBUTES["liveliness"]),
            deck(ATTRIBUTES["loudness"]),
            qualities,
            deck(["single"] * 4 + ["joined"]),
            strict=True,
        )
        for *labels, kind in drawn:
            style = _Style(*labels)
            if style.quality != "normal":
                style = dataclasses.replace(style, liveliness="normal")
            yield self._pair(style) if kind == "joined" else (style, None)

    def _pair(self, style: _Style) -> tuple[_Style, _Style]:
        """Two styles that differ in one or two attributes."""
        rng = self._rng
        changed = rng.choice(["pitch", "speed", "loudness", "quality"], rng.choice([1, 2]), replace=False)
        first = {**dataclasses.asdict(style), "liveliness": "normal"}
        if "pitch" in changed and "quality" not in changed:
            first["quality"] = "normal"
        second = dict(first)
        for attribute in changed:
            low, high = ATTRIBUTES[attribute][0], ATTRIBUTES[attribute][-1]
            if attribute == "quality":
                low, high = "normal", str(rng.choice(["whisper", "creaky"]))
            first[attribute], second[attribute] = (low, high) if rng.random() < 0.5 else (high, low)
        return _Style(**first), _Style(**second)

    def clip(self, style: _Style, change: _Style | None) -> tuple[Signal, dict[str, Any]]:
        """A waveform, and the fields of its manifest line that describe it."""
        rng = self._rng
        voices = self._voices[style.sex]
        voice = voices[int(rng.integers(len(voices)))]
        if change is None:
            x, tags = self._piece(style, voice, rng.uniform(1.4, 2.7), exact=False)
        else:
            first, tags = self._piece(style, voice, rng.uniform(0.8, 1.3), exact=True)
            second, tags_after = self._piece(change, voice, rng.uniform(0.8, 1.3), exact=True)
            x = np.concatenate([first, np.zeros(int(rng.uniform(0.02, 0.1) * SAMPLE_RATE_HZ)), second])
            tags = _joined_tags(tags, tags_after)
        x = x + _room_noise(x, rng)
        captions = wording.captions(tags, rng, fine=int(rng.integers(5, 7)))
        return x, {
            "speaker": f"{self._name}-{voice}",
            "gender": style.sex,
            "global_captions": captions.global_captions,
            "finegrained_captions": captions.fine_captions,
            "tags": {**tags, "engine": self._name},
            "claims": {"global": captions.global_claims, "fine": captions.fine_claims},
        }

    def _sentence(self, wanted_syllables: float) -> tuple[str, int]:
        distance = np.abs(self._syllables - wanted_syllables)
        (near,) = np.nonzero(distance <= max(0.5, distance.min()))
        index = int(self._rng.choice(near))
        return self._sentences[index], int(self._syllables[index])

    def _piece(
        self, style: _Style, voice: Voice, duration_s: float, *, exact: bool
    ) -> tuple[Signal, dict[str, str]]:
        """Speaks one sentence at the level of `style`; returns it with the labels that were measured on it.

        The sentence is spoken up to three times. With `exact`, the attempts end early if speed and pitch have
        the labels of `style`; otherwise, if they have any label. The last attempt is used.
        """
        rng = self._rng
        f0_hz = float(rng.uniform(*_WANTED_PITCH[style.sex][style.pitch]))
        rate = float(rng.uniform(*_WANTED_SPEED[style.speed]))
        text, count = self._sentence(rate * duration_s)  # slow clips get fewer words, not more seconds
        whispers = style.quality == "whisper" and self._engine.can_whisper and rng.random() < 0.5
        rate_gain = self._rate_gain.get(voice.name, style.speed)
        f0_gain = self._f0_gain.get(voice.name, style.liveliness)
        for _ in range(3):
            manner = Manner(
                f0_hz=f0_hz * f0_gain,
                syllables_per_s=rate * rate_gain,
                liveliness=style.liveliness,
                whisper=bool(whispers),
            )
            x = trim(self._engine.speak(f"{text}.", voice, manner, rng))
            part = measured(x).whole
            measured_rate, measured_f0 = _syllables_per_s(part, count), 0.0 if whispers else part.f0_hz
            rate_gain *= float(np.clip(rate / measured_rate, 0.5, 2.0))
            self._rate_gain.learn(voice.name, style.speed, rate_gain)
            if measured_f0 > 0:
                f0_gain *= float(np.clip(f0_hz / measured_f0, 0.6, 1.6))
                self._f0_gain.learn(voice.name, style.liveliness, f0_gain)
            speed, pitch = label(measured_rate, FIXED.speed), label(measured_f0, FIXED.pitch[style.sex])
            lowest, highest = _TYPICAL_F0_HZ[style.sex]
            if not lowest <= measured_f0 <= highest:
                pitch = ""
            pitch_matters = style.quality == "normal" and measured_f0 > 0
            as_requested = speed == style.speed and (not pitch_matters or pitch == style.pitch)
            if as_requested or (not exact and speed and (pitch or not pitch_matters)):
                break
        if style.quality == "creaky":
            x = creak(x, float(rng.uniform(*_CREAK_HZ[style.sex])), rng)
        elif style.quality == "whisper" and not whispers:
            x = whisper(x, rng)
        elif style.quality == "normal" and rng.random() < _BREATHY:
            x = add_breath(x, float(rng.uniform(*_BREATH_DB)), rng)
        x = tilt(x, _EFFORT_TILT[style.loudness] + float(rng.uniform(-0.7, 0.7)))
        x = set_level(x, float(rng.uniform(*WANTED_LEVEL[style.loudness])))
        tags = {
            "sex": style.sex,
            "pitch": pitch if pitch_matters else "",
            "speed": speed,
            "liveliness": label(part.f0_sd, FIXED.liveliness) if pitch_matters else "",
            "loudness": label(active_level_db(x), FIXED.loudness),
            "quality": style.quality,
        }
        return x, {attribute: name for attribute, name in tags.items() if name}


def _syllables_per_s(part: Part, count: int) -> float:
    """Speaking rate, from the geometric mean of the syllables in the text and the syllables in the sound.

    Foreign voices add syllables and fast ones swallow some, so neither count alone is what a listener hears.
    """
    return math.sqrt(count * max(1.0, part.syllables())) / max(0.2, part.duration_s)


def prompts() -> dict[str, dict[str, list[str]]]:
    """Zero-shot tasks for the labelled attributes, in the form of `captioning.wording.prompts`."""
    return wording.prompts(LABELLED)


def _joined_tags(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Labels of a clip that joins two pieces: shared labels, and changes that captions can express."""
    tags = {}
    for attribute in LABELLED:
        a, b = before.get(attribute, ""), after.get(attribute, "")
        if attribute == "liveliness" or not a or not b:
            continue
        if a == b:
            tags[attribute] = a
        elif wording.has_change(attribute, f"{a}>{b}"):
            tags[attribute] = f"{a}>{b}"
    return tags


def _room_noise(x: Signal, rng: np.random.Generator) -> Signal:
    """Background noise 25-55 dB below the speech. Without it, digital silence would reveal the engine."""
    noise = tilt(rng.standard_normal(len(x)), float(rng.uniform(-4.0, 1.0)))
    level_db = active_level_db(x) - float(rng.uniform(25, 55))
    return noise * 10 ** (level_db / 20) / float(np.sqrt(np.mean(noise**2)))


def write_wav(path: Path, x: Signal) -> int:
    """Writes 16-bit PCM; returns the number of samples."""
    samples = np.round(np.clip(x, -1.0, 1.0) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.tobytes())
    return len(samples)
