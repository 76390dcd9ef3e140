"""Every format but WAV, decoded by libsndfile in blocks, so that no header can make it allocate.

What libsndfile and its Python wrapper do about wrong or missing lengths is worked around here only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from soundfile import SoundFile

UNKNOWN_LENGTH = 1 << 62
"""`frames` of a stream is at least this where its file does not state its length."""

_BLOCK_SAMPLES = 1 << 18
_MAGIC = (b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"RIFX", b"RF64", b"caff", b"riff", b"NIST")
_MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")


class DecodeError(Exception):
    """libsndfile cannot decode it; the message says why."""


@contextlib.contextmanager
def open_stream(data: str | bytes | bytearray | memoryview) -> Iterator[SoundFile]:
    """Opens a path or the bytes of a file for `read_mono`.

    Raises:
        DecodeError: it is in no format that libsndfile knows, or its header is damaged.
        OSError: the file cannot be read.
    """
    import soundfile

    with _open_file(data) as file:
        head = file.read(4096)
        file.seek(0)
        try:
            with (
                _pipe(file) if _is_bare_mp3(head) else contextlib.nullcontext(file.fileno()) as descriptor,
                _stream_class()(descriptor, closefd=False) as stream,
            ):
                yield stream
        except soundfile.LibsndfileError as error:
            raise DecodeError(f"cannot be decoded: {error.error_string}") from error


def read_mono(
    stream: SoundFile, first: int, count: int, channel: int | None
) -> tuple[NDArray[np.float32], int, str]:
    """Decodes frames [first, first + count) to one channel, or to the mean over channels for None.

    Returns:
        (samples, end, problem): fewer than `count` samples if the stream ended before, at frame `end`;
        `problem` is what the decoder said then, if it did.
    """
    import soundfile

    buffer = np.empty((max(1, _BLOCK_SAMPLES // stream.channels), stream.channels), np.float32)
    blocks = [np.empty(0, np.float32)]
    position, last, problem = 0, first + count, ""
    try:
        # MP3 seeks are not exact, and without a length there are none.
        if first > 0 and stream.frames < UNKNOWN_LENGTH and stream.format != "MP3":
            position = stream.seek(first)
        while position < last:
            block = stream.read(min(last - position, len(buffer)), out=buffer)
            if len(block) == 0:
                break
            kept = block[max(first - position, 0) :]
            position += len(block)
            with np.errstate(all="ignore"):  # what is not finite is the caller's to refuse
                blocks.append(kept.mean(axis=1) if channel is None else kept[:, channel].copy())
    except soundfile.LibsndfileError as error:
        problem = str(error.error_string)
    return np.concatenate(blocks), position, problem


def _open_file(data: str | bytes | bytearray | memoryview) -> IO[bytes]:
    """A file with a descriptor: libsndfile then judges by content, not by a name, and needs no callbacks."""
    if isinstance(data, str):
        return Path(data).open("rb", buffering=0)
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("clsp_fast"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]
    file.seek(0)
    return file


def check_magic(head: bytes) -> None:
    """Raises DecodeError, naming the fix, unless `head` begins like a format that libsndfile decodes.

    libsndfile itself would take some text files for audio.
    """
    if head.startswith(_MAGIC) or _is_mpeg(head):
        return
    found = "an MP4/M4A container" if head[4:8] == b"ftyp" else f"it begins with {head[:8]!r}"
    fix = "convert it, for instance with `ffmpeg -i in -ar 16000 out.flac`"
    raise DecodeError(f"not in a known audio format ({found}); {fix}")


def _is_mpeg(head: bytes) -> bool:
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0


def _is_bare_mp3(head: bytes) -> bool:
    """An MP3 file without a frame that states its length."""
    check_magic(head)
    return (_is_mpeg(head) or head.startswith(b"ID3")) and not any(tag in head for tag in _MP3_LENGTH_TAGS)


@contextlib.contextmanager
def _pipe(file: IO[bytes]) -> Iterator[int]:
    """A descriptor that cannot seek: otherwise libsndfile guesses a bare MP3's length and stops there."""
    reader, writer = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as sink:
            shutil.copyfileobj(file, sink)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()


@functools.lru_cache(maxsize=1)
def _stream_class() -> type[SoundFile]:
    import soundfile

    class Stream(soundfile.SoundFile):  # type: ignore[misc]
        """Reads on where SoundFile.read would seek: behind the last frame that a wrong header promised."""

        def seekable(self) -> bool:
            return False

    return Stream
