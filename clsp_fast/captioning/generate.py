"""Asks an audio language model for candidate captions of each clip of a manifest."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from clsp_fast import __version__, audio
from clsp_fast.audio import DEFAULT_LIMITS, AudioError, AudioErrorReason, AudioLimits, Segment, Waveform
from clsp_fast.captioning.answers import Answer, custom_id, recorded_rows
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.job_files import exchange_files
from clsp_fast.captioning.jobs import run_jobs
from clsp_fast.captioning.prompt import Prompt, read_prompt
from clsp_fast.captioning.request import Request
from clsp_fast.captioning.rows import ALL_ROWS, RowRange, clips_of_rows, describe_rows, rows_as_json, union
from clsp_fast.checks import is_positive, listed, require
from clsp_fast.console import INCOMPLETE
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import Problem
from clsp_fast.data.tag_values import stated
from clsp_fast.storage import paths

STEP = "generate"
_RATE_HZ = 16_000
_BYTES_READ = 2**20
_SHOWN_PROBLEMS = 10
_EXPECTED = 'expected a manifest with lines such as {"audio": "a.wav"}'


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model chooses words. The defaults are those of the paper."""

    temperature: float = 0.6
    """0 always takes the most probable word, so that all candidates of a request are the same."""
    top_p: float = 0.95
    """Only the most probable words, which together have this probability, are considered."""
    top_k: int = 20
    """Only this many words are considered; 0: not sent, for servers that do not know top_k."""
    max_tokens: int = 512
    """Longest answer, in tokens. Answers that reach it are marked as cut, and are dropped later."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 10, "sampling.temperature", "in [0, 10]", self.temperature)
        require(0 < self.top_p <= 1, "sampling.top_p", "in (0, 1]", self.top_p)
        require(self.top_k >= 0, "sampling.top_k", "an integer >= 0", self.top_k)
        require(is_positive(self.max_tokens), "sampling.max_tokens", "an integer > 0", self.max_tokens)

    def to_body(self) -> dict[str, Any]:
        """The fields of a request."""
        fields = asdict(self)
        return fields if self.top_k else {k: v for k, v in fields.items() if k != "top_k"}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Asks an audio language model for candidate captions of each clip.

    The manifest is one that `train` reads, but needs no captions. If the command is stopped, the same command
    continues the work.
    """

    manifest: Path
    """Manifest (.jsonl, .jsonl.gz) or lhotse cuts."""
    work: Path
    """Working folder; the answers go to WORK/generate."""
    server: ServerConfig = field(default_factory=ServerConfig)
    sampling: Sampling = field(default_factory=Sampling)
    candidates: int = 5
    """Captions that are asked for each clip."""
    candidates_per_request: int | None = None
    """Captions that one request asks for: 1 for servers that ignore `n`. None: all of a clip."""
    max_clip_s: float = 30.0
    """Longer clips are left out and counted."""
    seed: int = 0
    """The seed of each request is derived from this seed and from the clip's row."""
    tags: tuple[str, ...] = ("accent", "speaking_rate", "situational_tags")
    """Tags of the manifest that are told to the model, if a clip has them."""
    prompt: Path | None = None
    """File with another prompt. None: prompts/generate.txt of the package."""
    audio_url: str | None = None
    """Sends the address of each file instead of the sound: "file" for file:// URLs, or the http(s) URL that
    stands for the manifest's folder. The server must be allowed to read them. A clip that is only a part of
    its file is sent as sound. If a file is not on this machine, a clip without start_s and channel counts as
    the whole file, even if its duration_s is shorter."""
    rows: str = ""
    """Part of the manifest, counted from 0 without the end, such as 0:1000000: a machine's share of the work.
    Empty: all rows, or with --answers those that earlier calls were asked for. Later calls can add further
    rows to the same folder."""
    jobs_only: bool = False
    """Sends nothing, but writes WORK/generate/jobs.jsonl with the requests, for `vllm run-batch`. Job files
    of earlier calls are replaced, so the rows of those calls are included."""
    shard_rows: int | None = None
    """With --jobs-only: rows of the manifest in a job file. None: one file for all."""
    answers: tuple[Path, ...] = ()
    """Files with answers to such job files. They are added to WORK/generate."""
    decode_threads: int = 4
    """Threads that decode recordings while others are sent."""

    def __post_init__(self) -> None:
        for name in ("candidates", "decode_threads"):
            require(is_positive(getattr(self, name)), name, "an integer > 0", getattr(self, name))
        for name in ("candidates_per_request", "shard_rows"):
            value = getattr(self, name)
            require(value is None or is_positive(value), name, "an integer > 0 or None", value)
        require(0 < self.max_clip_s < math.inf, "max_clip_s", "seconds > 0", self.max_clip_s)
        ok = self.shard_rows is None or self.jobs_only
        require(ok, "shard_rows", "given with --jobs-only", self.shard_rows)
        url = self.audio_url
        is_url = url is None or url == "file" or urlsplit(url).scheme in ("http", "https")
        require(is_url, "audio_url", '"file" or an http(s) URL', url)
        self.server.require_model()
        _ = self.row_range

    @property
    def row_range(self) -> RowRange:
        """The first row, and the row after the last."""
        if not self.rows:
            return ALL_ROWS
        first, colon, end = self.rows.partition(":")
        valid = colon == ":" and all(text.isdecimal() or not text for text in (first, end))
        start, stop = (int(first or 0), int(end) if end else math.inf) if valid else (0, 0)
        require(valid and start < stop, "rows", "a range such as 0:1000000", self.rows)
        return start, stop

    @property
    def per_request(self) -> int:
        """Captions that a request asks for."""
        return min(self.candidates, self.candidates_per_request or self.candidates)

    @property
    def parts(self) -> int:
        """Requests of a clip."""
        return -(-self.candidates // self.per_request)


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """What identifies a manifest in job.json, and its number of lines (0: not known, the file is gzipped)."""

    name: str
    bytes: int
    sha256: str
    lines: int


def read_facts(path: Path) -> ManifestFacts:
    """Reads the whole file once. FileNotFoundError if it does not exist."""
    digest, size, lines, last = hashlib.sha256(), 0, 0, b""
    if paths.is_dir(path) or not paths.exists(path):
        kind = "is a folder" if paths.is_dir(path) else "does not exist"
        raise FileNotFoundError(f"{path} {kind}; {_EXPECTED}")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        while part := file.read(_BYTES_READ):
            digest.update(part)
            size += len(part)
            lines += part.count(b"\n")
            last = part
    lines += bool(last) and not last.endswith(b"\n")
    return ManifestFacts(path.name, size, digest.hexdigest(), 0 if packed else lines)


def seed_of(seed: int, row: int, part: int) -> int:
    """The seed of a request, in [0, 2^31)."""
    digest = hashlib.sha256(f"{seed}/{row}/{part}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def wav_bytes(waveform: Waveform) -> bytes:
    """A WAV file with 16-bit samples at 16 kHz. Samples outside [-1, 1) are clipped."""
    samples: bytes = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype("<i2").tobytes()
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _RATE_HZ, 2 * _RATE_HZ, 2, 16)
    header = struct.pack("<4sI4s", b"RIFF", 36 + len(samples), b"WAVE") + layout
    return header + struct.pack("<4sI", b"data", len(samples)) + samples


def sound_of(clip: Clip, limits: AudioLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The part of a message that holds the recording. AudioError: it cannot be read or is too long."""
    source = Segment(clip.audio, start_s=clip.start_s, duration_s=clip.duration_s, channel=clip.channel)
    waveform = audio.load(source, sample_rate=_RATE_HZ, limits=limits)
    data = base64.b64encode(wav_bytes(waveform)).decode("ascii")
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def describe_tags(tags: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The tags for the prompt: "accent: Scottish; speaking rate: slow". Empty if there are none."""
    pairs = [(name.replace("_", " "), stated(tags[name])) for name in names if name in tags]
    return "; ".join(f"{name}: {value}" for name, value in pairs if value)


def is_longer(clip: Clip, longest_s: float) -> bool:
    """Whether a clip that states no duration is longer, by its file. False if that cannot be read."""
    try:
        info = audio.info(clip.audio)
    except (AudioError, OSError):
        return False
    return info.frames is not None and info.frames / info.sample_rate_hz - clip.start_s > longest_s


class _Source:
    """The requests of a manifest, and the count of what was left out."""

    def __init__(self, config: GenerateConfig, prompt: Prompt, rows: Sequence[RowRange]) -> None:
        self._config, self._prompt, self._rows = config, prompt, rows
        self.manifest = config.manifest
        self._limits = AudioLimits(max_s=config.max_clip_s)
        self._lock = threading.Lock()
        self.left_out: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def requests(self) -> Iterator[Request]:
        """The requests of all rows, in their order. Bodies are made later. The counts start at zero."""
        config = self._config
        self.left_out.clear()
        self.problems.clear()
        for row, clip in clips_of_rows(config.manifest, self._rows):
            if isinstance(clip, Problem):
                self.left_out["bad lines"] += 1
                if len(self.problems) < _SHOWN_PROBLEMS:
                    self.problems.append(clip)
            elif clip.duration_s is not None and clip.duration_s > config.max_clip_s:
                self._count_long()
            else:
                for part in range(config.parts):
                    name = custom_id(STEP, row, clip.id, part)
                    yield Request(name, functools.partial(self._body, clip, row, part))

    def require_clips(self, lines: int) -> None:
        """Raises ValueError if no line of the manifest, or of its rows, is a clip. It may be a long one.

        Args:
            lines: of the manifest; 0: not known.
        """
        config = self._config
        if 0 < lines <= config.row_range[0]:
            raise ValueError(
                f"{config.manifest} has {lines} lines, so no row of {config.rows}; rows count from 0"
            )
        if next(self.requests(), None) is None and self.left_out.keys() <= {"bad lines"}:
            where = f"rows {config.rows} of {config.manifest}" if config.rows else f"{config.manifest}"
            reasons = [f"line {problem.line}: {problem.message}" for problem in self.problems[:1]]
            raise ValueError(
                f"{where} holds no usable clip ({', '.join(reasons) or 'no lines'}); {_EXPECTED}"
            )

    def warn_of_unknown_tags(self) -> None:
        """Warns of --tags that no clip has. Stops reading the manifest where each was seen once."""
        missing = set(self._config.tags) - {*GenerateConfig.tags}
        names: set[str] = set()
        clips = clips_of_rows(self._config.manifest, [ALL_ROWS]) if missing else ()
        for _, clip in clips:
            if isinstance(clip, Clip):
                missing -= clip.tags.keys()
                names |= clip.tags.keys()
            if not missing:
                return
        if missing:
            print(
                f"warning: no clip of {self._config.manifest} has the tag {listed(sorted(missing))} "
                f"(--tags); the tags are {listed(sorted(names)) if names else 'none'}",
                file=sys.stderr,
            )

    def _count_long(self) -> None:
        with self._lock:
            self.left_out[f"clips over {self._config.max_clip_s:g} s"] += 1

    def _body(self, clip: Clip, row: int, part: int) -> Mapping[str, Any] | None:
        """The body of a request; None if the clip turns out to be too long."""
        config = self._config
        try:
            sound = self._sound(clip)
        except AudioError as error:
            if error.reason is not AudioErrorReason.TOO_LONG:
                raise
            if part == 0:
                self._count_long()
            return None
        values = {"tags": describe_tags(clip.tags, config.tags)}
        messages: list[dict[str, Any]] = []
        for role, text in self._prompt.messages(values):
            if role == "user":
                messages.append({"role": role, "content": [sound, {"type": "text", "text": text}]})
            else:
                messages.append({"role": role, "content": text})
        if not any(message["role"] == "user" for message in messages):
            messages.append({"role": "user", "content": [sound]})
        count = min(config.per_request, config.candidates - part * config.per_request)
        return {
            "model": config.server.model,
            "messages": messages,
            "n": count,
            "seed": seed_of(config.seed, row, part),
            **config.sampling.to_body(),
        }

    def _sound(self, clip: Clip) -> dict[str, Any]:
        """The part of the message that holds the recording or its address."""
        if self._config.audio_url is not None and self._is_whole_file(clip):
            return {"type": "audio_url", "audio_url": {"url": self._url(clip.audio)}}
        return sound_of(clip, self._limits)

    def _is_whole_file(self, clip: Clip) -> bool:
        """Whether the clip is all of its file. If the file is not on this machine, the manifest tells."""
        if clip.start_s or clip.channel is not None:
            return False
        if not paths.exists(clip.audio):
            return True
        info = audio.info(clip.audio)
        if info.frames is None or not info.exact:
            return clip.duration_s is None
        duration_s = info.frames / info.sample_rate_hz
        if clip.duration_s is not None:
            return abs(duration_s - clip.duration_s) < 0.1
        if duration_s > self._config.max_clip_s:
            raise AudioError(clip.audio, AudioErrorReason.TOO_LONG, f"{duration_s:.1f} s long")
        return True

    def _url(self, path: str) -> str:
        prefix = self._config.audio_url
        if prefix == "file":
            return Path(path).absolute().as_uri()
        folder = self._config.manifest.parent
        if not Path(path).is_relative_to(folder) or ".." in Path(path).relative_to(folder).parts:
            raise ValueError(f"{path} is not in the manifest's folder, so --audio-url has no address for it")
        name = quote(Path(path).relative_to(folder).as_posix(), errors="surrogateescape")
        return f"{str(prefix).rstrip('/')}/{name}"


class _ChoiceCheck:
    """Counts answers with fewer candidates than were asked for, and warns at the first."""

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config
        self.short = 0

    def __call__(self, answer: Answer) -> None:
        part = int(answer.custom_id.partition("/")[0].partition(".")[2])
        asked = min(self._config.per_request, self._config.candidates - part * self._config.per_request)
        if answer.error is None and len(answer.texts) < asked:
            self.short += 1
            if self.short == 1:
                print(
                    f"warning: a request for {asked} candidates was answered with {len(answer.texts)}; if "
                    "the server ignores n, begin another folder with --candidates-per-request 1",
                    file=sys.stderr,
                )


def generate(config: GenerateConfig) -> int:
    """Asks for candidate captions of every clip, or writes the requests as job files.

    Returns:
        The exit code of the command: 0, or 3 if some clips have no candidates, or no request in a job file.

    Raises:
        ValueError, FileNotFoundError: a setting or the manifest is wrong, or the folder was begun with other
        settings. ServerError, Stopped, FolderInUse, DiskFull: see `run_jobs`.
    """
    prompt = read_prompt(STEP, config.prompt, set())
    facts = read_facts(config.manifest)
    folder = config.work / STEP
    earlier = recorded_rows(folder)
    rows = earlier if config.answers and earlier and not config.rows else [config.row_range]
    _Source(config, prompt, rows).require_clips(facts.lines)
    if config.jobs_only:  # new job files replace those of earlier calls
        rows = union([*earlier, *rows])
    source = _Source(config, prompt, rows)
    source.warn_of_unknown_tags()
    job: dict[str, Any] = {
        "settings": _settings(config, prompt, facts),
        "parts": config.parts,
        "asked": rows,
        "notes": {
            "manifest_path": str(config.manifest.absolute()),
            "prompt": prompt.text,
            "version": __version__,
        },
    }
    exchange = exchange_files(
        source.requests,
        folder,
        sources=config.answers,
        write=config.jobs_only,
        shard_rows=config.shard_rows,
        **job,
    )
    if config.jobs_only:
        if rows != [config.row_range]:
            print(f"job files cover the rows of this and earlier calls: {describe_rows(rows_as_json(rows))}")
        return _report(source, exchange.failed)
    if config.answers and not config.server.servers:
        if exchange.missing:
            print(f"{exchange.missing} requests have no answer: name servers, or write them with --jobs-only")
        return _report(source, exchange.missing)
    config.server.require_servers()
    check = _ChoiceCheck(config)
    counts = run_jobs(
        source.requests(),
        folder,
        config.server,
        total=_total(rows, config.parts, facts),
        noun="requests",
        on_answer=check,
        threads=config.decode_threads,
        **job,
    )
    print(f"{folder}: {counts.describe()}")
    if check.short:
        print(f"answers with fewer candidates than asked: {check.short}")
    return _report(source, counts.failed)


def _settings(config: GenerateConfig, prompt: Prompt, facts: ManifestFacts) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "step": STEP,
        "manifest": {"name": facts.name, "bytes": facts.bytes, "sha256": facts.sha256},
        "model": config.server.model,
        "prompt_digest": prompt.digest,
        "tags": list(config.tags),
        "seed": config.seed,
        "candidates": config.candidates,
        "candidates_per_request": config.per_request,
        "sampling": asdict(config.sampling),
        "max_clip_s": config.max_clip_s,
        "audio_url": config.audio_url,
    }


def _total(ranges: Sequence[RowRange], parts: int, facts: ManifestFacts) -> int | None:
    rows = sum(max(0, min(facts.lines, end) - first) for first, end in ranges)
    return int(rows) * parts or None


def _report(source: _Source, failed: int) -> int:
    """Says what was left out. Returns the exit code; `failed` is the number of requests without an answer."""
    for problem in source.problems:
        print(f"{source.manifest}, line {problem.line}: {problem.message}", file=sys.stderr)
    if source.left_out:
        parts = [f"{text}: {count}" for text, count in source.left_out.items()]
        print(f"left out: {', '.join(parts)}")
    return INCOMPLETE if failed or source.left_out else 0
