"""`caption verify WORK`: a language model reads the candidates and looks for what the rules cannot see.

The model sees the text of a caption, never the recording. It answers a checklist of four questions in JSON.
One violation drops the caption. Each caption has its own request, so that no caption influences the verdict
on another one. All requests begin with the same text, which servers with a prefix cache compute once.

If an answer is not a verdict, the caption is sent once more with another seed. If that fails, too, the
caption counts as "unverified" and is dropped.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clsp_fast import __version__
from clsp_fast.captioning import json_answers
from clsp_fast.captioning.answers import (
    ANSWERS,
    Answer,
    AnswerIndex,
    custom_id,
    identity,
    manifest_of,
    read_record,
    row_and_part,
)
from clsp_fast.captioning.candidates import candidates_of, texts_a_request
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.generate import Sampling, describe_tags, read_facts
from clsp_fast.captioning.job_files import exchange_files
from clsp_fast.captioning.jobs import run_jobs
from clsp_fast.captioning.json_answers import BadAnswer
from clsp_fast.captioning.prompt import Prompt, read_prompt
from clsp_fast.captioning.request import Request
from clsp_fast.captioning.rows import RowRange, asked_rows, clips_of_rows
from clsp_fast.captioning.rules import Rules, answer_fault, clean_answer, read_rules
from clsp_fast.checks import is_positive, require
from clsp_fast.console import INCOMPLETE
from clsp_fast.data.clips import Clip

STEP = "verify"
CHECKLIST = ("background", "audio_quality", "transcription", "absence")
"""The violations that the verifier looks for."""
UNVERIFIED = "unverified"
"""What a caption is called whose answers are no verdict."""
ATTEMPTS = 2
"""How often a caption is sent until its answer is a verdict."""
_SECOND_TEMPERATURE = 0.6
_SCHEMA = json_answers.object_schema({item: {"type": "boolean"} for item in CHECKLIST})


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Asks a language model whether candidates hold what a caption must not hold: the background, the quality
    of the recording, spoken words, or what is absent.

    The model reads the captions and hears nothing. `filter` drops the captions with a violation.
    """

    work: Path
    """Working folder of `generate`. The verdicts go to WORK/verify."""
    server: ServerConfig = field(default_factory=ServerConfig)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0, top_p=1.0, top_k=0))
    manifest: Path | None = None
    """The manifest that `generate` read. None: where it was then."""
    rules: Path | None = None
    """JSON file with other rules, as for `filter`. Only candidates that keep the rules are sent."""
    min_characters: int | None = None
    """Replaces the smallest length of the rules, as for `filter`."""
    max_characters: int | None = None
    """Replaces the largest length of the rules, as for `filter`."""
    prompt: Path | None = None
    """File with another prompt. None: prompts/verify.txt of the package."""
    tags: tuple[str, ...] = ("accent", "speaking_rate", "situational_tags")
    """Tags of the manifest that are told to the model, if a clip has them."""
    transcript: str = "transcript"
    """Tag of the manifest that holds the spoken words, which are told to the model. Empty: none."""
    seed: int = 0
    """Seed of the requests."""
    jobs_only: bool = False
    """Sends nothing, but writes WORK/verify/jobs.jsonl with the requests, for `vllm run-batch`. If answers to
    such a file are no verdicts, the next call writes the requests that ask again."""
    shard_rows: int | None = None
    """With --jobs-only: rows of the manifest in a job file. None: one file for all."""
    answers: tuple[Path, ...] = ()
    """Files with answers to such job files. They are added to WORK/verify."""

    def __post_init__(self) -> None:
        rows = self.shard_rows
        require(rows is None or is_positive(rows), "shard_rows", "an integer > 0 or None", rows)
        require(rows is None or self.jobs_only, "shard_rows", "given with --jobs-only", rows)
        self.server.require_model()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says about a caption.

    Attributes:
        violations: names from the checklist; empty: the caption passes if there is no fault.
        fault: why there is no verdict, although there are answers; "" if there is one.
    """

    violations: tuple[str, ...] = ()
    fault: str = ""

    @property
    def passed(self) -> bool:
        """Whether the caption is kept."""
        return not self.violations and not self.fault


def parse_verdict(text: str, finish_reason: str) -> Verdict:
    """The verdict in an answer; a fault names what is wrong with it.

    Faults: "truncated", "refused", "empty", "not a JSON object", "key missing", "wrong type".
    """
    if fault := answer_fault(text, finish_reason):
        return Verdict(fault=fault)
    try:
        values = json_answers.parse_object(clean_answer(text, finish_reason) or "")
        broken = {item: json_answers.member(values, item, json_answers.as_flag) for item in CHECKLIST}
    except BadAnswer as error:
        return Verdict(fault=str(error))
    return Verdict(tuple(item for item, violated in broken.items() if violated))


class Verdicts:
    """The verdicts of a job, found by row. A context manager.

    Args:
        work: the work folder.
    """

    def __init__(self, work: Path) -> None:
        self._candidates = int(read_record(work / STEP)["parts"]) // ATTEMPTS
        self._index = AnswerIndex(work / STEP)

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.__exit__()

    @property
    def rows(self) -> int:
        """One more than the last row with a verdict."""
        return self._index.rows

    def of_row(self, row: int) -> dict[int, Verdict]:
        """Number of a candidate -> its verdict, for the candidates that have an answer.

        The first answer that is a verdict counts. If none is, the fault is that of the last answer.
        """
        verdicts: dict[int, Verdict] = {}
        for answer in self._index.of_row(row):
            number = row_and_part(answer.custom_id)[1] % self._candidates
            if number not in verdicts or verdicts[number].fault:
                verdicts[number] = parse_verdict(answer.texts[0], answer.finish_reasons[0])
        return verdicts


@dataclass(frozen=True)
class _Checklist:
    """The captions that are verified, and their requests.

    Part n of a row asks about candidate n for the first time, and part n + candidates asks again.
    """

    config: VerifyConfig
    manifest: Path
    prompt: Prompt
    rules: Rules
    rows: Sequence[RowRange]
    texts: int
    candidates: int

    def requests(self) -> Iterator[Request]:
        """A request for each caption, and a second one if the answer to the first is no verdict."""
        known = (self.config.work / STEP / ANSWERS).exists()
        with Verdicts(self.config.work) if known else nullcontext() as verdicts:
            for row, clip, captions in self.captions():
                given = verdicts.of_row(row) if verdicts and captions else {}
                for number, caption in captions:
                    yield self._request(row, clip, number, caption, 0)
                    if number in given and given[number].fault:
                        yield self._request(row, clip, number, caption, 1)

    def names(self) -> Iterator[str]:
        """The custom_id of every request that `requests` can yield."""
        for row, clip, captions in self.captions():
            for number, _ in captions:
                for attempt in range(ATTEMPTS):
                    yield custom_id(STEP, row, clip.id, attempt * self.candidates + number)

    def captions(self) -> Iterator[tuple[int, Clip, list[tuple[int, str]]]]:
        """Row, clip, and the clip's candidates that keep the rules, with their numbers."""
        with AnswerIndex(self.config.work / "generate") as answers:
            for row, clip in clips_of_rows(self.manifest, self.rows):
                if row >= answers.rows:
                    return
                if isinstance(clip, Clip):
                    candidates = candidates_of(answers.of_row(row), self.texts)
                    kept = [(c.number, c.caption) for c in candidates if c.caption and c.usable(self.rules)]
                    yield row, clip, kept

    def _request(self, row: int, clip: Clip, number: int, caption: str, attempt: int) -> Request:
        """The request about a candidate. Its body is only made if it is sent."""
        name = custom_id(STEP, row, clip.id, attempt * self.candidates + number)
        return Request(name, functools.partial(self._body, clip, caption, attempt))

    def _body(self, clip: Clip, caption: str, attempt: int) -> dict[str, Any]:
        config = self.config
        values = {
            "caption": caption,
            "tags": describe_tags(clip.tags, config.tags),
            "transcript": " ".join(clip.tags.get(config.transcript, "").split()),
        }
        body: dict[str, Any] = {
            "model": config.server.model,
            "messages": [{"role": role, "content": text} for role, text in self.prompt.messages(values)],
            "seed": config.seed + attempt,
            "response_format": json_answers.response_format("verdict", _SCHEMA),
            **config.sampling.to_body(),
        }
        if attempt:  # at temperature 0, the same answer would come back
            body["temperature"] = max(config.sampling.temperature, _SECOND_TEMPERATURE)
        return body


class _Faults:
    """Counts answers to first attempts that are no verdicts, so that a second one follows.

    Args:
        candidates: of a row; the parts from this number on are second attempts.
    """

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self.count = 0

    def __call__(self, answer: Answer) -> None:
        if answer.error is None and row_and_part(answer.custom_id)[1] < self._candidates:
            self.count += bool(parse_verdict(answer.texts[0], answer.finish_reasons[0]).fault)


def verify(config: VerifyConfig) -> int:
    """Asks a language model whether the candidates of `generate` hold what a caption must not hold.

    Returns:
        The exit code of the command: 0, or 3 if some captions have no answer.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, `generate` did not run, its manifest has changed,
        or the folder was begun with other settings. Others as `run_jobs`.
    """
    prompt = read_prompt(STEP, config.prompt, {"caption"})
    rules = read_rules(
        config.rules, min_characters=config.min_characters, max_characters=config.max_characters
    )
    record = read_record(config.work / "generate")
    manifest = config.manifest or manifest_of(record)
    check_manifest(manifest, record)
    texts = texts_a_request(record)
    checklist = _Checklist(
        config, manifest, prompt, rules, asked_rows(record), texts, texts * int(record["parts"])
    )
    folder = config.work / STEP
    job: dict[str, Any] = {
        "settings": _settings(config, prompt, record),
        "parts": ATTEMPTS * checklist.candidates,
        "notes": {"prompt": prompt.text, "rules_digest": rules.digest, "version": __version__},
    }
    exchange_files(
        checklist.requests,
        folder,
        sources=config.answers,
        write=config.jobs_only,
        names=checklist.names,
        shard_rows=config.shard_rows,
        **job,
    )
    if config.jobs_only:
        return 0
    if config.server.servers or not config.answers:
        config.server.require_servers()
        for attempt in range(ATTEMPTS):
            faults = _Faults(checklist.candidates)
            counts = run_jobs(checklist.requests(), folder, config.server, on_answer=faults, **job)
            print(f"{folder}: {counts.describe()}")
            if not faults.count or attempt == ATTEMPTS - 1:
                break
            print(f"{folder}: {faults.count} answers are no verdicts; asking again")
    tally = _tally(checklist)
    print(_describe(tally))
    return INCOMPLETE if tally["without answer"] else 0


def check_manifest(manifest: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError if the manifest is not the one that `generate` read."""
    facts, earlier = read_facts(manifest), record["settings"]["manifest"]
    if facts.sha256 != earlier["sha256"]:
        raise ValueError(
            f"{manifest} has changed since `generate` read it ({earlier['bytes']} bytes then, {facts.bytes} "
            "now); name the unchanged manifest with --manifest"
        )


def _settings(config: VerifyConfig, prompt: Prompt, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the verdicts depend on. The rules only decide which captions are sent."""
    return {
        "step": STEP,
        "generate": identity(record),
        "model": config.server.model,
        "prompt_digest": prompt.digest,
        "tags": list(config.tags),
        "transcript": config.transcript,
        "seed": config.seed,
        "sampling": asdict(config.sampling),
    }


def _tally(checklist: _Checklist) -> Counter[str]:
    """Captions by outcome: "passed", each violation, each fault, "without answer", and their "total"."""
    tally: Counter[str] = Counter()
    with Verdicts(checklist.config.work) as verdicts:
        for row, _, captions in checklist.captions():
            given = verdicts.of_row(row) if captions else {}
            for number, _ in captions:
                tally["total"] += 1
                verdict = given.get(number)
                if verdict is None:
                    tally["without answer"] += 1
                elif verdict.fault:
                    tally[f"{UNVERIFIED}: {verdict.fault}"] += 1
                else:
                    tally.update(verdict.violations or ["passed"])
                    tally["dropped"] += bool(verdict.violations)
    return tally


def _describe(tally: Mapping[str, int]) -> str:
    """A few lines of text."""
    lines = [f"{tally['total']} captions, {tally['passed']} passed, {tally['dropped']} with violations"]
    known = ("total", "passed", "dropped")
    lines += [f"  {name:<32}{count:>9}" for name, count in tally.items() if name not in known]
    return "\n".join(lines)
