"""The features: compared with the float64 reference and lhotse, for all inputs, batches and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from encoded_audio import by_soundfile, encode_samples, mono_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FEW, eps
from numpy.typing import NDArray
from sample_data import GOLDEN

from clsp_fast import _C, features
from clsp_fast.audio import AudioError, AudioErrorReason, AudioLimits, Segment
from clsp_fast.features import PADDING_VALUE, FbankConfig, extract, extract_files, reference

FRONTEND = GOLDEN / "frontend"
VOICES = ["speech_de-DE", "speech_en-GB", "speech_en-US"]
ZERO_TAIL = FbankConfig(tail="zero")
SILENCE = np.float32(-15.942385)
Wave = NDArray[np.float32]


def speech(name: str) -> Wave:
    return np.asarray(soundfile.read(FRONTEND / f"{name}.flac", dtype="float32")[0])


def band_limited(x: Wave, highest_hz: float) -> Wave:
    spectrum = np.fft.rfft(x.astype(np.float64))
    spectrum[np.fft.rfftfreq(len(x), 1 / 16000) > highest_hz] = 0
    return np.fft.irfft(spectrum, len(x)).astype(np.float32)


def through_codec(x: Wave, kind: str, subtype: str) -> Wave:
    return np.ascontiguousarray(by_soundfile(encode_samples(x, kind, subtype)))


VARIANTS: dict[str, Callable[[Wave], Wave]] = {
    "clean": lambda x: x,
    "quiet": lambda x: x * np.float32(0.01),
    "noisy": lambda x: x + 0.01 * mono_noise(len(x)),
    "telephone": lambda x: band_limited(x, 3400),
    "narrow": lambda x: band_limited(x, 4000),
    "mp3": lambda x: through_codec(x, "MP3", "MPEG_LAYER_III"),
    "vorbis": lambda x: through_codec(x, "OGG", "VORBIS"),
    "opus": lambda x: through_codec(x, "OGG", "OPUS"),
}


@pytest.fixture(scope="session")
def lhotse_fbank() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lhotse import Fbank
        from lhotse import FbankConfig as LhotseConfig

        return Fbank(LhotseConfig(num_mel_bins=128, sampling_rate=16000, dither=0.0, snip_edges=False))


def fbank(waves: list[Wave], isa: str = "auto", padded: int = 0, threads: int = 1) -> Wave:
    out = np.full((len(waves), max(_C.frame_count(len(w)) for w in waves), 128), np.nan, np.float32)
    _C.fbank_batch(waves, out, padded_size=padded, num_threads=threads, isa=isa)
    return out


def linear_error(values: Wave, truth: NDArray[np.float64]) -> float:
    """Largest error of an energy as a share of its frame's peak."""
    peak = np.exp(truth).max(axis=1, keepdims=True, initial=1e-30)
    error = np.abs(np.exp(values.astype(np.float64)) - np.exp(truth)) / peak
    return float(error.max(initial=0))


# Bound for the error of an energy, relative to the peak of its frame. A power is the square of a transform
# with log2(512) stages of samples that took some 10 operations; a logarithm of up to 16 is rounded once.
ENERGY_ROUNDING = (2 * (9 + 10) + 16 / 2) * eps(np.float32)


def test_tables_are_the_golden_ones() -> None:
    matrix = _C.mel_matrix()
    assert np.array_equal(matrix, np.load(FRONTEND / "mel_matrix.npy"))
    assert np.array_equal(_C.povey_window(), np.load(FRONTEND / "povey_window.npy"))
    assert np.count_nonzero(matrix) == 480
    assert matrix.sum(dtype=np.float64) == pytest.approx(240.0162866, abs=1e-7)
    assert not matrix[:, 1].any()


def test_reference_is_the_plain_formula() -> None:
    """One inner frame by hand, with the formula of the window instead of its table."""
    x = mono_noise(4000).astype(np.float64)
    z = x[160 * 7 - 120 :][:400]
    z = z - z.mean()
    z = z - 0.97 * np.r_[z[0], z[:-1]]
    z *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    angles = 2 * np.pi * np.outer(np.arange(257), np.arange(400)) / 512
    power = (np.cos(angles) @ z) ** 2 + (np.sin(angles) @ z) ** 2
    energy = power @ np.load(FRONTEND / "mel_matrix.npy").astype(np.float64)
    values = reference(x.astype(np.float32))[7]
    expected = np.log(np.maximum(energy, 2.0**-23))
    # The tables and samples of the reference are rounded to float32, which bounds the error relative to the
    # energy.
    assert np.abs(np.exp(values) - np.exp(expected)).max() <= ENERGY_ROUNDING * energy.max()


def rms(error: NDArray[np.float64]) -> float:
    return float(np.sqrt((error**2).mean()))


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("name", VOICES)
def test_error_on_speech(name: str, isa: str, lhotse_fbank: Any) -> None:
    waves = [np.ascontiguousarray(change(speech(name)), np.float32) for change in VARIANTS.values()]
    truths = [reference(x) for x in waves]
    lhotse_errors = [lhotse_fbank.extract(x, 16000) - truth for x, truth in zip(waves, truths, strict=True)]
    # The largest error of one recording is random, so it is compared with the largest over all variants.
    largest = max(np.abs(error).max() for error in lhotse_errors)
    rounding = FEW * 16 * eps(np.float32)  # of logarithms of up to 16
    for variant, x, truth, lhotse_error in zip(VARIANTS, waves, truths, lhotse_errors, strict=True):
        values = fbank([x], isa)[0]
        assert linear_error(values, truth) <= ENERGY_ROUNDING, variant
        assert np.abs(values - truth).max() <= 2 * largest + rounding, variant
        assert rms(values - truth) <= 2 * rms(lhotse_error) + rounding, variant


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_a_constant_offset_does_no_harm(isa: str) -> None:
    for name in VOICES:
        shifted = (speech(name) + np.float32(0.05)).astype(np.float32)
        assert linear_error(fbank([shifted], isa)[0], reference(shifted)) <= ENERGY_ROUNDING


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_every_length_and_both_tails(isa: str) -> None:
    for samples in range(642):
        x = mono_noise(samples, samples)
        padded = samples + samples % 250
        for config, size in ((FbankConfig(), 0), (ZERO_TAIL, padded)):
            truth = reference(x, config, padded_samples=padded)
            values = fbank([x], isa, size)[0]
            assert values.shape == truth.shape == ((samples + 80) // 160, 128)
            assert linear_error(values, truth) <= ENERGY_ROUNDING, (samples, config)


def test_zero_tail_is_the_recipes_padded_batch(lhotse_fbank: Any) -> None:
    """As in any padded batch, frames at the end of a clip that is nearly the longest see the mirrored end."""
    lengths = [16000, 15999, 15950, 15901, 15880, 15800, 9000, 400]
    waves = [mono_noise(n, n) for n in lengths]
    lhotse_values = lhotse_fbank.extract_batch([torch.from_numpy(w) for w in waves], 16000)
    result = extract(waves, config=ZERO_TAIL)
    for values, length, expected in zip(result.values, result.lengths, lhotse_values, strict=True):
        assert linear_error(values[:length].numpy(), expected.double().numpy()) <= ENERGY_ROUNDING
    assert not torch.allclose(result.values[2], extract(waves).values[2])


@pytest.mark.parametrize("tail", ["reflect", "zero"])
def test_one_clip_is_the_same_alone_and_in_any_batch(tail: Any) -> None:
    waves = [mono_noise(n, n) for n in (80, 400, 2559, 2560, 2561, 12345, 40000, 160000)]
    config = FbankConfig(tail=tail)
    batch = extract(waves, config=config, num_threads=2)
    assert torch.equal(batch.values, extract(waves, config=config, num_threads=1).values)
    for wave, values, length in zip(waves, batch.values, batch.lengths, strict=True):
        if tail == "zero":  # padded to the same length; this changes no other bit
            alone = torch.from_numpy(fbank([wave], padded=160000)[0])
        else:
            alone = extract(wave).values[0]
        assert torch.equal(alone, values[:length])
        assert (values[length:] == PADDING_VALUE).all()


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(80, 6000), min_size=1, max_size=9), threads=st.integers(2, 5))
def test_threads_do_not_change_a_bit(lengths: list[int], threads: int) -> None:
    # With a long clip, the batch is large enough for several threads.
    lengths = [*lengths, 320000]
    waves = [mono_noise(n, n) for n in lengths]
    one, many = extract(waves, num_threads=1), extract(waves, num_threads=threads)
    assert torch.equal(one.values, many.values)
    assert many.lengths.tolist() == [(n + 80) // 160 for n in lengths]
    assert many.kept.tolist() == list(range(len(lengths)))


@pytest.mark.parametrize("level", [0.0, 1e-3, 0.37, -0.9, 1.0])
@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_constant_input_is_silence(level: float, isa: str) -> None:
    assert (fbank([np.full(7000, level, np.float32)], isa) == SILENCE).all()


def test_silence_and_padding_stay_distinguishable() -> None:
    result = extract([np.zeros(16000, np.float32), mono_noise(32000)])
    assert (result.values[0, :100] == SILENCE).all()
    assert (result.values[0, 100:] == np.float32(PADDING_VALUE)).all()


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_exactly_the_frames_that_cover_a_bad_sample_are_nan(isa: str, bad: float) -> None:
    clean = mono_noise(16000)
    for position in (0, 119, 120, 3319, 3320, 3399, 3400, 3479, 3480, 15999):
        x = clean.copy()
        x[position] = bad
        frames = np.arange(100)[:, None] * 160 - 120 + np.arange(400)
        index = frames % 32000
        covers = (np.minimum(index, 31999 - index) == position).any(axis=1)
        values = fbank([x], isa)[0]
        assert np.isnan(values[covers]).all()
        assert np.array_equal(values[~covers], fbank([clean], isa)[0][~covers])


def test_instruction_sets_agree() -> None:
    x = speech("speech_en-US")
    values = [fbank([x], isa)[0] for isa in _C.instruction_sets()]
    for other in values[1:]:
        assert linear_error(other, values[0].astype(np.float64)) <= 2 * ENERGY_ROUNDING


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="isa must be 'auto' or one of instruction_sets"):
        fbank([mono_noise(400)], isa="sse9")


@pytest.mark.parametrize(
    "waves",
    [
        np.stack([mono_noise(4000, 1), mono_noise(4000, 2)]),
        torch.from_numpy(np.stack([mono_noise(4000, 1), mono_noise(4000, 2)])),
        [mono_noise(4000, 1), torch.from_numpy(mono_noise(4000, 2))],
        (mono_noise(4000, 1).astype(np.float64), mono_noise(8000, 2).repeat(2)[::4].copy()),
        [torch.from_numpy(mono_noise(4000, 1)).requires_grad_(), mono_noise(4000, 2)[::1]],
    ],
)
def test_arrays_tensors_and_lists_are_accepted(waves: Any) -> None:
    result = extract(waves)
    assert result.values.shape == (2, 25, 128)
    assert result.values.dtype == torch.float32
    assert result.lengths.dtype == torch.int64
    assert torch.equal(result.values[0], extract(mono_noise(4000, 1)).values[0])


@pytest.mark.parametrize(
    ("waves", "error", "message"),
    [
        ([np.zeros(400, np.int16)], TypeError, r"waveforms\[0\] must be floating point .* int16"),
        (
            [mono_noise(400), torch.zeros(400, dtype=torch.int32)],
            TypeError,
            r"waveforms\[1\] must be floating",
        ),
        (np.zeros((2, 1, 400), np.float32), ValueError, r"waveforms\[0\] must have shape \(samples,\)"),
        ([np.zeros((400, 2))], ValueError, r"got \(400, 2\); choose a channel"),
        (["a.wav"], TypeError, r"waveforms\[0\] must be a numpy array or torch tensor, got str"),
        ("a.wav", TypeError, "waveforms must be arrays or a sequence"),
    ],
)
def test_wrong_waveforms_are_named(waves: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extract(waves)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="tail must be 'reflect' or 'zero', got 'mirror'"):
        FbankConfig(tail="mirror")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be FbankConfig"):
        extract(mono_noise(400), config="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        extract(mono_noise(400), num_threads=0)
    with pytest.raises(ValueError, match="on_error must be"):
        extract_files([], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="paths must be a sequence of recordings, got str"):
        extract_files("a.wav")


def test_too_short_is_named() -> None:
    with pytest.raises(AudioError, match=r"waveforms\[1\]: has 79 samples") as caught:
        extract([mono_noise(80), mono_noise(79)])
    assert caught.value.reason is AudioErrorReason.TOO_SHORT


def test_an_error_shows_the_label_and_not_the_bytes() -> None:
    wav = encode_samples(np.zeros(40))
    result = extract_files([wav, Segment(wav)], limits=AudioLimits(min_s=0), on_error="skip")
    assert [error.path for _, error in result.errors] == ["<bytes>", "<bytes>"]
    assert [error.reason for _, error in result.errors] == [AudioErrorReason.TOO_SHORT] * 2


def test_out_is_written_in_place() -> None:
    out = torch.full((2, 40, 128), torch.nan)
    result = extract([mono_noise(4000), mono_noise(1000)], out=out)
    assert result.values is out
    assert torch.equal(out[:, :25], extract([mono_noise(4000), mono_noise(1000)]).values)
    assert (out[:, 25:] == PADDING_VALUE).all()
    for wrong in (torch.zeros(2, 24, 128), torch.zeros(1, 25, 128), torch.zeros(2, 25, 128).double()):
        with pytest.raises(ValueError, match=r"out must be contiguous float32 of shape \(2, >= 25, 128\)"):
            extract([mono_noise(4000), mono_noise(1000)], out=wrong)


def test_other_rates_are_resampled() -> None:
    x = mono_noise(44100)
    result = extract([x], sample_rate=44100)
    (resampled,) = _C.resample_batch([x], from_hz=44100, to_hz=16000)
    assert torch.equal(result.values, extract(resampled).values)


def test_empty_batches() -> None:
    assert extract([]).values.shape == (0, 0, 128)
    result = extract_files([b"", b"text"], on_error="skip")
    assert result.values.shape == (0, 0, 128)
    assert result.lengths.shape == result.kept.shape == (0,)
    assert [(i, error.reason.value) for i, error in result.errors] == [(0, "empty"), (1, "format")]


def test_files_in_mixed_formats(tmp_path: Path) -> None:
    x = speech("speech_en-US")
    paths: list[Any] = []
    for name, subtype in (("a.wav", "PCM_16"), ("b.flac", "PCM_16"), ("c.wav", "FLOAT"), ("d.ogg", "VORBIS")):
        soundfile.write(tmp_path / name, x, 16000, subtype=subtype)
        paths.append(tmp_path / name)
    (tmp_path / "bad.wav").write_bytes(b"RIFF....WAVE")
    paths.insert(1, tmp_path / "bad.wav")
    paths.append(Segment(tmp_path / "a.wav", start_s=0.5, duration_s=1.0))
    result = extract_files(paths, on_error="skip", num_threads=3)
    assert result.kept.tolist() == [0, 2, 3, 4, 5]
    assert [(i, e.path, e.reason.value) for i, e in result.errors] == [(1, str(paths[1]), "format")]
    frames = (len(x) + 80) // 160
    assert result.lengths.tolist() == [frames, frames, frames, frames, 100]
    exact = torch.from_numpy(fbank([x])[0])
    for clip in (0, 1, 2):
        assert torch.equal(result.values[clip], exact)
    assert torch.equal(result.values[4, :100], torch.from_numpy(fbank([x[8000:24000].copy()])[0]))
    assert torch.equal(result.values, extract_files(paths, on_error="skip", num_threads=1).values)
    with pytest.raises(AudioError, match=r"bad.wav: .* \[format\]"):
        extract_files(paths)


def test_zero_tail_of_files_uses_the_longest_good_one(tmp_path: Path) -> None:
    waves = [mono_noise(n, n) for n in (8000, 8090)]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
    result = extract_files([tmp_path / "0.wav", tmp_path / "1.wav", b""], config=ZERO_TAIL, on_error="skip")
    assert torch.equal(result.values, extract(waves, config=ZERO_TAIL).values)


# Only numpy, because the OpenMP team of torch does not survive a fork.
FORKED = """
import os, sys, numpy as np
from clsp_fast import audio, features
waves = [np.sin(np.arange(70000 + i, dtype=np.float32) * 0.1) for i in range(8)]
work = lambda: features.extract(waves, num_threads=4, sample_rate=22050).values.numpy()
before = work()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(work(), before) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or not np.array_equal(work(), before))
"""


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_works_after_fork() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=240, env=environment)


def test_the_identity_changes_with_the_settings() -> None:
    default = features.identity()
    assert len(default) == 64
    assert default == features.identity(features.FbankConfig())
    assert default != features.identity(features.FbankConfig(tail="zero"))
