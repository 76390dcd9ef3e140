"""Changes the waveforms of the demo corpus, in numpy.

Every waveform is a float64 array of shape (samples,) at SAMPLE_RATE_HZ; frames advance by HOP samples.
Whisper and creak are made here from any engine's voice, so that a voice quality does not reveal the engine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clsp_fast.captioning.measure import Measurement, measure, track

Signal = npt.NDArray[np.float64]

SAMPLE_RATE_HZ = 16_000
HOP = 160
_WINDOW = 3 * HOP  # a Hann window of 3 hops adds up to a constant
_FFT = 1024
_LPC_ORDER = 18


def _fft_length(samples: int) -> int:
    """A length of at least `samples` for which an FFT is fast."""
    unit = 1 << max(0, (samples - 1).bit_length() - 4)
    return next(m * unit for m in (8, 9, 10, 12, 15, 16) if m * unit >= samples)


def resample(x: Signal, ratio: float) -> Signal:
    """Changes the number of samples by `ratio` with one FFT (band-limited, no delay)."""
    # The FFT treats x as periodic. The ringing at its ends falls into the added silence.
    padded = _fft_length(len(x) + 256)
    total = round(padded * ratio)
    spectrum = np.fft.rfft(x, padded)
    kept = np.zeros(total // 2 + 1, np.complex128)
    kept[: len(spectrum)] = spectrum[: len(kept)]
    return np.fft.irfft(kept, total)[: round(len(x) * ratio)] * (total / padded)


def trim(x: Signal, *, threshold_db: float = -40.0, margin_s: float = 0.04) -> Signal:
    """Cuts silence off both ends, except for `margin_s`. A signal without speech is returned unchanged."""
    block = 2 * HOP
    count = len(x) // block
    if count < 3:
        return x
    level = 10 * np.log10(np.mean(x[: count * block].reshape(count, block) ** 2, axis=1) + 1e-10)
    (active,) = np.nonzero(level > np.percentile(level, 95) + threshold_db)
    margin = round(margin_s * SAMPLE_RATE_HZ)
    return x[max(0, active[0] * block - margin) : (active[-1] + 1) * block + margin]


def _frames(x: Signal, size: int) -> Signal:
    return np.lib.stride_tricks.sliding_window_view(x, size)[::HOP]


def measured(x: Signal) -> Measurement:
    """What `captioning.measure` says of a waveform."""
    return measure([x.astype(np.float32)], num_threads=1)[0]


def f0_track(x: Signal) -> Signal:
    """F0 in Hz of each frame of HOP samples; 0 if the frame has no voice."""
    return track(x.astype(np.float32)).f0_hz


def active_level_db(x: Signal) -> float:
    """Level of the frames that hold speech, in dB relative to full scale."""
    return measured(x).whole.level_db


def set_level(x: Signal, level_db: float) -> Signal:
    """Scales to an active level. Peaks above 0.8 are compressed, so that they stay below full scale."""
    y = x * 10 ** ((level_db - active_level_db(x)) / 20)
    knee = 0.8
    over = np.maximum(np.abs(y) - knee, 0.0)
    return np.where(over > 0, np.sign(y) * (knee + (1 - knee) * np.tanh(over / (1 - knee))), y)


def tilt(x: Signal, db_per_octave: float) -> Signal:
    """Tilts the spectrum around 500 Hz. A positive slope sounds like vocal effort, a negative one like soft
    speech."""
    length = _fft_length(len(x) + 256)
    octaves = np.log2(np.clip(np.linspace(0, SAMPLE_RATE_HZ / 2, length // 2 + 1), 125, 4000) / 500)
    spectrum = np.fft.rfft(x, length) * 10 ** (db_per_octave * octaves / 20)
    return np.fft.irfft(spectrum, length)[: len(x)]


def shape(excitation: Signal, envelopes: npt.NDArray[np.complex128]) -> Signal:
    """Filters frame by frame: row m of `envelopes` (frames, 513) filters the frame that starts at m * HOP.

    Overlap-add in the frequency domain; the filters' tails are kept up to _FFT samples. Returns as many
    samples as `excitation` has.
    """
    count = len(envelopes)
    padded = np.pad(excitation, (0, max(0, (count - 1) * HOP + _WINDOW - len(excitation))))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    spectra = np.fft.rfft(_frames(padded, _WINDOW)[:count] * window, _FFT)
    pieces = np.fft.irfft(spectra * envelopes, _FFT)
    blocks = -(-_FFT // HOP)
    pieces = np.pad(pieces, ((0, 0), (0, blocks * HOP - _FFT))).reshape(count, blocks, HOP)
    out = np.zeros((count + blocks - 1, HOP))
    for block in range(blocks):
        out[block : block + count] += pieces[:, block]
    result = out.reshape(-1)[: len(excitation)] / 1.5
    return np.pad(result, (0, len(excitation) - len(result)))


def _linear_prediction(x: Signal) -> tuple[Signal, Signal]:
    """Coefficients (frames, order + 1) and residual amplitude (frames,), by Levinson's recursion."""
    window = np.hanning(_WINDOW)
    frames = _frames(np.pad(x, (0, _WINDOW)), _WINDOW) * window
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, _FFT)) ** 2)[:, : _LPC_ORDER + 1]
    correlation[:, 0] = correlation[:, 0] * 1.002 + 1e-8  # adds white noise, so that silent frames are stable
    coefficients = np.zeros_like(correlation)
    coefficients[:, 0] = 1.0
    error = correlation[:, 0].copy()
    for order in range(1, _LPC_ORDER + 1):
        reflection = -np.sum(coefficients[:, :order] * correlation[:, order:0:-1], axis=1) / error
        previous = coefficients[:, :order].copy()
        coefficients[:, 1 : order + 1] += reflection[:, None] * previous[:, ::-1]
        error *= 1 - reflection**2
    return coefficients, np.sqrt(np.maximum(error, 0.0) / np.sum(window**2))


def _resynthesize(x: Signal, excitation: Signal, *, tilt_pole: float) -> Signal:
    """Filters `excitation` (unit power) with the vocal tract of `x`."""
    emphasised = np.append(x[:1], x[1:] - 0.95 * x[:-1])
    coefficients, gain = _linear_prediction(emphasised)
    delay = np.exp(-1j * np.linspace(0, np.pi, _FFT // 2 + 1))
    envelopes = gain[:, None] / (np.fft.rfft(coefficients, _FFT) * (1 - tilt_pole * delay))
    return shape(excitation, envelopes)


def whisper(x: Signal, rng: np.random.Generator) -> Signal:
    """The same words without voice: noise filtered by the vocal tract, weaker at low frequencies."""
    return _resynthesize(x, rng.standard_normal(len(x)), tilt_pole=float(rng.uniform(0.3, 0.6)))


def add_breath(x: Signal, harmonics_to_noise_db: float, rng: np.random.Generator) -> Signal:
    """The same voice with breath in it, as in hoarse and breathy voices."""
    breath = whisper(x, rng)
    return x + set_level(breath, active_level_db(x) - harmonics_to_noise_db)


def creak(x: Signal, pulse_hz: float, rng: np.random.Generator) -> Signal:
    """The same words in vocal fry: slow, irregular, unequal pulses where `x` has voice."""
    steps = 1 + 0.28 * rng.standard_normal(int(2 * len(x) * pulse_hz / SAMPLE_RATE_HZ) + 8)
    onsets = np.cumsum(np.clip(steps, 0.35, 1.8)) * SAMPLE_RATE_HZ / pulse_hz
    times = onsets[onsets < len(x)].astype(np.int64)
    noise = rng.standard_normal(len(x))
    voiced = np.repeat(f0_track(x) > 0, HOP)
    voiced = np.pad(voiced, (0, max(0, len(x) - len(voiced))))[: len(x)]
    excitation = np.where(voiced, 0.05, 0.7) * noise
    pulses = rng.uniform(0.5, 1.3, len(times)) * np.sqrt(SAMPLE_RATE_HZ / pulse_hz)
    np.add.at(excitation, times, pulses * voiced[times])
    return _resynthesize(x, excitation, tilt_pole=0.95)


def scale_intonation(x: Signal, factor: float) -> Signal:
    """Widens (factor > 1) or flattens (< 1) the melody by changes of playing speed, smoothed over 70 ms."""
    f0_hz = f0_track(x)
    (voiced,) = np.nonzero(f0_hz)
    if len(voiced) < 8:
        return x
    relative = np.clip(f0_hz[voiced] / np.median(f0_hz[voiced]), 0.6, 1.7)
    contour = np.interp(np.arange(len(f0_hz)), voiced, relative)
    contour = np.convolve(np.pad(contour, 3, mode="edge"), np.full(7, 1 / 7), "valid")
    centres = np.arange(len(f0_hz)) * HOP + HOP // 2
    speed = np.interp(np.arange(len(x)), centres, np.clip(contour ** (factor - 1), 0.7, 1.4))
    times = np.append(0.0, np.cumsum(speed))
    wanted = times[: int(np.searchsorted(times, len(x) - 1))]
    return np.asarray(np.interp(wanted, np.arange(len(x)), x), np.float64)


def resonances(formants: Signal, bandwidths: Signal) -> npt.NDArray[np.complex128]:
    """Response (T, bins) of a product of two-pole resonators. Each is 1 at 0 Hz."""
    z = np.exp(-1j * np.linspace(0, np.pi, 513))
    radius = np.exp(-np.pi * bandwidths / SAMPLE_RATE_HZ)
    a1 = -2 * radius * np.cos(2 * np.pi * formants / SAMPLE_RATE_HZ)
    a2 = np.broadcast_to(radius**2, a1.shape)
    response = np.ones((len(formants), 513), np.complex128)
    for k in range(formants.shape[1]):
        response *= (1 + a1[:, k] + a2[:, k])[:, None] / (1 + a1[:, k, None] * z + a2[:, k, None] * z * z)
    return response


def pulses(f0_T: Signal, rng: np.random.Generator) -> Signal:
    """Unit-power pulse train that follows F0, with the small irregularities of a human voice."""
    jitter = 1 + 0.01 * rng.standard_normal(len(f0_T))
    f0 = np.interp(np.arange(len(f0_T) * HOP), np.arange(len(f0_T)) * HOP + HOP / 2, f0_T * jitter)
    cycles = np.cumsum(f0 / SAMPLE_RATE_HZ)
    (at,) = np.nonzero(np.diff(np.floor(cycles), prepend=0.0))
    late = (cycles[at] % 1.0) / (f0[at] / SAMPLE_RATE_HZ)  # in samples, since the cycle began
    height = np.sqrt(SAMPLE_RATE_HZ / f0[at]) * rng.uniform(0.93, 1.07, len(at))
    train = np.zeros(len(f0) + 1)
    train[at] += height * (1 - late)
    train[np.maximum(at - 1, 0)] += height * late
    return train[:-1]
