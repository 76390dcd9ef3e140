"""Job files that other programs run, and the answers that these programs wrote.

The requests of a job are written as OpenAI batch JSONL, and the answers are added to the job's folder, which
clsp_fast/captioning/answers.py describes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clsp_fast.audio import AudioError
from clsp_fast.captioning.answers import (
    Answer,
    AnswerFile,
    SparseIntegers,
    answer_line,
    begin,
    parse_answer,
    row_and_part,
)
from clsp_fast.captioning.client import Reply, describe
from clsp_fast.captioning.ids import digest
from clsp_fast.captioning.request import LINES_HINT, Body, Counts, FirstClips, Request
from clsp_fast.captioning.rows import RowRange
from clsp_fast.checks import counted
from clsp_fast.storage import files

_SHOWN_FILES = 10


@dataclass(slots=True)
class Written:
    """What `write_pending` did.

    Attributes:
        files: each job file and its number of requests.
        counts: "failed" requests, whose body cannot be made, and "skipped" ones are in no file.
    """

    files: dict[Path, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def describe(self) -> str:
        """A few lines of text."""
        shown = list(itertools.islice(self.files.items(), _SHOWN_FILES))
        lines = [f"{path}: {counted(count, 'request')}" for path, count in shown]
        if len(shown) < len(self.files):
            rest = sum(self.files.values()) - sum(count for _, count in shown)
            lines.append(f"and {len(self.files) - len(shown)} more files with {rest} requests")
        if self.counts.failed:
            reasons = self.counts.reasons()
            lines.append(f"left out: {self.counts.failed} requests that cannot be made ({reasons})")
        return "\n".join(lines or ["no request is left to write"])


def write_pending(
    requests: Iterable[Request],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    asked: Sequence[RowRange] = (),
    shard_rows: int | None = None,
) -> Written:
    """Writes the requests of a job that are not answered yet as job files in its folder.

    They are OpenAI batch JSONL, which `vllm run-batch` and hosted batches run. A file appears only when it is
    complete: jobs.jsonl, or jobs-00000.jsonl and so on. Job files of earlier calls are deleted, so `requests`
    must include those for the rows of earlier calls. A shard without requests has no file.

    Args:
        requests: as for `run_jobs`, like the arguments that are not listed here.
        shard_rows: rows of the manifest in a file; None: one file for all.

    Raises:
        ValueError: the folder was begun with other settings. ServerError: no request of the first clips can
        be made. FolderInUse, DiskFull.
    """
    written = Written()
    with files.lock_folder(folder):
        begin(folder, settings, parts=parts, notes=notes or {}, asked=asked)
        for path in (*folder.glob("jobs*.jsonl"), *folder.glob(".*.tmp")):  # of earlier and killed calls
            path.unlink()
        with contextlib.closing(AnswerFile(folder, parts)) as answers:
            pending = (request for request in requests if not answers.is_done(request.custom_id))
            jobs = _built(pending, written.counts, FirstClips(answers.count > 0))

            def name_of_file(job: tuple[str, Body]) -> str:
                if shard_rows is None:
                    return "jobs.jsonl"
                return f"jobs-{row_and_part(job[0])[0] // shard_rows:05d}.jsonl"

            for name, group in itertools.groupby(jobs, name_of_file):
                written.files[folder / name] = _write_jobs(group, folder / name)
    return written


def _built(requests: Iterable[Request], counts: Counts, first: FirstClips) -> Iterator[tuple[str, Body]]:
    """The ids and bodies of requests; those that fail or are skipped are counted and left out."""
    for place, request in enumerate(requests):
        try:
            body = request.build()
        except (AudioError, OSError, ValueError) as error:
            counts.add(Answer(request.custom_id, (), (), {}, "", describe(error)))
            first.note_failure(place, request.custom_id, describe(error), LINES_HINT)
            continue
        if body is None:
            counts.skipped += 1
            first.note_skip(place)
        else:
            first.note_answer()
            yield request.custom_id, body


def _write_jobs(jobs: Iterable[tuple[str, Body]], path: Path) -> int:
    """Writes a job file. Returns its number of requests."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("wb") as file:
            for name, body in jobs:
                row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(row).encode() + b"\n")
                count += 1

    files.replace_file(path, write)
    return count


@dataclass(slots=True)
class Imported:
    """What `import_answers` did with the lines of the files.

    Attributes:
        added: answers that the folder has now, and did not have before.
        repeated: answers to requests that were already answered.
        failed: lines that say that a request failed.
        unknown: answers whose custom_id is not one of the job's.
        damaged: lines that are not answers.
        missing: requests that still have no answer.
    """

    added: int = 0
    repeated: int = 0
    failed: int = 0
    unknown: int = 0
    damaged: int = 0
    missing: int = 0

    def describe(self) -> str:
        """One line of text."""
        others = {
            "already answered": self.repeated,
            "failed": self.failed,
            "with an id that is not one of this job's": self.unknown,
            "damaged": self.damaged,
        }
        rest = [f"{count} {text}" for text, count in others.items() if count]
        return ", ".join([f"{self.added} answers added", *rest])


def import_answers(
    sources: Iterable[Path],
    names: Iterable[str],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    parts: int = 1,
    notes: Mapping[str, Any] | None = None,
    asked: Sequence[RowRange] = (),
) -> Imported:
    """Adds answers that another program collected, such as the output of `vllm run-batch`.

    An answer is added if its custom_id is that of a request of this job, clip id included. Thus answers that
    belong to another manifest, or to this one with shifted rows, are noticed.

    Args:
        sources: files in the format of the OpenAI batch output.
        names: the custom_id of every request of the job. Eight bytes are held for each.
        folder: as for `run_jobs`, like the other arguments.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the folder was begun with other settings.
        FolderInUse, DiskFull.
    """
    digests, result = SparseIntegers(), Imported()
    with files.lock_folder(folder):
        begin(folder, settings, parts=parts, notes=notes or {}, asked=asked)
        with contextlib.closing(AnswerFile(folder, parts)) as answers:
            for name in names:
                row, part = row_and_part(name)
                digests[row * parts + part] = digest(name)
                result.missing += not answers.is_done(name)
            for path in sources:
                with path.open("rb") as file:
                    for line in file:
                        _import_line(line, digests, answers, parts, result)
    result.missing -= result.added
    return result


class Exchange(NamedTuple):
    """What `exchange_files` did.

    Attributes:
        missing: requests without an answer after the import; 0 without an import.
        failed: requests that cannot be made and are in no job file.
    """

    missing: int
    failed: int


def exchange_files(
    requests: Callable[[], Iterable[Request]],
    folder: Path,
    *,
    sources: Sequence[Path],
    write: bool,
    names: Callable[[], Iterable[str]] | None = None,
    shard_rows: int | None = None,
    **job: Any,
) -> Exchange:
    """Does and prints what a command is asked for with --answers and --jobs-only: both run without servers.

    Args:
        requests: gives all requests of the job.
        folder: the job's folder.
        sources: files for `import_answers`, if any.
        write: whether `write_pending` is called, after the import.
        names: gives the names for `import_answers`; None: those of `requests`.
        shard_rows: for `write_pending`.
        job: settings, parts and so on, for both.
    """
    missing = failed = 0
    if sources:
        known = (request.custom_id for request in requests()) if names is None else names()
        imported = import_answers(sources, known, folder, **job)
        missing = imported.missing
        print(f"{folder}: {imported.describe()}")
    if write:
        written = write_pending(requests(), folder, shard_rows=shard_rows, **job)
        failed = written.counts.failed
        print(written.describe())
    return Exchange(missing, failed)


def _import_line(
    line: bytes, digests: SparseIntegers, answers: AnswerFile, parts: int, result: Imported
) -> None:
    if not line.strip():
        return
    try:
        answer = parse_answer(line)
    except ValueError:
        result.damaged += 1
        return
    try:
        row, part = row_and_part(answer.custom_id)
    except ValueError:
        row, part = 0, parts
    number = row * parts + part
    if part >= parts or digests[number] != digest(answer.custom_id):
        result.unknown += 1
    elif answer.error is not None:
        result.failed += 1
    elif answers.is_done(answer.custom_id):
        result.repeated += 1
    else:
        body = json.loads(line)["response"]["body"]
        answers.append(answer.custom_id, answer_line(answer.custom_id, Reply(200, body)), good=True)
        result.added += 1
