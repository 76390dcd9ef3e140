"""The audio frontend: log-mel features, decoding, resampling, and the whole path from a file to features.

Peers with the same definition must give nearly the same numbers. Other peers (asrfront, kaldi-native-fbank
with 120 bins, librosa, transformers) do the same work by another definition. Their numbers must correlate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import soundfile

from bench import frontend_peers as peers
from bench.frontend_inputs import (
    RATE_HZ,
    Recording,
    Recordings,
    Waveform,
    recording,
    recordings,
    resampled,
    speech,
)
from bench.measure import Case, Provider, close, correlated, equal
from clsp_fast import features

SECONDS = 10
CLIPS = 64
FRAMES = 100 * SECONDS
# One frame: real FFT of 512 points (2.5 n log2 n), mean, pre-emphasis and window, power, mel, logarithms.
FRAME_FLOPS = 2.5 * 512 * 9 + 4 * 400 + 3 * 257 + 2 * 480 + 20 * 128

# Float32 against float64, on log energies from -16 to 5. The error of lhotse is 2e-4 to 2e-3.
same_features = close(5e-3, rms=1e-4)


def like_features(expected: Any, result: Any) -> tuple[bool, str]:
    """For other definitions: the correlation over the frames and bins of each clip.

    Definitions differ in scale and pre-emphasis, so the mean of each bin is removed. They treat edges
    differently, so a few frames may be missing or added, and all may be shifted by less than one hop. Another
    number of bins is interpolated to 128.
    """
    if np.ndim(expected) == 2:
        expected, result = [expected], [result]
    correlations = []
    for a, b in zip(expected, np.asarray(result, np.float64), strict=True):
        if abs(len(a) - len(b)) > 3:
            return False, f"{len(b)} frames, expected {len(a)}"
        if a.shape[1] != b.shape[1]:
            bins_a, bins_b = (np.linspace(0, 1, x.shape[1]) for x in (a, b))
            b = np.stack([np.interp(bins_a, bins_b, row) for row in b])
        correlations.append(max(_correlation(a, b), _correlation(a[1:], b)))
    lowest = min(correlations)
    return lowest >= 0.9, f"correlation {lowest:.3f} (at least 0.9), other definition"


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    rows = min(len(a), len(b))
    a, b = (x[:rows] - x[:rows].mean(0) for x in (a, b))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


ASRFRONT_NOTE = "Hamming window, 20 to 8000 Hz, whole windows only"
FBANK_PEERS = (
    Provider("reference (numpy)", peers.reference),
    Provider("asrfront", peers.asrfront, "asrfront", like_features, ASRFRONT_NOTE),
    Provider("lhotse", peers.lhotse, "lhotse"),
    Provider("torchaudio", peers.torchaudio, "torchaudio"),
    Provider("kaldi-native-fbank", peers.kaldi_native_fbank, "kaldi_native_fbank", like_features, "120 bins"),
    Provider("librosa", peers.librosa, "librosa", like_features, "no pre-emphasis, Hann window"),
    Provider("transformers", peers.transformers, "transformers", like_features, "whole windows only"),
)


def fbank_case(seconds: int, goals: dict[str, float]) -> Case:
    frames = 100 * seconds
    return Case(
        name=f"fbank-{seconds}s",
        area="frontend",
        what=f"log-mel of {seconds} s at 16 kHz: ({frames}, 128)",
        inputs=partial(speech, seconds),
        expected=features.reference,
        gate=same_features,
        providers=(Provider("clsp_fast", peers.clsp), *FBANK_PEERS),
        goals=goals,
        amount=seconds,
        unit="audio seconds",
        flops=frames * FRAME_FLOPS,
        bytes=4 * (RATE_HZ * seconds + frames * 128),
    )


def batch_case(threads: int, goals: dict[str, float], **settings: Any) -> Case:
    one_thread = Provider("clsp_fast, 1 thread", partial(peers.clsp_batch, threads=1))
    asrfront = partial(peers.asrfront_batch, threads=threads)
    return Case(
        name=f"fbank-batch-{threads}-thread{'s' * (threads > 1)}",
        area="frontend",
        what=f"log-mel of {CLIPS} clips of {SECONDS} s: ({CLIPS}, {FRAMES}, 128)",
        inputs=lambda: [speech(SECONDS, seed=i) for i in range(CLIPS)],
        expected=lambda waves: np.stack([features.reference(wave) for wave in waves]),
        gate=same_features,
        providers=(
            Provider("clsp_fast", partial(peers.clsp_batch, threads=threads)),
            *([one_thread] if threads > 1 else []),
            Provider("asrfront", asrfront, "asrfront", like_features, ASRFRONT_NOTE),
            Provider("lhotse", peers.lhotse_batch, "lhotse"),
            Provider("torchaudio", peers.torchaudio_batch, "torchaudio"),
        ),
        goals=goals,
        amount=CLIPS * SECONDS,
        unit="audio seconds",
        flops=CLIPS * FRAMES * FRAME_FLOPS,
        bytes=4 * CLIPS * (RATE_HZ * SECONDS + FRAMES * 128),
        threads=threads,
        **settings,
    )


def decode_case(kind: str, goals: dict[str, float]) -> Case:
    rounding = correlated(0.999) if kind == "mp3" else close(1 / 32767)
    others = [Provider("asrfront", peers.asrfront_decode, "asrfront", rounding, "rounds to 16 bits")]
    return Case(
        name=f"decode-{kind}",
        area="frontend",
        what=f"{kind} file of {SECONDS} s at 16 kHz to float32",
        inputs=partial(recording, kind, RATE_HZ, SECONDS),
        expected=lambda file: soundfile.read(file.path, dtype="float32")[0],
        # libsndfile rounds MP3 differently when it is read in blocks.
        gate=close(1e-7) if kind == "mp3" else equal,
        providers=(
            Provider("clsp_fast", peers.clsp_decode),
            Provider("soundfile", peers.soundfile_decode, "soundfile"),
            Provider("librosa", peers.librosa_decode, "librosa"),
            *([] if kind == "ogg" else others),
        ),
        goals=goals,
        amount=SECONDS,
        unit="audio seconds",
        bytes=4 * RATE_HZ * SECONDS,
    )


def resample_case(rate_hz: int, goals: dict[str, float]) -> Case:
    steeper = correlated(0.99)
    return Case(
        name=f"resample-{rate_hz / 1000:g}k",
        area="frontend",
        what=f"{SECONDS} s from {rate_hz} to 16000 Hz",
        inputs=lambda: Waveform(speech(SECONDS, rate_hz), rate_hz),
        expected=resampled,
        # At 44.1 kHz lhotse and torchaudio round the 160 phases to float32 before they compute the filter.
        gate=close(1e-5 if rate_hz == 44100 else 1e-6),
        providers=(
            Provider("clsp_fast", peers.clsp_resample),
            Provider("lhotse", peers.lhotse_resample, "lhotse"),
            Provider("torchaudio", peers.torchaudio_resample, "torchaudio"),
            Provider("soxr HQ", peers.soxr_resample, "soxr", steeper, "steeper filter"),
            Provider("librosa", peers.librosa_resample, "librosa", steeper, "soxr HQ inside"),
        ),
        goals=goals,
        amount=SECONDS,
        unit="audio seconds",
        bytes=4 * SECONDS * (rate_hz + RATE_HZ),
    )


def file_features(file: Recording) -> np.ndarray:
    """Features in float64 of samples that libsndfile decodes."""
    samples, rate_hz = soundfile.read(file.path)
    return features.reference(resampled(Waveform(samples, rate_hz)) if rate_hz != RATE_HZ else samples)


def file_case(kind: str, rate_hz: int, goals: dict[str, float]) -> Case:
    return Case(
        name=f"file-{rate_hz // 1000}k-{kind}",
        area="frontend",
        what=f"{kind} file of {SECONDS} s at {rate_hz} Hz to features: ({FRAMES}, 128)",
        inputs=partial(recording, kind, rate_hz, SECONDS),
        expected=file_features,
        gate=same_features,
        providers=(
            Provider("clsp_fast", peers.clsp_file),
            Provider("soundfile + lhotse", peers.recipe_file, "lhotse", note="the recipe's parts"),
            Provider("asrfront", peers.asrfront_file, "asrfront", like_features, ASRFRONT_NOTE),
        ),
        goals=goals,
        amount=SECONDS,
        unit="audio seconds",
        flops=FRAMES * FRAME_FLOPS,
        bytes=4 * FRAMES * 128,
    )


def recipe_batch(files: Recordings) -> np.ndarray:
    """The batch that lhotse makes: waveforms are padded with zeros, then feature rows with log(1e-10)."""
    waves = [soundfile.read(path)[0] for path in files.paths]
    longest, zero = max(map(len, waves)), features.FbankConfig(tail="zero")
    rows = [features.reference(wave, zero, padded_samples=longest) for wave in waves]
    frames = max(map(len, rows))
    value = features.PADDING_VALUE
    return np.stack([np.pad(r, ((0, frames - len(r)), (0, 0)), constant_values=value) for r in rows])


RECIPE_BATCH = Case(
    name="recipe-batch",
    area="frontend",
    what="a lhotse recipe's batch: 32 cuts of 4 to 10 s, WAV files, to a padded batch",
    inputs=partial(recordings, 32, 4.0, 10.0),
    expected=recipe_batch,
    gate=same_features,
    providers=(
        Provider("OnTheFlyFeatures(ClspFbank())", peers.clsp_on_the_fly, "lhotse"),
        Provider("OnTheFlyFeatures(Fbank(...))", peers.lhotse_on_the_fly, "lhotse"),
        Provider("features.extract_files", peers.clsp_files, note="without lhotse"),
    ),
    amount=32 * 7.0,
    unit="audio seconds",
    flops=32 * 700 * FRAME_FLOPS,
    bytes=4 * 32 * FRAMES * 128,
    memory=True,
)


# The goals of fbank-10s hold for processors with AVX-512.
CASES = (
    fbank_case(3, {}),
    fbank_case(10, {"asrfront": 2.0, "lhotse": 10.0, "torchaudio": 11.0, "kaldi-native-fbank": 35.0}),
    fbank_case(30, {}),
    batch_case(
        1,
        {"asrfront": 1.9, "lhotse": 40.0, "torchaudio": 10.0},
        memory=True,
        # The size of the output, and a tenth more.
        memory_goal=1.1 * 4 * CLIPS * FRAMES * 128,
    ),
    batch_case(2, {"clsp_fast, 1 thread": 1.8}),
    decode_case("s16", {"soundfile": 5.0}),
    decode_case("s24", {"soundfile": 10.0}),
    decode_case("s32", {"soundfile": 7.0}),
    decode_case("f32", {}),
    decode_case("flac", {"soundfile": 1.6}),
    decode_case("mp3", {}),
    decode_case("ogg", {}),
    resample_case(48000, {"torchaudio": 5.0, "soxr HQ": 2.0}),
    resample_case(44100, {"lhotse": 4.0}),
    resample_case(24000, {}),
    file_case("s16", 16000, {"soundfile + lhotse": 10.0, "asrfront": 1.7}),
    file_case("s24", 48000, {"soundfile + lhotse": 8.0}),
    file_case("s32", 48000, {"soundfile + lhotse": 8.0}),
    file_case("flac", 16000, {"soundfile + lhotse": 3.8}),
    RECIPE_BATCH,
)
