"""How good a model is: `python -m clsp_fast.evaluate retrieval | zeroshot | similarity SOURCE --model MODEL`.

Each writes results.json, prints a table with 95 % bootstrap intervals, and draws a picture if matplotlib is
installed. The exit code is 3 if some recordings could not be used; the figures are then of the others.
Shape suffixes: M clips, N captions, L labels, D joint dimension.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clsp_fast import console, metrics
from clsp_fast.audio import AudioError
from clsp_fast.checks import listed, require
from clsp_fast.config import EncodeConfig
from clsp_fast.console import INCOMPLETE
from clsp_fast.data import segment
from clsp_fast.data.captions import Captions
from clsp_fast.data.manifest import Clip
from clsp_fast.evaluation import tasks
from clsp_fast.evaluation.figures import caption_of, hit_chance
from clsp_fast.model import CLSP, load_model
from clsp_fast.similarity import ranks as ranks_of
from clsp_fast.storage import files, paths, textfile
from clsp_fast.storage.ranks import Ranks

Results = dict[str, Any]

_DIRECTIONS = ("audio_to_text", "text_to_audio")
_KS = (1, 5, 10)
_CURVE = 100


@dataclass(frozen=True, kw_only=True)
class _Config(EncodeConfig):
    source: Path
    """Manifest, or what --layout says."""
    out: Path = Path("evaluation")
    """Folder for results.json and the picture."""
    resamples: int = 1000
    """Bootstrap resamples."""
    seed: int = 0
    """Of the resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resamples >= 1, "resamples", "at least 1", self.resamples)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(_Config):
    """Retrieval in both directions."""

    captions: Literal["global", "fine", "both"] = "both"
    """Captions that are searched for, and with: a clip's first global one, its longest fine-grained one."""
    all_captions: bool = False
    """Take every caption of a clip, each a right answer, instead of one."""
    layout: str = "manifest"
    """How the source is laid out: manifest or paraspeechcaps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.captions in ("global", "fine", "both"), "captions", "global, fine or both", self.captions
        )
        require(self.layout in tasks.LAYOUTS, "layout", "one of " + ", ".join(tasks.LAYOUTS), self.layout)


@dataclass(frozen=True, kw_only=True)
class ZeroshotConfig(_Config):
    """Zero-shot classification."""

    task: tuple[str, ...] = ()
    """Tasks of the package (iemocap-emotion, ravdess-emotion, ravdess-gender, crema-d-emotion,
    crema-d-gender, crema-d-age) or of --task-file."""
    task_file: Path | None = None
    """JSON file of tasks; see clsp_fast.tasks for its form."""
    layout: str | None = None
    """How the source is laid out: manifest, ravdess, crema-d, iemocap, paraspeechcaps. None: a file is a
    manifest, a folder what the task says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.task), "task", "one task or more", "none")
        known = self.layout is None or self.layout in tasks.LAYOUTS
        require(known, "layout", "one of " + ", ".join(tasks.LAYOUTS), self.layout)


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(_Config):
    """Agreement with people: SOURCE is a CSV file with the columns clip, caption, rater, rating (0 to 5) and
    category, paths relative to it."""


def retrieval(config: RetrievalConfig, *, model: CLSP | None = None) -> Results:
    """Retrieval figures of a set of clips.

    Returns:
        As in results.json: "retrieval": {"global" | "fine": {"audio_to_text" | "text_to_audio": figures of
        `metrics.retrieval`, with "interval", "chance", "n" and "curve", R@k for k = 1, 2, ...}}.

    Raises:
        FileNotFoundError, ValueError: no such source or model, or nothing in it to evaluate.
    """
    clips = tasks.clips_of(config.source, config.layout)
    model = _model(config, model)
    kinds = ("global", "fine") if config.captions == "both" else (config.captions,)
    texts = {kind: {clip.id: _captions(clip, kind, config.all_captions) for clip in clips} for kind in kinds}
    wanted = [clip for clip in clips if any(own[clip.id] for own in texts.values())]
    require(bool(wanted), "source", f"clips with {' or '.join(kinds)} captions", str(config.source))
    audio_MD, kept, bad = _embed(wanted, model, config)
    results = _results("retrieval", model, len(kept), bad)
    for kind, captions in texts.items():
        own = [i for i, clip in enumerate(kept) if captions[clip.id]]
        if own:
            text_ND = model.encode_text([text for i in own for text in captions[kept[i].id]]).float().cpu()
            owner_N = torch.tensor([row for row, i in enumerate(own) for _ in captions[kept[i].id]])
            results["retrieval"][kind] = _both_ways(audio_MD[own], text_ND, owner_N, config)
    return results


def _captions(clip: Clip, kind: str, every: bool) -> tuple[str, ...]:
    own = clip.captions.global_captions if kind == "global" else clip.captions.fine_captions
    chosen = caption_of(clip, kind)
    return own if every or chosen is None else (own[chosen],)


def _both_ways(audio_MD: Tensor, text_ND: Tensor, owner_N: Tensor, config: _Config) -> Results:
    ranks = ranks_of(audio_MD, text_ND, text_owner=owner_N)
    own_M = torch.bincount(owner_N, minlength=len(audio_MD)).tolist()
    found = {}
    for direction, of, group in zip(_DIRECTIONS, ranks, (torch.arange(len(audio_MD)), owner_N), strict=True):
        size, answers = (len(text_ND), own_M) if direction == "audio_to_text" else (len(audio_MD), [1])
        # Captions of one clip are no independent queries: a resample draws them together.
        resampled = functools.partial(metrics.resampled_retrieval, of)
        chance = {f"R@{k}": float(np.mean([hit_chance(size, n, k) for n in answers])) for k in _KS}
        curve = [float((of < k).double().mean()) for k in range(1, min(size, _CURVE) + 1)]
        found[direction] = metrics.retrieval(of) | {
            "interval": _intervals(resampled, group.numpy(), config),
            "chance": chance,
            "n": len(of),
            "curve": curve,
        }
    return found


def zeroshot(config: ZeroshotConfig, *, model: CLSP | None = None) -> Results:
    """Zero-shot classification figures.

    Returns:
        As in results.json: "zeroshot": {task: {"n", "accuracy" (WA), "uar", "interval", "chance" (of guessing
        evenly), "majority", "labels", "confusion" (rows: labels, columns: predictions), "left_out"}}.

    Raises:
        FileNotFoundError, ValueError: no such source, task or model, or no clip that takes part.
    """
    known = tasks.read() | ({} if config.task_file is None else tasks.read(config.task_file))
    for name in config.task:
        require(name in known, "task", f"one of {listed(list(known), width=200)}", name)
    chosen = [known[name] for name in config.task]
    # All other layouts but ParaSpeechCaps' are folders, so a file of any name is a manifest.
    rows, named = paths.is_file(config.source), ".jsonl" in config.source.suffixes
    layouts = {
        config.layout or ("manifest" if rows and (named or task.layout != "paraspeechcaps") else task.layout)
        for task in chosen
    }
    require(len(layouts) == 1, "task", "tasks of one layout, or --layout", sorted(layouts))
    clips = tasks.clips_of(config.source, layouts.pop(), {task.field for task in chosen})
    labelled = [clip for clip in clips if any(task.label_of(clip) for task in chosen)]
    fields = ", ".join(sorted({task.field for task in chosen}))
    require(bool(labelled), "source", f"clips with a label of the tasks under {fields}", config.source)
    model = _model(config, model)
    audio_MD, kept, bad = _embed(labelled, model, config)
    results = _results("zeroshot", model, len(kept), bad)
    for task in chosen:
        left_out = Counter(clip.tags.get(task.field, "none") for clip in clips if task.label_of(clip) is None)
        results["zeroshot"][task.name] = _classify(task, audio_MD, kept, model, config) | {
            "left_out": dict(left_out)
        }
    return results


def _classify(task: tasks.Task, audio_MD: Tensor, clips: list[Clip], model: CLSP, config: _Config) -> Results:
    labels_M = [task.label_of(clip) for clip in clips]
    own = [i for i, label in enumerate(labels_M) if label is not None]
    labels = [label for label in labels_M if label is not None]
    require(bool(own), "source", f"readable clips of the task {task.name}", config.source)
    means_LD = torch.stack(
        [F.normalize(model.encode_text(list(p)).float().mean(0), dim=0) for p in task.prompts.values()]
    )
    names = list(task.prompts)
    best = (audio_MD[own] @ means_LD.cpu().T).argmax(1).tolist()
    predicted = [task.merge.get(names[i], names[i]) for i in best]
    resampled = functools.partial(metrics.resampled_classification, predicted, labels)
    return {
        "n": len(own),
        "accuracy": metrics.accuracy(predicted, labels),
        "uar": metrics.unweighted_average_recall(predicted, labels),
        "interval": _intervals(resampled, np.arange(len(own)), config),
        "chance": 1 / len(task.names),
        "majority": max(Counter(labels).values()) / len(own),
        "labels": task.names,
        "confusion": metrics.confusion(predicted, labels, task.names).tolist(),
    }


def similarity(config: SimilarityConfig, *, model: CLSP | None = None) -> Results:
    """Correlation of the cosine of clip and caption with the mean rating that people gave the pair.

    Returns:
        As in results.json: "similarity": {"all" and each category: {"n" pairs, "ratings", "raters",
        "pearson", "spearman", "kendall", "interval"}}, and "pairs" with the cosine and mean rating of each.

    Raises:
        FileNotFoundError: no such file or model. ValueError: a row that is no rating, or fewer than 3 pairs.
    """
    ratings: dict[tuple[str, str, str], list[tuple[str, float]]] = defaultdict(list)
    for clip, caption, category, rater, rating in _ratings(config.source):
        ratings[clip, caption, category].append((rater, rating))
    require(bool(ratings), "source", "a table with a rating or more", str(config.source))
    names = list(dict.fromkeys(clip for clip, _, _ in ratings))
    none = Captions((), ())
    clips = [
        Clip(name, str(config.source.parent / paths.from_text(name)), 0.0, None, None, none) for name in names
    ]
    model = _model(config, model)
    audio_MD, kept, bad = _embed(clips, model, config)
    row = {clip.id: i for i, clip in enumerate(kept)}
    pairs = [pair for pair in ratings if pair[0] in row]
    text_ND = model.encode_text([caption for _, caption, _ in pairs]).float().cpu()
    cosine_N = (audio_MD[[row[clip] for clip, _, _ in pairs]] * text_ND).sum(1).double().numpy()
    mean_N = np.array([np.mean([rating for _, rating in ratings[pair]]) for pair in pairs])
    results = _results("similarity", model, len(kept), bad)
    categories = sorted({category for _, _, category in pairs})
    for name in ("all", *(categories if len(categories) > 1 else ())):
        own = [i for i, pair in enumerate(pairs) if name in ("all", pair[2])]
        require(len(own) >= 3, "source", f"at least 3 rated pairs of {name}", len(own))
        raters = {rater for i in own for rater, _ in ratings[pairs[i]]}
        results["similarity"][name] = _correlations(cosine_N[own], mean_N[own], config) | {
            "ratings": sum(len(ratings[pairs[i]]) for i in own),
            "raters": len(raters),
        }
    results["pairs"] = [
        {"clip": clip, "caption": caption, "category": category, "cosine": float(c), "rating": float(r)}
        for (clip, caption, category), c, r in zip(pairs, cosine_N, mean_N, strict=True)
    ]
    return results


def _ratings(path: Path) -> Iterator[tuple[str, str, str, str, float]]:
    """(clip, caption, category, rater, rating) of each row."""
    columns = ("clip", "caption", "category", "rater", "rating")
    expected = "a CSV table with the columns clip, caption, rater, rating and category"
    with textfile.open_text(path, expected, newline="") as text:
        try:
            rows = csv.DictReader(text.file)
            missing = set(columns) - set(rows.fieldnames or ())
            require(not missing, "its columns", "clip, caption, rater, rating, category", rows.fieldnames)
            for row in rows:
                values = [row[column] for column in columns]
                if not all(values):
                    raise ValueError(f"row {rows.line_num}: each column must have a value")
                if not textfile.is_text(row["caption"]):
                    raise ValueError(
                        f"row {rows.line_num}: the caption is not UTF-8; save the table as UTF-8"
                    )
                rating = float(row["rating"])
                require(0 <= rating <= 5, f"row {rows.line_num}: rating", "in [0, 5]", rating)
                yield row["clip"], row["caption"], row["category"], row["rater"], rating
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path}: {error}") from error


def _correlations(x_N: NDArray[np.float64], y_N: NDArray[np.float64], config: _Config) -> Results:
    def resampled(counts_RN: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {name: figure(x_N, y_N, counts_RN) for name, figure in metrics.CORRELATIONS.items()}

    figures = {name: float(figure(x_N, y_N)[0]) for name, figure in metrics.CORRELATIONS.items()}
    return {"n": len(x_N)} | figures | {"interval": _intervals(resampled, np.arange(len(x_N)), config)}


def _intervals(
    resampled: Callable[[NDArray[np.float64]], dict[str, NDArray[np.float64]]],
    groups: NDArray[np.int64],
    config: _Config,
) -> dict[str, metrics.Interval]:
    return metrics.bootstrap(resampled, groups, resamples=config.resamples, seed=config.seed)


def _model(config: EncodeConfig, model: CLSP | None) -> CLSP:
    if model is not None:
        return model
    with Ranks.join(config.device) as ranks:
        require(ranks.world == 1, "processes", "1", ranks.world)
        return load_model(config, ranks.device)


def _embed(
    clips: Sequence[Clip], model: CLSP, config: EncodeConfig
) -> tuple[Tensor, list[Clip], dict[str, str]]:
    """Embeddings, the clips that they are of, and why the others have none: id -> reason."""
    errors: dict[int, AudioError] = {}
    found = model.encode_audio([segment(clip) for clip in clips], errors=errors, **config.batching)
    good = [i for i in range(len(clips)) if i not in errors]
    bad = {clips[i].id: str(errors[i]) for i in sorted(errors)}
    if not good:
        raise ValueError(f"not one recording is readable: {next(iter(bad.values()))}")
    return found[good].float().cpu(), [clips[i] for i in good], bad


def _results(kind: str, model: CLSP, count: int, bad: Mapping[str, str]) -> Results:
    made_by = model.fingerprint()
    return {"kind": kind, "model": made_by, "n": count, "bad": dict(bad), kind: {}}


def table(results: Results) -> str:
    """Results as text, each figure with its 95 % interval."""
    lines = [f"{results['kind']}: {results['n']} clips, {len(results['bad'])} could not be used"]
    columns = {
        "retrieval": ("R@1", "R@5", "R@10", "MRR@10", "median_rank"),
        "zeroshot": ("accuracy", "uar"),
        "similarity": tuple(metrics.CORRELATIONS),
    }[results["kind"]]
    titles = {"accuracy": "WA", "uar": "UAR", "median_rank": "median rank"}
    lines.append(f"{'':<24}{'n':>6}" + "".join(f"{titles.get(c, c):>22}" for c in columns))
    for name, figures in _rows(results):
        cells = []
        for column in columns:
            low, high = figures["interval"][column]
            digits = 1 if column == "median_rank" else 3
            cells.append(f"{figures[column]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        lines.append(f"{name:<24}{figures['n']:>6}" + "".join(f"{cell:>22}" for cell in cells))
        if "chance" in figures and isinstance(figures["chance"], dict):
            chance = "".join(f"{figures['chance'][f'R@{k}']:>22.3f}" for k in _KS)
            lines.append(f"{'  chance':<30}{chance}")
        elif "chance" in figures:
            lines.append(f"{'  chance, majority':<30}{figures['chance']:>22.3f}{figures['majority']:>22.3f}")
    return "\n".join(lines)


def _rows(results: Results) -> Iterator[tuple[str, Results]]:
    for name, figures in results[results["kind"]].items():
        if results["kind"] == "retrieval":
            for direction in _DIRECTIONS:
                yield (
                    f"{name} {direction.replace('audio', 'speech').replace('_to_', '->')}",
                    figures[direction],
                )
        else:
            yield name, figures


def save_picture(results: Results, path: Path) -> str:
    """Draws recall curves, confusion matrices or cosine against rating.

    Returns:
        A line that says where the picture is, or why there is none.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return f"{path.name}: not drawn, matplotlib is missing (pip install matplotlib)"
    mpl.use("agg")
    from matplotlib import pyplot as plt

    parts = list(results["zeroshot"]) if results["kind"] == "zeroshot" else [results["kind"]]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(6 * len(parts), 5), squeeze=False, layout="constrained"
    )
    for axis, part in zip(axes[0], parts, strict=True):
        if results["kind"] == "retrieval":
            for name, figures in _rows(results):
                axis.plot(range(1, len(figures["curve"]) + 1), figures["curve"], label=name)
            axis.set(xscale="log", ylim=(0, 1), xlabel="k", ylabel="R@k")
            axis.legend()
        elif results["kind"] == "zeroshot":
            _confusion_matrix(axis, part, results["zeroshot"][part])
        else:
            for name in sorted({pair["category"] for pair in results["pairs"]}):
                own = [pair for pair in results["pairs"] if pair["category"] == name]
                axis.plot([p["cosine"] for p in own], [p["rating"] for p in own], ".", label=name)
            axis.set(xlabel="cosine", ylabel="mean rating", ylim=(-0.1, 5.1))
            axis.legend()
    files.replace_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
    return f"picture: {path}"


def _confusion_matrix(axis: Any, title: str, figures: Results) -> None:
    counts = np.array(figures["confusion"])
    axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), vmin=0, vmax=1, cmap="Blues")
    places = range(len(counts))
    axis.set(title=title, xlabel="predicted", ylabel="label")
    axis.set_xticks(places, figures["labels"], rotation=45, ha="right")
    axis.set_yticks(places, figures["labels"])
    for i in places:
        for j in places:
            axis.text(j, i, str(counts[i, j]), ha="center", va="center")


def _plain(value: Any) -> Any:
    """Without NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        text = json.dumps({"config": _plain_config(config)} | _plain(results), indent=1)
        files.write_text(config.out / "results.json", text + "\n")
        print(table(results))
        print(save_picture(results, config.out / f"{results['kind']}.png"))
    except (OSError, ValueError) as error:
        sys.exit(f"clsp_fast.evaluate: {error}")
    if results["bad"]:
        reasons = Counter(text.rpartition("[")[2].rstrip("]") for text in results["bad"].values())
        print(
            "could not be used:", ", ".join(f"{n} {reason}" for reason, n in reasons.items()), file=sys.stderr
        )
    for reason in list(results["bad"].values())[:10]:
        print(f"not used: {reason}", file=sys.stderr)
    sys.exit(INCOMPLETE if results["bad"] else 0)


def _plain_config(config: _Config) -> Results:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


if __name__ == "__main__":
    main()
