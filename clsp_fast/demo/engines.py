"""Voices of the demo corpus: three text-to-speech packages and a synthesiser, with one interface.

| name   | package (extra)                 | licence               | voices                              |
|--------|---------------------------------|-----------------------|-------------------------------------|
| espeak | espeakng-loader ([demo-espeak]) | GPL-3+, never shipped | formant synthesis, many speakers    |
| pico   | py-nanotts ([demo])             | Apache-2.0            | SVOX Pico, one woman per language   |
| hibari | hibari-tts ([demo])             | Apache-2.0            | a neural US woman's voice           |
| synth  | none                            | as this package       | source and filter, in numpy         |

A package is imported only when its engine is made. espeak-ng is under the GPL: it has a separate extra, is
loaded from a separate wheel, and nothing of it is copied here. Voices that a package lacks, such as men's,
are made by changing the length of the vocal tract. A process may have only one engine and one thread, since
espeak-ng and Pico are not thread-safe.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from clsp_fast.demo.signal import (
    HOP,
    SAMPLE_RATE_HZ,
    Signal,
    measured,
    pulses,
    resample,
    resonances,
    scale_intonation,
    shape,
    trim,
)
from clsp_fast.demo.text import Split, syllables

_CALIBRATION_TEXT = "we should go home now and wait for them."
_HIBARI_VERSION = "0.2.1"  # other versions may change the network's outputs, which are used directly
_PACKAGES = {"espeak": "espeakng-loader", "pico": "py-nanotts", "hibari": "hibari-tts"}
_MODULES = {"espeak": "espeakng_loader", "pico": "py_nanotts", "hibari": "hibari"}
ENGINES = (*_PACKAGES, "synth")


@dataclass(frozen=True)
class Voice:
    """A speaker: a voice of the engine, and a factor for its formants (below 1: a longer vocal tract)."""

    name: str
    formants: float

    def __str__(self) -> str:
        return f"{self.name}*{self.formants:.3f}"


@dataclass(frozen=True, kw_only=True)
class Manner:
    """The style that an engine is to speak in. The actual style is measured afterwards."""

    f0_hz: float
    syllables_per_s: float
    liveliness: str
    whisper: bool = False


class Engine(Protocol):
    """A source of speech."""

    can_whisper: bool

    def voices(self, sex: str, split: Split) -> list[Voice]:
        """The speakers of a split. No two splits share a speaker."""

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        """Speaks `text`; returns (samples,) at SAMPLE_RATE_HZ."""


def unavailable(name: str) -> str:
    """Why an engine cannot be used here, judged without importing it; empty if no reason is known."""
    if name not in ENGINES:
        return f"unknown; the engines are {', '.join(ENGINES)}"
    if name == "synth":
        return ""
    extra = "demo-espeak" if name == "espeak" else "demo"
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"package {_PACKAGES[name]} is not installed (pip install 'clsp_fast[{extra}]')"
    version = package_version(name)
    if name == "hibari" and version != _HIBARI_VERSION:
        return f"hibari-tts {version} is installed, but only {_HIBARI_VERSION} is supported"
    return ""


def package_version(name: str) -> str:
    """Version of an engine's package; empty for "synth", which has none."""
    return importlib.metadata.version(_PACKAGES[name]) if name in _PACKAGES else ""


def make(name: str, seed: int) -> Engine:
    """Loads an engine. Raises the package's error if it cannot run on this machine."""
    if name == "synth":
        return Synth()
    makers: dict[str, Callable[[], Engine]] = {"espeak": lambda: Espeak(seed), "pico": Pico, "hibari": Hibari}
    return makers[name]()


class _Calibration:
    """Measures fundamental frequency and speaking rate of each voice at neutral settings, once."""

    def __init__(self, say: Callable[[str], Signal]) -> None:
        self._say = say
        self._known: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str) -> tuple[float, float]:
        if name not in self._known:
            x = trim(self._say(name))
            f0_hz = measured(x).whole.f0_hz
            rate = syllables(_CALIBRATION_TEXT) / (len(x) / SAMPLE_RATE_HZ - 0.08)
            self._known[name] = (f0_hz or 150.0, rate)
        return self._known[name]


class Espeak:
    """espeak-ng through ctypes: formant synthesis, `language+variant` voices."""

    can_whisper = True
    _ACCENTS = ("en-us", "en", "en-gb-scotland", "en-029")
    # Similar variants are in the same split. Robots and variants with broken formants are left out.
    _SPEAKERS: ClassVar[dict[tuple[str, Split], str]] = {
        ("female", "train"): "f1 f2 f3 f5 linda belinda aunty Annie Alicia",
        ("female", "validation"): "steph steph2",
        ("female", "test"): "f4 Andrea",
        ("male", "train"): "m1 m2 m4 m5 m7 m8 max Mike Andy paul robert antonio pablo Denis victor",
        ("male", "validation"): "Diogo michel",
        ("male", "test"): "m3 m6",
    }
    _SYNCHRONOUS = 2
    _PARAMETERS: ClassVar = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}
    _UTF8 = 1
    _LOG_F0_PER_UNIT = 0.0093  # change of log F0 for one unit of the pitch parameter

    def __init__(self, seed: int) -> None:
        import espeakng_loader

        data = Path(espeakng_loader.get_data_path())
        self._variants = data / "voices" / "!v"
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        # The library's built-in path exists only on the machine that built the wheel.
        self._rate_hz = self._library.espeak_Initialize(self._SYNCHRONOUS, 500, str(data).encode(), 0)
        if self._rate_hz <= 0:
            raise RuntimeError(f"espeak-ng could not be initialised with the data in {data}")
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed % 2**31))
        receiver = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = receiver(self._receive)  # the library keeps only an address, so we keep the object
        self._library.espeak_SetSynthCallback(self._callback)
        pointer, size, unsigned = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint
        self._library.espeak_Synth.argtypes = [
            pointer, size, unsigned, ctypes.c_int, unsigned, unsigned, ctypes.c_void_p, ctypes.c_void_p
        ]  # fmt: skip
        self._pieces: list[Any] = []
        self._calibration = _Calibration(lambda name: self._say(_CALIBRATION_TEXT, name))

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def voices(self, sex: str, split: Split) -> list[Voice]:
        speakers = self._SPEAKERS[sex, split].split()
        # For an unknown variant, espeak-ng silently uses another voice.
        present = [s for s in speakers if (self._variants / s).is_file()]
        return [
            Voice(f"{accent}+{speaker}", factor)
            for speaker in present
            for accent in self._ACCENTS
            for factor in (0.96, 1.0, 1.04)
        ]

    def _say(
        self, text: str, name: str, rate: int = 175, pitch: int = 50, spread: int = 50, stretch: float = 1.0
    ) -> Signal:
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {name}")
        for parameter, value in {"rate": rate, "volume": 60, "pitch": pitch, "range": spread}.items():
            self._library.espeak_SetParameter(self._PARAMETERS[parameter], value, 0)
        self._pieces = []
        raw = text.encode() + b"\0"
        self._library.espeak_Synth(raw, len(raw), 0, 1, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate([np.zeros(1, np.int16), *self._pieces])
        return resample(samples / 32768.0, SAMPLE_RATE_HZ / self._rate_hz / stretch)

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        name, stretch = voice.name, voice.formants
        f0_hz, rate = self._calibration(name)
        pitch = 50 + np.log(manner.f0_hz / f0_hz / stretch) / self._LOG_F0_PER_UNIT
        if manner.whisper:
            accent, speaker = name.split("+")
            women = {
                s
                for (sex, _), speakers in self._SPEAKERS.items()
                if sex == "female"
                for s in speakers.split()
            }
            name = f"{accent}+{'whisperf' if speaker in women else 'whisper'}"
        spread = {"monotone": (0, 9), "normal": (55, 65), "lively": (90, 100)}[manner.liveliness]
        x = self._say(
            text,
            name,
            rate=int(np.clip(175 * manner.syllables_per_s / rate / stretch, 80, 420)),
            pitch=int(np.clip(pitch, 8, 95)),  # the library crashes at pitch 0 with a wide range
            spread=int(rng.integers(*spread)),
            stretch=stretch,
        )
        return scale_intonation(x, 1.8) if manner.liveliness == "lively" else x


class Pico:
    """SVOX Pico through py-nanotts: voices of six languages read the English text, each with an accent."""

    can_whisper = False
    _LANGUAGES: ClassVar[dict[Split, tuple[str, ...]]] = {
        "train": ("en-US", "en-GB", "en-US", "en-GB", "de-DE", "es-ES"),
        "validation": ("fr-FR",),
        "test": ("it-IT",),
    }
    _FORMANTS: ClassVar = {
        "male": (0.80, 0.82, 0.84, 0.86, 0.88),
        "female": (0.97, 0.995, 1.02, 1.05, 1.08),
    }

    def __init__(self) -> None:
        from py_nanotts import NanoTTS

        self._engine = NanoTTS()
        self._calibration = _Calibration(lambda name: self._say(_CALIBRATION_TEXT, name, 1.0, 1.0))

    def voices(self, sex: str, split: Split) -> list[Voice]:
        return [Voice(lang, factor) for lang in self._LANGUAGES[split] for factor in self._FORMANTS[sex]]

    def _say(self, text: str, name: str, pitch: float, speed: float) -> Signal:
        raw = self._engine.speak(
            text,
            voice=name,
            pitch=float(np.clip(pitch, 0.5, 2.0)),
            speed=float(np.clip(speed, 0.3, 4.0)),
            volume=0.5,  # full volume clips
        )
        return np.frombuffer(raw, "<i2") / 32768.0

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        f0_hz, rate = self._calibration(voice.name)
        stretch = voice.formants
        x = self._say(
            text, voice.name, manner.f0_hz / f0_hz / stretch, manner.syllables_per_s / rate / stretch
        )
        x = resample(trim(x), 1 / stretch)
        factor = {"monotone": 0.0, "normal": 1.0, "lively": 2.2}[manner.liveliness]
        return x if factor == 1.0 else scale_intonation(x, factor)


class Hibari:
    """The network of hibari-tts gives spectral envelopes and F0. Both are changed before synthesis."""

    can_whisper = True
    _FORMANTS: ClassVar[dict[tuple[str, Split], tuple[float, ...]]] = {
        ("male", "train"): (0.79, 0.80, 0.81, 0.82, 0.875, 0.89, 0.905),
        ("male", "validation"): (0.832, 0.838),
        ("male", "test"): (0.85, 0.855, 0.86),
        ("female", "train"): (0.95, 0.965, 0.98, 0.992, 1.055, 1.07, 1.09),
        ("female", "validation"): (1.003, 1.007),
        ("female", "test"): (1.02, 1.03, 1.04),
    }
    _RATE_HZ = 24_000
    _BINS = 601
    _VOICED_HZ = 40.0

    def __init__(self) -> None:
        from hibari import Hibari as Network
        from hibari import dsp

        self._network, self._synthesise = Network(threads=1), dsp.synth
        self._calibration = _Calibration(self._plain)

    def voices(self, sex: str, split: Split) -> list[Voice]:
        return [Voice("heart", factor) for factor in self._FORMANTS[sex, split]]

    def _plain(self, _name: str) -> Signal:
        return resample(
            self._network(_CALIBRATION_TEXT, seed=0).astype(np.float64), SAMPLE_RATE_HZ / self._RATE_HZ
        )

    def _frames(self, phonemes: str, speed: float) -> list[Any]:
        inputs = {
            "ids": np.asarray([self._network.ids(phonemes)], np.int64),
            "speed": np.asarray([speed], np.float32),
        }
        return [np.asarray(output[0], np.float32) for output in self._network.sess.run(None, inputs)]

    def _warp(self, envelope: Any, factor: float) -> Any:
        """Multiplies the formants of a log envelope (bins, frames) by `factor`."""
        source = np.clip(np.arange(self._BINS) / factor, 0, self._BINS - 1)
        low = source.astype(np.int64)
        weight = (source - low)[:, None].astype(np.float32)
        return envelope[low] * (1 - weight) + envelope[np.minimum(low + 1, self._BINS - 1)] * weight

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        neutral_hz, neutral_rate = self._calibration(voice.name)
        spread = {"monotone": rng.uniform(0.03, 0.15), "normal": 0.6, "lively": rng.uniform(1.4, 2.0)}
        speed = float(np.clip(manner.syllables_per_s / neutral_rate, 0.4, 2.6))
        pieces = []
        for phonemes in self._network.phonemize(text):
            harmonic, theta, noise, free, phase, f0 = self._frames(phonemes, speed)
            voiced = f0 > self._VOICED_HZ
            if voiced.any():
                median = np.median(f0[voiced])
                target = median * manner.f0_hz / neutral_hz
                melody = target * (np.maximum(f0, 1) / median) ** spread[manner.liveliness]
                f0 = np.where(voiced, np.maximum(45, melody), f0).astype(np.float32)
            harmonic, noise, free = (self._warp(e, voice.formants) for e in (harmonic, noise, free))
            if manner.whisper:  # noise replaces the harmonic part, except at low frequencies
                hertz = np.linspace(0, self._RATE_HZ / 2, self._BINS)
                slope = np.interp(hertz, [0, 300, 700, 1500, 12000], [-7, -3.5, -1.0, 0.3, 0.8])
                noise = np.logaddexp(noise, harmonic - 0.8) + slope[:, None].astype(np.float32)
                harmonic, free = harmonic - 12, free - 12
            noise = noise.astype(np.float32)
            pieces.append(self._synthesise(harmonic, theta, noise, free, phase, f0, rng))
        x = np.concatenate(pieces).astype(np.float64)
        return resample(x, SAMPLE_RATE_HZ / self._RATE_HZ)


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
    """Source-filter synthesis: filters pulses and noise with four formants, frame by frame.

    The speech is rough, but needs no package, and pitch, speed, melody and length of the vocal tract are
    exactly as requested. A few rules turn letters into phones, and phones into tracks of formants and
    amplitudes.
    """

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
        phones: list[str] = []
        for word in text.lower().replace(".", "").split():
            rest = word[:-1] if word.endswith("e") and syllables(word) < syllables(word[:-1] + "a") else word
            while rest:
                unit = next((u for u in units if rest.startswith(u)), "")
                if unit and unit not in phones[-1:]:
                    phones.append(unit)
                rest = rest[max(1, len(unit)) :]
        return phones

    def _frame_tracks(self, text: str, rate: float, voice: Voice) -> tuple[Signal, Signal, Signal, Signal]:
        """Per frame: formants (T, 4) in Hz; amplitudes of voice and noise, centre of the noise (T,)."""
        phones = self._phones(text)
        weights = np.array([1.0 if p in _VOWELS else 0.42 for p in phones])
        edges = np.round(np.append(0.0, np.cumsum(weights / weights.sum())) * 100 * syllables(text) / rate)
        rows = np.zeros((max(1, int(edges[-1])), 6))
        for phone, start, stop in zip(phones, edges[:-1].astype(int), edges[1:].astype(int), strict=True):
            rows[start:stop] = (*_VOWELS[phone], 1.0, 0.0, 0) if phone in _VOWELS else _CONSONANTS[phone]
            if phone in _STOPS:  # a closure, then a burst
                rows[start : stop - max(1, (stop - start) // 2), 3:5] *= 0.05
        kernel = np.hanning(7)[1:-1] / np.hanning(7)[1:-1].sum()
        padded = np.pad(rows, ((2, 2), (0, 0)), mode="edge")
        smooth = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in range(5)], axis=1)
        personal = np.random.default_rng(list(voice.name.encode())).uniform(0.95, 1.05, 4)
        formants = np.column_stack([smooth[:, :3], np.full(len(rows), 3500.0)]) * personal * voice.formants
        return formants, smooth[:, 3], smooth[:, 4], rows[:, 5]

    def speak(self, text: str, voice: Voice, manner: Manner, rng: np.random.Generator) -> Signal:
        formants, voiced, noisy, centre = self._frame_tracks(text, manner.syllables_per_s, voice)
        count = len(voiced)
        knots = max(3, round(count / 100 * manner.syllables_per_s))
        accents = np.interp(
            np.linspace(0, knots - 1, count), np.arange(knots), rng.choice([-1.0, 1.0], knots)
        )
        spread = {"monotone": 0.2, "normal": 2.2, "lively": 5.5}[manner.liveliness]
        f0 = manner.f0_hz * 2 ** (spread * (accents * 0.8 + np.linspace(0.7, -0.7, count)) / 12)
        bandwidths = np.array([70.0, 100.0, 160.0, 280.0])
        tract = resonances(formants, bandwidths)
        frication = resonances(centre[:, None], np.array([1800.0]))
        noise = rng.standard_normal(count * HOP)
        z = np.exp(-1j * np.linspace(0, np.pi, 513))
        hiss = noisy[:, None] * frication * (1 - 0.9 * z)
        if manner.whisper:
            return shape(noise, 0.1 * (hiss + 0.5 * voiced[:, None] * tract * (1 - 0.7 * z)))
        glottis = (1 - z) / (1 - 0.94 * z) ** 2 / 4  # -6 dB an octave after radiation from the lips
        breath = 0.01 * voiced[:, None] * tract
        x = shape(pulses(f0, rng), voiced[:, None] * tract * glottis)
        return 0.1 * (x + shape(noise, 0.3 * hiss + breath))
