"""`caption filter WORK`: from the candidates of `generate` to a manifest that training reads.

A candidate is kept if its answer is whole, it breaks no rule, and, where the verifier ran, has no violation.
The order of answers and verdicts does not matter, because those of a clip are looked up by its row.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clsp_fast import __version__
from clsp_fast.captioning import generate, verify
from clsp_fast.captioning.answers import ANSWERS, AnswerIndex, identity, manifest_of, read_record
from clsp_fast.captioning.candidates import Candidate, candidates_of, texts_a_request
from clsp_fast.captioning.ids import Digests, digest
from clsp_fast.captioning.rows import asked_rows, clips_of_rows, rows_as_json
from clsp_fast.captioning.rules import EMPTY, Rules, read_rules
from clsp_fast.captioning.verify import UNVERIFIED, Verdict, Verdicts, check_manifest
from clsp_fast.checks import is_positive, require
from clsp_fast.console import INCOMPLETE, Progress
from clsp_fast.data.audio_paths import AudioPaths
from clsp_fast.data.caption_text import normalise
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest_lines import manifest_line
from clsp_fast.storage import files

CAPTIONS, COUNTS = "captions.jsonl", "filter.json"
"""What `filter` writes to the work folder: the manifest, and how many candidates were kept and dropped."""
REPEATED_IDS = "repeated ids"
"""What clips are counted as whose id an earlier clip of the new manifest has."""
_NOT_DONE = ("without answer", "too long", "bad lines", REPEATED_IDS)
NO_VERDICT = "without verdict"
"""Reason to drop a candidate: the verifier has not answered yet."""
REPEATED = "repeated"
"""Reason to drop a candidate: the clip has the same caption already."""
SURPLUS, TOO_FEW = "surplus", "too few in the clip"
"""Reasons to drop a candidate: its clip has `keep` captions already, or fewer than `min_captions`."""
CHARACTERS_A_BIN, WORDS_A_BIN = 32, 5
"""Width of a bin of the histograms of lengths."""
_PROGRESS_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Keeps the candidates that break no rule and that the verifier passed. Writes WORK/captions.jsonl, a
    manifest that training reads, and WORK/filter.json with the counts.

    If `verify` did not run, the candidates are not verified, and the manifest says so. Fine-grained captions
    that the clips had before are replaced.
    """

    work: Path
    """Working folder of `generate` and `verify`."""
    manifest: Path | None = None
    """The manifest that `generate` read. None: where it was then."""
    rules: Path | None = None
    """JSON file with other words and limits, in the form of captioning/rules.json; also for `verify`."""
    min_characters: int | None = None
    """Replaces the smallest length of the rules."""
    max_characters: int | None = None
    """Replaces the largest length of the rules."""
    keep: int = 14
    """Largest number of captions of a clip."""
    min_captions: int = 1
    """Clips with fewer captions are dropped."""
    longest: bool = False
    """Keeps the longest captions of a clip, and puts them first. Otherwise the shortest."""

    def __post_init__(self) -> None:
        require(is_positive(self.keep), "keep", "an integer > 0", self.keep)
        ok = is_positive(self.min_captions) and self.min_captions <= self.keep
        require(ok, "min_captions", f"in [1, {self.keep}] (keep)", self.min_captions)


@dataclass
class FilterCounts:
    """What `filter` did. A candidate that is dropped has one or more reasons."""

    clips: Counter[str] = field(default_factory=Counter)
    """"total" of the rows that `generate` was asked for; "kept", "without captions" (all candidates were
    dropped), "without answer", "too long" for `generate`, "bad lines", and "repeated ids"."""
    candidates: Counter[str] = field(default_factory=Counter)
    """"total", "kept" and "dropped"."""
    first_reasons: Counter[str] = field(default_factory=Counter)
    """Reason -> candidates that were dropped with this as their first reason. Adds up to "dropped"."""
    all_reasons: Counter[str] = field(default_factory=Counter)
    """Reason -> candidates that were dropped with this as one of their reasons."""
    global_captions: Counter[str] = field(default_factory=Counter)
    """"kept", or why a global caption of the manifest was dropped."""
    candidates_per_clip: Counter[int] = field(default_factory=Counter)
    """Number of candidates -> clips."""
    captions_per_clip: Counter[int] = field(default_factory=Counter)
    """Number of captions that were kept -> clips."""
    characters: dict[str, Counter[int]] = field(default_factory=lambda: {"all": Counter(), "kept": Counter()})
    """Number of characters // 32 -> captions, of "all" whole answers and of the "kept" ones."""
    words: dict[str, Counter[int]] = field(default_factory=lambda: {"all": Counter(), "kept": Counter()})
    """Number of words // 5 -> captions."""
    audio_s: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "asked": 0.0, "kept": 0.0})
    """Seconds of audio in clips whose duration the manifest states. "asked" leaves out clips that are too
    long."""
    partly_answered: int = 0
    """Clips that lack some of the answers."""
    unknown_durations: int = 0
    """Clips whose duration the manifest does not state."""

    def drop(self, *reasons: str) -> None:
        """Counts a candidate that is dropped."""
        self.candidates["dropped"] += 1
        self.first_reasons[reasons[0]] += 1
        self.all_reasons.update(reasons)

    def count_lengths(self, kind: str, caption: str) -> None:
        """Adds a caption to the histograms of "all" or "kept"."""
        self.characters[kind][len(caption) // CHARACTERS_A_BIN] += 1
        self.words[kind][len(caption.split()) // WORDS_A_BIN] += 1

    def keep(self, clip: Clip, captions: list[str]) -> None:
        """Counts a clip of the manifest."""
        self.clips["kept"] += 1
        self.audio_s["kept"] += clip.duration_s or 0.0
        self.candidates["kept"] += len(captions)
        for caption in captions:
            self.count_lengths("kept", caption)

    def as_json(self) -> dict[str, Any]:
        """For filter.json: the keys of a histogram in their order, the reasons by their counts."""
        values = dict(vars(self))
        for key in ("first_reasons", "all_reasons", "global_captions"):
            values[key] = dict(sorted(values[key].items(), key=lambda item: (-item[1], item[0])))
        for key in ("candidates_per_clip", "captions_per_clip"):
            values[key] = dict(sorted(values[key].items()))
        for key in ("characters", "words"):
            values[key] = {kind: dict(sorted(counts.items())) for kind, counts in values[key].items()}
        return values

    def describe(self) -> str:
        """A few lines of text."""
        clips, candidates = self.clips, self.candidates
        lines = [
            f"{clips['kept']} of {clips['total']} clips have captions",
            f"{candidates['kept']} of {candidates['total']} candidates are kept",
        ]
        for key in ("without captions", *_NOT_DONE):
            if clips[key]:
                lines.append(f"{key}: {clips[key]}")
        if self.partly_answered:
            lines.append(f"answered in part: {self.partly_answered}")
        if self.first_reasons:
            reasons = [f"{reason} {count}" for reason, count in self.first_reasons.most_common()]
            lines.append(f"dropped, by their first reason: {', '.join(reasons)}")
        return "\n".join(lines)


def reasons_to_drop(
    candidate: Candidate, rules: Rules, verdict: Verdict | None, *, verified: bool
) -> tuple[str, ...]:
    """Why a candidate is dropped: its fault, or all rules that it breaks, or the verifier's violations."""
    if candidate.caption is None:
        return (candidate.fault or EMPTY,)
    broken = rules.broken(candidate.caption)
    if broken or not verified:
        return broken
    if verdict is None:
        return (NO_VERDICT,)
    if verdict.fault:
        return (UNVERIFIED,)
    return tuple(f"verifier: {violation}" for violation in verdict.violations)


def choose(captions: Iterable[str], config: FilterConfig, counts: FilterCounts) -> list[str]:
    """The captions of a clip, sorted by length, and by their text where it is equal.

    Captions that differ only in case and white space count as repeated.
    """
    distinct: dict[str, str] = {}
    for caption in sorted(captions):
        key = " ".join(caption.casefold().split())
        if key in distinct:
            counts.drop(REPEATED)
        else:
            distinct[key] = caption
    sign = -1 if config.longest else 1
    ordered = sorted(distinct.values(), key=lambda caption: (sign * len(caption), caption))
    if len(ordered) < config.min_captions:
        for _ in ordered:
            counts.drop(TOO_FEW)
        return []
    for _ in ordered[config.keep :]:
        counts.drop(SURPLUS)
    return ordered[: config.keep]


def global_captions(
    clip: Clip, rules: Rules, counts: FilterCounts
) -> tuple[list[str], list[Mapping[str, str]]]:
    """The clip's global captions after normalisation, and their claims, if the manifest has claims."""
    kept: dict[str, Mapping[str, str]] = {}
    captions = clip.captions.global_captions
    claims = clip.claims.get("global") or ({},) * len(captions)
    for caption, claim in zip(captions, claims, strict=True):
        text = normalise(caption, accent=clip.tags.get("accent"))
        reason = rules.broken_global(text)
        if reason is None and text in kept:
            reason = REPEATED
        elif reason is None and len(kept) == rules.max_global_captions:
            reason = SURPLUS
        counts.global_captions[reason or "kept"] += 1
        if reason is None:
            kept[text] = claim
    return list(kept), list(kept.values()) if clip.claims.get("global") else []


def filter(config: FilterConfig) -> int:
    """Writes the manifest of the captions that are kept.

    Returns:
        The exit code of the command: 0; 1 if no clip has captions, so that no manifest is written; 3 if
        `generate` or `verify` has not finished, or if clips are too long, have a repeated id or a bad line.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, `generate` did not run, its manifest changed, or
        the verdicts belong to other candidates.
        DiskFull: there is no room. The manifest of an earlier call is kept.
    """
    rules = read_rules(
        config.rules, min_characters=config.min_characters, max_characters=config.max_characters
    )
    record = read_record(config.work / generate.STEP)
    manifest = config.manifest or manifest_of(record)
    check_manifest(manifest, record)
    path = config.work / CAPTIONS
    if path.exists() and path.samefile(manifest):
        raise ValueError(f"{path} is the manifest that generate read; copy it elsewhere and use --manifest")
    job = _Filter(config, manifest, rules, record)
    (config.work / COUNTS).unlink(missing_ok=True)
    try:
        files.replace_file(path, job.write)
    except _NoCaptions:
        print(f"{path} was not written: no clip has captions", file=sys.stderr)
    summary = {
        "provenance": job.provenance,
        "rules": asdict(rules),
        "keep": config.keep,
        "rows": rows_as_json(asked_rows(record)),
    }
    files.write_json(config.work / COUNTS, summary | job.counts.as_json())
    print(f"{path}: {job.counts.describe()}" if job.counts.clips["kept"] else job.counts.describe())
    if not job.counts.clips["kept"]:
        return 1
    if repeated := job.counts.clips[REPEATED_IDS]:
        print(
            f"left out: {repeated} clips with the id of an earlier clip; give each line of {manifest} "
            "its own id",
            file=sys.stderr,
        )
    missing = job.counts.first_reasons[NO_VERDICT]
    if missing:
        print(f"{missing} candidates have no verdict{_why_no_verdict(config.work, rules)}", file=sys.stderr)
    not_done = missing or job.counts.partly_answered or any(job.counts.clips[key] for key in _NOT_DONE)
    return INCOMPLETE if not_done else 0


def _why_no_verdict(work: Path, rules: Rules) -> str:
    """The end of a message: why candidates have no verdict, and what to do."""
    verified_with = read_record(work / verify.STEP).get("rules_digest", rules.digest)
    if verified_with == rules.digest:
        return " yet: run `verify` again, then `filter`"
    return (
        f", maybe because `verify` last ran with other rules ({verified_with}) than `filter` "
        f"({rules.digest}): run both with the same --rules, --min-characters and --max-characters"
    )


def _has_verdicts(work: Path, record: Mapping[str, Any]) -> bool:
    """Whether the verifier has answered. ValueError if its answers belong to other candidates."""
    if not (work / verify.STEP / ANSWERS).exists():
        return False
    with Verdicts(work) as verdicts:
        if not verdicts.rows:
            return False
    if read_record(work / verify.STEP)["settings"].get("generate") != identity(record):
        raise ValueError(
            f"the verdicts of {work / verify.STEP} belong to other candidates than {work / generate.STEP} "
            f"holds; delete {work / verify.STEP} and run `verify`"
        )
    return True


class _NoCaptions(Exception):
    """No clip has captions."""


class _Filter:
    """One call of `filter`. It holds one clip at a time, and eight bytes for each request of both jobs and
    each clip that is kept."""

    def __init__(self, config: FilterConfig, manifest: Path, rules: Rules, record: Mapping[str, Any]) -> None:
        self._config, self._manifest, self._rules = config, manifest, rules
        self._texts, self._rows, self._parts = texts_a_request(record), asked_rows(record), record["parts"]
        self._longest_s = float(record["settings"].get("max_clip_s", math.inf))
        self._verified = _has_verdicts(config.work, record)
        self._paths = AudioPaths(manifest.parent, config.work)
        self.counts = FilterCounts()
        self.provenance = _provenance(config.work, record["settings"], rules, verified=self._verified)

    def write(self, path: Path) -> None:
        """Writes the manifest. _NoCaptions if it would be empty."""
        work, progress = self._config.work, Progress(None, "clips")
        repeated_ids, kept_ids = self._repeated_ids(), set[int]()
        with (
            path.open("w", encoding="ascii") as file,
            AnswerIndex(work / generate.STEP) as answers,
            Verdicts(work) if self._verified else nullcontext() as verdicts,
        ):
            for row, clip in clips_of_rows(self._manifest, self._rows):
                self.counts.clips["total"] += 1
                if not self.counts.clips["total"] % _PROGRESS_ROWS:
                    progress.add(_PROGRESS_ROWS)
                if not isinstance(clip, Clip):
                    self.counts.clips["bad lines"] += 1
                    continue
                too_long = self._count_duration(clip)
                clip_id = digest(clip.id)
                if clip_id in kept_ids:
                    self.counts.clips[REPEATED_IDS] += 1
                    continue
                given = answers.of_row(row)
                self.counts.partly_answered += 0 < len(given) < self._parts
                candidates = [*candidates_of(given, self._texts)]
                captions = self._captions(candidates, verdicts.of_row(row) if verdicts else {})
                if captions:
                    self.counts.keep(clip, captions)
                    if clip_id in repeated_ids:
                        kept_ids.add(clip_id)
                    file.write(json.dumps(self._line(clip, captions)) + "\n")
                elif candidates:
                    self.counts.clips["without captions"] += 1
                else:
                    if clip.duration_s is None:
                        too_long = generate.is_longer(clip, self._longest_s)
                    self.counts.clips["too long" if too_long else "without answer"] += 1
        if not self.counts.clips["kept"]:
            raise _NoCaptions

    def _repeated_ids(self) -> set[int]:
        """The digests of the ids that several clips have."""
        ids = Digests()
        for _, clip in clips_of_rows(self._manifest, self._rows):
            if isinstance(clip, Clip):
                ids.add(clip.id)
        return ids.repeated_values()

    def _count_duration(self, clip: Clip) -> bool:
        """Counts the clip's seconds. Returns whether it was too long for `generate`."""
        if clip.duration_s is None:
            self.counts.unknown_durations += 1
            return False
        too_long = clip.duration_s > self._longest_s
        self.counts.audio_s["total"] += clip.duration_s
        self.counts.audio_s["asked"] += 0.0 if too_long else clip.duration_s
        return too_long

    def _line(self, clip: Clip, captions: list[str]) -> dict[str, Any]:
        """The clip as a line of the manifest, with these fine-grained captions."""
        coarse, claims = global_captions(clip, self._rules, self.counts)
        return manifest_line(
            clip,
            audio=self._paths(clip.audio),
            captions=Captions(tuple(coarse), tuple(captions)),
            claims={"global": claims},
            tags=clip.tags,
            made_by={"fine": self.provenance},
            written_by="filter",
        )

    def _captions(self, candidates: list[Candidate], verdicts: Mapping[int, Verdict]) -> list[str]:
        """The captions of a clip that are kept; counts all candidates."""
        counts = self.counts
        if not candidates:
            return []
        passed: list[str] = []
        for candidate in candidates:
            if candidate.caption is not None:
                counts.count_lengths("all", candidate.caption)
            verdict = verdicts.get(candidate.number)
            reasons = reasons_to_drop(candidate, self._rules, verdict, verified=self._verified)
            if reasons:
                counts.drop(*reasons)
            else:
                passed.append(candidate.caption or "")
        captions = choose(passed, self._config, counts)
        counts.candidates["total"] += len(candidates)
        counts.candidates_per_clip[len(candidates)] += 1
        counts.captions_per_clip[len(captions)] += 1
        return captions


def _provenance(work: Path, settings: Mapping[str, Any], rules: Rules, *, verified: bool) -> dict[str, Any]:
    """Where the captions come from, for each line of the manifest."""
    verifier = None
    if verified:
        by = read_record(work / verify.STEP)["settings"]
        verifier = {"model": by["model"], "prompt_digest": by["prompt_digest"], "seed": by["seed"]}
    return {
        "by": "generate",
        "version": __version__,
        "model": settings["model"],
        "prompt_digest": settings["prompt_digest"],
        "seed": settings["seed"],
        "sampling": settings["sampling"],
        "rules": rules.version,
        "rules_digest": rules.digest,
        "verifier": verifier,
    }
