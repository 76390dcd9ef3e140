"""Measurements on signals whose truth is known, and the engine against the reference in numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from clsp_fast import _C
from clsp_fast.captioning import measure_reference as reference
from clsp_fast.captioning.measure import (
    SAMPLE_RATE_HZ,
    Measurement,
    Part,
    measure,
    measure_reference,
    measure_rows,
    measurement_of,
    sex_score,
    speaker_sex,
    track,
    voice_quality,
)
from clsp_fast.demo import engines, signal

Waveform = np.ndarray


def voice(f0_hz: np.ndarray, *, formants: tuple[float, ...] = (600.0, 1400.0, 2600.0, 3700.0)) -> Waveform:
    """A buzz that follows F0 (one value a sample) through these resonances and one at 4.7 kHz."""
    phase = 2 * np.pi * np.cumsum(f0_hz) / SAMPLE_RATE_HZ
    harmonics = range(1, int(7500 / np.max(f0_hz)) + 1)
    x = np.sum([np.cos(k * phase) for k in harmonics], axis=0)
    frequency = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE_HZ)
    response = np.ones(len(frequency), complex)
    for formant in (*formants, 4700.0):
        response /= 1 - (frequency / formant) ** 2 + 1j * frequency / formant * 80 / formant
    return scaled(np.fft.irfft(np.fft.rfft(x) * response, len(x)))


def scaled(x: np.ndarray, rms: float = 0.1) -> Waveform:
    """float32 with the given root mean square."""
    return (x * (rms / np.sqrt(np.mean(x**2)))).astype(np.float32)


def steady(f0_hz: float, seconds: float = 1.0) -> Waveform:
    return voice(np.full(round(seconds * SAMPLE_RATE_HZ), f0_hz))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE_HZ))


def speech_like(seed: int = 0) -> Waveform:
    """Voiced syllables with a moving melody, noise between them, and a pause."""
    rng = np.random.default_rng(seed)
    t = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    f0 = rng.uniform(90, 250) * 2 ** (0.3 * np.sin(2 * np.pi * t) + 0.1 * t)
    syllables = np.clip(1.2 * np.sin(2 * np.pi * 3.5 * t), 0, 1)
    x = voice(f0) * syllables + 0.02 * noise(2, seed) * (1 - syllables)
    return np.concatenate([x, np.zeros(8000), x[:9000]]).astype(np.float32)


SIGNALS = {
    **{f"speech {seed}": speech_like(seed) for seed in range(4)},
    "voice": steady(123.0),
    "noise": scaled(noise(1.3)),
    "clipped": np.sign(noise(1.1)).astype(np.float32),
    "offset": (steady(200.0) + 0.4).astype(np.float32),
    "silence": np.zeros(16000, np.float32),
    "constant": np.full(5000, 0.3, np.float32),
    "empty": np.zeros(0, np.float32),
    "one sample": np.ones(1, np.float32),
    "79 samples": scaled(noise(1))[:79],
    "quiet": (steady(150.0) * 1e-3).astype(np.float32),
}


def values(measurement: Measurement) -> dict[str, float]:
    """All values by name."""
    parts = (measurement.whole, *measurement.halves, *measurement.thirds)
    named = {
        f"{field} of part {i}": getattr(part, field) for i, part in enumerate(parts) for field in fields()
    }
    formants = {f"F{k + 1}": hz for k, hz in enumerate(measurement.formants_hz)}
    others = ("duration_s", "bandwidth_hz", "snr_db")
    return named | formants | {name: getattr(measurement, name) for name in others}


def fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Part)]


def test_the_fields_of_a_part_are_those_of_the_engine() -> None:
    assert tuple(fields()) == _C.VOICE_PART_FIELDS


def test_a_row_holds_all_of_a_measurement() -> None:
    rows = measure_rows([*SIGNALS.values()], num_threads=1)
    assert rows.shape == (len(SIGNALS), len(values(measure_reference(SIGNALS["empty"]))))
    copies = [measurement_of(np.frombuffer(row.tobytes())) for row in rows]
    assert list(map(repr, copies)) == list(map(repr, measure([*SIGNALS.values()])))  # NaN is not equal to NaN
    assert [copy.duration_s for copy in copies] == [len(x) / SAMPLE_RATE_HZ for x in SIGNALS.values()]
    assert measure_rows([]).shape == (0, rows.shape[1])


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("name", SIGNALS)
def test_frames_of_the_engine_are_those_of_the_reference(name: str, isa: str) -> None:
    """A decision may differ if two choices are equally good up to rounding, and only then."""
    waveform = SIGNALS[name]
    f0_hz, strength, level_db = _C.track_voice(waveform, isa=isa)
    expected = reference.analyse(waveform)
    audible = np.maximum(reference.decibels(expected.power), -100)
    np.testing.assert_allclose(np.maximum(level_db, -100), audible, atol=1e-3)
    if not np.array_equal(f0_hz > 0, expected.f0_hz > 0) or not np.allclose(f0_hz, expected.f0_hz, rtol=1e-3):
        ours, best = total_gain(waveform, f0_hz), total_gain(waveform, expected.f0_hz)
        assert ours >= best - 1e-3 * len(f0_hz)
    same = np.isclose(f0_hz, expected.f0_hz, rtol=1e-3)
    np.testing.assert_allclose(strength[same], expected.strength[same], atol=1e-3)


def total_gain(waveform: Waveform, f0_hz: np.ndarray) -> float:
    """What the search for F0 maximises, by the reference's candidates."""
    x = np.asarray(waveform, np.float64)
    x = np.pad(x - np.mean(x), (0, max(0, len(f0_hz) * reference.HOP - len(x))))[: len(f0_hz) * reference.HOP]
    candidates, strength = reference.pitch_candidates(reference.correlations(x))
    power = reference.frame_power(x)
    unvoiced = reference.unvoiced_strength(power, reference.active_frames(power))
    octaves = np.log2(np.maximum(f0_hz, 1) / reference.LOWEST_F0_HZ)
    nearest = np.argmin(np.abs(candidates - f0_hz[:, None]), axis=1)
    voiced = f0_hz > 0
    gain = np.where(
        voiced,
        strength[np.arange(len(f0_hz)), nearest] + reference.OCTAVE_COST * octaves,
        unvoiced,
    )
    jumps = np.where(
        voiced[1:] & voiced[:-1],
        reference.JUMP_COST * np.abs(np.diff(octaves)),
        np.where(voiced[1:] != voiced[:-1], reference.VOICING_COST, 0.0),
    )
    return float(np.sum(gain) - np.sum(jumps))


def independent_of_voicing(key: str) -> bool:
    """Whether a value follows from the level and the spectrum of the active frames alone."""
    timing = {"start_s", "duration_s", "nuclei", "pauses", "pause_s"}
    return key.split()[0] in timing | {"level_db", "bandwidth_hz", "snr_db"}


def same_voicing(waveform: Waveform, isa: str) -> bool:
    """Whether the engine and the reference find voice in the same frames. They may differ at ties."""
    return np.array_equal(_C.track_voice(waveform, isa=isa)[0] > 0, reference.analyse(waveform).f0_hz > 0)


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("name", SIGNALS)
def test_the_engine_measures_what_the_reference_measures(name: str, isa: str) -> None:
    waveform = SIGNALS[name]
    row = _C.measure_voices([waveform], num_threads=1, isa=isa)[0]
    result = values(measurement_of(np.append(len(waveform) / SAMPLE_RATE_HZ, row)))
    everything = same_voicing(waveform, isa)
    for key, value in values(measure_reference(waveform)).items():
        if everything or independent_of_voicing(key):
            assert result[key] == pytest.approx(value, rel=2e-3, abs=2e-3, nan_ok=True), key


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_voicing_is_that_of_the_reference_for_nearly_all_signals(isa: str) -> None:
    same = [same_voicing(waveform, isa) for waveform in SIGNALS.values()]
    assert np.count_nonzero(same) >= len(SIGNALS) - 2


def test_results_depend_neither_on_threads_nor_on_the_batch() -> None:
    waveforms = list(SIGNALS.values())
    alone = [measure([waveform], num_threads=1)[0] for waveform in waveforms]
    assert repr(measure(waveforms, num_threads=4)) == repr(alone)  # NaN equals NaN, -0 differs from 0
    assert measure([]) == []


@pytest.mark.parametrize("f0_hz", [62.0, 85.0, 120.0, 180.0, 260.0, 400.0, 580.0])
def test_f0_of_a_pulse_train(f0_hz: float) -> None:
    part = measure([steady(f0_hz)])[0].whole
    assert part.f0_hz == pytest.approx(f0_hz, rel=0.005)
    assert part.f0_sd < 0.1
    assert part.voiced > 0.9
    assert part.hnr_db > 12


def test_f0_in_noise() -> None:
    loud = scaled(noise(1.0), 0.05)  # 6 dB below the voice
    assert measure([steady(140.0) + loud])[0].whole.f0_hz == pytest.approx(140, rel=0.01)


def test_a_rising_melody() -> None:
    t = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    measurement = measure([voice(120 * 2 ** (t / 4))])[0]  # 3 semitones a second
    assert measurement.whole.f0_slope == pytest.approx(3, abs=0.2)
    assert measurement.whole.f0_range == pytest.approx(6 * 0.9, abs=0.4)
    assert measurement.whole.f0_sd == pytest.approx(6 / math.sqrt(12), abs=0.2)
    first, second = measurement.halves
    assert first.f0_hz == pytest.approx(120 * 2**0.125, rel=0.02)
    assert second.f0_hz == pytest.approx(120 * 2**0.375, rel=0.02)
    assert [part.start_s for part in measurement.thirds] == pytest.approx([0, 0.66, 1.33], abs=0.03)


@pytest.mark.parametrize("rate", [2.5, 4.0, 6.0])
def test_syllables_are_counted_with_and_without_voice(rate: float) -> None:
    t = np.arange(3 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    swell = 0.02 + np.sin(np.pi * rate * t) ** 2
    whispered, voiced = measure([scaled(swell * noise(3)), scaled(swell * steady(130.0, 3.0))])
    count = rate * 3
    assert abs(whispered.whole.nuclei - count) <= 1
    assert whispered.whole.voiced_nuclei <= 1
    assert whispered.whole.syllables() == pytest.approx(whispered.whole.nuclei / 1.12)
    assert abs(voiced.whole.voiced_nuclei - count) <= 1
    assert voiced.whole.syllables_per_s == pytest.approx(rate, rel=0.15)


def test_a_change_of_rate_is_seen_in_the_halves() -> None:
    t = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    slow, fast = (np.sin(np.pi * rate * t) ** 2 for rate in (2.0, 6.0))
    x = np.concatenate([slow, fast]) * steady(130.0, 4.0)
    first, second = measure([scaled(x)])[0].halves
    assert first.syllables_per_s == pytest.approx(2, abs=0.6)
    assert second.syllables_per_s == pytest.approx(6, abs=0.6)


@pytest.mark.parametrize("level_db", [-50.0, -20.0, -6.0])
def test_level_is_that_of_the_speech(level_db: float) -> None:
    x = scaled(steady(120.0), 10 ** (level_db / 20))
    with_pause = np.concatenate([x, np.zeros(32000, np.float32)])
    for waveform in (x, with_pause, with_pause + np.float32(0.2)):
        assert measure([waveform])[0].whole.level_db == pytest.approx(level_db, abs=0.3)


def test_pauses() -> None:
    gap, short = np.zeros(8000, np.float32), np.zeros(1600, np.float32)
    voiced = steady(120.0, 0.5)
    whole = measure([np.concatenate([gap, voiced, gap, voiced, short, voiced, gap])])[0].whole
    assert whole.pauses == 1
    assert whole.pause_s == pytest.approx(0.5, abs=0.06)
    assert whole.start_s == pytest.approx(0.5, abs=0.03)
    assert whole.duration_s == pytest.approx(2.1, abs=0.06)


def test_formants_of_known_resonances() -> None:
    formants = (620.0, 1300.0, 2500.0, 3600.0)
    waveform = voice(np.full(SAMPLE_RATE_HZ, 120.0), formants=formants)
    assert measure([waveform])[0].formants_hz == pytest.approx(formants, rel=0.1)


def test_bandwidth_and_noise() -> None:
    spectrum = np.fft.rfft(noise(2.0))
    spectrum[6800:] = 0  # 3.4 kHz
    x = scaled(np.fft.irfft(spectrum))
    assert measure([x])[0].bandwidth_hz == pytest.approx(3400, abs=400)
    x[16000:] *= 0.01
    assert measure([x])[0].snr_db == pytest.approx(40, abs=1.5)


def test_slow_irregular_pulses_are_creak() -> None:
    rng = np.random.default_rng(0)
    at = np.cumsum(rng.uniform(0.6, 1.4, 80) * SAMPLE_RATE_HZ / 45).astype(int)
    x = np.zeros(SAMPLE_RATE_HZ)
    x[at[at < len(x)]] = 1
    pulse = np.exp(-np.arange(400) / 40) * np.sin(np.arange(400) * 0.4)
    creaky, modal = measure([scaled(np.convolve(x, pulse)[: len(x)]), steady(110.0)])
    assert creaky.whole.creak > 0.7
    assert modal.whole.creak < 0.1


def test_only_documented_values_are_nan() -> None:
    may_be_nan = {"f0_hz", "f0_sd", "f0_range", "f0_slope", "hnr_db", "tilt_db"}
    for name, waveform in SIGNALS.items():
        for key, value in values(measure([waveform])[0]).items():
            if key.split()[0] not in may_be_nan | {"F1", "F2", "F3", "F4", "bandwidth_hz"}:
                assert math.isfinite(value), f"{key} of {name}"
    loud = values(measure([SIGNALS["speech 0"]])[0])
    assert all(map(math.isfinite, loud.values()))


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(100), "float32 array of shape"),
        (np.zeros((2, 100), np.float32), r"got float32 \(2, 100\)"),
        ([0.0, 1.0], "got list"),
        (np.array([0.0, np.nan], np.float32), "must be finite"),
        (np.array([0.0, -np.inf], np.float32), "must be finite"),
        (np.full(1000, 3e38, np.float32), "at most 10000"),
    ],
)
def test_other_waveforms_are_refused(waveform: object, message: str) -> None:
    for call in (lambda: measure([waveform]), lambda: track(waveform)):  # type: ignore[arg-type, list-item]
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("f0_hz", "f3_hz", "f4_hz", "sex"),
    [
        (115, 2600, 3500, "male"),
        (215, 2600, 3800, "female"),
        (173, 2600, 3700, None),
        (195, 2600, 3800, "female"),  # F4 agrees
        (205, 2600, 3560, None),  # F4 contradicts: a man speaking high
        (235, 2600, 3560, "female"),  # beyond the F0 of men
        (198, 2750, None, "female"),  # over a telephone, F3 agrees
        (198, 2500, None, None),
        (150, 2500, None, "male"),
        (150, 2750, None, None),
        (120, 2750, None, "male"),  # below the F0 of women
    ],
)
def test_sex_by_f0_and_vocal_tract(f0_hz: float, f3_hz: float, f4_hz: float | None, sex: str | None) -> None:
    formants = (600.0, 1400.0, float(f3_hz), f4_hz or math.nan)
    measured = measure([voice(np.full(16000, float(f0_hz)))])[0]
    assert speaker_sex(dataclasses.replace(measured, formants_hz=formants)) == sex


def test_sex_is_open_without_a_normal_voice() -> None:
    assert speaker_sex(measure([SIGNALS["noise"]])[0]) is None
    assert math.isnan(sex_score(measure([SIGNALS["silence"]])[0]))


def test_voice_quality_of_the_demo_engine_without_packages() -> None:
    rng = np.random.default_rng(0)
    manner = engines.Manner(f0_hz=120.0, syllables_per_s=4.0, liveliness="normal", whisper=False)
    synth = engines.make("synth", 0)
    name = synth.voices("male", "train")[0]
    modal = signal.set_level(synth.speak("the little boat went over the water.", name, manner, rng), -25.0)
    changed = (modal, signal.whisper(modal, rng), signal.creak(modal, 50.0, rng))
    measurements = measure([x.astype(np.float32) for x in changed])
    qualities = [voice_quality(measurement.whole) for measurement in measurements]
    assert qualities == ["normal", "whisper", "creaky"]
    assert [speaker_sex(measurement) for measurement in measurements] == ["male", None, None]
