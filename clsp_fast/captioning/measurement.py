"""What is measured of a recording, and what follows about its speaker: sex and voice quality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

SAMPLE_RATE_HZ = 16_000
HOP_S = 0.01  # distance between frames; frame m is centred at (m + 1/2) HOP_S

Values = npt.NDArray[np.float64]
Sex = Literal["female", "male"]
Quality = Literal["normal", "whisper", "creaky"]

_MIDDLE_F0_HZ, _MIDDLE_F3_HZ, _MIDDLE_F4_HZ = 173.0, 2640.0, 3700.0
_F4_BANDWIDTH_HZ, _F4_TILT_DB = 4500.0, -15.0
_UNDECIDED_SEMITONES = 1.5
_BOTH_SEXES_SEMITONES = 3.6  # 140 to 213 Hz: the F0 of men and of women
_CLEAR_F4_SEMITONES = 0.5
_NUCLEI_PER_WHISPERED_SYLLABLE = 1.12  # median of 485 clips that were whispered by signal processing


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was measured of a stretch of speech: all of it, or one of its halves or thirds.

    A value that cannot be measured is NaN: F0 and HNR if fewer than 8 frames are voiced, and the tilt if
    there is no speech. Without speech, the level is that of the whole recording.
    """

    start_s: float  # where it begins in the recording
    duration_s: float  # with its pauses
    level_db: float  # power of the active frames, dB full scale (a sine of amplitude 1 has -3 dB)
    voiced: float  # share of the active frames that are voiced, 0..1
    clear_voice: float  # share of the active frames whose voice is periodic: autocorrelation above 0.7
    f0_hz: float  # median
    f0_sd: float  # standard deviation in semitones, without octave errors
    f0_range: float  # distance between the 5 % and the 95 % quantile, semitones
    f0_slope: float  # of a line through F0 over time, semitones per second
    nuclei: int  # peaks of the level, which are syllables if they have voice, but also consonants
    voiced_nuclei: int  # those with voice
    pauses: int  # silences of 0.2 s or longer
    pause_s: float  # their sum
    hnr_db: float  # harmonics-to-noise ratio, mean over the voiced frames
    creak: float  # share of the active frames that lie between two slow pulses, 0..1
    tilt_db: float  # power at 1-5 kHz relative to the power below 1 kHz

    def syllables(self, quality: str | None = None) -> float:
        """Estimated number of syllables: the voiced nuclei, or in a whisper a share of all nuclei.

        In a whisper, nothing tells vowels from consonants such as "s", which are nuclei as well.

        Args:
            quality: of the voice; None: what `voice_quality` says.
        """
        if (quality or voice_quality(self)) == "whisper":
            return self.nuclei / _NUCLEI_PER_WHISPERED_SYLLABLE
        return self.voiced_nuclei

    @property
    def syllables_per_s(self) -> float:
        """Speaking rate with its pauses."""
        return self.syllables() / max(self.duration_s, HOP_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One recording."""

    duration_s: float
    whole: Part  # from the first to the last active frame
    halves: tuple[Part, ...]  # of the same stretch, in order
    thirds: tuple[Part, ...]
    formants_hz: tuple[float, float, float, float]  # medians of F1 to F4 over voiced frames, or NaN
    bandwidth_hz: float  # the highest frequency with speech; NaN without speech
    snr_db: float  # level of the speech above that of the quietest frames: at most the true ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Values for each frame of a recording."""

    f0_hz: Values  # 0 = no voice
    strength: Values  # normalised autocorrelation at the period, 0..1
    level_db: Values  # dB full scale


def sex_score(measurement: Measurement) -> float:
    """Evidence for the speaker's sex, in semitones: positive is female, negative male.

    NaN without a normal voice: whisper has no F0, and that of a creaking woman is as low as a man's.

    The distance of F0 from 173 Hz, plus the distance of F4 from 3.7 kHz: F4 is high in a short vocal tract.
    F4 counts only if the recording has it (not over a telephone) and its spectrum is bright enough to measure
    it. Then it moves the score by about one semitone, which decides where F0 lies between 150 and 213 Hz.
    """
    whole = measurement.whole
    if not whole.f0_hz > 0 or voice_quality(whole) != "normal":
        return math.nan
    f4 = _f4_semitones(measurement)
    return _semitones(whole.f0_hz, _MIDDLE_F0_HZ) + (0.0 if math.isnan(f4) else f4)


def _f4_semitones(measurement: Measurement) -> float:
    """Distance of F4 from 3.7 kHz; NaN if the recording does not show F4."""
    shown = measurement.bandwidth_hz >= _F4_BANDWIDTH_HZ and measurement.whole.tilt_db > _F4_TILT_DB
    return _semitones(measurement.formants_hz[3], _MIDDLE_F4_HZ) if shown else math.nan


def _semitones(hz: float, reference_hz: float) -> float:
    return 12 * math.log2(hz / reference_hz) if hz > 0 else math.nan


def speaker_sex(measurement: Measurement) -> Sex | None:
    """The speaker's sex; None if the voice is not normal or the evidence is weak or contradictory.

    The evidence is weak if the score is smaller than 1.5 semitones. Between 140 and 213 Hz, where men and
    women speak, the vocal tract must agree with F0: F4 must not lie clearly on the other side. If the
    recording does not show F4, F3 must lie on the same side of 2,640 Hz.
    """
    score = sex_score(measurement)
    if not abs(score) >= _UNDECIDED_SEMITONES:
        return None
    f0 = _semitones(measurement.whole.f0_hz, _MIDDLE_F0_HZ)
    if abs(f0) < _BOTH_SEXES_SEMITONES:
        f4 = _f4_semitones(measurement)
        if math.isnan(f4):
            agrees = f0 * _semitones(measurement.formants_hz[2], _MIDDLE_F3_HZ) > 0
        else:
            agrees = f0 * f4 > 0 or abs(f4) <= _CLEAR_F4_SEMITONES
        if not agrees:
            return None
    return "female" if score > 0 else "male"


def voice_quality(part: Part) -> Quality | None:
    """Whether a stretch of speech is whispered, creaky or neither; None if the evidence is weak."""
    if part.creak > 0.42:
        return "creaky"
    if part.clear_voice < 0.2:
        return "whisper" if part.creak < 0.3 else None
    return "normal" if part.clear_voice > 0.25 and part.creak < 0.35 else None
