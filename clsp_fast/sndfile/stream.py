"""What the extension does not decode, through libsndfile in blocks, so that no header can make it allocate.

What libsndfile and its Python wrapper do about wrong or missing lengths is worked around here only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clsp_fast.sndfile import containers, ogg
from clsp_fast.storage.files import LFS_FIX, LFS_POINTER

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
_SEEKABLE = frozenset((*_SAMPLE_BYTES, "VORBIS", "OPUS"))
_MP3_RATES_HZ = (44100, 48000, 32000)
_MP3_KBPS = (  # MPEG-2 and 2.5, MPEG-1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
# How a layer III frame begins: no reserved version or rate, and a bit rate that is stated.
_MP3_KBPS_AND_RATE = b"".join(rb"\x%x0-\x%xb" % (kbps, kbps) for kbps in range(1, 15))
_MP3_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][%s]." % _MP3_KBPS_AND_RATE, re.DOTALL)
_MP3_LONGEST_GAP = 1 << 16
_MP3_FEW_FRAMES = 10
_ID3V1_BYTES = 128
_ID3_HEAD_BYTES = 10
_ID3_FOOTER = 0x10
_FIX = "or convert it, for instance with `ffmpeg -i in -ar 16000 out.flac`"


class DecodeError(Exception):
    """Nothing can be decoded; the message says why.

    Attributes:
        reason: "format", "truncated" or "empty".
    """

    def __init__(self, message: str, reason: str = "format") -> None:
        self.reason = reason
        super().__init__(message)


class Stream:
    """One or several recordings, one after the other, opened for `read_mono`.

    Attributes:
        parts: the recordings.
        sizes: frames of each of them.
        cut: what is missing, where the file ends before what its header states; else empty.
    """

    def __init__(self, parts: Sequence[SoundFile], cut: str = "", sound_bytes: int | None = None) -> None:
        self.parts, self.cut = parts, cut
        self.sizes = [min(int(part.frames), UNKNOWN_LENGTH) for part in parts]
        if sound_bytes is not None:  # libsndfile may take what follows the sound for more of it
            frame_bytes = _SAMPLE_BYTES[parts[0].subtype] * parts[0].channels
            self.sizes[0] = min(self.sizes[0], sound_bytes // frame_bytes)
        first = parts[0]
        self.samplerate, self.channels, self.format = first.samplerate, first.channels, first.format

    @property
    def frames(self) -> int:
        return min(sum(self.sizes), UNKNOWN_LENGTH)


@contextlib.contextmanager
def open_stream(
    data: str | bytes | bytearray | memoryview, offset: int = 0, *, guess: bool = False
) -> Iterator[Stream]:
    """Opens a path or the bytes of a file, whose recording begins at `offset`, for `read_mono`.

    With `guess` the length of an MP3 file is what libsndfile makes of its beginning; the file is not read.

    Raises:
        DecodeError: it is in no format that libsndfile knows, its header is damaged, or it has no samples.
        OSError: the file cannot be read.
    """
    import soundfile

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_file(data))
        _check_tag(file, offset)
        if offset > 0 and not _is_tagged_mpeg(file, offset):
            rest = stack.enter_context(_memory_file(containers.blocks(file, offset)))
            file = rest if _begins_here(rest) else file
        file.seek(0)
        check_magic(file.read(32))
        files, cut, sound_bytes = _parts(file, guess)
        try:
            opened = [
                stack.enter_context(_stream_class()(stack.enter_context(part).fileno(), closefd=False))
                for part in files
            ]
        except soundfile.LibsndfileError as error:
            if cut:
                raise DecodeError(cut, "truncated") from error
            if _begins_as_mp3(file):
                _require_mp3_frames(file, 2)
                raise DecodeError("cannot be decoded: no two MP3 frames follow one another") from error
            raise DecodeError(f"cannot be decoded: {error.error_string}") from error
        # Of encodings in blocks, libsndfile makes up the rest of a block that is cut.
        if cut and not all(part.subtype in _SEEKABLE for part in opened):
            raise DecodeError(cut, "truncated")
        kinds = {(part.samplerate, part.channels) for part in opened}
        if len(kinds) > 1:
            listed = " and ".join(f"{rate} Hz in {channels} channels" for rate, channels in sorted(kinds))
            raise DecodeError(f"holds recordings of {listed}, one after the other; split them, {_FIX}")
        yield Stream(opened, cut, sound_bytes)


def read_mono(
    stream: Stream, first: int, count: int, channel: int | None
) -> tuple[NDArray[np.float32], int, str]:
    """Decodes frames [first, first + count) to one channel, or to the mean over channels for None.

    Returns:
        (samples, end, problem): fewer than `count` samples if the stream ended before, at frame `end`;
        `problem` is what the decoder said then, if it did.
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
    """`read_mono` of one recording."""
    import soundfile

    buffer = np.empty((max(1, _BLOCK_SAMPLES // part.channels), part.channels), np.float32)
    blocks = [np.empty(0, np.float32)]
    mean = channel is None and part.channels > 1
    position, last, problem = 0, first + count, ""
    try:
        # Not of every encoding are seeks exact, and without a length there are none.
        if first > 0 and part.frames < UNKNOWN_LENGTH and part.subtype in _SEEKABLE:
            position = part.seek(first)
        while position < last:
            block = part.read(min(last - position, len(buffer)), out=buffer)
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
    return Path(data).open("rb", buffering=0) if isinstance(data, str) else _memory_file([data])


def _memory_file(parts: Iterable[bytes | bytearray | memoryview]) -> IO[bytes]:
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


def _check_tag(file: IO[bytes], offset: int) -> None:
    """Raises DecodeError if the file ends within an ID3v2 tag, or with one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if offset > size or (size < _ID3_HEAD_BYTES and file.read(3) == b"ID3"):
        raise DecodeError("the file ends within its ID3 tag", "truncated")
    if offset == size > 0:
        raise DecodeError("the file ends behind its ID3 tag, before any sound", "truncated")


def _is_tagged_mpeg(file: IO[bytes], offset: int) -> bool:
    """Whether MPEG audio at `offset` follows one ID3v2 tag, which libsndfile passes over by itself."""
    file.seek(0)
    head = file.read(_ID3_HEAD_BYTES)
    if _id3_bytes(head) != offset or head[5] & _ID3_FOOTER:
        return False
    file.seek(offset)
    return _is_mpeg(file.read(4))


def check_magic(head: bytes) -> None:
    """Raises DecodeError, naming the fix, unless `head` begins like a format that libsndfile decodes.

    libsndfile itself would take some text files for audio.
    """
    if head.startswith(_MAGIC) or _is_mpeg(head):
        return
    if head.startswith(LFS_POINTER):
        raise DecodeError(LFS_FIX)
    found = "an MP4/M4A container" if head[4:8] == b"ftyp" else f"it begins with {head[:8]!r}"
    raise DecodeError(f"not in a known audio format ({found}); {_FIX.removeprefix('or ')}")


def _is_mpeg(head: bytes | memoryview) -> bool:
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0


def _begins_as_mp3(file: IO[bytes]) -> bool:
    file.seek(0)
    head = file.read(4)
    return head.startswith(b"ID3") or _is_mpeg(head)


def _begins_here(file: IO[bytes]) -> bool:
    """Whether a recording begins where junk may have ended."""
    head = file.read(16)
    if not _is_mpeg(head):
        return head.startswith(_MAGIC)
    file.seek(_mp3_frame_bytes(head))
    return _mp3_frame_bytes(head) > 0 and _mp3_frame_bytes(file.read(4)) > 0  # one might be chance


def _parts(file: IO[bytes], guess: bool) -> tuple[list[IO[bytes]], str, int | None]:
    """The recordings of a file, each as a file that libsndfile reads to its end, and what is missing.

    The last value is how many bytes of sound there are, where libsndfile would read on behind them.
    """
    head = file.read(4) if file.seek(0) == 0 else b""
    size = file.seek(0, os.SEEK_END)
    if head.startswith(b"OggS"):
        return *_ogg_parts(file, size), None
    if _begins_as_mp3(file):
        _require_mp3_frames(file, 1)
        return ([_copy_of(file)] if guess else _mp3_parts(file)), "", None
    extent = containers.find_extent(file, size)
    if extent is None:
        return [_copy_of(file)], "", None
    if extent.cut:
        missing = max(extent.end or 0, extent.extra_end) - extent.present_end
        return [_copy_of(file)], f"the file ends {missing} bytes before what its header states", None
    if extent.several:
        raise DecodeError(f"a second chunk of sound follows the first; split them, {_FIX}")
    if containers.find_second(file, size, extent):
        raise DecodeError(f"a second file follows the first; split them, {_FIX}")
    if extent.end is not None and extent.begin == extent.end:
        raise DecodeError("has no samples", "empty")
    if extent.end is None and extent.size_at > 0:
        return [_memory_file(containers.with_size(file, extent))], "", None
    if extent.end is not None and extent.end < size and containers.reads_too_far(head):
        if _subtype(file) in _SAMPLE_BYTES:
            return [_copy_of(file)], "", extent.end - extent.begin
        try:
            return [_memory_file(containers.blocks(file, 0, extent.end))], "", None
        except EOFError:
            raise DecodeError("the file became shorter while it was read", "truncated") from None
    return [_copy_of(file)], "", None


def _subtype(file: IO[bytes]) -> str:
    """What libsndfile calls the encoding; empty if it cannot open the file."""
    import soundfile

    try:
        with _copy_of(file) as same, soundfile.SoundFile(same.fileno(), closefd=False) as sound:
            return str(sound.subtype)
    except soundfile.LibsndfileError:
        return ""


def _copy_of(file: IO[bytes]) -> IO[bytes]:
    """The same file to be closed on its own, read from its beginning."""
    file.seek(0)
    return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)


def _ogg_parts(file: IO[bytes], size: int) -> tuple[list[IO[bytes]], str]:
    try:
        recordings = ogg.recordings(file, size)
    except ogg.MultiplexedError:
        raise DecodeError(f"holds several recordings at the same time; choose one, {_FIX}") from None
    whole = all(recording.ended for recording in recordings)
    cut = "" if whole else "the last page of the Ogg stream is missing; decode and encode what is there"
    # Not even the second page begins.
    if cut and len(recordings[-1].pages) == 1 and size - sum(recordings[-1].pages[0]) < ogg.LONGEST_HEAD:
        raise DecodeError("the Ogg stream ends within its header")
    if len(recordings) == 1 and not recordings[0].is_flac:
        covered = sum(count for _, count in recordings[0].pages)
        if covered == size or not whole:
            return [_copy_of(file)], cut
    if not recordings:
        return [_copy_of(file)], ""
    return [_memory_file([ogg.copy(file, recording)]) for recording in recordings], cut


def _mp3_parts(file: IO[bytes]) -> list[IO[bytes]]:
    """MP3 files one after the other, each with a frame that states its length.

    From those that do not state it libsndfile stops at a guess, which is far off where the bit rate varies.
    """
    first = _mp3_start(file)
    file.seek(first)
    head = file.read(2048)
    if not _mp3_frame_bytes(head):
        return [_copy_of(file)]
    stated = _mp3_stated(head)
    size = file.seek(0, os.SEEK_END) - first
    # The usual file: its length is stated, and nothing or a short tag follows.
    if stated and 0 <= size - stated[1] <= _ID3V1_BYTES:
        return [_copy_of(file)]
    file.seek(first)
    audio = memoryview(file.read())
    spans = _mp3_spans(audio)
    if len(spans) == 1 and stated:
        return [_copy_of(file)]
    parts = []
    for begin, end in spans:
        part = audio[begin:end]
        lengths = [] if _mp3_stated(part[:2048]) else [_mp3_length_frame(part)]
        parts.append(_memory_file([*lengths, part]))
    return parts


def _require_mp3_frames(file: IO[bytes], count: int) -> None:
    """Raises DecodeError if an MP3 file ends before so many frames do."""
    size = file.seek(0, os.SEEK_END)
    at = _mp3_start(file)
    for frame in range(count):
        file.seek(at)
        head = file.read(4)
        frame_bytes = _mp3_frame_bytes(head)
        if len(head) == 4 and frame_bytes == 0:
            return  # something else that libsndfile may pass over
        at += max(frame_bytes, 4)
        if at > size:
            raise DecodeError(f"the file ends after {frame} whole MP3 frames", "truncated")


def _mp3_start(file: IO[bytes]) -> int:
    """Where the audio begins: behind an ID3v2 tag, if there is one."""
    file.seek(0)
    return _id3_bytes(file.read(10))


def _id3_bytes(head: bytes | memoryview) -> int:
    """Length of the ID3v2 tag that begins like this; 0 if none does."""
    if len(head) < _ID3_HEAD_BYTES or head[:3] != b"ID3":
        return 0
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return _ID3_HEAD_BYTES + size + (_ID3_HEAD_BYTES if head[5] & _ID3_FOOTER else 0)


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


def _mp3_stated(frame: bytes | memoryview) -> tuple[int, int] | None:
    """(frames, bytes) that follow, as a length frame states them, 0 where not; None: it is no such frame."""
    if not _mp3_frame_bytes(frame):
        return None
    mpeg1, mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    side_bytes = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    # Encoders write the tag there whether or not a checksum precedes the side information.
    for at in (4 + side_bytes, 6 + side_bytes):
        tag = bytes(frame[at : at + 16])
        if len(tag) == 16 and tag.startswith((b"Xing", b"Info")):
            flags, *fields = struct.unpack(">3I", tag[4:])
            frames = fields.pop(0) if flags & 1 else 0
            return frames, fields[0] if flags & 2 else 0
    tag = bytes(frame[36:54])
    if len(tag) == 18 and tag.startswith(b"VBRI"):
        total, frames = struct.unpack(">II", tag[10:])
        return frames, total
    return None


def _mp3_kind(head: bytes | memoryview) -> tuple[int, int, bool]:
    """What stays the same within a recording: version, rate, and whether it is mono."""
    return head[1] & 0x18, head[2] & 0x0C, head[3] >> 6 == 3


def _mp3_spans(audio: memoryview) -> list[tuple[int, int]]:
    """(begin, end) of each of the recordings that follow one another in `audio`.

    A recording begins where a frame states a length, where the frames change in kind, and where many more
    frames follow than were stated.
    """
    begins, at, frames, in_step = [0], 0, 0, True
    kind, stated = _mp3_kind(audio), _mp3_stated(audio[:64])
    while (begin := _next_mp3_frame(audio, at, kind if in_step else None)) is not None:
        head = audio[begin : begin + 64]
        length = _mp3_stated(head)
        more = stated is not None and frames == stated[0] > 0 and _goes_on(audio, begin)
        if begin > 0 and (length or more or _mp3_kind(head) != kind):
            begins.append(begin)
            frames, kind, stated = 0, _mp3_kind(head), length
        frames += length is None
        at = begin + _mp3_frame_bytes(head)
        # Where no frame follows, this one may be cut, and the next recording begin within its stated length.
        in_step = at >= len(audio) or _MP3_HEADER.match(audio, at) is not None
        at = at if in_step else begin + 4
    return list(zip(begins, [*begins[1:], len(audio)], strict=True))


def _next_mp3_frame(audio: memoryview, at: int, kind: tuple[int, int, bool] | None) -> int | None:
    """Where the next frame begins, behind tags and other bytes that are none.

    It is one if it begins at once and is of the kind. Others count only if another one of theirs follows, or
    nothing.

    Raises:
        DecodeError: it begins so far behind other bytes that a decoder would give up before.
    """
    gap_at = at
    while at < len(audio):
        match = _MP3_HEADER.search(audio, at)
        begin = match.start() if match else len(audio)
        tag = bytes(audio[at:begin]).find(b"ID3") if begin > at else -1
        if tag >= 0 and (tag_bytes := _id3_bytes(audio[at + tag : at + tag + _ID3_HEAD_BYTES])):
            at = gap_at = at + tag + tag_bytes
            continue
        if match is None:
            return None
        head = audio[begin : begin + 4]
        found = _mp3_kind(head)
        if begin == at and found == kind:
            return begin
        following = audio[begin + _mp3_frame_bytes(head) :][:4]
        goes_on = _mp3_frame_bytes(following) > 0 and _mp3_kind(following) == found
        gap = begin - gap_at
        if goes_on and gap > _MP3_LONGEST_GAP:
            raise DecodeError(
                f"a second recording follows behind {gap} bytes of something else; split them, {_FIX}"
            )
        if goes_on or (len(following) < 4 and gap <= _MP3_LONGEST_GAP):
            return begin
        at = begin + 1
    return None


def _goes_on(audio: memoryview, at: int) -> bool:
    """Whether so many frames follow that they are not the end of the recording before."""
    for _ in range(_MP3_FEW_FRAMES):
        size = _mp3_frame_bytes(audio[at : at + 4])
        if size == 0:
            return False
        at += size
    return True


@functools.lru_cache(maxsize=1)
def _stream_class() -> type[SoundFile]:
    import soundfile

    class Unseekable(soundfile.SoundFile):  # type: ignore[misc]
        """Reads on where SoundFile.read would seek: behind the last frame that a wrong header promised."""

        def seekable(self) -> bool:
            return False

    return Unseekable
