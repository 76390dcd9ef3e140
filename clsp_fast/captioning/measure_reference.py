"""Measures recordings in numpy. It defines what the engine computes; the tests compare the two.

Frames advance by 10 ms. Frame m is centred at sample 160 m + 80; outside the recording, samples are 0.

Sources: P. Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise
ratio of a sampled sound", 1993 (F0, HNR); D. Hirst, "The analysis by synthesis of speech melody", 2011 (the
second, narrower range of F0); N. de Jong and T. Wempe, "Praat script to detect syllable nuclei", 2009;
J. Makhoul, "Spectral linear prediction", 1975 (formants from a part of the spectrum).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clsp_fast.captioning.measurement import HOP_S, SAMPLE_RATE_HZ, Measurement, Part, Track, Values

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

HOP, WINDOW, FFT = 160, 400, 512
MIN_VOICED = 8  # frames, for values that concern the voice

# Activity
SILENCE_DB = -80.0
BELOW_LOUD_DB = 30.0  # quieter frames, relative to the 95 % quantile of the level, are inactive
MIN_RUN, MIN_PAUSE = 4, 20  # frames

# F0: frames of 50 ms at 8 kHz, which hold three periods of 60 Hz
LOWEST_F0_HZ, HIGHEST_F0_HZ = 60.0, 600.0
PITCH_RATE_HZ = SAMPLE_RATE_HZ // 2
PITCH_BINS = slice(3, 230)  # 47 Hz to 3.6 kHz
PITCH_LAGS = np.arange(12.0, 138.0, 0.5)  # samples at 8 kHz
CANDIDATES = 8
OCTAVE_ERROR_SEMITONES = 9.0  # larger distances from the median are octave errors
UNVOICED_STRENGTH, OCTAVE_COST, JUMP_COST, VOICING_COST = 0.5, 0.01, 0.35, 0.14
QUIET_DB, QUIET_COST = 27.0, 0.1  # frames that are quieter than the loudest one by more: cost per dB

# Syllables
SYLLABLE_BINS = slice(3, 112)  # 80 Hz to 3.5 kHz
SYLLABLE_FLOOR_DB, SYLLABLE_DIP_DB = 25.0, 2.5

# Pulses of a creaking voice: peaks of the level of 2 ms blocks, where no clear voice is above 75 Hz
CLEAR_STRENGTH, HIGHEST_CREAK_HZ = 0.7, 75.0
PULSE_BLOCK, PULSE_DIP_DB = 32, 6.0
SHORTEST_PULSE, LONGEST_PULSE = 7, 25  # blocks: 14 to 50 ms

# Formants
FORMANT_BINS, FORMANT_ORDER = 166, 10  # five formants below 5.2 kHz
PRE_EMPHASIS = 0.9995  # of the power: that of a filter with 6 dB per octave above 50 Hz


@dataclass(frozen=True, slots=True)
class Frames:
    """Values for each frame, from which a `Part` is made."""

    power: Values  # of the samples around the frame's centre
    active: Flags  # has speech
    f0_hz: Values  # 0 = no voice
    strength: Values
    spectrum: Values  # (frames, 257): power
    nuclei: Flags  # is a syllable's loudest frame
    creak: Flags  # lies between two slow pulses


def decibels(power: npt.ArrayLike) -> Values:
    """dB, at least -120."""
    return np.asarray(10 * np.log10(np.asarray(power, np.float64) + 1e-12))


def centred_frames(x: Values, size: int, hop: int) -> Values:
    """(frames, size): samples around the centres hop/2, 3 hop/2, ... of a signal of whole hops."""
    margin = (size - hop) // 2
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, margin), size)[::hop]


def hann(size: int) -> Values:
    """A Hann window that is symmetric and nowhere 0."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size)


def runs(flags: Flags) -> list[tuple[int, int]]:
    """First and last + 1 index of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def frame_power(x: Values) -> Values:
    """Mean square around each frame: a triangle over three hops."""
    power = np.pad(np.mean(x.reshape(-1, HOP) ** 2, axis=1), 1, mode="edge")
    smoothed: Values = (power[:-2] + 2 * power[1:-1] + power[2:]) / 4
    return smoothed


def active_frames(power: Values) -> Flags:
    """Frames with speech: at most 30 dB below the loud ones, and above the noise."""
    level = decibels(power)
    quiet, loud = np.percentile(level, [5, 95])
    threshold = max(loud - BELOW_LOUD_DB, min(quiet + 6, loud - 18), SILENCE_DB)
    active: Flags = level > threshold
    for first, end in runs(active):
        if end - first < MIN_RUN:
            active[first:end] = False
    return active


def half_rate(x: Values) -> Values:
    """The signal at 8 kHz, low-passed at 3.6 kHz."""
    n = np.arange(-31, 32)
    taps = 0.475 * np.sinc(0.475 * n) * hann(63)
    return np.convolve(x, taps / np.sum(taps), "same")[::2]


def correlations(x: Values) -> Values:
    """(frames, lags): autocorrelation of each frame over that of the window (Boersma, eq. 9).

    It is computed from the power spectrum, so that it can be had at any lag and without the lowest
    frequencies. The FFT wraps around, but only where two ends of the window meet, which are close to 0.
    """
    window = hann(WINDOW)
    spectrum = np.abs(np.fft.rfft(centred_frames(half_rate(x), WINDOW, HOP // 2) * window, FFT)) ** 2
    bins = np.arange(FFT // 2 + 1)[PITCH_BINS]
    cosines = np.cos(2 * np.pi / FFT * np.outer(bins, PITCH_LAGS))
    energy = np.sum(spectrum[:, PITCH_BINS], axis=1, keepdims=True)
    ratio = spectrum[:, PITCH_BINS] @ cosines / np.maximum(energy, 1e-20)
    window_spectrum = np.abs(np.fft.rfft(window, FFT)) ** 2
    window_spectrum[1:-1] *= 2
    window_cosines = np.cos(2 * np.pi / FFT * np.outer(np.arange(FFT // 2 + 1), PITCH_LAGS))
    return np.asarray(ratio / (window_spectrum @ window_cosines / np.sum(window_spectrum)))


def pitch_candidates(ratio: Values) -> tuple[Values, Values]:
    """(frames, 8) each: F0 and strength of the highest peaks of a row of `correlations`; 0 where there are
    fewer."""
    f0, strength = np.zeros((2, len(ratio), CANDIDATES))
    for m, row in enumerate(ratio):
        (peaks,) = np.nonzero((row[1:-1] > row[:-2]) & (row[1:-1] >= row[2:]) & (row[1:-1] > 0))
        left, middle, right = row[peaks], row[peaks + 1], row[peaks + 2]
        offset = 0.5 * (left - right) / (left - 2 * middle + right)
        height = middle - 0.25 * (left - right) * offset
        height = np.where(height > 1, 1 / height, height)
        hz = PITCH_RATE_HZ / (PITCH_LAGS[peaks + 1] + 0.5 * offset)
        usable = (hz >= LOWEST_F0_HZ) & (hz <= HIGHEST_F0_HZ)
        hz, height = hz[usable], height[usable]
        order = np.argsort(-(height + OCTAVE_COST * np.log2(hz)), kind="stable")[:CANDIDATES]
        f0[m, : len(order)], strength[m, : len(order)] = hz[order], height[order]
    return f0, strength


def unvoiced_strength(power: Values, active: Flags) -> Values:
    """The strength that a candidate needs in each frame."""
    level = decibels(power)
    quiet = np.maximum(np.max(level) - QUIET_DB - level, 0)
    return np.where(active, UNVOICED_STRENGTH + QUIET_COST * quiet, 2.0)


def best_path(f0: Values, strength: Values, unvoiced: Values) -> Indices:
    """For each frame the candidate on the cheapest path, or -1: no voice (Boersma's costs, per 10 ms)."""
    count = len(f0)
    octaves = np.log2(np.maximum(f0, 1) / LOWEST_F0_HZ)
    gain = np.where(f0 > 0, strength + OCTAVE_COST * octaves, -1e9)
    gain = np.column_stack([unvoiced, gain])  # column 0: no voice
    back = np.zeros(gain.shape, np.int64)
    total = gain[0]
    cost = np.full((CANDIDATES + 1, CANDIDATES + 1), VOICING_COST)
    cost[0, 0] = 0
    for m in range(1, count):
        cost[1:, 1:] = JUMP_COST * np.abs(octaves[m - 1][:, None] - octaves[m])
        totals = total[:, None] - cost
        back[m] = np.argmax(totals, axis=0)
        total = np.max(totals, axis=0) + gain[m]
    path = np.empty(count, np.int64)
    path[-1] = np.argmax(total)
    for m in range(count - 1, 0, -1):
        path[m - 1] = back[m, path[m]]
    return path - 1


def f0_track(x: Values, unvoiced: Values) -> tuple[Values, Values]:
    """F0 in Hz (0 = no voice) and strength of each frame. The second search has the range of this voice."""
    f0, strength = pitch_candidates(correlations(x))
    rows = np.arange(len(f0))
    path = best_path(f0, strength, unvoiced)
    voiced = f0[rows, path][path >= 0]
    if len(voiced) >= MIN_VOICED:
        low, high = np.percentile(voiced, [25, 75])
        low = 0.75 * low
        inside = (f0 >= low) & (f0 <= max(1.9 * high, 2 * low))
        path = best_path(np.where(inside, f0, 0.0), strength, unvoiced)
    chosen = path >= 0
    return (
        np.where(chosen, f0[rows, path], 0.0),
        np.where(chosen, strength[rows, path], np.max(strength, axis=1)),
    )


def peaks_between_dips(level: Values, dip_db: float) -> list[int]:
    """Indices of maxima, each of which is `dip_db` above the minima on both sides or at an end."""
    peaks, rising, extreme = [], False, 0
    for i, value in enumerate(level):
        if (value > level[extreme]) == rising:
            extreme = i
        elif abs(value - level[extreme]) > dip_db:
            if rising:
                peaks.append(extreme)
            rising, extreme = not rising, i
    return [*peaks, extreme] if rising else peaks


def syllable_nuclei(spectrum: Values, active: Flags) -> Flags:
    """Frames in which a syllable is loudest."""
    power = np.sum(spectrum[:, SYLLABLE_BINS], axis=1) / np.sum(hann(WINDOW) ** 2)
    level = decibels(np.convolve(np.pad(power, 3), np.hanning(7) / 3, "valid"))
    level = np.maximum(level, np.percentile(level, 95) - SYLLABLE_FLOOR_DB)
    nuclei = np.zeros(len(active), np.bool_)
    nuclei[peaks_between_dips(level, SYLLABLE_DIP_DB)] = True
    return nuclei & active


def creak_frames(x: Values, creaks: Flags) -> Flags:
    """Frames of `creaks` between two pulses that follow each other more slowly than in a modal voice."""
    power = np.mean(np.diff(x, prepend=0.0).reshape(-1, PULSE_BLOCK) ** 2, axis=1)
    level = decibels(np.convolve(np.pad(power, 1), [0.25, 0.5, 0.25], "valid"))
    pulses = np.array(peaks_between_dips(level, PULSE_DIP_DB), np.int64)
    creak = np.zeros(len(level), np.bool_)
    for first, second in itertools.pairwise(pulses):
        if SHORTEST_PULSE <= second - first <= LONGEST_PULSE:
            creak[first:second] = True
    return creak[2::5] & creaks  # the blocks at the centres of the frames


def formants(spectrum: Values) -> tuple[float, float, float, float]:
    """Medians of F1 to F4 over frames: poles of a linear prediction of the spectrum below 5.2 kHz."""
    nyquist = FORMANT_BINS * SAMPLE_RATE_HZ / FFT
    bins = np.arange(FORMANT_BINS + 1)
    emphasised = spectrum[:, : FORMANT_BINS + 1] * (1 - PRE_EMPHASIS * np.cos(np.pi * bins / FORMANT_BINS))
    emphasised[:, -1] /= 2
    emphasised[:, 0] = 0  # a frame's mean is not speech
    lags = np.cos(np.pi / FORMANT_BINS * np.outer(bins, np.arange(FORMANT_ORDER + 1)))
    rows = []
    for r in emphasised @ lags:
        r[0] *= 1 + 1e-5
        matrix = r[np.abs(np.subtract.outer(np.arange(FORMANT_ORDER), np.arange(FORMANT_ORDER)))]
        poles = np.roots(np.concatenate([[1.0], -np.linalg.solve(matrix, r[1:])]))
        hz = np.angle(poles) * nyquist / np.pi
        rows.append(np.sort(hz[(hz > 90) & (hz < nyquist - 50)])[:4])
    medians = []
    for k in range(4):
        values = [row[k] for row in rows if len(row) > k]
        medians.append(float(np.median(values)) if len(values) >= MIN_VOICED else math.nan)
    return medians[0], medians[1], medians[2], medians[3]


def bandwidth(spectrum: Values) -> float:
    """Upper edge of the highest band of 250 Hz whose power is at most 55 dB below the strongest one."""
    if not len(spectrum):
        return math.nan
    bands = decibels(np.mean(spectrum, axis=0)[1:249].reshape(-1, 8).sum(axis=1))
    return 250.0 * float(1 + np.flatnonzero(bands > np.max(bands) - 55)[-1])


def analyse(waveform: npt.NDArray[np.float32]) -> Frames:
    """All frames of a waveform at 16 kHz."""
    x = np.asarray(waveform, np.float64)
    count = max(1, (len(x) + HOP // 2) // HOP)
    x = np.pad(x - (np.mean(x) if len(x) else 0.0), (0, max(0, count * HOP - len(x))))[: count * HOP]
    power = frame_power(x)
    active = active_frames(power)
    f0, strength = f0_track(x, unvoiced_strength(power, active))
    spectrum = np.abs(np.fft.rfft(centred_frames(x, WINDOW, HOP) * hann(WINDOW), FFT)) ** 2
    modal = (f0 > HIGHEST_CREAK_HZ) & (strength > CLEAR_STRENGTH)
    return Frames(
        power=power,
        active=active,
        f0_hz=f0,
        strength=strength,
        spectrum=spectrum,
        nuclei=syllable_nuclei(spectrum, active),
        creak=creak_frames(x, active & ~modal),
    )


def pitch_statistics(f0_hz: Values, voiced: Indices) -> tuple[float, float, float, float]:
    """Median (Hz), standard deviation, range (semitones) and slope (semitones per second)."""
    if len(voiced) < MIN_VOICED:
        return math.nan, math.nan, math.nan, math.nan
    median = float(np.median(f0_hz[voiced]))
    semitones = 12 * np.log2(f0_hz[voiced] / median)
    near = np.abs(semitones) < OCTAVE_ERROR_SEMITONES
    if not near.any():  # the median lies between two groups of values
        near[:] = True
    semitones, times = semitones[near], voiced[near] * HOP_S
    low, high = np.percentile(semitones, [5, 95])
    times = times - np.mean(times)
    slope = np.sum(times * semitones) / max(float(np.sum(times**2)), 1e-12)
    return median, float(np.std(semitones)), float(high - low), float(slope)


def measure_part(frames: Frames, first: int, end: int) -> Part:
    """What is measured of frames `first` to `end` - 1."""
    inside = slice(first, end)
    active, f0 = frames.active[inside], frames.f0_hz[inside]
    nuclei = frames.nuclei[inside]
    speech = int(np.sum(active))
    (voiced,) = np.nonzero(f0)
    f0_hz, f0_sd, f0_range, f0_slope = pitch_statistics(f0, voiced)
    silences = [stop - start for start, stop in runs(~active) if stop - start >= MIN_PAUSE]
    hnr, tilt = math.nan, math.nan
    loud = frames.power[inside][active] if speech else frames.power
    if speech:
        bright = frames.spectrum[inside][f0 > 0 if len(voiced) >= MIN_VOICED else active].sum(axis=0)
        tilt = float(10 * np.log10((np.sum(bright[32:160]) + 1e-12) / (np.sum(bright[2:32]) + 1e-12)))
    if len(voiced) >= MIN_VOICED:
        r = np.clip(frames.strength[inside][voiced], 1e-4, 0.9999)
        hnr = float(np.mean(10 * np.log10(r / (1 - r))))
    return Part(
        start_s=first * HOP_S,
        duration_s=(end - first) * HOP_S,
        level_db=float(decibels(np.mean(loud))),
        voiced=len(voiced) / max(speech, 1),
        clear_voice=float(np.sum((f0 > 0) & (frames.strength[inside] > CLEAR_STRENGTH)) / max(speech, 1)),
        f0_hz=f0_hz,
        f0_sd=f0_sd,
        f0_range=f0_range,
        f0_slope=f0_slope,
        nuclei=int(np.sum(nuclei)),
        voiced_nuclei=int(np.sum(nuclei & (f0 > 0))),
        pauses=len(silences),
        pause_s=sum(silences) * HOP_S,
        hnr_db=hnr,
        creak=float(np.sum(frames.creak[inside]) / max(speech, 1)),
        tilt_db=tilt,
    )


def measure_reference(waveform: npt.NDArray[np.float32]) -> Measurement:
    """Measures one mono waveform at 16 kHz. See `Part` for values that cannot be measured."""
    frames = analyse(waveform)
    (speech,) = np.nonzero(frames.active)
    first, end = (int(speech[0]), int(speech[-1]) + 1) if len(speech) else (0, 0)
    voiced = frames.f0_hz > 0
    edges = {n: [first + (end - first) * i // n for i in range(n + 1)] for n in (1, 2, 3)}
    parts = {
        n: tuple(measure_part(frames, *pair) for pair in itertools.pairwise(at)) for n, at in edges.items()
    }
    quiet_db = float(np.percentile(decibels(frames.power), 5))
    return Measurement(
        duration_s=len(waveform) / SAMPLE_RATE_HZ,
        whole=parts[1][0],
        halves=parts[2],
        thirds=parts[3],
        formants_hz=formants(frames.spectrum[voiced]),
        bandwidth_hz=bandwidth(frames.spectrum[frames.active]),
        snr_db=parts[1][0].level_db - quiet_db,
    )


def track_reference(waveform: npt.NDArray[np.float32]) -> Track:
    """F0, strength and level of each frame of a mono waveform at 16 kHz."""
    frames = analyse(waveform)
    return Track(f0_hz=frames.f0_hz, strength=frames.strength, level_db=decibels(frames.power))
