"""Embeddings of many recordings: `python -m clsp_fast.embed SOURCE FOLDER --model MODEL`.

SOURCE is a manifest (.jsonl), a folder, a list with one path per line, or - for a list or manifest on
standard input. In a folder, files without an audio suffix are left out and counted; a list may name any file.
To continue a killed run, give the same command again. Under torchrun, the processes share the work. The exit
code is 0 if every recording was embedded, and 3 if not: index.jsonl says which recordings failed and why.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from clsp_fast import console, features, precision
from clsp_fast.audio import AudioError
from clsp_fast.checks import require
from clsp_fast.config import EncodeConfig
from clsp_fast.console import INCOMPLETE, Progress
from clsp_fast.data import segment
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import Problem, read_source
from clsp_fast.model import CLSP, load_model
from clsp_fast.storage import embedding_folder, files
from clsp_fast.storage.embedding_folder import EmbeddingHeader
from clsp_fast.storage.files import FolderInUse
from clsp_fast.storage.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EncodeConfig):
    """What is embedded, and where it is written."""

    source: str
    """Manifest (.jsonl, .jsonl.gz), folder, list with one path per line, or - for standard input."""
    out: Path
    """Folder to write. If an earlier run of the same command was not finished, this run continues it."""
    shard_format: Literal["npy", "safetensors"] = "npy"
    """Format of the shards."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored embeddings."""
    shard_rows: int = 1024
    """Recordings in a shard. A crash loses the work on one shard."""
    wait_hours: float = 168.0
    """With several processes: how many hours a process that has finished waits for the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source.strip()), "source", "a manifest, folder, list, or -", self.source)
        require(
            self.shard_format in ("npy", "safetensors"),
            "shard_format",
            '"npy" or "safetensors"',
            self.shard_format,
        )
        require(self.dtype in ("float32", "float16"), "dtype", '"float32" or "float16"', self.dtype)
        require(0 < self.wait_hours <= 1e5, "wait_hours", "in (0, 100000]", self.wait_hours)
        require(1 <= self.shard_rows <= 2**20, "shard_rows", "in [1, 1048576]", self.shard_rows)


class EmbedResult(NamedTuple):
    """Number of recordings, failures by reason, and bad lines of the manifest."""

    clips: int
    failed: Counter[str]
    problems: list[Problem]

    @property
    def complete(self) -> bool:
        """Whether every recording of the source has an embedding."""
        return not self.failed and not self.problems


@precision.as_configured
def embed(config: EmbedConfig, *, model: CLSP | None = None) -> EmbedResult:
    """Embeds recordings into a folder. Continues where an earlier call stopped.

    On one machine the folder is the same, bit for bit, however often the work was interrupted.

    Args:
        config: what is embedded, and where it is written.
        model: a loaded model to use instead of `config.model`.

    Raises:
        FileNotFoundError: no such model or source. ValueError: no recording, or the folder was begun with
        another model, other settings or another list. FolderInUse: another process writes to the folder.
        ConnectionError: another process of this run ended, or took too long.
    """
    # Processes wait for each other only at the end, and some finish hours before others. With the short time
    # limit of training they would give up. A long limit is safe: if a process dies, torchrun ends the others.
    with files.naming_full_disk(config.out), Ranks.join(config.device, wait_hours=config.wait_hours) as ranks:
        require(
            config.source != "-" or ranks.world == 1, "source", "a file or folder with several processes", "-"
        )
        clips, problems = read_source(config.source)
        model = load_model(config, ranks.device) if model is None else model
        header = EmbeddingHeader(
            model=model.fingerprint(config.precision),
            frontend=features.identity(),
            dim=model.config.joint_dim,
            dtype=config.dtype,
            shard_rows=config.shard_rows,
            shard_format=config.shard_format,
            long_audio=config.long_audio,
            window_s=float(config.window_s),
            slack_seconds=float(config.slack_seconds),
        )
        with ranks.exclusive(config.out):
            job = _Job(config.out, header, clips, config.source)
            # The first process lists the units to do, for all processes. If each process listed them, a late
            # one would not list the units that others have already finished, and the shares would not match.
            todo = ranks.gather(job.begin() if ranks.first else [])[0]
            units = todo[ranks.rank :: ranks.world]
            progress = Progress(
                sum(len(job.clips_of(unit)) for unit in units), "recordings", active=ranks.first
            )
            for unit in units:
                job.run(unit, model, config, progress)
            _await_others(ranks, config)
            failures = job.finish() if ranks.first else Counter()
            return EmbedResult(len(clips), ranks.gather(failures)[0], problems)


def _await_others(ranks: Ranks, config: EmbedConfig) -> None:
    try:
        ranks.gather(None)
    except RuntimeError as error:
        raise ConnectionError(
            f"another process ended, or needed over {config.wait_hours:g} hours more than this one "
            f"(--wait-hours); the same command continues the work: {error}"
        ) from error


def _record(clip: Clip) -> dict[str, Any]:
    """The part of a clip's line in the index that is known before the clip is embedded."""
    record: dict[str, Any] = {"id": clip.id, "audio": clip.audio}
    if clip.start_s:
        record["start_s"] = clip.start_s
    for key in ("duration_s", "channel"):
        if getattr(clip, key) is not None:
            record[key] = getattr(clip, key)
    return record


class _Job:
    """The work in units. A unit writes a shard, then its part of the index. With both, the unit is done."""

    def __init__(self, out: Path, header: EmbeddingHeader, clips: list[Clip], source: str) -> None:
        self._out, self._header, self._clips, self._source = out, header, clips, source
        self._parts, self._index = out / ".parts", out / "index.jsonl"

    def clips_of(self, unit: int) -> list[Clip]:
        """The clips of a unit."""
        rows = self._header.shard_rows
        return self._clips[unit * rows : (unit + 1) * rows]

    def _part(self, unit: int) -> Path:
        return self._parts / f"{unit:06d}.jsonl"

    def begin(self) -> list[int]:
        """The units that are not done; ValueError if the folder was begun with other settings or clips."""
        units = range(-(-len(self._clips) // self._header.shard_rows))
        earlier = self._index if self._index.exists() else self._parts / "header.jsonl"
        if earlier.exists():
            with earlier.open("rb") as file:
                self._compare_header(earlier, file.readline(embedding_folder.LONGEST_LINE))
        self._parts.mkdir(parents=True, exist_ok=True)
        files.write_text(self._parts / "header.jsonl", self._header.to_line() + "\n")
        if self._index.exists():
            self._split_index()
        return [unit for unit in units if not self._is_done(unit)]

    def _compare_header(self, file: Path, line: bytes) -> None:
        try:
            old = EmbeddingHeader.from_line(line)
        except ValueError as error:
            raise ValueError(f"{file}, line 1: {error}") from error
        for name in EmbeddingHeader.__dataclass_fields__:
            was, now = getattr(old, name), getattr(self._header, name)
            if was != now:
                fix = "give the same --model and --precision, or " if name == "model" else ""
                raise ValueError(
                    f"{self._out} was begun with {name} {was}, not {now}; {fix}choose another folder"
                )

    def _split_index(self) -> None:
        """Splits the index of a finished folder into parts, because its list may have grown."""
        rows = self._header.shard_rows
        with self._index.open("rb") as file:
            file.readline()
            unit = 0
            while lines := [line for line in (file.readline() for _ in range(rows)) if line]:
                if not self._part(unit).exists():
                    files.write_text(self._part(unit), b"".join(lines).decode())
                unit += 1

    def _is_done(self, unit: int) -> bool:
        part, wanted = self._part(unit), [_record(clip) for clip in self.clips_of(unit)]
        if not part.exists():
            return False
        try:
            shard = embedding_folder.read_shard(self._header.shard(self._out, unit), self._header)
            lines = part.read_text(encoding="utf-8").splitlines()
            records = [
                embedding_folder.check_record(embedding_folder.parse_object(line), unit, len(shard))
                for line in lines
            ]
        except (FileNotFoundError, ValueError):
            return False  # damaged or missing: it is written again
        outcome = {"shard", "row", "error", "detail"}
        known = [{key: value for key, value in record.items() if key not in outcome} for record in records]
        for number, (was, now) in enumerate(zip(known, wanted, strict=False)):
            if was != now:
                position = unit * self._header.shard_rows + number + 1
                raise ValueError(
                    f"{self._out} was begun with another list: recording {position} was {was['audio']!r}, "
                    f"is {now['audio']!r} in {self._source}; choose another folder"
                )
        if len(known) > len(wanted):
            raise ValueError(
                f"{self._out} was begun with a longer list than {self._source}; choose another folder"
            )
        return len(known) == len(wanted)

    def run(self, unit: int, model: CLSP, config: EncodeConfig, progress: Progress) -> None:
        """Embeds the recordings of a unit."""
        clips, errors = self.clips_of(unit), dict[int, AudioError]()
        sources = [segment(clip) for clip in clips]
        embedded = model.encode_audio(sources, errors=errors, progress=progress.add, **config.batching)
        progress.add(len(errors), len(errors))
        good = [i for i in range(len(clips)) if i not in errors]
        embedding_folder.write_shard(
            self._header.shard(self._out, unit),
            embedded.cpu()[good].to(getattr(torch, self._header.dtype)).numpy(),
        )
        rows = {i: row for row, i in enumerate(good)}
        lines = []
        for i, clip in enumerate(clips):
            where: dict[str, Any] = (
                {"shard": unit, "row": rows[i]}
                if i in rows
                else {"error": str(errors[i].reason), "detail": errors[i].detail}
            )
            lines.append(json.dumps(_record(clip) | where) + "\n")
        files.write_text(self._part(unit), "".join(lines))

    def finish(self) -> Counter[str]:
        """Joins the parts of the index, removes leftovers of killed runs. Returns the failures by reason."""
        units = range(-(-len(self._clips) // self._header.shard_rows))
        failures: Counter[str] = Counter()

        def join(path: Path) -> None:
            with path.open("wb") as file:
                file.write(self._header.to_line().encode() + b"\n")
                for unit in units:
                    part = self._part(unit).read_bytes()
                    file.write(part)
                    failures.update(
                        str(json.loads(line)["error"]) for line in part.splitlines() if b'"error": ' in line
                    )

        files.replace_file(self._index, join)
        shutil.rmtree(self._parts)
        for leftover in self._out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return failures


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    config = tyro.cli(
        EmbedConfig,
        args=arguments,
        prog="python -m clsp_fast.embed",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        result = embed(config)
    except (OSError, ValueError, FolderInUse) as error:
        sys.exit(f"clsp_fast.embed: {error}")
    except KeyboardInterrupt:
        print("clsp_fast.embed: stopped by SIGINT; the same command continues", file=sys.stderr)
        sys.exit(130)
    for problem in result.problems[:10]:
        print(f"{config.source}, line {problem.line}: {problem.message}", file=sys.stderr)
    failed = sum(result.failed.values())
    print(f"{config.out}: {result.clips - failed} embeddings of {result.clips} recordings")
    if not result.complete:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.failed.most_common())
        bad = f"; {len(result.problems)} bad lines in {config.source}" if result.problems else ""
        print(f'failed: {reasons or 0}; see "error" in {config.out / "index.jsonl"}{bad}', file=sys.stderr)
        sys.exit(INCOMPLETE)


if __name__ == "__main__":
    main()
