"""A source-filter synthesiser in numpy: the demo corpus' voice where no engine is installed, and the unheard
one.

Letters become phones by a few rules, phones become tracks of formants and amplitudes, and a pulse train
or noise is filtered frame by frame. It is rough speech, but pitch, speed, melody and tract length are
exactly under control.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from clsp_fast.demo_engines import Manner, Voice
from clsp_fast.demo_signal import HOP, SAMPLE_RATE_HZ, Signal, shape
from clsp_fast.demo_text import Split, syllables

Response = npt.NDArray[np.complex128]

_VOWELS = {
    "a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (390, 1990, 2550), "o": (570, 840, 2410),
    "u": (440, 1020, 2240), "y": (300, 2200, 2900), "ee": (270, 2290, 3010), "ea": (290, 2250, 2980),
    "oo": (300, 870, 2240), "ou": (640, 1190, 2390), "ai": (500, 1900, 2500),
}  # fmt: skip
# consonant -> (three formants, amplitude of voice, amplitude of noise, its centre in Hz)
_CONSONANTS = {
    "m": (250, 1000, 2200, 0.35, 0.0, 0), "n": (250, 1500, 2500, 0.35, 0.0, 0),
    "ng": (250, 1900, 2500, 0.3, 0.0, 0), "l": (360, 1100, 2700, 0.5, 0.0, 0),
    "r": (420, 1250, 1650, 0.5, 0.0, 0), "w": (300, 700, 2200, 0.45, 0.0, 0),
    "j": (300, 2200, 2900, 0.4, 0.1, 3000), "h": (500, 1500, 2500, 0.0, 0.25, 1500),
    "s": (300, 1600, 2600, 0.0, 0.5, 5500), "z": (280, 1600, 2600, 0.2, 0.35, 5500),
    "sh": (300, 1700, 2500, 0.0, 0.5, 3200), "ch": (300, 1700, 2500, 0.0, 0.5, 3500),
    "f": (300, 1000, 2300, 0.0, 0.12, 6000), "v": (280, 1000, 2300, 0.25, 0.1, 5000),
    "th": (280, 1400, 2500, 0.12, 0.12, 5500), "ck": (280, 1900, 2400, 0.0, 0.35, 2200),
    "p": (280, 800, 2200, 0.0, 0.25, 1000), "b": (250, 800, 2200, 0.15, 0.15, 900),
    "t": (280, 1700, 2600, 0.0, 0.35, 4500), "d": (250, 1700, 2600, 0.15, 0.2, 4000),
    "k": (280, 1900, 2400, 0.0, 0.35, 2200), "c": (280, 1900, 2400, 0.0, 0.35, 2200),
    "q": (280, 1900, 2400, 0.0, 0.35, 2200), "g": (250, 1900, 2400, 0.15, 0.2, 2200),
    "x": (280, 1900, 2400, 0.0, 0.4, 5000),
}  # fmt: skip
_STOPS = frozenset("ptkbdgcq") | {"ck", "ch"}


class Synth:
    """Pulses and noise through four formants: rough, but free, with every manner under control."""

    can_whisper = True
    _FORMANTS: ClassVar[dict[Split, tuple[float, ...]]] = {
        "train": (0.90, 0.93, 0.96, 0.99, 1.02, 1.05),
        "validation": (0.945, 1.0),
        "test": (0.915, 0.975, 1.035),
    }

    def voices(self, sex: str, split: Split) -> list[Voice]:
        scale = 1.19 if sex == "female" else 1.0
        return [Voice(f"{sex}-{i}", scale * factor) for i, factor in enumerate(self._FORMANTS[split])]

    @staticmethod
    def _phones(text: str) -> list[str]:
        units = sorted({*_VOWELS, *_CONSONANTS}, key=len, reverse=True)
        found: list[str] = []
        for word in text.lower().replace(".", "").split():
            rest = word[:-1] if word.endswith("e") and syllables(word) < syllables(word[:-1] + "a") else word
            while rest:
                unit = next((u for u in units if rest.startswith(u)), "")
                if unit and unit not in found[-1:]:
                    found.append(unit)
                rest = rest[max(1, len(unit)) :]
        return found

    def _score(self, text: str, rate: float, voice: Voice) -> tuple[Signal, Signal, Signal, Signal]:
        """Per frame: formants (T, 4) in Hz; amplitudes of voice and noise, centre of the noise (T,)."""
        phones = self._phones(text)
        weights = np.array([1.0 if p in _VOWELS else 0.42 for p in phones])
        edges = np.round(np.append(0.0, np.cumsum(weights / weights.sum())) * 100 * syllables(text) / rate)
        rows = np.zeros((max(1, int(edges[-1])), 6))
        for phone, start, stop in zip(phones, edges[:-1].astype(int), edges[1:].astype(int), strict=True):
            rows[start:stop] = (*_VOWELS[phone], 1.0, 0.0, 0) if phone in _VOWELS else _CONSONANTS[phone]
            if phone in _STOPS:  # closure, then burst
                rows[start : stop - max(1, (stop - start) // 2), 3:5] *= 0.05
        kernel = np.hanning(7)[1:-1] / np.hanning(7)[1:-1].sum()
        padded = np.pad(rows, ((2, 2), (0, 0)), mode="edge")
        smooth = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in range(5)], axis=1)
        personal = np.random.default_rng(list(voice.name.encode())).uniform(0.95, 1.05, 4)
        formants = np.column_stack([smooth[:, :3], np.full(len(rows), 3500.0)]) * personal * voice.formants
        return formants, smooth[:, 3], smooth[:, 4], rows[:, 5]

    @staticmethod
    def _resonances(formants: Signal, bandwidths: Signal) -> Response:
        """Response (T, bins) of the product of two-pole resonators that are 1 at 0 Hz."""
        z = np.exp(-1j * np.linspace(0, np.pi, 513))
        radius = np.exp(-np.pi * bandwidths / SAMPLE_RATE_HZ)
        a1 = -2 * radius * np.cos(2 * np.pi * formants / SAMPLE_RATE_HZ)
        a2 = np.broadcast_to(radius**2, a1.shape)
        response = np.ones((len(formants), 513), np.complex128)
        for k in range(formants.shape[1]):
            response *= (1 + a1[:, k] + a2[:, k])[:, None] / (1 + a1[:, k, None] * z + a2[:, k, None] * z * z)
        return response

    @staticmethod
    def _pulses(f0_T: Signal, rng: np.random.Generator) -> Signal:
        """Unit-power pulse train that follows F0, with the small irregularity of a human voice."""
        jitter = 1 + 0.01 * rng.standard_normal(len(f0_T))
        f0 = np.interp(np.arange(len(f0_T) * HOP), np.arange(len(f0_T)) * HOP + HOP / 2, f0_T * jitter)
        cycles = np.cumsum(f0 / SAMPLE_RATE_HZ)
        (at,) = np.nonzero(np.diff(np.floor(cycles), prepend=0.0))
        late = (cycles[at] % 1.0) / (f0[at] / SAMPLE_RATE_HZ)  # in samples, since the cycle began
        height = np.sqrt(SAMPLE_RATE_HZ / f0[at]) * rng.uniform(0.93, 1.07, len(at))
        pulses = np.zeros(len(f0) + 1)
        pulses[at] += height * (1 - late)
        pulses[np.maximum(at - 1, 0)] += height * late
        return pulses[:-1]

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        formants, voiced, noisy, centre = self._score(text, manner.syllables_per_s, voice)
        count = len(voiced)
        knots = max(3, round(count / 100 * manner.syllables_per_s))
        accents = np.interp(
            np.linspace(0, knots - 1, count), np.arange(knots), rng.choice([-1.0, 1.0], knots)
        )
        spread = {"monotone": 0.2, "normal": 2.2, "lively": 5.5}[manner.liveliness]
        f0 = manner.f0_hz * 2 ** (spread * (accents * 0.8 + np.linspace(0.7, -0.7, count)) / 12)
        bandwidths = np.array([70.0, 100.0, 160.0, 280.0])
        tract = self._resonances(formants, bandwidths)
        frication = self._resonances(centre[:, None], np.array([1800.0]))
        noise = rng.standard_normal(count * HOP)
        z = np.exp(-1j * np.linspace(0, np.pi, 513))
        hiss = noisy[:, None] * frication * (1 - 0.9 * z)
        if manner.whisper:
            return shape(noise, 0.1 * (hiss + 0.5 * voiced[:, None] * tract * (1 - 0.7 * z)))
        glottis = (1 - z) / (1 - 0.94 * z) ** 2 / 4  # -6 dB an octave after radiation from the lips
        breath = 0.01 * voiced[:, None] * tract
        x = shape(self._pulses(f0, rng), voiced[:, None] * tract * glottis)
        return 0.1 * (x + shape(noise, 0.3 * hiss + breath))
