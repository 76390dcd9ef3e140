"""The picture of a finished run: curves.png, drawn from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clsp_fast.storage import files
from clsp_fast.storage.log import read_log

_COLOURS = {"global": "tab:orange", "fine": "tab:blue"}


def draw_curves(run: Path) -> str:
    """Draws `run`/curves.png from the run's log: loss, retrieval, zero-shot accuracy and speed over steps.

    Returns:
        A line that says where the picture is, or why there is none.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return "curves.png: not drawn, matplotlib is missing (pip install 'clsp_fast[demo]')"
    mpl.use("agg")
    from matplotlib import pyplot as plt

    records = read_log(run / "log.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, constrained_layout=True)
    _draw_line(axes[0, 0], train, "loss", "training loss")
    _draw_line(axes[1, 1], train, "audio_s_per_s", "audio seconds per second")
    for kind, colour in _COLOURS.items():
        _draw_retrieval(axes[0, 1], validation, kind, "R@10", colour, "-")
        _draw_retrieval(axes[0, 1], validation, kind, "hit@5", colour, "--")
    for tag in sorted({tag for record in validation for tag in record["results"]["zeroshot"]}):
        points = [
            (record["step"], record["results"]["zeroshot"][tag]["accuracy"])
            for record in validation
            if tag in record["results"]["zeroshot"]
        ]
        axes[1, 0].plot(*zip(*points, strict=True), marker=".", label=tag)
    for axis, title in (
        (axes[0, 1], "validation retrieval, mean of both directions"),
        (axes[1, 0], "zero-shot accuracy"),
    ):
        axis.set(title=title, ylim=(0, 1))
        if axis.lines:
            axis.legend(fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("step")
    files.replace_file(run / "curves.png", lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
    return f"curves: {run / 'curves.png'}"


def _draw_line(axis: Any, records: list[dict[str, Any]], key: str, title: str) -> None:
    axis.plot([record["step"] for record in records], [record[key] for record in records])
    axis.set(title=title)


def _draw_retrieval(
    axis: Any, records: list[dict[str, Any]], kind: str, key: str, colour: str, style: str
) -> None:
    points = []
    for record in records:
        figures = record["results"]["retrieval"].get(kind)
        if figures and key in figures["audio_to_text"]:
            points.append(
                (record["step"], (figures["audio_to_text"][key] + figures["text_to_audio"][key]) / 2)
            )
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{kind} {key}")
