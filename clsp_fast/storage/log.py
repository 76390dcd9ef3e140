"""Records a run in log.jsonl, and as TensorBoard events on request; prints the lines of the first rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from clsp_fast.storage import files


class RunLog:
    """Appends records to `<folder>/log.jsonl`.

    A resumed run repeats steps. Their old records are removed first.

    Args:
        folder: run folder.
        first_step: step that this process starts with; records from this step on are removed.
        tensorboard: also write TensorBoard events.
        active: True on the first rank only. The other ranks write and print nothing.

    Raises:
        ImportError: `tensorboard` is True, but TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path, *, first_step: int, tensorboard: bool = False, active: bool = True
    ) -> None:
        self._active = active
        if not active:
            return
        self._path = folder / "log.jsonl"
        _remove_from(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = _tensorboard(folder) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            try:
                with files.naming_full_disk(self._path):
                    self._file.close()
            except files.DiskFull:
                if kind is None:  # otherwise report the error that ended the run
                    raise
            if self._board is not None:
                self._board.close()

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Writes one record, {"kind", "step", "time", ...}; numbers also go to TensorBoard as kind/name."""
        if not self._active:
            return
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | figures) + "\n"
        with files.naming_full_disk(self._path, len(line)):
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, oldest first. A line that a crash cut short is skipped."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def _remove_from(path: Path, step: int) -> None:
    kept = [record for record in read_log(path) if record["step"] < step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the extra: pip install 'clsp_fast[tensorboard]'") from error
    return SummaryWriter(str(folder))
