"""Opens a file for libsndfile and decodes parts of it to one channel."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clsp_fast.sndfile import containers, mp3, ogg
from clsp_fast.sndfile.errors import DecodeError
from clsp_fast.storage.files import LFS_FIX, LFS_POINTER
from clsp_fast.storage.folders import CONVERT

if TYPE_CHECKING:
    from soundfile import SoundFile

UNKNOWN_LENGTH = 1 << 62
"""Value of `Stream.frames` if the file does not state its length."""

_BLOCK_SAMPLES = 1 << 18
_MAGIC = (
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b".snd",
    b"RIFF",
    b"RIFX",
    b"RF64",
    b"BW64",
    b"caff",
    b"riff",
    b"NIST",
)
_SAMPLE_BYTES = {
    "PCM_S8": 1,
    "PCM_U8": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "ULAW": 1,
    "ALAW": 1,
}
# Encodings in which libsndfile seeks to the exact frame.
_SEEKABLE = frozenset((*_SAMPLE_BYTES, "VORBIS", "OPUS"))
_SPLIT_FIX = f"split them, or {CONVERT}"


class Stream:
    """One recording, or several that follow one another, opened for `read_mono`.

    Attributes:
        parts: the recordings.
        sizes: frames of each recording.
        missing: what is missing in the file compared with its header, in words; empty if nothing.
    """

    def __init__(self, parts: Sequence[SoundFile], missing: str = "", sound_bytes: int | None = None) -> None:
        self.parts, self.missing = parts, missing
        self.sizes = [min(int(part.frames), UNKNOWN_LENGTH) for part in parts]
        if sound_bytes is not None:  # libsndfile would decode the bytes after the sound as sound
            frame_bytes = _SAMPLE_BYTES[parts[0].subtype] * parts[0].channels
            self.sizes[0] = min(self.sizes[0], sound_bytes // frame_bytes)
        first = parts[0]
        self.samplerate, self.channels, self.format = first.samplerate, first.channels, first.format

    @property
    def frames(self) -> int:
        """Frames of all recordings together."""
        return min(sum(self.sizes), UNKNOWN_LENGTH)


class _Recordings(NamedTuple):
    """The recordings of a file, prepared for libsndfile."""

    files: list[IO[bytes]]
    """One file for each recording."""
    missing: str = ""
    """As in `Stream`."""
    sound_bytes: int | None = None
    """Number of bytes of sound, if libsndfile would also decode the bytes after them."""


@contextlib.contextmanager
def open_stream(
    data: str | bytes | bytearray | memoryview, offset: int = 0, *, guess: bool = False
) -> Iterator[Stream]:
    """Opens a path or the bytes of a file, whose recording begins at `offset`, for `read_mono`.

    With `guess` an MP3 file is not read to find its length; libsndfile estimates it from the first frames.

    Raises:
        DecodeError: libsndfile does not know the format, the header is damaged, or there are no samples.
        OSError: the file cannot be read.
    """
    import soundfile

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_file(data))
        mp3.check_tag(file, offset)
        if offset > 0 and not mp3.is_tagged_mpeg(file, offset):
            rest = stack.enter_context(_memory_file(containers.blocks(file, offset)))
            file = rest if _begins_with_recording(rest) else file
        file.seek(0)
        check_magic(file.read(32))
        recordings = _recordings(file, guess)
        missing = recordings.missing
        try:
            opened = [
                stack.enter_context(_stream_class()(stack.enter_context(part).fileno(), closefd=False))
                for part in recordings.files
            ]
        except soundfile.LibsndfileError as error:
            if missing:
                raise DecodeError(missing, "truncated") from error
            if mp3.begins_as_mp3(file):
                mp3.require_frames(file, 2)
                raise DecodeError("cannot be decoded: no two MP3 frames follow one another") from error
            raise DecodeError(f"cannot be decoded: {error.error_string}") from error
        # In block-based encodings, libsndfile makes up the rest of a truncated block.
        if missing and not all(part.subtype in _SEEKABLE for part in opened):
            raise DecodeError(missing, "truncated")
        kinds = {(part.samplerate, part.channels) for part in opened}
        if len(kinds) > 1:
            listed = " and ".join(f"{rate} Hz in {channels} channels" for rate, channels in sorted(kinds))
            raise DecodeError(f"holds recordings of {listed}, one after the other; {_SPLIT_FIX}")
        yield Stream(opened, missing, recordings.sound_bytes)


def read_mono(
    stream: Stream, first: int, count: int, channel: int | None
) -> tuple[NDArray[np.float32], int, str]:
    """Decodes frames [first, first + count) of one channel, or the mean of all channels for None.

    Returns:
        (samples, end, problem). If the stream ends early, there are fewer than `count` samples, `end` is the
        frame at which it ended, and `problem` is the decoder's message, if it gave one.
    """
    blocks = [np.empty(0, np.float32)]
    begin, last, problem = 0, first + count, ""
    for part, size in zip(stream.parts, stream.sizes, strict=True):
        skipped = min(max(first - begin, 0), size)
        wanted = min(last - begin, size) - skipped
        end = size
        if wanted > 0:
            samples, end, problem = _read_part(part, skipped, wanted, channel)
            blocks.append(samples)
            if problem or len(samples) < wanted:
                begin += end
                break
        begin += end
        if begin >= last:
            break
    return np.concatenate(blocks), begin, problem


def _read_part(
    part: SoundFile, first: int, count: int, channel: int | None
) -> tuple[NDArray[np.float32], int, str]:
    """`read_mono` for one recording."""
    import soundfile

    buffer = np.empty((max(1, _BLOCK_SAMPLES // part.channels), part.channels), np.float32)
    blocks = [np.empty(0, np.float32)]
    mean = channel is None and part.channels > 1
    position, last, problem = 0, first + count, ""
    try:
        # Other encodings, and files of unknown length, are decoded from their beginning.
        if first > 0 and part.frames < UNKNOWN_LENGTH and part.subtype in _SEEKABLE:
            position = part.seek(first)
        while position < last:
            block = part.read(min(last - position, len(buffer)), out=buffer)
            if len(block) == 0:
                break
            kept = block[max(first - position, 0) :]
            position += len(block)
            with np.errstate(all="ignore"):  # the caller refuses samples that are not finite
                blocks.append(kept.mean(axis=1) if mean else kept[:, channel or 0].copy())
    except soundfile.LibsndfileError as error:
        problem = str(error.error_string)
    return np.concatenate(blocks), position, problem


def check_magic(head: bytes) -> None:
    """Raises DecodeError, with the fix, if the file that begins with `head` has no format for libsndfile.

    Without this check, libsndfile would decode some text files as audio.
    """
    if head.startswith(_MAGIC) or mp3.is_mpeg(head):
        return
    if head.startswith(LFS_POINTER):
        raise DecodeError(LFS_FIX)
    kind = "an MP4/M4A container" if head[4:8] == b"ftyp" else f"it begins with {head[:8]!r}"
    raise DecodeError(f"not in a known audio format ({kind}); {CONVERT}")


def _begins_with_recording(file: IO[bytes]) -> bool:
    """Whether the file begins with a recording. Other bytes may have been removed before it."""
    head = file.read(16)
    if not mp3.is_mpeg(head):
        return head.startswith(_MAGIC)
    file.seek(mp3.frame_bytes(head))
    return mp3.frame_bytes(head) > 0 and mp3.frame_bytes(file.read(4)) > 0  # one frame may be there by chance


def _recordings(file: IO[bytes], guess: bool) -> _Recordings:
    """Prepares the recordings of a file. Wrong and missing lengths are corrected for libsndfile."""
    head = file.read(4) if file.seek(0) == 0 else b""
    size = file.seek(0, os.SEEK_END)
    if head.startswith(b"OggS"):
        return _ogg_recordings(file, size)
    if mp3.begins_as_mp3(file):
        mp3.require_frames(file, 1)
        return _Recordings([_copy_of(file)] if guess else _mp3_files(file))
    extent = containers.find_extent(file, size)
    if extent is None:
        return _Recordings([_copy_of(file)])
    if extent.cut:
        missing = max(extent.end or 0, extent.extra_end) - extent.present_end
        return _Recordings([_copy_of(file)], f"the file ends {missing} bytes before what its header states")
    if extent.several:
        raise DecodeError(f"a second chunk of sound follows the first; {_SPLIT_FIX}")
    if containers.has_second_file(file, size, extent):
        raise DecodeError(f"a second file follows the first; {_SPLIT_FIX}")
    if extent.end is not None and extent.begin == extent.end:
        raise DecodeError("has no samples", "empty")
    if extent.end is None and extent.size_at > 0:
        return _Recordings([_memory_file(containers.with_size(file, extent))])
    if extent.end is not None and extent.end < size and containers.reads_too_far(head):
        if _subtype(file) in _SAMPLE_BYTES:
            return _Recordings([_copy_of(file)], sound_bytes=extent.end - extent.begin)
        try:
            return _Recordings([_memory_file(containers.blocks(file, 0, extent.end))])
        except EOFError:
            raise DecodeError("the file became shorter while it was read", "truncated") from None
    return _Recordings([_copy_of(file)])


def _ogg_recordings(file: IO[bytes], size: int) -> _Recordings:
    try:
        recordings = ogg.recordings(file, size)
    except ogg.MultiplexedError:
        raise DecodeError(f"holds several recordings at the same time; choose one, or {CONVERT}") from None
    complete = all(recording.ended for recording in recordings)
    missing = (
        "" if complete else "the last page of the Ogg stream is missing; decode and encode what is there"
    )
    # The header continues in the second page. If this page is missing, too, nothing can be decoded.
    if missing and len(recordings[-1].pages) == 1 and size - sum(recordings[-1].pages[0]) < ogg.LONGEST_HEAD:
        raise DecodeError("the Ogg stream ends within its header")
    if len(recordings) == 1 and not recordings[0].is_flac:
        covered = sum(count for _, count in recordings[0].pages)
        if covered == size or not complete:
            return _Recordings([_copy_of(file)], missing)
    if not recordings:
        return _Recordings([_copy_of(file)])
    return _Recordings([_memory_file([ogg.copy(file, recording)]) for recording in recordings], missing)


def _mp3_files(file: IO[bytes]) -> list[IO[bytes]]:
    recordings = mp3.split_recordings(file)
    return [_copy_of(file)] if recordings is None else [_memory_file(parts) for parts in recordings]


def _subtype(file: IO[bytes]) -> str:
    """libsndfile's name of the encoding; empty if it cannot open the file."""
    import soundfile

    try:
        with _copy_of(file) as same, soundfile.SoundFile(same.fileno(), closefd=False) as sound:
            return str(sound.subtype)
    except soundfile.LibsndfileError:
        return ""


def _open_file(data: str | bytes | bytearray | memoryview) -> IO[bytes]:
    """A file with a descriptor. If libsndfile gets a descriptor, it finds the format by content and not by
    the suffix of a name, and it calls no Python code to read."""
    return Path(data).open("rb", buffering=0) if isinstance(data, str) else _memory_file([data])


def _memory_file(parts: Iterable[bytes | bytearray | memoryview]) -> IO[bytes]:
    """A file in memory that holds the parts one after the other."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("clsp_fast"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    for part in parts:
        rest = memoryview(part).cast("B")
        while rest:
            rest = rest[file.write(rest) :]
    file.seek(0)
    return file


def _copy_of(file: IO[bytes]) -> IO[bytes]:
    """A second handle of the file, at its beginning. It can be closed without closing the first."""
    file.seek(0)
    return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)


@functools.lru_cache(maxsize=1)
def _stream_class() -> type[SoundFile]:
    import soundfile

    class Unseekable(soundfile.SoundFile):  # type: ignore[misc]
        """Reads to the end of the sound. A seekable SoundFile stops or fails at the stated length."""

        def seekable(self) -> bool:
            return False

    return Unseekable
