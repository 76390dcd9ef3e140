"""`caption judge MANIFEST WORK`: a language model hears recordings and scores their captions.

For each clip the judge is asked several times for scores of 1 to 5 for correctness, coverage and naturalness.
Each round lists the captions and the aspects in another order, drawn from the seed. The scores of a clip are
averaged. With a second manifest, both captions of a clip are scored together, and two further requests ask
which is better: one for each order, so that a preference for a position cancels.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from clsp_fast import __version__
from clsp_fast.captioning import json_answers, scores
from clsp_fast.captioning.answers import Answer, AnswerIndex, custom_id, row_and_part
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.generate import ManifestFacts, Sampling, read_facts, seed_of, sound_of
from clsp_fast.captioning.job_files import exchange_files
from clsp_fast.captioning.jobs import run_jobs
from clsp_fast.captioning.json_answers import BadAnswer
from clsp_fast.captioning.prompt import Prompt, read_prompt
from clsp_fast.captioning.request import Request
from clsp_fast.captioning.rules import answer_fault, clean_answer
from clsp_fast.captioning.sample import Kind, Sample, choose_clips
from clsp_fast.captioning.scores import ASPECTS, PREFERENCES, Comparison, Scores
from clsp_fast.checks import is_positive, require
from clsp_fast.console import INCOMPLETE
from clsp_fast.storage import files

STEP = "judge"
RESULTS, CLIPS = "judge.json", "clips.jsonl"
"""What `judge` writes: the figures, and the scores of each clip."""
Value = TypeVar("Value")
_OTHER_STEPS = ("generate", "verify")
_STREAM_ROUND = 2
_ASPECT_LINE = re.compile(rf"^- ({'|'.join(ASPECTS)}):.*$", re.MULTILINE)
_SCORE = {"type": "integer", "enum": list(scores.SCORES)}
_PAIR_SCHEMA = json_answers.object_schema({"better": {"type": "string", "enum": list(PREFERENCES)}})


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Lets a language model that hears score the captions of a manifest, or compare those of two manifests.

    The figures are printed and written to WORK/judge/judge.json, and those of each clip to clips.jsonl beside
    it.
    """

    manifest: Path
    """A manifest with captions, such as WORK/captions.jsonl."""
    work: Path
    """Working folder. The answers and results go to WORK/judge."""
    server: ServerConfig = field(default_factory=ServerConfig)
    sampling: Sampling = field(default_factory=Sampling)
    against: Path | None = None
    """Another manifest with captions for the same clips, which are found by their ids. The captions of both
    are scored together and compared."""
    name: str = STEP
    """Name of the folder in WORK for answers and results. A run with other settings needs another name."""
    clips: int = 200
    """Clips that are judged, drawn by the seed. A larger number continues the work of a smaller one."""
    rounds: int = 5
    """How often each clip is scored."""
    kind: Kind = "fine"
    """Which captions are judged, fine-grained or global ones. One caption of a clip is drawn."""
    prompt: Path | None = None
    """File with another prompt for scores. None: prompts/judge.txt of the package."""
    pairs_prompt: Path | None = None
    """File with another prompt for comparisons. None: prompts/judge_pairs.txt of the package."""
    seed: int = 0
    """Seed of the sample, of all orders and of the intervals."""
    resamples: int = 1000
    """Bootstrap resamples of the clips, for the 95 % intervals."""
    jobs_only: bool = False
    """Sends nothing, but writes WORK/judge/jobs.jsonl with the requests, for `vllm run-batch`."""
    answers: tuple[Path, ...] = ()
    """Files with answers to such a file. They are added to WORK/judge."""

    def __post_init__(self) -> None:
        for name in ("clips", "rounds", "resamples"):
            require(is_positive(getattr(self, name)), name, "an integer > 0", getattr(self, name))
        ok = Path(self.name).name == self.name and self.name not in ("", "..", *_OTHER_STEPS)
        require(ok, "name", 'the name of a new folder, such as "against-offline"', self.name)
        self.server.require_model()


class Round(NamedTuple):
    """What one request for scores shows.

    Attributes:
        systems: number of the system at each position of the list of captions.
        aspects: the aspects in the order in which the prompt explains them.
    """

    systems: tuple[int, ...]
    aspects: tuple[str, ...]


def round_of(number: int, row: int, systems: int, seed: int) -> Round:
    """The orders of a round: functions of (seed, row, round).

    Two captions change places in every round, and the seed decides which one begins.
    """
    first = int(np.random.default_rng((seed, _STREAM_ROUND, row)).integers(systems))
    random = np.random.default_rng((seed, _STREAM_ROUND, row, number))
    order = tuple((first + number + position) % systems for position in range(systems))
    return Round(order, tuple(str(aspect) for aspect in random.permutation(ASPECTS)))


def in_order_of(prompt: Prompt, aspects: Sequence[str]) -> Prompt:
    """The prompt with its lines "- aspect: explanation" in the given order of the aspects."""
    lines = {match[1]: match[0] for match in _ASPECT_LINE.finditer(prompt.text)}
    order = iter(aspects)
    return Prompt(prompt.name, _ASPECT_LINE.sub(lambda _: lines[next(order)], prompt.text))


def read_judge_prompt(file: Path | None) -> Prompt:
    """The prompt for scores, with one line for each aspect.

    Raises:
        ValueError: a line "- correctness: ...", "- coverage: ..." or "- naturalness: ..." is missing.
    """
    prompt = read_prompt("judge", file, {"captions"})
    names = [match[1] for match in _ASPECT_LINE.finditer(prompt.text)]
    if sorted(names) != sorted(ASPECTS):
        raise ValueError(
            f'{prompt.name} must have one line that begins with "- {ASPECTS[0]}:", one with '
            f'"- {ASPECTS[1]}:" and one with "- {ASPECTS[2]}:"; their order is drawn in each round'
        )
    return prompt


def score_schema(order: Round) -> dict[str, Any]:
    """The schema of an answer with the scores of a round."""
    entry = json_answers.object_schema(dict.fromkeys(order.aspects, _SCORE))
    return json_answers.object_schema(dict.fromkeys(json_answers.caption_keys(len(order.systems)), entry))


def parse_scores(text: str, finish_reason: str, order: Round) -> NDArray[np.int64]:
    """The scores (systems, aspects) of a round, with systems and aspects in their fixed order.

    Raises:
        BadAnswer: "truncated", "refused", "empty", "not a JSON object", "key missing", "wrong type" or
        "out of range".
    """
    values = _parse(text, finish_reason)
    scores_SA = np.zeros((len(order.systems), len(ASPECTS)), np.int64)
    for name, system in zip(json_answers.caption_keys(len(order.systems)), order.systems, strict=True):
        entry = json_answers.member(values, name, json_answers.as_object)
        scores_SA[system] = [json_answers.member(entry, aspect, _as_score) for aspect in ASPECTS]
    return scores_SA


def _as_score(value: object) -> int:
    return json_answers.as_integer(value, scores.SCORES)


def parse_preference(text: str, finish_reason: str) -> int:
    """1 if the caption that stands first is better, 0 for a tie, otherwise -1.

    Raises:
        BadAnswer: as `parse_scores`.
    """
    value = json_answers.member(_parse(text, finish_reason), "better", lambda value: value)
    if not isinstance(value, str):
        raise BadAnswer("wrong type")
    if value not in PREFERENCES:
        raise BadAnswer("out of range")
    return PREFERENCES[value]


def _parse(text: str, finish_reason: str) -> dict[str, Any]:
    if fault := answer_fault(text, finish_reason):
        raise BadAnswer(fault)
    return json_answers.parse_object(clean_answer(text, finish_reason) or "")


@dataclass
class Outcome:
    """What the answers of a judge say.

    Attributes:
        scores: the scores of each clip; its number is the row.
        comparisons: row -> comparison, for the clips with usable answers in both orders.
        answers: "asked", "usable", "without answer", and each fault of an answer -> count.
    """

    scores: Scores
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)

    def read(self, answer: Answer | None, parse: Callable[[str, str], Value]) -> Value | None:
        """What `parse` reads from an answer; None if there is no usable answer, which is counted."""
        self.answers["asked"] += 1
        if answer is None:
            self.answers["without answer"] += 1
            return None
        try:
            value = parse(answer.texts[0], answer.finish_reasons[0])
        except BadAnswer as error:
            self.answers[str(error)] += 1
            return None
        self.answers["usable"] += 1
        return value


@dataclass(frozen=True)
class _Questions:
    """What is asked about a sample, and the reading of the answers.

    Part r of a row is round r of the scores. With two systems, two more parts ask which caption is better,
    first with the captions in the order of the systems and then in the other one.
    """

    config: JudgeConfig
    prompt: Prompt
    pairs_prompt: Prompt | None
    samples: Sequence[Sample]

    @property
    def parts(self) -> int:
        """Requests of a clip."""
        return self.config.rounds + (0 if self.pairs_prompt is None else 2)

    def requests(self) -> Iterator[Request]:
        """All requests, clip by clip."""
        for sample in self.samples:
            for part in range(self.parts):
                name = custom_id(STEP, sample.row, sample.clip.id, part)
                yield Request(name, functools.partial(self._body, sample, part))

    def _body(self, sample: Sample, part: int) -> dict[str, Any]:
        config, captions = self.config, sample.captions
        if part < config.rounds:
            order = round_of(part, sample.row, len(captions), config.seed)
            captions = tuple(captions[system] for system in order.systems)
            prompt, schema = in_order_of(self.prompt, order.aspects), score_schema(order)
        else:
            assert self.pairs_prompt is not None
            captions = captions if part == config.rounds else captions[::-1]
            prompt, schema = self.pairs_prompt, _PAIR_SCHEMA
        messages: list[dict[str, Any]] = []
        for role, text in prompt.messages({"captions": json_answers.captions_as_text(captions)}):
            content = [sound_of(sample.clip), {"type": "text", "text": text}] if role == "user" else text
            messages.append({"role": role, "content": content})
        return {
            "model": config.server.model,
            "messages": messages,
            "seed": seed_of(config.seed, sample.row, part),
            "response_format": json_answers.response_format("judgement", schema),
            **config.sampling.to_body(),
        }

    def read(self, answers: AnswerIndex) -> Outcome:
        """The scores and comparisons in all usable answers."""
        outcome = Outcome(Scores(len(self.samples[0].captions)))
        rounds = self.config.rounds
        for row, _, captions in self.samples:
            given = {row_and_part(answer.custom_id)[1]: answer for answer in answers.of_row(row)}
            for part in range(rounds):
                order = round_of(part, row, len(captions), self.config.seed)
                scores_SA = outcome.read(given.get(part), functools.partial(parse_scores, order=order))
                if scores_SA is not None:
                    outcome.scores.add(row, scores_SA)
            if self.pairs_prompt is not None:
                straight, reverse = (outcome.read(given.get(rounds + i), parse_preference) for i in (0, 1))
                if straight is not None and reverse is not None:
                    outcome.comparisons[row] = Comparison(straight, reverse)
        return outcome


def judge(config: JudgeConfig) -> int:
    """Lets a model that hears score the captions of a manifest, and compare them with those of another one.

    Returns:
        The exit code of the command: 0, or 3 if some requests have no answer, or cannot be written.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, no clip can be judged, or the folder was begun with
        other settings. Others as `run_jobs`.
    """
    prompt = read_judge_prompt(config.prompt)
    pairs_prompt = (
        None if config.against is None else read_prompt("judge_pairs", config.pairs_prompt, {"captions"})
    )
    manifests = [config.manifest, *([config.against] if config.against else [])]
    facts = [read_facts(path) for path in manifests]
    samples, left_out = choose_clips(
        config.manifest, config.against, kind=config.kind, count=config.clips, seed=config.seed
    )
    questions = _Questions(config, prompt, pairs_prompt, samples)
    folder = config.work / config.name
    job: dict[str, Any] = {
        "settings": _settings(config, prompt, pairs_prompt, facts),
        "parts": questions.parts,
        "notes": {"prompt": prompt.text, "version": __version__},
    }
    exchange = exchange_files(
        questions.requests, folder, sources=config.answers, write=config.jobs_only, **job
    )
    if config.jobs_only:
        return INCOMPLETE if exchange.failed else 0
    if config.server.servers or not config.answers:
        config.server.require_servers()
        total = len(samples) * questions.parts
        counts = run_jobs(questions.requests(), folder, config.server, total=total, **job)
        print(f"{folder}: {counts.describe()}")
    with AnswerIndex(folder) as index:
        outcome = questions.read(index)
    names_of_systems = _names(manifests)
    results = {
        "model": config.server.model,
        "settings": job["settings"],
        "sample": len(samples),
        "left_out": dict(left_out),
        "answers": dict(outcome.answers),
        **_summary(outcome, names_of_systems, config),
    }
    files.write_json(folder / RESULTS, results)
    _write_clips(folder / CLIPS, samples, outcome, names_of_systems)
    print(f"{scores.table(results)}\n{_describe(outcome.answers, left_out)}")
    return INCOMPLETE if outcome.answers["without answer"] else 0


def _settings(
    config: JudgeConfig, prompt: Prompt, pairs_prompt: Prompt | None, facts: Sequence[ManifestFacts]
) -> dict[str, Any]:
    """What the answers depend on. The sample may grow, because a larger one holds the smaller one."""
    manifests = [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in facts]
    return {
        "step": STEP,
        "manifest": manifests[0],
        "against": manifests[1] if len(manifests) > 1 else None,
        "model": config.server.model,
        "prompt_digest": prompt.digest,
        "pairs_prompt_digest": None if pairs_prompt is None else pairs_prompt.digest,
        "kind": config.kind,
        "rounds": config.rounds,
        "seed": config.seed,
        "sampling": asdict(config.sampling),
    }


def _names(manifests: Sequence[Path]) -> list[str]:
    """Names of the systems: those of the files, or the paths if the names are equal."""
    for names in ([path.name for path in manifests], [str(path) for path in manifests]):
        if len(set(names)) == len(names):
            return names
    return [names[0], f"{names[0]} (2)"]


def _summary(outcome: Outcome, names: Sequence[str], config: JudgeConfig) -> dict[str, Any]:
    resampling = {"resamples": config.resamples, "seed": config.seed}
    summary = {"scores": scores.summarise_scores(outcome.scores.means(), names, **resampling)}
    if len(names) == 2:
        summary["pairs"] = scores.summarise_comparisons(outcome.comparisons, **resampling)
    return summary


def _write_clips(path: Path, samples: Sequence[Sample], outcome: Outcome, names: Sequence[str]) -> None:
    """Writes a line for each clip: its captions, its scores, and the preference for the first system."""
    means = outcome.scores.by_clip()
    lines = []
    for row, clip, captions in samples:
        line: dict[str, Any] = {
            "row": row,
            "id": clip.id,
            "captions": dict(zip(names, captions, strict=True)),
        }
        if row in means:
            line["scores"] = {
                name: dict(zip(ASPECTS, values, strict=True))
                for name, values in zip(names, means[row].tolist(), strict=True)
            }
        if row in outcome.comparisons:
            line["preference"] = outcome.comparisons[row].preference
        lines.append(json.dumps(line) + "\n")
    files.write_text(path, "".join(lines))


def _describe(answers: Mapping[str, int], left_out: Mapping[str, int]) -> str:
    faults = [f"{count} {name}" for name, count in answers.items() if name not in ("asked", "usable")]
    lines = [f"{answers['usable']} of {answers['asked']} answers are usable{': ' if faults else ''}"]
    lines[0] += ", ".join(faults)
    if left_out:
        lines.append(f"left out: {', '.join(f'{count} clips {name}' for name, count in left_out.items())}")
    return "\n".join(lines)
