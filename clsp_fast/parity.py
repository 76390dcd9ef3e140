"""`python -m clsp_fast.features --check-parity`: compares our features with lhotse's and torchaudio's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from clsp_fast.audio import Waveform
from clsp_fast.features import NUM_MEL_BINS, SAMPLE_RATE_HZ, FbankConfig, extract, frame_count, reference

Tail: TypeAlias = Literal["reflect", "zero"]
TAILS: tuple[Tail, ...] = ("reflect", "zero")
_Frames: TypeAlias = NDArray[np.float32]
_DIFFERS = "DIFFERS"


def check() -> int:
    """Compares our features, lhotse's and torchaudio's with the float64 reference, on speech-like clips.

    Prints a table and a verdict. A library that is not installed or cannot be imported is named. It does not
    count as a difference.

    Returns:
        The exit code: 1 if any library differs by more than the rounding of float32.
    """
    clips = _voices()
    print(f"{'against float64':16s} {'tail':8s} {'max':>10s} {'rms':>10s} {'energy / peak':>14s}")
    verdicts = {"clsp_fast": _verdict("clsp_fast", _clsp_fast, clips)}
    for name, compute in (("lhotse", _lhotse), ("torchaudio", _torchaudio)):
        try:
            verdicts[name] = _verdict(name, compute, clips)
        except ImportError as error:
            verdicts[name] = f"is not installed ({error})"
        except (OSError, RuntimeError, AttributeError) as error:  # often it was built for another torch
            verdicts[name] = f"is broken here ({error!r})"
    print("; ".join(f"{name} {verdict}" for name, verdict in verdicts.items()))
    return int(_DIFFERS in verdicts.values())


def _verdict(
    name: str, compute: Callable[[list[Waveform], Tail], list[_Frames]], clips: list[Waveform]
) -> str:
    agree = [_print_line(name, tail, clips, compute(clips, tail)) for tail in TAILS]
    return "agrees" if all(agree) else _DIFFERS


def _voices() -> list[Waveform]:
    """Three speech-like clips: a voice of varying pitch with noise, a hiss, a voice with digital silence."""
    rng = np.random.default_rng(0)
    time_s = np.arange(5 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    phase = 2 * np.pi * np.cumsum(130 + 40 * np.sin(3 * time_s)) / SAMPLE_RATE_HZ
    harmonics = np.arange(1, 40)
    voiced = 0.08 * np.sin(9 * time_s) ** 2 * (np.sin(phase[:, None] * harmonics) @ (1 / harmonics))
    hiss = rng.standard_normal(len(time_s))
    clips = [voiced + 0.002 * hiss, (0.05 * np.sin(9 * time_s) ** 2 * hiss)[:36010], voiced[:17000].copy()]
    clips[2][6000:9000] = 0
    return [clip.astype(np.float32) for clip in clips]


def _lhotse(clips: list[Waveform], tail: Tail) -> list[_Frames]:
    from lhotse import Fbank
    from lhotse import FbankConfig as LhotseConfig

    extractor = Fbank(LhotseConfig(num_mel_bins=NUM_MEL_BINS))
    if tail == "reflect":
        return [extractor.extract(clip, SAMPLE_RATE_HZ) for clip in clips]
    return list(extractor.extract_batch(clips, SAMPLE_RATE_HZ))


def _torchaudio(clips: list[Waveform], tail: Tail) -> list[_Frames]:
    from torchaudio.compliance import kaldi

    longest = max(map(len, clips)) if tail == "zero" else 0
    features = []
    for clip in clips:
        padded = torch.from_numpy(np.pad(clip, (0, max(0, longest - len(clip)))))[None]
        settings = {"num_mel_bins": NUM_MEL_BINS, "high_freq": -400.0, "snip_edges": False, "dither": 0.0}
        values = kaldi.fbank(padded, sample_frequency=SAMPLE_RATE_HZ, **settings)
        features.append(values[: frame_count(len(clip))].numpy())
    return features


def _clsp_fast(clips: list[Waveform], tail: Tail) -> list[_Frames]:
    batch = extract(clips, config=FbankConfig(tail=tail))
    return [row[:n].numpy() for row, n in zip(batch.values, batch.lengths.tolist(), strict=True)]


def _print_line(name: str, tail: Tail, clips: list[Waveform], features: list[_Frames]) -> bool:
    """Prints a line of the table. Returns whether the features equal the reference up to float32's
    rounding."""
    longest, config = max(map(len, clips)), FbankConfig(tail=tail)
    truths = [reference(clip, config, padded_samples=longest) for clip in clips]
    shapes, expected = [x.shape for x in features], [x.shape for x in truths]
    if shapes != expected:
        print(f"{name:16s} {tail:8s} shapes {shapes}, expected {expected}")
        return False
    truth, values = np.concatenate(truths), np.concatenate(features).astype(np.float64)
    worst, rms = float(np.abs(values - truth).max()), float(np.sqrt(((values - truth) ** 2).mean()))
    peak = np.exp(truth).max(axis=1, keepdims=True)
    energy = float((np.abs(np.exp(values) - np.exp(truth)) / peak).max())
    print(f"{name:16s} {tail:8s} {worst:10.2e} {rms:10.2e} {energy:14.2e}")
    # float32 rounds to about 1e-6 of a frame's peak. In quiet bins that changes the logarithm by a few 1e-3.
    return worst <= 5e-3 and rms <= 1e-4 and energy <= 1e-5
