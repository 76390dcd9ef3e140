"""What a run reads: the user's manifests or the demo corpus, the tokenizer, the zero-shot tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clsp_fast import demo
from clsp_fast.config import TrainConfig
from clsp_fast.console import Progress
from clsp_fast.data import DataError, usable
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import Manifest, read_manifest
from clsp_fast.demo import human
from clsp_fast.demo.recordings import FetchError
from clsp_fast.evaluation.tasks import Tasks, read_tasks, tasks_from_prompts
from clsp_fast.storage import files
from clsp_fast.tokenizer import Tokenizer
from clsp_fast.training import checkpoint

HUMAN_SET = "human"
"""Name of the final set with the held-out human voices."""
_ROBERTA_VOCABULARY = 50265


@dataclass(frozen=True)
class Corpus:
    """Everything that a run reads.

    Attributes:
        train: training clips.
        validation: clips that the model is evaluated on during training; may be empty.
        final_sets: name of a set -> its clips, which the finished model is evaluated on.
        tasks: zero-shot tasks; may be empty.
        tokenizer: turns captions into tokens.
        max_tokens: captions are truncated to this number of tokens.
        is_demo: whether this is the demo corpus.
        note: description of the training clips, printed before training.
    """

    train: list[Clip]
    validation: list[Clip]
    final_sets: Mapping[str, list[Clip]]
    tasks: Tasks
    tokenizer: Tokenizer
    max_tokens: int
    is_demo: bool
    note: str

    @classmethod
    def open(cls, config: TrainConfig) -> Corpus:
        """Reads the manifests, or makes the demo corpus if the configuration names none. Reads or trains the
        tokenizer.

        Raises:
            DataError, ValueError, FileNotFoundError: a manifest, tokenizer or task file is missing or wrong.
        """
        if config.data.manifest is None:
            return cls._demo(config)
        train = _read_manifest(config.data.manifest, config)
        sets = {}
        for name in ("validation", "test"):
            path: Path | None = getattr(config.data, name)
            if path is not None:
                manifest = _read_manifest(path, config)
                manifest.warn()  # the training manifest's warnings are printed as part of `note`
                sets[name], _, left_out = usable(manifest.clips, config.data)
                if not sets[name]:
                    raise DataError(f"--data.{name} {path}: all clips are left out: {dict(left_out)}")
                if left_out:
                    print(f"{path}: clips left out: {dict(left_out)}", file=sys.stderr)
        tasks = read_tasks(config.data.zeroshot, short=True) if config.data.zeroshot else {}
        final = {name: clips for name, clips in sets.items() if name == "test" or "test" not in sets}
        return cls(
            train=train.clips,
            validation=sets.get("validation", []),
            final_sets=final,
            tasks=tasks,
            tokenizer=_tokenizer(train.clips, config),
            max_tokens=config.model.text.max_tokens,
            is_demo=False,
            note=f"{config.data.manifest}: {train.describe()}",
        )

    @classmethod
    def _demo(cls, config: TrainConfig) -> Corpus:
        made = demo.prepare(
            config.run / "corpus",
            demo.DemoConfig(clips=config.data.demo_clips),
            progress=_show_progress("making the demo corpus", "clips"),
        )
        sets = {"test": made.test} | ({"transfer": made.transfer} if made.transfer else {})
        train, note = read_manifest(made.train).clips, demo.describe(made)
        if config.data.human:
            recorded = _human(config)
            sets[HUMAN_SET] = recorded.test
            train = train + read_manifest(recorded.train).clips
            note += f"\n{human.describe(recorded)}"
        return cls(
            train=train,
            validation=read_manifest(made.validation).clips,
            final_sets={name: read_manifest(path).clips for name, path in sets.items()},
            tasks=tasks_from_prompts(demo.prompts()),
            tokenizer=_tokenizer(train, config),
            max_tokens=config.model.text.max_tokens,
            is_demo=True,
            note=note,
        )

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """token_ids and attention_mask, int64 (N, L)."""
        return self.tokenizer.encode_batch(captions, self.max_tokens)

    def describe(self) -> str:
        """The description of the training clips, printed before training."""
        return self.note


def _human(config: TrainConfig) -> human.HumanCorpus:
    """The corpus of human speech. DataError if it cannot be fetched or read."""
    try:
        return human.prepare(
            config.run / "human",
            human.HumanConfig(recordings=config.data.recordings),
            progress=_show_progress("captioning human speech", "recordings"),
        )
    except FetchError as error:
        raise DataError(str(error)) from error


def _read_manifest(path: Path, config: TrainConfig) -> Manifest:
    """Reads a manifest and prints its first bad lines to standard error. DataError if more lines are bad than
    data.max_bad_share allows."""
    manifest = read_manifest(path)
    for problem in manifest.problems[:20]:
        print(f"{path}, line {problem.line}: {problem.message}; skipped", file=sys.stderr)
    count, lines = len(manifest.problems), len(manifest.problems) + len(manifest.clips)
    if count > max(10, config.data.max_bad_share * lines):
        raise DataError(
            f"{count} of {lines} lines of {path} are bad, more than data.max_bad_share "
            f"{config.data.max_bad_share} allows; `python -m clsp_fast.data validate {path}` lists them"
        )
    return manifest


def _tokenizer(clips: Sequence[Clip], config: TrainConfig) -> Tokenizer:
    """A resumed run keeps its tokenizer. A new run takes that of `data.tokenizer` or `init`, or trains one on
    the captions."""
    path = config.run / "tokenizer.json"
    if path.exists() and checkpoint.exists(config.run / "checkpoints"):
        return Tokenizer.from_file(path)
    size = config.model.text.vocab_size
    if config.data.tokenizer is not None:
        tokenizer = Tokenizer.from_file(config.data.tokenizer)
    elif config.init is not None:
        tokenizer = Tokenizer.from_file(config.init)
    elif size == _ROBERTA_VOCABULARY:
        raise ValueError(
            "this preset's text tower is RoBERTa: give --data.tokenizer a RoBERTa folder (tokenizer.json, or "
            "vocab.json and merges.txt), or --init a saved model"
        )
    else:
        tokenizer = Tokenizer.train(_all_captions(clips), size, lowercase=True)
    tokenizer.check_fits(config.model.text)
    config.run.mkdir(parents=True, exist_ok=True)
    files.write_text(path, tokenizer.to_json())
    return tokenizer


def _all_captions(clips: Sequence[Clip]) -> list[str]:
    return [text for clip in clips for captions in clip.captions for text in captions]


def _show_progress(doing: str, unit: str) -> Callable[[int, int], None]:
    """Returns a callback that shows progress. Its arguments are the number made so far and in total."""
    progress = None

    def show(made: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(total, unit, lead=f"{doing}: ")
        progress.update(made)

    return show
