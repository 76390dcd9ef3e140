"""Our features as a lhotse extractor: `OnTheFlyFeatures(ClspFbank())` replaces lhotse's `Fbank`.

The values equal those of lhotse's `Fbank(FbankConfig(num_mel_bins=128))`, for single clips and for batches,
and are computed faster. Import this module before reading manifests that name the extractor. Needs the extra
`[lhotse]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clsp_fast import features
from clsp_fast.features import FbankConfig

try:
    from lhotse.features.base import FeatureExtractor, register_extractor
except ImportError as error:
    raise ImportError(f"clsp_fast.lhotse needs lhotse ({error}): pip install 'clsp_fast[lhotse]'") from error

_LEAST_ENERGY = 1e-10  # lhotse's EPSILON; lhotse pads features with its logarithm


@dataclass(frozen=True, kw_only=True)
class ClspFbankConfig:
    """Settings of the extractor. Only `tail` and `num_threads` can be chosen. The others are fixed; they are
    fields because lhotse reads them here and writes them into manifests."""

    tail: Literal["zero", "reflect"] = "zero"
    """How a clip of a batch continues after its end, for frames that reach past it. "zero": with zeros up to
    the longest clip, as in lhotse's batches. "reflect": with its mirror image, so that features do not depend
    on the batch. A single clip is always reflected."""
    num_threads: int | None = None
    """Threads for a batch; None: `audio.default_num_threads()`, which is 1 in a DataLoader worker."""
    sampling_rate: int = features.SAMPLE_RATE_HZ
    """In Hz; fixed."""
    num_filters: int = features.NUM_MEL_BINS
    """Mel bins; fixed."""
    frame_shift: float = features.HOP_SAMPLES / features.SAMPLE_RATE_HZ
    """In seconds; fixed."""

    def __post_init__(self) -> None:
        FbankConfig(tail=self.tail)
        for name in ("sampling_rate", "num_filters", "frame_shift"):
            value, fixed = getattr(self, name), getattr(ClspFbankConfig, name)
            if value != fixed:
                raise ValueError(f"{name} must be {fixed}, as in the training of CLSP, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary; `from_dict` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ClspFbankConfig:
        """The configuration from the result of `to_dict`."""
        return ClspFbankConfig(**data)


@register_extractor
class ClspFbank(FeatureExtractor):  # type: ignore[misc]
    """lhotse's interface to `features.extract`."""

    name = "clsp-fbank"
    config_type = ClspFbankConfig

    @property
    def frame_shift(self) -> float:
        """Seconds between frames."""
        return float(self.config.frame_shift)

    def feature_dim(self, sampling_rate: int) -> int:
        """Number of mel bins, 128."""
        return int(self.config.num_filters)

    def extract(self, samples: Any, sampling_rate: int) -> Any:
        """Features of one clip.

        Args:
            samples: floating (samples,) or (1, samples), numpy array or torch tensor.
            sampling_rate: 16000.

        Returns:
            (frames, 128) float32: a tensor for a tensor, an array for an array.

        Raises:
            AudioError: the clip has fewer than 80 samples.
            ValueError, TypeError: another rate, more than one channel, or no floating dtype.
        """
        self._check_rate(sampling_rate)
        values = features.extract(_mono(samples), num_threads=1).values[0]
        return values.to(samples.device) if isinstance(samples, torch.Tensor) else values.numpy()

    def extract_batch(self, samples: Any, sampling_rate: int, lengths: Any = None) -> Any:
        """Features of a batch, in one call of the extension.

        Args:
            samples: a list of clips, each as for `extract`; or a batch (B, samples) or (B, 1, samples); or
                one clip (samples,).
            sampling_rate: 16000.
            lengths: (B,), samples of each row of a padded torch batch; None: all rows are full.

        Returns:
            The same as lhotse's `Fbank`: (B, frames, 128) if all clips have the same number of frames,
            otherwise a list of (frames, 128) that share one buffer; an empty list for an empty batch;
            (frames, 128) for a single clip that is not in a list. Torch tensors if any clip is a tensor and
            `lengths` is None, else numpy arrays.

        Raises:
            AudioError, ValueError, TypeError: as `extract`.
            TypeError: `lengths` without a torch batch.
        """
        self._check_rate(sampling_rate)
        if lengths is not None and not isinstance(samples, torch.Tensor):
            raise TypeError(f"lengths need a padded torch batch, got {type(samples).__name__}")
        is_list = isinstance(samples, list | tuple)
        clips = list(samples) if is_list or samples.ndim > 1 else [samples]
        if not clips:
            return []
        waves = [_mono(clip) for clip in clips]
        frames = None
        if lengths is not None:
            sizes = [int(size) for size in lengths]
            frames = [features.frame_count(size) for size in sizes]
            if self.config.tail == "reflect":
                waves = [wave[:size] for wave, size in zip(waves, sizes, strict=True)]
        config = FbankConfig(tail=self.config.tail)
        batch = features.extract(waves, config=config, num_threads=self.config.num_threads)
        tensors = [clip for clip in clips if isinstance(clip, torch.Tensor)]
        as_torch = bool(tensors) and lengths is None
        values = batch.values.to(tensors[0].device) if as_torch else batch.values.numpy()
        frames = batch.lengths.tolist() if frames is None else frames
        if len(set(frames)) > 1 or (len(frames) == 1 and is_list):
            return [row[:count] for row, count in zip(values, frames, strict=True)]
        return values[0, : frames[0]] if len(frames) == 1 else values[:, : frames[0]]

    @staticmethod
    def mix(
        features_a: NDArray[np.float32], features_b: NDArray[np.float32], energy_scaling_factor_b: float
    ) -> NDArray[np.float32]:
        """Features of the sum of two signals. Their phases are assumed to be unrelated, so that their
        energies add up."""
        energy = np.exp(features_a) + energy_scaling_factor_b * np.exp(features_b)
        mixed: NDArray[np.float32] = np.log(np.maximum(energy, _LEAST_ENERGY))
        return mixed

    @staticmethod
    def compute_energy(features: NDArray[np.float32]) -> float:
        """Sum of the energies of all frames and bins."""
        return float(np.exp(features).sum(dtype=np.float64))

    @staticmethod
    def scale(features: NDArray[np.float32], energy_scaling_factor: float) -> NDArray[np.float32]:
        """Features of a signal after its energy is scaled by a factor."""
        return features + np.float32(np.log(energy_scaling_factor))

    def _check_rate(self, sampling_rate: int) -> None:
        if sampling_rate != self.config.sampling_rate:
            raise ValueError(
                f"sampling_rate must be {self.config.sampling_rate}, got {sampling_rate}: "
                f"use CutSet.resample({self.config.sampling_rate})"
            )


def _mono(samples: Any) -> Any:
    """(1, samples) as (samples,), without a copy. `features.extract` checks everything else."""
    if getattr(samples, "ndim", 0) == 2 and not isinstance(samples, Sequence):
        if samples.shape[0] != 1:
            raise ValueError(f"samples must have one channel, got shape {tuple(samples.shape)}")
        return samples[0]
    return samples
