"""Every format but WAV and FLAC, decoded by libsndfile in blocks, so that no header can make it allocate.

What libsndfile and its Python wrapper do about wrong or missing lengths is worked around here only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clsp_fast.disk import LFS_FIX, LFS_POINTER

if TYPE_CHECKING:
    from soundfile import SoundFile

UNKNOWN_LENGTH = 1 << 62
"""`frames` of a stream is at least this where its file does not state its length."""

_BLOCK_SAMPLES = 1 << 18
_MAGIC = (
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b".snd",
    b"RIFX",
    b"RF64",
    b"caff",
    b"riff",
    b"NIST",
    b"Creative Voice",
)
_MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
_MP3_RATES_HZ = (44100, 48000, 32000)
_MP3_KBPS = (  # MPEG-2 and 2.5, MPEG-1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
# How a layer III frame begins: no reserved version or rate, and a bit rate that is stated.
_MP3_KBPS_AND_RATE = b"".join(rb"\x%x0-\x%xb" % (kbps, kbps) for kbps in range(1, 15))
_MP3_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][%s]." % _MP3_KBPS_AND_RATE, re.DOTALL)
_MP3_LONGEST_GAP = 1 << 16


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
        check_magic(file.read(32))
        file.seek(0)
        try:
            with _with_length(file) as complete, _stream_class()(complete.fileno(), closefd=False) as stream:
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
    mean = channel is None and stream.channels > 1
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
                blocks.append(kept.mean(axis=1) if mean else kept[:, channel or 0].copy())
    except soundfile.LibsndfileError as error:
        problem = str(error.error_string)
    return np.concatenate(blocks), position, problem


def _open_file(data: str | bytes | bytearray | memoryview) -> IO[bytes]:
    """A file with a descriptor: libsndfile then judges by content, not by a name, and needs no callbacks."""
    return Path(data).open("rb", buffering=0) if isinstance(data, str) else _memory_file(data)


def _memory_file(*parts: bytes | bytearray | memoryview) -> IO[bytes]:
    """A file that holds the parts one after the other."""
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


def check_magic(head: bytes) -> None:
    """Raises DecodeError, naming the fix, unless `head` begins like a format that libsndfile decodes.

    libsndfile itself would take some text files for audio.
    """
    if head.startswith(_MAGIC) or _is_mpeg(head):
        return
    if head.startswith(LFS_POINTER):
        raise DecodeError(LFS_FIX)
    found = "an MP4/M4A container" if head[4:8] == b"ftyp" else f"it begins with {head[:8]!r}"
    fix = "convert it, for instance with `ffmpeg -i in -ar 16000 out.flac`"
    raise DecodeError(f"not in a known audio format ({found}); {fix}")


def _is_mpeg(head: bytes | memoryview) -> bool:
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0


@contextlib.contextmanager
def _with_length(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The file, or for an MP3 file that does not state its length a copy that does.

    From such files libsndfile stops at a guess, which is far off where the bit rate varies.
    """
    first = _mp3_start(file)
    file.seek(first)
    head = file.read(2048)
    file.seek(0)
    if not _mp3_frame_bytes(head) or any(tag in head for tag in _MP3_LENGTH_TAGS):
        yield file
        return
    audio = memoryview(file.read())[first:]
    with _memory_file(_mp3_length_frame(audio), audio) as complete:
        yield complete


def _mp3_start(file: IO[bytes]) -> int:
    """Where the audio begins: behind an ID3v2 tag, if there is one."""
    head = file.read(10)
    if len(head) < 10 or not head.startswith(b"ID3"):
        return 0
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))


def _mp3_frame_bytes(head: bytes | memoryview) -> int:
    """Length of the layer III frame that begins like this; 0 if none does (ISO 11172-3, 2.4.2.3)."""
    if len(head) < 4 or not _is_mpeg(head):
        return 0
    version, layer, rate, kbps = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer != 1 or rate == 3 or kbps in (0, 15):
        return 0
    bits_per_s = 1000 * _MP3_KBPS[version == 3][kbps]
    rate_hz = _MP3_RATES_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * bits_per_s // rate_hz + (head[2] >> 1 & 1)


def _mp3_length_frame(audio: memoryview) -> bytes:
    """A frame that states how many frames follow, as encoders write it (the Xing header).

    What is no frame is passed over by the expression, not byte by byte here, and not for ever: a decoder
    gives up sooner.
    """
    frames, at = 0, 0
    while match := _MP3_HEADER.search(audio, at, at + _MP3_LONGEST_GAP):
        at = match.start() + _mp3_frame_bytes(audio[match.start() : match.end()])
        frames += at <= len(audio)
    # The first frame's header with bit rate 9 (room enough), no padding and no checksum.
    head = bytes([0xFF, audio[1] | 1, 9 << 4 | audio[2] & 0x0C, audio[3]])
    mpeg1, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    side_bytes = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    body = head + bytes(side_bytes) + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return body.ljust(_mp3_frame_bytes(head), b"\0")


@functools.lru_cache(maxsize=1)
def _stream_class() -> type[SoundFile]:
    import soundfile

    class Stream(soundfile.SoundFile):  # type: ignore[misc]
        """Reads on where SoundFile.read would seek: behind the last frame that a wrong header promised."""

        def seekable(self) -> bool:
            return False

    return Stream
