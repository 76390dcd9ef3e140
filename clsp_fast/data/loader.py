"""From clips to batches. The batch of a step is a pure function of (seed, step, rank, world)."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clsp_fast import audio
from clsp_fast.audio import AudioError, AudioLimits, Segment, default_num_threads
from clsp_fast.config import DataConfig
from clsp_fast.data import captions as caption_sampling
from clsp_fast.data.augment import augment
from clsp_fast.data.clips import Clip
from clsp_fast.data.sampler import BatchPlan
from clsp_fast.features import NUM_MEL_BINS, PADDING_VALUE, FbankConfig, extract_files

_STREAM_AUGMENT = 21
_SPARE_ATTEMPTS = 20
_TOLERATED_BAD_CLIPS = 10
_MIN_CLIP_S = 0.1  # nine frames, the fewest that the model accepts

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Captions -> token_ids and attention_mask, both int64 (N, L)."""


class DataError(RuntimeError):
    """The data cannot be used for training; the message says why."""


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step.

    Attributes:
        step: step of the run.
        ids: ids of the B clips; empty if no clip was readable.
        features: float32 (B, T, 128), padded with log(1e-10).
        lengths: int64 (B,), frames.
        token_ids: int64 (N, L), N = B in stage 1 and 2 B in stage 2 (first captions, then second captions).
        attention_mask: int64 (N, L), 1 for tokens.
        text_owner: int64 (N,), the clip that each caption describes.
        seconds: audio in the batch, without padding.
        bad: unreadable clips, planned for this batch or tried as replacements: id -> reason.
    """

    step: int
    ids: list[str]
    features: Tensor
    lengths: Tensor
    token_ids: Tensor
    attention_mask: Tensor
    text_owner: Tensor
    seconds: float
    bad: dict[str, str] = field(default_factory=dict)


class ClipFeatures:
    """Log-mel features of clips. A cache in memory keeps the features of as many clips as fit.

    Args:
        config: threads, limits and size of the cache.

    Attributes:
        bad: the unreadable clips so far: id -> reason.
        details: the same clips: id -> error message with the path.
    """

    def __init__(self, config: DataConfig) -> None:
        self.bad: dict[str, str] = {}
        self.details: dict[str, str] = {}
        self._fbank = FbankConfig(tail=config.tail)
        self._limits = AudioLimits(
            min_s=_MIN_CLIP_S, max_s=config.max_seconds + 1, slack_s=config.slack_seconds
        )
        self._threads = config.threads or default_num_threads()
        # With tail="zero" a clip's last frame depends on its batch, so the cache stays empty.
        self._cache_bytes_left = config.cache_mb << 20 if config.tail == "reflect" else 0
        self._cache: dict[str, Tensor] = {}

    def read(self, clips: Sequence[Clip]) -> list[Tensor | None]:
        """Features of each clip, float32 (T, 128). An unreadable clip gives None and an entry in `bad`."""
        features = [self._cache.get(clip.id) for clip in clips]
        missing = [i for i, values in enumerate(features) if values is None and clips[i].id not in self.bad]
        if not missing:
            return features
        result = extract_files(
            [segment(clips[i]) for i in missing],
            config=self._fbank,
            num_threads=self._threads,
            on_error="skip",
            limits=self._limits,
        )
        for failed, error in result.errors:
            clip_id = clips[missing[failed]].id
            self.bad[clip_id], self.details[clip_id] = error.reason.value, str(error)
        for row, kept in enumerate(result.kept.tolist()):
            values = result.values[row, : int(result.lengths[row])]
            features[missing[kept]] = self._cached(clips[missing[kept]].id, values)
        return features

    def _cached(self, clip_id: str, values: Tensor) -> Tensor:
        """The values, copied into the cache if they fit."""
        size = values.numel() * values.element_size()
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[clip_id] = values = torch.from_numpy(values.numpy().copy())
        return values


class Loader:
    """The batches of a training run.

    Args:
        clips: training clips; those outside the duration limits are left out.
        encode: captions -> tokens.
        config: batches, buckets, augmentation, limits.
        seed: seed of the run.
        stage1_steps: steps before stage 2 begins.
        rank: number of this process.
        world: number of processes.
        device: where the batches are used; for a CUDA device they are in page-locked memory.

    Attributes:
        plan: which clips are in the batch of each step.
        left_out: reason -> number of clips that are left out.

    Raises:
        DataError: fewer clips than ranks are left.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        encode: Encode,
        config: DataConfig,
        *,
        seed: int,
        stage1_steps: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.clips, seconds, self.left_out = usable(clips, config)
        if len(self.clips) < world:
            raise DataError(
                f"{len(self.clips)} usable clips for {world} ranks; left out: {dict(self.left_out)}"
            )
        self._encode, self._config, self._seed = encode, config, seed
        self._stage1_steps, self._rank = stage1_steps, rank
        self._pin = device is not None and device.type == "cuda"
        self._features = ClipFeatures(config)
        self.plan = BatchPlan(
            durations_s=np.array(seconds),
            batch_seconds=config.batch_seconds,
            batch_clips=config.batch_clips,
            buckets=config.buckets,
            seed=seed,
            world=world,
        )

    @property
    def bad(self) -> dict[str, str]:
        """Clips that this rank could not read so far, including batches prepared ahead: id -> reason."""
        return self._features.bad

    @cached_property
    def _digest(self) -> str:
        """A hash of the clips and of how they are put into batches."""
        digest = hashlib.blake2b(self.plan.digest.encode(), digest_size=16)
        for clip in self.clips:
            digest.update(clip.id.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """What `resume` needs, as plain JSON values."""
        return {"start": self.plan.start, "digest": self._digest, "world": self.plan.world}

    def resume(self, step: int, state: Mapping[str, Any]) -> bool:
        """Continues a run with step `step`, given the `state` that was saved.

        If the number of ranks, the clips or the batches have changed, it is unknown which clips of the epoch
        are still unused. Then a new epoch begins.

        Returns:
            Whether a new epoch begins with this step.
        """
        changed = bool(state["digest"] != self._digest)
        start = step if changed else int(state["start"])
        if start != self.plan.start:
            self.plan = replace(self.plan, start=start)
        return changed

    def batches(self, first_step: int, stop: int) -> Iterator[Batch]:
        """Batches of steps first_step .. stop-1, prepared ahead in a background thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="clsp-loader") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in range(first_step, stop):
                    ahead.append(pool.submit(self.batch, step))
                    if len(ahead) > self._config.prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        clips, features, bad = self._read(step)
        lengths_B = torch.tensor([len(values) for values in features], dtype=torch.int64)
        features_BTF = collate(features)
        seed = (self._seed, _STREAM_AUGMENT, step, self._rank)
        features_BTF = augment(features_BTF, lengths_B, strength=self._config.augment, seed=seed)
        texts = self._captions(clips, step)
        token_ids_NL, attention_mask_NL = self._encode([text for column in texts for text in column])
        batch = Batch(
            step=step,
            ids=[clip.id for clip in clips],
            features=features_BTF,
            lengths=lengths_B,
            token_ids=token_ids_NL,
            attention_mask=attention_mask_NL,
            text_owner=torch.arange(len(clips)).repeat(len(texts)),
            seconds=float(lengths_B.sum()) * 0.01,
            bad=bad,
        )
        return _page_locked(batch) if self._pin else batch

    def check_bad(self, bad: Mapping[str, str]) -> None:
        """Raises DataError, with a list, if `bad`, the unreadable clips of all ranks, has too many clips."""
        if self._too_many(bad):
            raise DataError(
                f"{len(bad)} of {len(self.clips)} clips cannot be read, more than data.max_bad_share "
                f"{self._config.max_bad_share} allows; {bad_list(bad)}"
            )

    def _too_many(self, bad: Mapping[str, str]) -> bool:
        return len(bad) > max(_TOLERATED_BAD_CLIPS, self._config.max_bad_share * len(self.clips))

    def _captions(self, clips: Sequence[Clip], step: int) -> list[list[str]]:
        captions, ids = [clip.captions for clip in clips], [_number(clip.id) for clip in clips]
        if step < self._stage1_steps:
            return caption_sampling.stage1(captions, ids, seed=self._seed, step=step)
        return caption_sampling.stage2(captions, ids, seed=self._seed, step=step - self._stage1_steps)

    def _read(self, step: int) -> tuple[list[Clip], list[Tensor], dict[str, str]]:
        """Clips, features and unreadable clips of a step. Other clips replace the unreadable ones. If no
        readable replacement is found, the batch has fewer clips."""
        ids = self.plan.batch(step, self._rank).tolist()
        taken = {int(i) for rank in range(self.plan.world) for i in self.plan.batch(step, rank)}
        good: list[tuple[Clip, Tensor]] = []
        bad: dict[str, str] = {}
        for planned, values in zip(ids, self._features.read([self.clips[i] for i in ids]), strict=True):
            clip, attempt = self.clips[planned], 0
            while values is None:
                bad[clip.id] = self.bad[clip.id]
                # If this rank alone has too many bad clips, the run ends before this step: none is replaced.
                if attempt == _SPARE_ATTEMPTS or self._too_many(self.bad):
                    break
                spare = self.plan.spare(step, self._rank, planned, attempt)
                attempt += 1
                if spare not in taken:
                    taken.add(spare)
                    clip = self.clips[spare]
                    values = self._features.read([clip])[0]
            else:
                good.append((clip, values))
        return [clip for clip, _ in good], [values for _, values in good], bad


def bad_list(bad: Mapping[str, str]) -> str:
    """The number of unreadable clips by reason, and the names of the first ones."""
    shown = [f"{clip_id} ({reason})" for clip_id, reason in sorted(bad.items())[:20]]
    return f"{dict(Counter(bad.values()))}: {', '.join(shown)}{', ...' if len(bad) > 20 else ''}"


def _page_locked(batch: Batch) -> Batch:
    """Copies the batch to page-locked memory, from which the GPU copies it while this process continues.

    This code is numpy for the reason that augment.py gives.
    """
    copies: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            copies[name] = torch.empty_like(value, pin_memory=True)
            np.copyto(copies[name].numpy(), value.numpy())
    return replace(batch, **copies)


def collate(features: Sequence[Tensor]) -> Tensor:
    """Features (T, 128) of several clips, padded to the longest: float32 (B, T, 128).

    This code is numpy for the reason that augment.py gives.
    """
    longest = max((len(values) for values in features), default=0)
    batch = np.full((len(features), longest, NUM_MEL_BINS), PADDING_VALUE, np.float32)
    for row, values in zip(batch, features, strict=True):
        row[: len(values)] = values.numpy()
    return torch.from_numpy(batch)


def segment(clip: Clip) -> Segment:
    """The part of a file that the frontend reads for a clip."""
    return Segment(clip.audio, start_s=clip.start_s, duration_s=clip.duration_s, channel=clip.channel)


def usable(clips: Sequence[Clip], config: DataConfig) -> tuple[list[Clip], list[float], Counter[str]]:
    """The clips within the duration limits, their seconds, and the number of the other clips by reason.

    If the manifest gives no duration, it is taken from the file's header. If the header gives none either,
    data.max_seconds is assumed. A header may be wrong, so these durations only select clips and plan batches:
    reading takes the whole file.
    """
    with ThreadPoolExecutor(config.threads or default_num_threads()) as pool:
        durations_s = list(pool.map(lambda clip: _seconds(clip, config), clips))
    kept: list[Clip] = []
    seconds: list[float] = []
    left_out: Counter[str] = Counter()
    for clip, duration_s in zip(clips, durations_s, strict=True):
        if duration_s < config.min_seconds:
            left_out["too_short"] += 1
        elif duration_s > config.max_seconds:
            left_out["too_long"] += 1
        else:
            kept.append(clip)
            seconds.append(duration_s)
    return kept, seconds, left_out


def _seconds(clip: Clip, config: DataConfig) -> float:
    if clip.duration_s is not None:
        return clip.duration_s
    try:
        header = audio.info(clip.audio)
    except AudioError:  # the error is reported when the clip is read
        return config.max_seconds
    if header.frames is None or header.sample_rate_hz < 1:
        return config.max_seconds
    seconds = header.frames / header.sample_rate_hz - clip.start_s
    return seconds if header.exact else min(max(seconds, config.min_seconds), config.max_seconds)


def _number(text: str) -> int:
    """A stable non-negative integer for a clip's id; Python's `hash` differs from run to run."""
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
