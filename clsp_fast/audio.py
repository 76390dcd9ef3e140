"""Loads recordings as finite mono float32 at the model's rate. `AudioError` says why one cannot be used.

The extension decodes WAV and FLAC files in threads, without the GIL, and reads only the bytes of the
requested part. libsndfile decodes all other formats, in blocks of fixed size: a wrong length in a header
cannot make it allocate much memory. Resampling uses the reference's filter (torchaudio's `sinc_interp_hann`:
width 6, rolloff 0.99), because the model was trained with it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from clsp_fast import _C, sndfile

_NOT_ENCODABLE = "cannot be the name of a file: it contains half a surrogate pair, which is no character"

Waveform: TypeAlias = NDArray[np.float32]
Source: TypeAlias = Any
"""A path, the bytes of a file, a binary file object, a waveform (samples,) as array or tensor, or a
`Segment`."""


class AudioErrorReason(str, Enum):
    """Why a recording cannot be used. The names are fixed, so that skipped recordings can be counted."""

    OPEN = "open"  # missing, not readable, not a regular file
    EMPTY = "empty"  # no bytes or no samples
    FORMAT = "format"  # not audio, an unsupported encoding, or a damaged header
    CHANNELS = "channels"  # too many, or the requested one is missing
    RATE = "rate"  # sample rate outside the limits
    SEGMENT = "segment"  # the requested part starts after the end
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    TRUNCATED = "truncated"  # shorter than its header states, or than the requested part needs
    NON_FINITE = "non_finite"  # NaN or infinity among the samples
    AMPLITUDE = "amplitude"  # samples far outside [-1, 1]
    MEMORY = "memory"

    def __str__(self) -> str:
        return self.value


class AudioError(Exception):
    """A recording that cannot be used.

    Attributes:
        path: the file, or a description of the source if it is not a file.
        reason: one of `AudioErrorReason`.
        detail: the reason in words, with the fix if there is one.
    """

    def __init__(self, path: str, reason: AudioErrorReason | str, detail: str) -> None:
        self.path = path
        self.reason = AudioErrorReason(reason)
        self.detail = detail
        super().__init__(path, self.reason, detail)  # unpickling passes these arguments

    def __str__(self) -> str:
        return f"{self.path}: {self.detail} [{self.reason}]"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class AudioLimits:
    """Recordings outside these limits are refused. The defaults are generous, yet bound memory and time."""

    min_s: float = 0.005
    """Shortest loaded part, in seconds; 5 ms is one frame of features."""
    max_s: float = 3600.0
    """Longest loaded part, in seconds; the file may be longer."""
    min_rate_hz: int = 1000
    """Lowest sample rate in Hz."""
    max_rate_hz: int = 192_000
    """Highest sample rate in Hz."""
    max_channels: int = 64
    """Largest number of channels."""
    max_amplitude: float = 16.0
    """Largest absolute sample. Full scale is 1; far larger samples show that the scale is wrong."""
    slack_s: float = 0.1
    """A segment may reach this many seconds past the end; if it reaches further, it counts as truncated."""

    def __post_init__(self) -> None:
        got = f"got {self}"
        _require(0 <= self.min_s < self.max_s < math.inf, f"need 0 <= min_s < max_s, {got}")
        _require(1 <= self.min_rate_hz <= self.max_rate_hz <= 10**6, f"need 1 <= rates <= 10^6, {got}")
        _require(1 <= self.max_channels <= 1024, f"need 1 <= max_channels <= 1024, {got}")
        # A larger limit is infinite as a float32, and would refuse nothing.
        _require(0 < self.max_amplitude <= 3.4e38, f"need 0 < max_amplitude <= 3.4e38, {got}")
        _require(0 <= self.slack_s < math.inf, f"need slack_s >= 0, {got}")


DEFAULT_LIMITS = AudioLimits()


@dataclass(frozen=True)
class Segment:
    """A part of a recording. It is accepted wherever a recording is accepted."""

    source: Source
    """A path, bytes, file object or waveform."""
    start_s: float = 0.0
    """Start in seconds."""
    duration_s: float | None = None
    """Length in seconds; None: up to the end."""
    channel: int | None = None
    """Channel, counted from 0; None: the mean over channels."""

    def __post_init__(self) -> None:
        start, duration, channel = self.start_s, self.duration_s, self.channel
        _require(not isinstance(self.source, Segment), "source must not be a Segment itself")
        _require(0 <= start < math.inf, f"start_s must be finite and >= 0, got {start}")
        valid = duration is None or 0 < duration < math.inf
        _require(valid, f"duration_s must be None or finite and > 0, got {duration}")
        valid = channel is None or 0 <= operator.index(channel) < 1 << 31
        _require(valid, f"channel must be None or >= 0, got {channel}")


@dataclass(frozen=True)
class _Request:
    """A source of a checked type, and the part to load."""

    data: Any
    """A path (str), a buffer, or a waveform."""
    segment: Segment
    label: str
    rate_hz: int | None = None
    """Sample rate of a waveform; None for a file."""

    @property
    def part(self) -> tuple[float, float | None, int | None]:
        return float(self.segment.start_s), self.segment.duration_s, self.segment.channel

    def fail(self, reason: AudioErrorReason | str, detail: str) -> AudioError:
        return AudioError(self.label, reason, detail)


def load(
    source: Source,
    *,
    sample_rate: int = 16000,
    start_s: float = 0.0,
    duration_s: float | None = None,
    channel: int | None = None,
    source_rate: int | None = None,
    limits: AudioLimits = DEFAULT_LIMITS,
) -> Waveform:
    """Loads a recording, or a part of it, as mono float32.

    Integer samples are scaled to [-1, 1); float samples are not changed. Nothing is clipped or dithered.

    Args:
        source: a path, the bytes of a file, a binary file object (read from its current position), a waveform
            as numpy array or torch tensor of shape (samples,) and a floating dtype, or a `Segment`.
        sample_rate: rate of the result in Hz.
        start_s: where to start, in seconds.
        duration_s: how much to load, in seconds; None: up to the end.
        channel: which channel, counted from 0; None: the mean over channels.
        source_rate: rate of a waveform in Hz; None: `sample_rate`. The rate of a file is in its header.
        limits: recordings outside them are refused.

    Returns:
        float32 (samples,), finite, at `sample_rate`; never empty.

    Raises:
        AudioError: the recording cannot be used; its `reason` says why.
        ValueError, TypeError: an argument is wrong.
    """
    if isinstance(source, Segment):
        left_out = (start_s, duration_s, channel) == (0.0, None, None)
        _require(left_out, "start_s, duration_s and channel must be left out: the Segment has them")
    else:
        source = Segment(source, start_s, duration_s, channel)
    request = _parse(source, sample_rate if source_rate is None else source_rate)
    allowed = source_rate is None or request.rate_hz is not None
    _require(allowed, "source_rate is for waveforms: a file states its rate")
    (result,) = _load_requests([request], sample_rate, limits, 1)
    if isinstance(result, AudioError):
        raise result
    return result


def load_batch(
    sources: Sequence[Source],
    *,
    sample_rate: int = 16000,
    limits: AudioLimits = DEFAULT_LIMITS,
    num_threads: int | None = None,
) -> list[Waveform | AudioError]:
    """Loads many recordings in threads. If a recording cannot be used, its error is returned in its place.

    Args:
        sources: as for `load`; waveforms must already be at `sample_rate`.
        sample_rate: rate of the results in Hz.
        limits: recordings outside them are refused.
        num_threads: how many threads; None: `default_num_threads()`.

    Returns:
        For each source a float32 (samples,) waveform or an `AudioError`.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    segments = [item if isinstance(item, Segment) else Segment(item) for item in sources]
    requests = [_parse(segment, sample_rate) for segment in segments]
    return _load_requests(requests, sample_rate, limits, check_num_threads(num_threads))


def resample(waveform: Source, *, from_hz: int, to_hz: int) -> Waveform:
    """Resamples with the reference's filter.

    Args:
        waveform: (samples,), numpy array or torch tensor of a floating dtype.
        from_hz: its rate in Hz, 1 .. 10^6.
        to_hz: the wanted rate in Hz, 1 .. 10^6.

    Returns:
        float32 of round_half_up(samples * to_hz / from_hz) samples (lhotse's length rule); always a copy.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    samples = as_waveform(waveform, "waveform")
    if from_hz == to_hz and from_hz > 0:
        return samples.copy()
    (out,) = _C.resample_batch([samples], from_hz=operator.index(from_hz), to_hz=operator.index(to_hz))
    return out


def as_waveform(value: Any, name: str) -> Waveform:
    """Converts a numpy array or torch tensor to aligned, C-contiguous float32 (samples,); copies if needed.

    Raises:
        ValueError, TypeError: another shape, or no floating dtype. The message calls the argument `name`.
    """
    if hasattr(value, "detach"):  # a tensor, recognised without importing torch
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or torch tensor, got {type(value).__name__}")
    if value.dtype.kind != "f":
        raise TypeError(
            f"{name} must be floating point in [-1, 1], got {value.dtype}; divide integers by full scale"
        )
    if value.ndim != 1:
        raise ValueError(
            f"{name} must have shape (samples,), got {value.shape}; choose a channel or average the channels"
        )
    # The extension needs aligned samples. A view into the bytes of a file may not be aligned.
    return np.require(value, np.float32, ["C", "A"])


def default_num_threads() -> int:
    """This process's share of the CPUs, at most 16; 1 in a daemonic process such as a DataLoader worker.

    The CPUs that the process may use are divided among the processes that torchrun started on this machine.
    """
    if multiprocessing.current_process().daemon:
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), 16)


def check_num_threads(num_threads: int | None) -> int:
    """`num_threads`, or the default for None.

    Raises:
        ValueError: it is less than 1.
    """
    if num_threads is None:
        return default_num_threads()
    _require(operator.index(num_threads) >= 1, f"num_threads must be >= 1, got {num_threads}")
    return min(num_threads, 1024)


def _parse(segment: Segment, waveform_rate_hz: int) -> _Request:
    source, name = segment.source, label(segment)
    if isinstance(source, str | os.PathLike):
        _require(name != "", "source must not be an empty path")
        return _Request(name, segment, name)
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"a file object must be opened in binary mode, it gave {type(data).__name__}")
        return _Request(data, segment, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _Request(source, segment, name)
    return _Request(as_waveform(source, "source"), segment, name, operator.index(waveform_rate_hz))


def label(source: Source) -> str:
    """The name of a recording in error messages: its path, or a description such as "<bytes>"."""
    source = source.source if isinstance(source, Segment) else source
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if hasattr(source, "read"):
        return str(getattr(source, "name", "<file object>"))
    return "<bytes>" if isinstance(source, bytes | bytearray | memoryview) else "<waveform>"


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


@functools.lru_cache(maxsize=16)
def _policy(limits: AudioLimits, sample_rate: int) -> _C.LoadPolicy:
    if not isinstance(limits, AudioLimits):
        raise TypeError(f"limits must be AudioLimits, got {type(limits).__name__}")
    _require(1 <= operator.index(sample_rate) <= 10**6, f"sample_rate must be 1 .. 10^6, got {sample_rate}")
    return _C.LoadPolicy(sample_rate_hz=sample_rate, **asdict(limits))


def _load_requests(
    requests: Sequence[_Request], sample_rate: int, limits: AudioLimits, num_threads: int
) -> list[Waveform | AudioError]:
    policy = _policy(limits, sample_rate)
    results: list[Waveform | AudioError | None] = [None] * len(requests)
    for_extension: list[int] = []
    others: list[int] = []
    for i, request in enumerate(requests):
        if isinstance(request.data, str) and not _is_encodable(request.data):
            results[i] = request.fail(AudioErrorReason.OPEN, _NOT_ENCODABLE)
        else:
            (for_extension if request.rate_hz is None else others).append(i)
    items = [(requests[i].data, *requests[i].part) for i in for_extension]
    loaded_items = _C.load_batch(items, policy=policy, num_threads=num_threads)
    for i, loaded in zip(for_extension, loaded_items, strict=True):
        if isinstance(loaded, tuple) and loaded[0] == "other_format":
            others.append(i)
        else:
            results[i] = requests[i].fail(*loaded) if isinstance(loaded, tuple) else loaded

    def load_other(i: int) -> None:
        results[i] = _load_other(requests[i], limits, policy)

    if num_threads > 1 and len(others) > 1:
        with ThreadPoolExecutor(min(num_threads, len(others))) as pool:
            list(pool.map(load_other, others))
    else:
        for i in others:
            load_other(i)
    return cast("list[Waveform | AudioError]", results)


def _load_other(request: _Request, limits: AudioLimits, policy: _C.LoadPolicy) -> Waveform | AudioError:
    """Loads a waveform, or a file that libsndfile decodes because the extension does not."""
    try:
        if request.rate_hz is not None:
            rate_hz = request.rate_hz
            first, count = _select(request, policy, 1, rate_hz, len(request.data))
            samples = request.data[first : first + count]
        else:
            samples, rate_hz = _decode(request, limits, policy)
        result = _C.finish(samples, sample_rate_hz=rate_hz, policy=policy)
    except AudioError as error:
        return error
    except MemoryError:
        return request.fail(AudioErrorReason.MEMORY, "not enough memory to decode it; load a shorter segment")
    return request.fail(*result) if isinstance(result, tuple) else result


def _select(
    request: _Request, policy: _C.LoadPolicy, channels: int, rate_hz: int, frames: int
) -> tuple[int, int]:
    """First frame and number of frames of the requested part. Raises AudioError if the policy forbids it."""
    first, second = _C.select_section(channels, rate_hz, frames, *request.part, policy)
    if isinstance(first, str):
        raise request.fail(first, cast(str, second))
    return first, cast(int, second)


def _decode(request: _Request, limits: AudioLimits, policy: _C.LoadPolicy) -> tuple[Waveform, int]:
    """Decodes the requested part through libsndfile: (mono samples at the file's rate, rate in Hz)."""
    segment = request.segment
    with _named_failures(request), sndfile.open_stream(request.data, _probe(request)[0]) as stream:
        rate_hz, missing = stream.samplerate, stream.missing
        known = stream.frames < sndfile.UNKNOWN_LENGTH
        if missing and stream.frames == 0:
            raise request.fail(AudioErrorReason.TRUNCATED, missing)
        longest = sndfile.UNKNOWN_LENGTH
        start, max_frames = (int(min(s * rate_hz, longest)) for s in (segment.start_s, limits.max_s))
        claimed = stream.frames if known else start + max_frames
        first, count = _select(request, policy, stream.channels, rate_hz, claimed)
        if missing and segment.duration_s is None:
            raise request.fail(AudioErrorReason.TRUNCATED, missing)
        # If the length is unknown, one extra frame shows whether the file is longer than the limit.
        mono, end, problem = sndfile.read_mono(stream, first, count + (not known), segment.channel)
    if problem or (known and len(mono) < count):
        promised = f" of {count}" if known else ""
        detail = f"decoding stopped after {len(mono)}{promised} samples: {problem or 'the file ends'}"
        raise request.fail(AudioErrorReason.TRUNCATED, detail)
    if not known:
        _, count = _select(request, policy, stream.channels, rate_hz, end)
    # A part may reach a little past the end of a file, unless the file itself is truncated.
    if missing and count < math.floor(cast(float, segment.duration_s) * rate_hz + 0.5):
        raise request.fail(AudioErrorReason.TRUNCATED, missing)
    return mono[:count], rate_hz


def _probe(request: _Request) -> tuple[int, int, int, int | None] | tuple[int]:
    """The header of a file, read by the extension; see `_C.probe`."""
    probed = _C.probe(request.data)
    if isinstance(probed[0], str):
        raise request.fail(*probed)
    return cast("tuple[int]", probed)


@dataclass(frozen=True)
class AudioInfo:
    """The header of a recording."""

    sample_rate_hz: int
    """Sample rate in Hz."""
    channels: int
    """Number of channels."""
    frames: int | None
    """Samples of each channel; None: the header does not state them. Of FLAC files that were joined into one,
    only the first is counted; `load` refuses them."""
    exact: bool
    """True: the header states `frames`. False: `frames` is estimated from the bit rate."""


def info(source: Source) -> AudioInfo:
    """Reads the header of a recording, without decoding it.

    Args:
        source: a path, the bytes of a file, or a binary file object.

    Raises:
        AudioError: the header cannot be read.
        ValueError, TypeError: the argument is wrong.
    """
    request = _parse(Segment(source), 16000)
    if request.rate_hz is not None:
        raise TypeError("source must be a file, not a waveform, which has no header")
    if isinstance(request.data, str) and not _is_encodable(request.data):
        raise request.fail(AudioErrorReason.OPEN, _NOT_ENCODABLE)
    probed = _probe(request)
    if len(probed) == 4:
        _, channels, rate_hz, frames = probed
        return AudioInfo(rate_hz, channels, frames, True)
    with _named_failures(request), sndfile.open_stream(request.data, probed[0], guess=True) as stream:
        known = not stream.missing and stream.frames < sndfile.UNKNOWN_LENGTH
        frames = stream.frames if known else None
        return AudioInfo(stream.samplerate, stream.channels, frames, stream.format != "MP3")


@contextlib.contextmanager
def _named_failures(request: _Request) -> Iterator[None]:
    """Turns errors of `sndfile` into an AudioError that names the recording."""
    try:
        yield
    except sndfile.DecodeError as error:
        raise request.fail(error.reason, str(error)) from error
    except OSError as error:
        raise request.fail(AudioErrorReason.OPEN, str(error.strerror)) from error
