"""Reports of the figures: tables, a picture, results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clsp_fast import metrics
from clsp_fast.evaluation.figures import DIRECTIONS, KS, Figures
from clsp_fast.storage import files


def table_with_bounds(results: Figures, title: str) -> str:
    """The results of `evaluate_embeddings` as text, with chance and ceiling below each figure."""
    lines = [f"{title}: {results['n']} clips", ""]
    lines.append(f"{'retrieval':<24}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MRR@10':>8}{'hit@5':>7}{'n':>6}")
    for kind, by_direction in results["retrieval"].items():
        for direction in DIRECTIONS:
            figures = by_direction[direction]
            hit = figures.get("hit@5")
            lines.append(_row(_name(kind, direction), figures, figures["MRR@10"], hit, by_direction["n"]))
            hit_bounds = {"ceiling": None if hit is None else 1.0, "chance": figures.get("hit@5_chance")}
            for bound in ("ceiling", "chance"):
                if bound in figures:
                    lines.append(_row(f"  {bound}", figures[bound], None, hit_bounds[bound], None))
    if results["zeroshot"]:
        lines += ["", f"{'zero-shot':<24}{'WA':>7}{'UAR':>7}{'chance':>8}{'majority':>10}{'n':>6}"]
    for task, figures in results["zeroshot"].items():
        lines.append(
            f"{task:<24}{figures['accuracy']:>7.3f}{figures['uar']:>7.3f}{figures['chance']:>8.3f}"
            f"{figures['majority']:>10.3f}{figures['n']:>6}"
        )
    return "\n".join(lines)


def _row(
    name: str, recalls: Mapping[str, Any], mrr: float | None, hit: float | None, count: int | None
) -> str:
    cells = "".join(f"{recalls[f'R@{k}']:>7.3f}" for k in KS)
    return (
        f"{name:<24}{cells}"
        f"{'' if mrr is None else format(mrr, '.3f'):>8}"
        f"{'' if hit is None else format(hit, '.3f'):>7}{'' if count is None else count:>6}"
    )


def _name(kind: str, direction: str) -> str:
    """The name of a row, such as "fine speech->text"."""
    return f"{kind} {direction.replace('audio', 'speech').replace('_to_', '->')}"


def summary(results: Figures) -> str:
    """The results of `evaluate_embeddings` in one line: for each kind of caption the mean of both directions,
    and the zero-shot accuracies."""
    parts = []
    for kind, by_direction in results["retrieval"].items():
        both = [by_direction[direction] for direction in DIRECTIONS]
        means = {
            key: sum(figures[key] for figures in both) / 2
            for key in ("R@1", "R@10", "hit@5")
            if key in both[0]
        }
        parts.append(f"{kind} " + " ".join(f"{key} {value:.3f}" for key, value in means.items()))
    parts += [f"{task} {figures['accuracy']:.2f}" for task, figures in results["zeroshot"].items()]
    return " | ".join(parts)


def table_with_intervals(results: Figures) -> str:
    """The results of the evaluate command as text, each figure with its 95 % interval."""
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
            chance = "".join(f"{figures['chance'][f'R@{k}']:>22.3f}" for k in KS)
            lines.append(f"{'  chance':<30}{chance}")
        elif "chance" in figures:
            lines.append(f"{'  chance, majority':<30}{figures['chance']:>22.3f}{figures['majority']:>22.3f}")
    return "\n".join(lines)


def _rows(results: Figures) -> Iterator[tuple[str, Figures]]:
    """Name and figures of each row of the table with intervals."""
    for name, figures in results[results["kind"]].items():
        if results["kind"] == "retrieval":
            for direction in DIRECTIONS:
                yield _name(name, direction), figures[direction]
        else:
            yield name, figures


def save_picture(results: Figures, path: Path) -> str:
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
                pairs = [pair for pair in results["pairs"] if pair["category"] == name]
                axis.plot([p["cosine"] for p in pairs], [p["rating"] for p in pairs], ".", label=name)
            axis.set(xlabel="cosine", ylabel="mean rating", ylim=(-0.1, 5.1))
            axis.legend()
    files.replace_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
    return f"picture: {path}"


def _confusion_matrix(axis: Any, title: str, figures: Figures) -> None:
    counts = np.array(figures["confusion"])
    axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), vmin=0, vmax=1, cmap="Blues")
    positions = range(len(counts))
    axis.set(title=title, xlabel="predicted", ylabel="label")
    axis.set_xticks(positions, figures["labels"], rotation=45, ha="right")
    axis.set_yticks(positions, figures["labels"])
    for i in positions:
        for j in positions:
            axis.text(j, i, str(counts[i, j]), ha="center", va="center")


def write_results(path: Path, config: Mapping[str, Any], results: Figures) -> None:
    """Writes a JSON file with the results and the configuration that led to them."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
    files.write_text(path, json.dumps({"config": settings} | _without_nan(results), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
