"""What a run writes: log.jsonl always, TensorBoard if asked, one line to read, and curves.png at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from clsp_fast.storage import files

_COLOURS = {"global": "tab:orange", "fine": "tab:blue"}


class RunLog:
    """Appends records to `<folder>/log.jsonl`; records of steps that a resumed run does again are dropped
    first.

    Args:
        folder: run folder.
        first_step: step that this process starts with.
        tensorboard: also write TensorBoard events.
        active: False on all ranks but the first: nothing is written or printed.

    Raises:
        ImportError: `tensorboard` is asked for and not installed.
    """

    def __init__(
        self, folder: Path, *, first_step: int, tensorboard: bool = False, active: bool = True
    ) -> None:
        self._active = active
        if not active:
            return
        self._path = folder / "log.jsonl"
        _keep_before(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = _tensorboard(folder) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            try:
                with files.room_for(self._path):
                    self._file.close()
            except files.DiskFull:
                if kind is None:  # else it is told already
                    raise
            if self._board is not None:
                self._board.close()

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Writes one record, {"kind", "step", "time", ...}; numbers also go to TensorBoard as kind/name."""
        if not self._active:
            return
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | figures) + "\n"
        with files.room_for(self._path, len(line)):
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        """Prints a line, on the first rank only."""
        if self._active:
            print(text, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, oldest first; a last line that a crash cut short is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def _keep_before(path: Path, step: int) -> None:
    kept = [record for record in read(path) if record["step"] < step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the extra: pip install 'clsp_fast[tensorboard]'") from error
    return SummaryWriter(str(folder))


def save_report(run: Path) -> str:
    """Draws `run`/curves.png from its log: loss, retrieval, zero-shot accuracy and speed over steps.

    Returns:
        A line that says where it is, or why there is none.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return "curves.png: not drawn, matplotlib is missing (pip install 'clsp_fast[demo]')"
    mpl.use("agg")
    from matplotlib import pyplot as plt

    records = read(run / "log.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, constrained_layout=True)
    _line(axes[0, 0], train, "loss", "training loss")
    _line(axes[1, 1], train, "audio_s_per_s", "audio seconds a second")
    for kind, colour in _COLOURS.items():
        _validation_line(axes[0, 1], validation, kind, "R@10", colour, "-")
        _validation_line(axes[0, 1], validation, kind, "hit@5", colour, "--")
    for tag in sorted({tag for record in validation for tag in record["results"]["zeroshot"]}):
        having = [r for r in validation if tag in r["results"]["zeroshot"]]
        points = [(r["step"], r["results"]["zeroshot"][tag]["accuracy"]) for r in having]
        axes[1, 0].plot(*zip(*points, strict=True), marker=".", label=tag)
    for axis, title in (
        (axes[0, 1], "validation retrieval, mean of both ways"),
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


def _line(axis: Any, records: list[dict[str, Any]], key: str, title: str) -> None:
    axis.plot([record["step"] for record in records], [record[key] for record in records])
    axis.set(title=title)


def _validation_line(
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
