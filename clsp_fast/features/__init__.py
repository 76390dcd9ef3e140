"""The CLSP log-mel features: waveforms or files -> (B, T, 128) and lengths, as the reference computes them.

16 kHz, 25 ms Povey windows every 10 ms, 128 mel bins from 20 to 7600 Hz, natural log: the features of
lhotse's `Fbank(FbankConfig(num_mel_bins=128))`. `python -m clsp_fast.features --check-parity` compares them
with lhotse's and torchaudio's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clsp_fast import _C, audio
from clsp_fast.audio import DEFAULT_LIMITS, AudioError, AudioErrorReason, AudioLimits, Source, Waveform

SAMPLE_RATE_HZ = 16000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
NUM_MEL_BINS = 128
PADDING_VALUE = -23.025850929940457  # log(1e-10); real silence is log(2^-23) = -15.942385
_MIN_SAMPLES = HOP_SAMPLES // 2
_ENERGY_FLOOR = 1.1920929e-07


@dataclass(frozen=True, kw_only=True)
class FbankConfig:
    """How clips are framed. Everything else is fixed, because the published models were trained with it."""

    tail: Literal["reflect", "zero"] = "reflect"
    """How a clip continues after its last sample, for frames that reach past it. "reflect": with its mirror
    image, as in the reference's inference. "zero": with zeros up to the length of the batch's longest clip,
    then with the mirror image of clip and zeros, as in the reference's training."""

    def __post_init__(self) -> None:
        if self.tail not in ("reflect", "zero"):
            raise ValueError(f"tail must be 'reflect' or 'zero', got {self.tail!r}")


CLSP_FBANK = FbankConfig()


def frame_count(samples: int) -> int:
    """Number of frames of a clip at 16 kHz: floor((samples + 80) / 160)."""
    return _C.frame_count(samples)


def identity(config: FbankConfig = CLSP_FBANK) -> str:
    """SHA-256 of the settings that determine the values of the features."""
    window = (WINDOW_SAMPLES, HOP_SAMPLES, "povey", "preemphasis 0.97")
    mel = (NUM_MEL_BINS, "20 to 7600 Hz", "log power", _ENERGY_FLOOR)
    settings = (SAMPLE_RATE_HZ, "sinc_interp_hann", window, mel, config.tail)
    return hashlib.sha256(repr(settings).encode()).hexdigest()


@dataclass(frozen=True)
class Features:
    """A padded batch of features."""

    values: torch.Tensor
    """(B, T, 128) float32, natural log; `PADDING_VALUE` after each clip's last frame."""
    lengths: torch.Tensor
    """(B,) int64, frames of each clip."""
    kept: torch.Tensor
    """(B,) int64: for each clip of the batch, its position in the input."""
    errors: tuple[tuple[int, AudioError], ...] = ()
    """(position in the input, error) of each clip that was left out."""


def extract(
    waveforms: Any,
    *,
    config: FbankConfig = CLSP_FBANK,
    num_threads: int | None = None,
    sample_rate: int | None = None,
    out: torch.Tensor | None = None,
) -> Features:
    """Computes the features of waveforms.

    Args:
        waveforms: one waveform (samples,), a batch (B, samples), or a sequence of waveforms of any lengths;
            numpy arrays or torch tensors of a floating dtype, mono, in [-1, 1].
        config: how clips are framed.
        num_threads: how many threads; None: `audio.default_num_threads()`. The results do not depend on it.
        sample_rate: rate of the waveforms in Hz; None: 16000. Other rates are resampled.
        out: (B, at least T, 128) float32, contiguous, on the CPU. It is written and returned as `values`.
            None: a new batch, page-locked if CUDA is in use.

    Returns:
        `Features`; T = floor((samples + 80) / 160) of the longest clip. A frame is NaN exactly if it covers a
        NaN sample.

    Raises:
        AudioError: a clip has less than 80 samples at 16 kHz (reason too_short).
        ValueError, TypeError: an argument is wrong.
    """
    samples = _as_waveforms(waveforms)
    num_threads = audio.check_num_threads(num_threads)
    if sample_rate is not None and sample_rate != SAMPLE_RATE_HZ:
        samples = _C.resample_batch(
            samples, from_hz=sample_rate, to_hz=SAMPLE_RATE_HZ, num_threads=num_threads
        )
    for i, item in enumerate(samples):
        if len(item) < _MIN_SAMPLES:
            raise _too_short(f"waveforms[{i}]", len(item))
    return _fbank(samples, config, num_threads, out, range(len(samples)), ())


def extract_files(
    paths: Sequence[Source],
    *,
    config: FbankConfig = CLSP_FBANK,
    num_threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    limits: AudioLimits = DEFAULT_LIMITS,
    out: torch.Tensor | None = None,
) -> Features:
    """Decodes and resamples recordings and computes their features, in threads and without the GIL.

    Args:
        paths: paths, bytes of files, binary file objects, or `audio.Segment` of these.
        config: how clips are framed.
        num_threads: how many threads; None: `audio.default_num_threads()`. The results do not depend on it.
        on_error: "raise" the first error, or "skip" recordings that cannot be used and list them in `errors`.
        limits: recordings outside them are refused.
        out: as for `extract`.

    Returns:
        `Features` of the usable recordings, in order; `values` is (0, 0, 128) if there are none.

    Raises:
        AudioError: a recording cannot be used, and `on_error` is "raise".
        ValueError, TypeError: an argument is wrong.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if isinstance(paths, str | bytes) or not isinstance(paths, Sequence):
        raise TypeError(
            f"paths must be a sequence of recordings, got {type(paths).__name__}; put one in a list"
        )
    num_threads = audio.check_num_threads(num_threads)
    loaded = audio.load_batch(paths, sample_rate=SAMPLE_RATE_HZ, limits=limits, num_threads=num_threads)
    samples: list[Waveform] = []
    kept: list[int] = []
    errors: list[tuple[int, AudioError]] = []
    for i, item in enumerate(loaded):
        if not isinstance(item, AudioError) and len(item) < _MIN_SAMPLES:
            item = _too_short(audio.label(paths[i]), len(item))
        if not isinstance(item, AudioError):
            samples.append(item)
            kept.append(i)
        elif on_error == "raise":
            raise item
        else:
            errors.append((i, item))
    return _fbank(samples, config, num_threads, out, kept, tuple(errors))


def reference(
    waveform: Waveform, config: FbankConfig = CLSP_FBANK, *, padded_samples: int | None = None
) -> NDArray[np.float64]:
    """Computes the features of one clip in float64 numpy. The tests compare `extract` with it.

    Args:
        waveform: (samples,) at 16 kHz.
        config: how the clip is framed.
        padded_samples: length of the batch's longest clip; used with tail="zero".

    Returns:
        (T, 128) float64.
    """
    x = np.asarray(waveform, np.float64)
    size = max(len(x), padded_samples or 0) if config.tail == "zero" else len(x)
    frames = frame_count(len(x))
    starts = HOP_SAMPLES * np.arange(frames)[:, None] - (WINDOW_SAMPLES - HOP_SAMPLES) // 2
    index = (starts + np.arange(WINDOW_SAMPLES)) % max(2 * size, 1)
    z = np.pad(x, (0, size - len(x)))[np.minimum(index, 2 * size - 1 - index)]
    z = z - z.mean(axis=1, keepdims=True)
    z = z - 0.97 * np.concatenate([z[:, :1], z[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(z * _C.povey_window().astype(np.float64), 512)) ** 2
    energy: NDArray[np.float64] = power @ _C.mel_matrix().astype(np.float64)
    return np.log(np.maximum(energy, _ENERGY_FLOOR))


def _too_short(label: str, samples: int) -> AudioError:
    detail = f"has {samples} samples at 16 kHz, but one frame needs {_MIN_SAMPLES}"
    return AudioError(label, AudioErrorReason.TOO_SHORT, detail)


def _as_waveforms(waveforms: Any) -> list[Waveform]:
    if hasattr(waveforms, "ndim") and waveforms.ndim == 2:
        waveforms = list(waveforms)
    elif hasattr(waveforms, "ndim"):
        waveforms = [waveforms]
    if not isinstance(waveforms, Sequence) or isinstance(waveforms, str | bytes):
        raise TypeError(f"waveforms must be arrays or a sequence of arrays, got {type(waveforms).__name__}")
    return [audio.as_waveform(item, f"waveforms[{i}]") for i, item in enumerate(waveforms)]


def _fbank(
    samples: Sequence[Waveform],
    config: FbankConfig,
    num_threads: int,
    out: torch.Tensor | None,
    kept: Sequence[int],
    errors: tuple[tuple[int, AudioError], ...],
) -> Features:
    if not isinstance(config, FbankConfig):
        raise TypeError(f"config must be FbankConfig, got {type(config).__name__}")
    sizes = [len(item) for item in samples]
    longest = max(sizes, default=0)
    shape = (len(samples), frame_count(longest), NUM_MEL_BINS)
    if out is None:
        out = _new_batch(shape)
    else:
        _check_out(out, shape)
    padded = longest if config.tail == "zero" else 0
    _C.fbank_batch(samples, out.numpy(), padded_size=padded, num_threads=num_threads)
    lengths = torch.tensor([frame_count(size) for size in sizes], dtype=torch.int64)
    return Features(out, lengths, torch.from_numpy(np.array(kept, np.int64)), errors)


def _new_batch(shape: tuple[int, int, int]) -> torch.Tensor:
    """Uninitialised memory. It is page-locked if CUDA is in use, so that it can be copied to the GPU during
    other work."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.empty(shape, dtype=torch.float32, pin_memory=True)
    # numpy asks the system for huge pages, torch does not. With small pages, the first write to this memory
    # would take as long as the computation of the features.
    return torch.from_numpy(np.empty(shape, np.float32))


def _check_out(out: torch.Tensor, shape: tuple[int, int, int]) -> None:
    fits = (
        out.ndim == 3 and out.shape[0] == shape[0] and out.shape[1] >= shape[1] and out.shape[2] == shape[2]
    )
    usable = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
    if not fits or not usable or out.requires_grad:
        raise ValueError(
            f"out must be contiguous float32 of shape ({shape[0]}, >= {shape[1]}, {shape[2]}) on the CPU "
            f"without gradient, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
