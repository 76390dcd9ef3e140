"""How good a model is: `python -m clsp_fast.evaluate retrieval | zeroshot | similarity SOURCE --model MODEL`.

Each command writes results.json, prints a table with 95 % bootstrap intervals, and draws a picture if
matplotlib is installed. If some recordings cannot be used, the figures are for the others, and the exit code
is 3.
Shape suffixes: M clips, N captions or pairs, D joint dimension.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clsp_fast import console, precision
from clsp_fast.checks import listed, require
from clsp_fast.config import EncodeConfig
from clsp_fast.console import INCOMPLETE
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation import corpora, figures, report
from clsp_fast.evaluation.figures import Bootstrap, Figures, captions_of_kind, main_caption
from clsp_fast.evaluation.ratings import read_ratings
from clsp_fast.evaluation.tasks import Task, read_tasks
from clsp_fast.model import CLSP, load_model
from clsp_fast.storage import paths
from clsp_fast.storage.ranks import Ranks

Results = Figures


@dataclass(frozen=True, kw_only=True)
class _Config(EncodeConfig):
    source: Path
    """Manifest, or a corpus with the layout --layout."""
    out: Path = Path("evaluation")
    """Folder for results.json and the picture."""
    resamples: int = 1000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resamples >= 1, "resamples", "at least 1", self.resamples)

    @property
    def bootstrap(self) -> Bootstrap:
        """How the intervals are drawn."""
        return Bootstrap(self.resamples, self.seed)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(_Config):
    """Retrieval in both directions."""

    captions: Literal["global", "fine", "both"] = "both"
    """Kinds of captions. A clip's caption is its first global one, or its longest fine-grained one."""
    all_captions: bool = False
    """Use all captions of a clip instead of one; each is a right answer."""
    layout: str = "manifest"
    """How the source is laid out: manifest or paraspeechcaps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.captions in ("global", "fine", "both"), "captions", "global, fine or both", self.captions
        )
        require(self.layout in corpora.LAYOUTS, "layout", "one of " + ", ".join(corpora.LAYOUTS), self.layout)


@dataclass(frozen=True, kw_only=True)
class ZeroshotConfig(_Config):
    """Zero-shot classification."""

    task: tuple[str, ...] = ()
    """Tasks of the package (iemocap-emotion, ravdess-emotion, ravdess-gender, crema-d-emotion,
    crema-d-gender, crema-d-age) or of --task-file."""
    task_file: Path | None = None
    """JSON file of tasks; see clsp_fast/evaluation/tasks.py for its form."""
    layout: str | None = None
    """How the source is laid out: manifest, ravdess, crema-d, iemocap, paraspeechcaps. None: a file is a
    manifest, and a folder has the layout of the task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.task), "task", "at least one task", "none")
        known = self.layout is None or self.layout in corpora.LAYOUTS
        require(known, "layout", "one of " + ", ".join(corpora.LAYOUTS), self.layout)


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(_Config):
    """Agreement with people: SOURCE is a CSV file with the columns clip, caption, rater, rating (0 to 5) and
    category, paths relative to it."""


@precision.as_configured
def retrieval(config: RetrievalConfig, *, model: CLSP | None = None) -> Results:
    """Retrieval figures of a set of clips.

    Returns:
        As in results.json: "retrieval": {"global" | "fine": `retrieval_figures` with intervals}.

    Raises:
        FileNotFoundError, ValueError: no such source or model, or nothing in it to evaluate.
    """
    clips = corpora.read_corpus(config.source, config.layout)
    model = _model(config, model)
    kinds = figures.KINDS if config.captions == "both" else (config.captions,)
    texts = {kind: {clip.id: _captions(clip, kind, config.all_captions) for clip in clips} for kind in kinds}
    described = [clip for clip in clips if any(texts[kind][clip.id] for kind in kinds)]
    require(bool(described), "source", f"clips with {' or '.join(kinds)} captions", str(config.source))
    audio_MD, kept, bad = figures.embed_audio(model, described, config)
    results = _results("retrieval", config, model, len(kept), bad)
    for kind, captions in texts.items():
        rows = [i for i, clip in enumerate(kept) if captions[clip.id]]
        if rows:
            text_ND = model.encode_text([text for i in rows for text in captions[kept[i].id]]).float().cpu()
            owner_N = torch.tensor([row for row, i in enumerate(rows) for _ in captions[kept[i].id]])
            results["retrieval"][kind] = figures.retrieval_figures(
                audio_MD[rows], text_ND, owner_N=owner_N, bootstrap=config.bootstrap
            )
    return results


def _captions(clip: Clip, kind: str, every: bool) -> tuple[str, ...]:
    captions = captions_of_kind(clip, kind)
    return captions if every or not captions else (captions[main_caption(clip, kind)],)


@precision.as_configured
def zeroshot(config: ZeroshotConfig, *, model: CLSP | None = None) -> Results:
    """Zero-shot classification figures.

    Returns:
        As in results.json: "zeroshot": {task: `zeroshot_figures` with intervals, and "left_out": value of the
        tag -> number of clips without a label of the task}.

    Raises:
        FileNotFoundError, ValueError: no such source, task or model, or no clip has a label.
    """
    known = read_tasks() | ({} if config.task_file is None else read_tasks(config.task_file))
    for name in config.task:
        require(name in known, "task", f"one of {listed(list(known), width=200)}", name)
    tasks = [known[name] for name in config.task]
    clips = corpora.read_corpus(config.source, _layout(config, tasks), {task.field for task in tasks})
    labelled = [clip for clip in clips if any(task.label_of(clip) for task in tasks)]
    fields = ", ".join(sorted({task.field for task in tasks}))
    require(bool(labelled), "source", f"clips with a label of the tasks in the tags {fields}", config.source)
    model = _model(config, model)
    audio_MD, kept, bad = figures.embed_audio(model, labelled, config)
    results = _results("zeroshot", config, model, len(kept), bad)
    for task in tasks:
        left_out = Counter(clip.tags.get(task.field, "none") for clip in clips if task.label_of(clip) is None)
        results["zeroshot"][task.name] = _classify(task, audio_MD, kept, model, config) | {
            "left_out": dict(left_out)
        }
    return results


def _layout(config: ZeroshotConfig, tasks: Sequence[Task]) -> str:
    """The layout of the source: --layout, or the one that follows from the source and all tasks."""
    # A file is read as a manifest. ParaSpeechCaps is a file too: for its tasks, only .jsonl means a manifest.
    is_file, is_jsonl = paths.is_file(config.source), ".jsonl" in config.source.suffixes
    layouts = {
        config.layout
        or ("manifest" if is_file and (is_jsonl or task.layout != "paraspeechcaps") else task.layout)
        for task in tasks
    }
    require(len(layouts) == 1, "task", "tasks of one layout, or --layout", sorted(layouts))
    return layouts.pop()


def _classify(task: Task, audio_MD: Tensor, clips: list[Clip], model: CLSP, config: _Config) -> Results:
    labels = {i: label for i, clip in enumerate(clips) if (label := task.label_of(clip)) is not None}
    require(bool(labels), "source", f"readable clips of the task {task.name}", config.source)
    return figures.zeroshot_figures(
        audio_MD[list(labels)],
        list(labels.values()),
        task,
        lambda texts: model.encode_text(texts).float(),
        bootstrap=config.bootstrap,
    )


@precision.as_configured
def similarity(config: SimilarityConfig, *, model: CLSP | None = None) -> Results:
    """Correlation between the cosine of clip and caption and the mean rating that people gave the pair.

    Returns:
        As in results.json: "similarity": {"all" and each category: {"n" pairs, "ratings", "raters",
        "pearson", "spearman", "kendall", "interval"}}, and "pairs" with the cosine and mean rating of each.

    Raises:
        FileNotFoundError: no such file or model. ValueError: a row that is no rating, or fewer than 3 pairs.
    """
    ratings: dict[tuple[str, str, str], list[tuple[str, float]]] = defaultdict(list)
    for rating in read_ratings(config.source):
        ratings[rating.clip, rating.caption, rating.category].append((rating.rater, rating.value))
    require(bool(ratings), "source", "a table with at least one rating", str(config.source))
    names = list(dict.fromkeys(clip for clip, _, _ in ratings))
    no_captions = Captions((), ())
    clips = [
        Clip(name, str(config.source.parent / paths.from_text(name)), 0.0, None, None, no_captions)
        for name in names
    ]
    model = _model(config, model)
    audio_MD, kept, bad = figures.embed_audio(model, clips, config)
    row_of = {clip.id: row for row, clip in enumerate(kept)}
    pairs = [pair for pair in ratings if pair[0] in row_of]
    text_ND = model.encode_text([caption for _, caption, _ in pairs]).float().cpu()
    cosine_N = (audio_MD[[row_of[clip] for clip, _, _ in pairs]] * text_ND).sum(1).double().numpy()
    mean_N = np.array([np.mean([value for _, value in ratings[pair]]) for pair in pairs])
    results = _results("similarity", config, model, len(kept), bad)
    categories = sorted({category for _, _, category in pairs})
    for name in ("all", *(categories if len(categories) > 1 else ())):
        rows = [i for i, pair in enumerate(pairs) if name in ("all", pair[2])]
        require(len(rows) >= 3, "source", f"at least 3 rated pairs of {name}", len(rows))
        raters = {rater for i in rows for rater, _ in ratings[pairs[i]]}
        results["similarity"][name] = figures.correlation_figures(
            cosine_N[rows], mean_N[rows], config.bootstrap
        ) | {"ratings": sum(len(ratings[pairs[i]]) for i in rows), "raters": len(raters)}
    results["pairs"] = [
        {"clip": clip, "caption": caption, "category": category, "cosine": float(c), "rating": float(r)}
        for (clip, caption, category), c, r in zip(pairs, cosine_N, mean_N, strict=True)
    ]
    return results


def _model(config: EncodeConfig, model: CLSP | None) -> CLSP:
    if model is not None:
        return model
    with Ranks.join(config.device) as ranks:
        require(ranks.world == 1, "processes", "1", ranks.world)
        return load_model(config, ranks.device)


def _results(kind: str, config: EncodeConfig, model: CLSP, count: int, bad: Mapping[str, str]) -> Results:
    fingerprint = model.fingerprint(config.precision)
    return {"kind": kind, "model": fingerprint, "n": count, "bad": dict(bad), kind: {}}


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    config = tyro.extras.subcommand_cli_from_dict(
        {"retrieval": RetrievalConfig, "zeroshot": ZeroshotConfig, "similarity": SimilarityConfig},
        args=arguments,
        prog="python -m clsp_fast.evaluate",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        if isinstance(config, RetrievalConfig):
            results = retrieval(config)
        else:
            results = zeroshot(config) if isinstance(config, ZeroshotConfig) else similarity(config)
        config.out.mkdir(parents=True, exist_ok=True)
        report.write_results(config.out / "results.json", asdict(config), results)
        print(report.table_with_intervals(results))
        print(report.save_picture(results, config.out / f"{results['kind']}.png"))
    except (OSError, ValueError) as error:
        sys.exit(f"clsp_fast.evaluate: {error}")
    bad = list(results["bad"].values())
    if bad:
        reasons = Counter(sentence.rpartition("[")[2].rstrip("]") for sentence in bad)
        print(
            "could not be used:", ", ".join(f"{n} {reason}" for reason, n in reasons.items()), file=sys.stderr
        )
    for sentence in bad[:10]:
        print(f"not used: {sentence}", file=sys.stderr)
    sys.exit(INCOMPLETE if bad else 0)


if __name__ == "__main__":
    main()
