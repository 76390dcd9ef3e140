"""Captions without a server: measures each recording and describes what was measured.

The captions are about the voice alone: sex, pitch, speaking rate, intonation, loudness, voice quality,
pauses, and how these change. What the measurement leaves open is not mentioned. A clip's captions depend only
on the seed, the clip's id and its labels, so the manifest is the same for any number of threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clsp_fast import __version__, audio
from clsp_fast.audio import AudioError, AudioLimits, Segment
from clsp_fast.captioning import labels as labelling
from clsp_fast.captioning import wording
from clsp_fast.captioning.labels import FIXED, Bands, CorpusValues
from clsp_fast.captioning.measure import Measurement, measure_rows, measurement_of
from clsp_fast.captioning.wording import ATTRIBUTES
from clsp_fast.checks import counted, require
from clsp_fast.console import INCOMPLETE, Progress
from clsp_fast.data.audio_paths import AudioPaths
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import KINDS, Clip
from clsp_fast.data.manifest import Problem, read_source
from clsp_fast.data.manifest_lines import first_row, manifest_line, refuse_other_file
from clsp_fast.data.tag_values import is_unknown, sex_of, stated
from clsp_fast.storage import files, paths
from clsp_fast.storage.textfile import is_text

_CHUNK_S, _CHUNK = 600.0, 512  # most seconds and most recordings that are in memory at a time
_ESTIMATE = 4.0  # a recording whose length is estimated counts so many times: its bit rate may vary
_MEASURED = "measured_labels"  # the tag that lists the attributes whose labels were measured
_LEFT_OUT_KEYS = {"id", "audio", "reason", "detail"}
_MOST_SHOWN = 10
_REPORTED: tuple[str, ...] = (
    *("level_db", "tilt_db", "voiced", "hnr_db", "creak"),
    *("f0_hz", "f0_sd", "f0_range", "f0_slope", "syllables_per_s", "pauses", "pause_s"),
)
_REASONS = {
    "silent": "no sound",
    "short": "less than 0.5 s of sound",
    "no_speech": "a steady sound, or one without syllables",
    "unclear": "too little about the voice could be measured",
    "repeated": "the id occurs earlier in the source",
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A recording without captions, or a bad line of the source, which names no recording.

    Attributes:
        id: of the clip, or the bad line such as "line 3".
        audio: the recording; empty for a bad line.
        reason: a word that can be counted.
        detail: the reason in words.
    """

    id: str
    audio: str
    reason: str
    detail: str


@dataclass
class Summary:
    """What `caption_offline` did."""

    source: str
    out: Path
    clips: int = 0
    """Clips in the manifest."""
    seconds: float = 0.0
    """Length of all recordings that could be read."""
    wall_s: float = 0.0
    """How long the work took."""
    kept_captions: int = 0
    """Clips that keep captions of the source."""
    sex: Counter[str] = field(default_factory=Counter)
    """Clips whose sex is "from the manifest", "measured" or "left open"."""
    labels: dict[str, Counter[str]] = field(default_factory=lambda: {a: Counter() for a in ATTRIBUTES})
    """For each attribute, clips by label; "" for none."""
    foreign: Counter[str] = field(default_factory=Counter)
    """Tags of the source with values that captions have no words for."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Recordings without captions."""
    problems: list[Problem] = field(default_factory=list)
    """Bad lines of the source."""
    bands: Bands = FIXED
    """What the words meant."""
    relative: bool = False
    """Whether the bands are those of the corpus."""

    @property
    def complete(self) -> bool:
        """Whether every recording of the source has captions."""
        return not self.left_out and not self.problems

    def leave_out(self, clip: Clip, reason: str, detail: str = "") -> None:
        """Notes that a clip has no captions."""
        self.left_out.append(LeftOut(clip.id, clip.audio, reason, detail or _REASONS[reason]))

    def count(self, clip: Clip, tags: Mapping[str, str], known: Mapping[str, str], kept: Captions) -> None:
        """Counts a clip of the manifest."""
        self.clips += 1
        self.kept_captions += any(kept)
        how = "left open" if "sex" not in tags else "from the manifest" if "sex" in known else "measured"
        self.sex[how] += 1
        for attribute, counts in self.labels.items():
            counts[tags.get(attribute, "")] += 1
        self.foreign.update(foreign_tags(clip, known))


def offline(
    source: str,
    out: Path,
    /,
    *,
    bands: Literal["corpus", "fixed"] = "corpus",
    seed: int = 0,
    replace: bool = False,
    longest_s: float = 60.0,
    num_threads: int | None = None,
) -> int:
    """Writes captions for recordings from measurements alone, as a manifest that training reads.

    Each clip gets one or two global captions, and 5 to 14 fine-grained ones: the more is known, the more. A
    clip that has captions keeps them; only a kind (global, fine-grained) that is missing is written. Speaker,
    gender and tags of a manifest are kept; a gender, or a tag such as "quality": "whisper", replaces what
    would be measured. The tag "measured_labels" names those that were measured; a later run measures
    them once more. Recordings that cannot be used, and bad lines of a manifest, are listed in a file beside
    OUT whose name ends in .left-out.jsonl.

    Args:
        source: a folder, a recording, a manifest (.jsonl), a list with one path per line, or - for standard
            input.
        out: the manifest to write. An earlier result of this command is replaced, any other file is kept.
        bands: what "slow" or "loud" means. corpus: compared with the other clips of this source (30 % are
            slow, 30 % fast); where fewer than 50 clips have a value, the fixed numbers. fixed: the same
            numbers for every source, those of the demo corpus; take it to train on several sources, or with
            the demo corpus.
        seed: seed of the choice of words.
        replace: write new captions for clips that have some.
        longest_s: a longer clip is left out, because one description cannot fit all of it. Parts of a
            recording are named in a manifest with start_s and duration_s.
        num_threads: threads that decode and measure; None: one per CPU, at most 16.

    Returns:
        The command's exit code: 0 if every recording has captions, 3 if not, 130 after Ctrl-C.
    """
    try:
        summary = caption_offline(
            source, out, bands=bands, seed=seed, replace=replace, longest_s=longest_s, num_threads=num_threads
        )
    except KeyboardInterrupt:
        print(f"stopped by SIGINT; {out} was not written", file=sys.stderr)
        return 130
    for problem in summary.problems[:_MOST_SHOWN]:
        print(f"{source}, line {problem.line}: {problem.message}", file=sys.stderr)
    print(describe(summary))
    return 0 if summary.complete else INCOMPLETE


def caption_offline(
    source: str,
    out: Path,
    *,
    bands: Literal["corpus", "fixed"] = "corpus",
    seed: int = 0,
    replace: bool = False,
    longest_s: float = 60.0,
    num_threads: int | None = None,
) -> Summary:
    """Does the work of `offline`, with the same arguments, and returns what was done.

    Raises:
        FileNotFoundError: there is no such source. ValueError: an argument is wrong, the source names no
        recording, no recording can be captioned, or `out` or its `left_out_file` is the source or a file that
        this command did not write.
        files.DiskFull: there is no room; nothing is left behind.
    """
    require(bands in ("corpus", "fixed"), "bands", '"corpus" or "fixed"', bands)
    require(0 <= seed < 2**63, "seed", "in [0, 2^63)", seed)
    require(0.5 < longest_s <= 3600, "longest_s", "in (0.5, 3600]", longest_s)
    require(num_threads is None or num_threads >= 1, "num_threads", "an integer > 0", num_threads)
    threads = audio.check_num_threads(num_threads)
    out = Path(out)
    _check_out(out, source)
    name_audio = AudioPaths(_folder_of(source), out.parent)
    started = time.perf_counter()
    clips, problems = read_source(source)
    summary = Summary(source=source, out=out, problems=problems)
    provenance = {"by": "offline", "version": __version__, "bands": bands, "seed": seed}
    with files.naming_full_disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _Spool(out.parent) as spool:
            usable, values = _measure_all(_named(clips, source, summary), spool, longest_s, threads, summary)
            if bands == "corpus":
                summary.bands, summary.relative = values.bands(), True

            def write_to(path: Path) -> None:
                with path.open("w", encoding="ascii") as file:
                    for clip, measurement in zip(usable, spool, strict=True):
                        line = _line(clip, name_audio(clip.audio), measurement, summary, provenance, replace)
                        if line:
                            file.write(json.dumps(line) + "\n")
                if not summary.clips:
                    _write_left_out(summary)
                    raise ValueError(
                        f"{source}: none of {counted(len(clips), 'recording')} has captions: "
                        f"{_reasons(summary)}; see {left_out_file(out)}"
                    )

            files.replace_file(out, write_to)
        _write_left_out(summary)
    summary.wall_s = time.perf_counter() - started
    return summary


def left_out_file(out: Path) -> Path:
    """The file beside a manifest that lists the recordings without captions."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.left-out.jsonl")


def _check_out(out: Path, source: str) -> None:
    """ValueError if the result must not be written to `out`, or its list to `left_out_file(out)`."""
    require(out.name.endswith(".jsonl"), "out", "a file whose name ends in .jsonl", str(out))
    for file in (out, left_out_file(out)):
        if source != "-" and paths.exists(source) and paths.exists(file) and file.samefile(source):
            raise ValueError(f"{file} is the source; name another file for the result")
    refuse_other_file(out, "offline")
    others = left_out_file(out)
    if paths.is_dir(others) or (paths.exists(others) and first_row(others).keys() != _LEFT_OUT_KEYS):
        raise ValueError(
            f"{others}, the list of recordings without captions, exists and was not written by this command; "
            "name another file for the result, or remove it"
        )


def _folder_of(source: str) -> Path:
    """The folder of the recordings, or of the file that names them."""
    return Path() if source == "-" else Path(source) if paths.is_dir(source) else Path(source).parent


def _named(clips: Iterable[Clip], source: str, summary: Summary) -> Iterator[Clip]:
    """The clips with ids that can be written. In a folder, the id is the path relative to the folder."""
    folder = source if source != "-" and paths.is_dir(source) else None
    seen: set[str] = set()
    for clip in clips:
        name = os.path.relpath(clip.id, folder) if folder is not None else clip.id
        if not is_text(name):
            name = os.fsencode(name).decode("utf-8", "backslashreplace")
        clip = dataclasses.replace(clip, id=name)
        if name in seen:
            summary.leave_out(clip, "repeated")
            continue
        seen.add(name)
        yield clip


class _Spool:
    """Rows of `measure_rows` in a temporary file, so that a large corpus needs little memory."""

    def __init__(self, folder: Path) -> None:
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            error.filename = str(folder)  # not the name of the temporary file
            raise
        self._row_bytes = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, row: NDArray[np.float64]) -> None:
        """Writes a row at the end."""
        self._row_bytes = row.nbytes
        self._file.write(row.tobytes())

    def __iter__(self) -> Iterator[Measurement]:
        self._file.seek(0)
        while block := self._file.read(self._row_bytes):
            yield measurement_of(np.frombuffer(block))


def _measure_all(
    clips: Iterable[Clip], spool: _Spool, longest_s: float, num_threads: int, summary: Summary
) -> tuple[list[Clip], CorpusValues]:
    """Measures every clip into `spool`. Returns the clips that are speech, and the values for `bands`."""
    usable: list[Clip] = []
    values = CorpusValues()
    limits = AudioLimits(max_s=longest_s)
    progress = Progress(None, "recordings")
    for chunk in _chunks(clips, longest_s, num_threads):
        segments = [Segment(clip.audio, clip.start_s, clip.duration_s, clip.channel) for clip in chunk]
        loaded = audio.load_batch(segments, limits=limits, num_threads=num_threads)
        waveforms = [waveform for waveform in loaded if not isinstance(waveform, AudioError)]
        rows = iter(measure_rows(waveforms, num_threads=num_threads))
        for clip, waveform in zip(chunk, loaded, strict=True):
            if isinstance(waveform, AudioError):
                summary.leave_out(clip, str(waveform.reason), _detail(waveform))
                continue
            row = next(rows)
            measurement = measurement_of(row)
            summary.seconds += measurement.duration_s
            if problem := labelling.speech_problem(measurement):
                summary.leave_out(clip, problem)
                continue
            usable.append(clip)
            values.add(measurement, known_labels(clip))
            spool.append(row)
        progress.add(len(chunk), len(chunk) - len(waveforms))
    return usable, values


def _chunks(clips: Iterable[Clip], longest_s: float, num_threads: int) -> Iterator[list[Clip]]:
    """Groups of clips that fit in memory together. The threads read the lengths of the recordings."""
    chunk: list[Clip] = []
    total_s = 0.0
    remaining = iter(clips)
    with ThreadPoolExecutor(num_threads) as pool:
        while group := [*itertools.islice(remaining, _CHUNK)]:
            for clip, length_s in zip(group, pool.map(_largest_length_s, group), strict=True):
                seconds = min(length_s, longest_s)
                if chunk and (total_s + seconds > _CHUNK_S or len(chunk) == _CHUNK):
                    yield chunk
                    chunk, total_s = [], 0.0
                chunk.append(clip)
                total_s += seconds
    if chunk:
        yield chunk


def _largest_length_s(clip: Clip) -> float:
    """A clip's length, or a bound of it; infinite where neither the manifest nor the file states any."""
    if clip.duration_s is not None:
        return clip.duration_s
    try:
        header = audio.info(clip.audio)
    except AudioError:
        return math.inf
    if header.frames is None:
        return math.inf
    seconds = max(header.frames / header.sample_rate_hz - clip.start_s, 0.0)
    return seconds if header.exact else _ESTIMATE * seconds


def _detail(error: AudioError) -> str:
    """Why a recording cannot be read. A clip that is too long needs an option of this command."""
    if error.reason != audio.AudioErrorReason.TOO_LONG:
        return error.detail
    advice = "raise --longest-s, or name parts of it in a manifest with start_s and duration_s"
    return f"{error.detail.partition(';')[0]}; {advice}"


def known_labels(clip: Clip, *, with_measured: bool = False) -> dict[str, str]:
    """The labels that the manifest gives: attribute -> label; "" if captions have no words for its value.

    Args:
        clip: of the manifest.
        with_measured: include the labels that an earlier run of `offline` measured.
    """
    measured = set() if with_measured else set(clip.tags.get(_MEASURED, "").split(", "))
    given = {key: value for key, value in clip.tags.items() if key not in measured}
    known = {}
    for attribute in ATTRIBUTES:
        value = given.get(attribute, "")
        if value and attribute != "sex":
            usable = value in ATTRIBUTES[attribute] or wording.has_change(attribute, value)
            known[attribute] = value if usable else ""
    for key in ("gender", "sex"):
        sex = given.get(key, "")
        if not is_unknown(sex):
            known["sex"] = sex_of(sex)
    return known


def foreign_tags(clip: Clip, known: Mapping[str, str]) -> list[str]:
    """The tags whose values captions have no words for, such as "sex": "alien". `known`: `known_labels`."""
    foreign = [attribute for attribute, label in known.items() if not label and attribute != "sex"]
    sexes = {key: clip.tags.get(key, "") for key in ("gender", "sex")}
    return foreign + [key for key, value in sexes.items() if stated(value) and not sex_of(value)]


def describe_foreign(counts: Mapping[str, int]) -> list[str]:
    """A line for each tag of `foreign_tags`, from the number of clips that have it."""
    return [
        f'captions have no words for the tag "{tag}" of {counted(count, "clip")}: '
        "it is kept, but not described"
        for tag, count in counts.items()
    ]


def _line(
    clip: Clip,
    audio: str,
    measurement: Measurement,
    summary: Summary,
    provenance: Mapping[str, Any],
    replace: bool,
) -> dict[str, Any] | None:
    """The clip's line in the manifest; None if too little is known for captions."""
    known = known_labels(clip)
    tags = labelling.labels(measurement, summary.bands, known)
    kept = Captions((), ()) if replace else clip.captions
    if not all(kept) and not _is_enough(tags):
        summary.leave_out(clip, "unclear")
        return None
    summary.count(clip, tags, known, kept)
    written = _captions(clip, tags, kept, provenance["seed"])
    measured = [attribute for attribute in tags if attribute not in known]
    given = dict(clip.tags)
    for attribute in given.pop(_MEASURED, "").split(", "):
        given.pop(attribute, None)
    new = [kind for kind, texts in zip(KINDS, kept, strict=True) if not texts]
    return manifest_line(
        clip,
        audio=audio,
        captions=Captions(tuple(written.global_captions), tuple(written.fine_captions)),
        claims={"global": written.global_claims, "fine": written.fine_claims},
        tags=given | tags | ({_MEASURED: measured} if measured else {}),
        made_by=dict.fromkeys(new, provenance),
        written_by="offline",
        duration_s=clip.duration_s or measurement.duration_s,
        measured=_measured(measurement),
    )


def _is_enough(tags: Mapping[str, str]) -> bool:
    """Whether captions can be written: from two labels, or from one that is neither the sex nor neutral."""
    return len(tags) > 1 or any(a != "sex" and label != wording.NEUTRAL.get(a) for a, label in tags.items())


def _captions(clip: Clip, tags: Mapping[str, str], kept: Captions, seed: int) -> wording.Captions:
    """The captions that are kept, and new ones of each kind of which none is kept."""
    if all(kept):
        written = wording.Captions([], [], [], [])
    else:
        digest = hashlib.sha256(clip.id.encode()).digest()
        written = wording.captions(tags, np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]))
    global_claims, fine_claims = (
        [dict(claims) for claims in clip.claims.get(kind, ())] for kind in ("global", "fine")
    )
    return wording.Captions(
        global_captions=[*kept.global_captions] or written.global_captions,
        fine_captions=[*kept.fine_captions] or written.fine_captions,
        global_claims=global_claims if kept.global_captions else written.global_claims,
        fine_claims=fine_claims if kept.fine_captions else written.fine_claims,
    )


def _measured(measurement: Measurement) -> dict[str, Any]:
    """What was measured, for users of the manifest; values that could not be measured are left out."""
    values = {name: getattr(measurement.whole, name) for name in _REPORTED}
    values |= {f"f{i}_hz": hz for i, hz in enumerate(measurement.formants_hz, 1)}
    values |= {"bandwidth_hz": measurement.bandwidth_hz, "snr_db": measurement.snr_db}
    return {key: _rounded(value) for key, value in values.items() if math.isfinite(value)}


def _rounded(value: float) -> float:
    """Four significant digits. More would differ between processors."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _write_left_out(summary: Summary) -> None:
    path = left_out_file(summary.out)
    bad_lines = [LeftOut(f"line {p.line}", "", "bad_line", p.message) for p in summary.problems]
    if items := summary.left_out + bad_lines:
        lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in items)
        files.write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def _reasons(summary: Summary) -> str:
    counts = Counter(item.reason for item in summary.left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def describe(summary: Summary) -> str:
    """A few lines about what was done: clips, speed, labels and what was left out."""
    speed = summary.seconds / max(summary.wall_s, 1e-9)
    clips = counted(summary.clips, "clip")
    lines = [
        f"{summary.out}: captions for {clips}; {summary.seconds / 3600:.2f} h of recordings in "
        f"{summary.wall_s:.1f} s, {speed:,.0f} x real time"
    ]
    if summary.kept_captions:
        kept = counted(summary.kept_captions, "clip")
        lines.append(f"captions of the source are kept for {kept} (--replace writes new ones)")
    how = ", ".join(f"{summary.sex[how]} {how}" for how in ("from the manifest", "measured", "left open"))
    lines.append(f"source of the sex: {how}")
    for attribute, counts in summary.labels.items():
        shares = [f"{label or 'left open'} {count}" for label, count in counts.most_common()]
        lines.append(f"{attribute}: {', '.join(shares)}")
    lines += describe_foreign(summary.foreign)
    lines += _bands_in_words(summary)
    see = f"; see {left_out_file(summary.out)}"
    if summary.left_out:
        lines.append(f"left out: {_reasons(summary)}{see}")
        for item in summary.left_out[:_MOST_SHOWN]:
            lines.append(f"  {item.audio}: {item.detail} [{item.reason}]")
    if summary.problems:
        lines.append(f"{counted(len(summary.problems), 'bad line')} in {summary.source}{see}")
    return "\n".join(lines)


def _bands_in_words(summary: Summary) -> list[str]:
    bands = summary.bands
    tables = [(f"pitch of a {sex} voice, Hz", table, FIXED.pitch[sex]) for sex, table in bands.pitch.items()]
    tables += [
        ("speed, syllables/s", bands.speed, FIXED.speed),
        ("liveliness, semitones", bands.liveliness, FIXED.liveliness),
        ("loudness, dB", bands.loudness, FIXED.loudness),
    ]
    lines = []
    for name, table, fixed in tables:
        ranges = ", ".join(f"{label} {low:.3g} to {high:.3g}" for label, (low, high) in table.items())
        few = f"; fixed, because fewer than {labelling.MIN_VALUES} clips have a value"
        lines.append(f"bands of {name}: {ranges}{few if summary.relative and table is fixed else ''}")
    return lines
