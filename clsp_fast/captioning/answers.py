"""The answers of a job: a folder that a killed run leaves whole, and that a later run continues.

The folder holds job.json, the settings, and answers.jsonl, one line for each answer or failure in the format
of OpenAI's batch output: {"custom_id", "error", "response": {"status_code", "body"}, "id"}. The output of
`vllm run-batch` or of a hosted batch has the same format. Lines are in the order in which answers arrived, so
readers find the answers of a row with `AnswerIndex`.

A custom_id begins with the row of the manifest and the part of the row: "12.3/generate/clip-id" is the fourth
request of the thirteenth line. Which requests are done is therefore one bit each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clsp_fast.captioning.client import Reply, describe
from clsp_fast.captioning.rows import ALL_ROWS, RowRange, asked_rows, rows_as_json, union
from clsp_fast.checks import by_path, is_positive, listed
from clsp_fast.storage import files
from clsp_fast.storage.textfile import shown

ANSWERS, RECORD = "answers.jsonl", "job.json"
_IN_WORDS = {
    "prompt_digest": "another --prompt",
    "pairs_prompt_digest": "another --pairs-prompt",
    "generate.begun": "other answers of `generate`",
}
"""Settings whose values mean nothing to the user, in words."""
_LONGEST_ID = 40
_LONGEST_LINE = 2**26
_CUSTOM_ID = re.compile(r"(\d{1,18})\.(\d{1,9})/")


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of an answer file.

    Attributes:
        custom_id: that of the request.
        texts: the content of each choice; empty where a choice has no content. No text: the request failed.
        finish_reasons: why each text ended: "stop"; "length" if it was cut.
        usage: "prompt_tokens" and "completion_tokens", as far as the server states them.
        model: the model that the server names.
        error: what went wrong; None: nothing.
    """

    custom_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    usage: Mapping[str, int]
    model: str
    error: str | None


def custom_id(step: str, row: int, clip_id: str, part: int = 0) -> str:
    """The id of a request: "row.part/step/clip id".

    Row and part make it unique, even where clips share an id. Of the clip's id, the last 40 characters are
    kept, and characters other than ASCII letters, digits and ". _ : -" become "_". If this changes the id, a
    digest is added.
    """
    name = re.sub(r"[^A-Za-z0-9_.:-]", "_", clip_id)[-_LONGEST_ID:]
    if name != clip_id:
        name += "~" + hashlib.sha256(clip_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{row}.{part}/{step}/{name}"


def row_and_part(custom_id: str) -> tuple[int, int]:
    """The row and part of a request's id. ValueError if the id does not begin with them."""
    match = _CUSTOM_ID.match(custom_id)
    if match is None:
        raise ValueError(f'custom_id must begin like "12.0/", got {shown(custom_id)}')
    return int(match[1]), int(match[2])


def parse_answer(line: bytes | str) -> Answer:
    """The answer of a line, as this module, `vllm run-batch` or a hosted batch writes it.

    Raises:
        ValueError: the line is not an answer.
    """
    try:
        row = json.loads(line)
        name, error, response = str(row["custom_id"]), row.get("error"), row.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if isinstance(body, dict) and status == 200 and not error and body.get("choices"):
            choices = [choice for _, choice in sorted(_numbered(body["choices"]), key=lambda pair: pair[0])]
            return Answer(
                name,
                tuple(_content(choice) for choice in choices),
                tuple(str(choice.get("finish_reason") or "") for choice in choices),
                _usage(body),
                str(body.get("model") or ""),
                None,
            )
        nested = body.get("error", body) if isinstance(body, dict) else body
        what = error or nested or "no answer"
        message = what.get("message") if isinstance(what, dict) else what
        return Answer(name, (), (), {}, "", str(message or what)[:1000])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an answer: {describe(error)}") from error


def _content(choice: Mapping[str, Any]) -> str:
    """The text of a choice. Servers give a string, null, or a list of parts."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _numbered(choices: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The choices with their "index". Where it is missing or no integer, the place in the list is taken."""
    for place, choice in enumerate(choices):
        index = choice.get("index")
        yield (index if isinstance(index, int) else place), choice


def _usage(body: Mapping[str, Any]) -> dict[str, int]:
    """The counts of tokens; empty if the server gives none."""
    usage = body.get("usage")
    pairs = usage.items() if isinstance(usage, dict) else ()
    return {str(key): int(value) for key, value in pairs if isinstance(value, int)}


def answer_line(name: str, reply: Reply) -> bytes:
    """The line of a request's outcome. Of a choice only the content is kept, not its reasoning."""
    response: dict[str, Any] | None = None
    error = {"code": f"http_{reply.status}" if reply.status else "failed", "message": reply.error}
    if reply.status:
        response = {"status_code": reply.status, "body": None}
    if response is not None and reply.body is not None:
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": _content(choice)},
                "finish_reason": choice.get("finish_reason"),
            }
            for number, choice in _numbered(reply.body["choices"])
        ]
        kept = {"id": reply.body.get("id"), "model": reply.body.get("model"), "usage": _usage(reply.body)}
        response["body"] = {"object": "chat.completion", "choices": choices} | kept
    row = {"custom_id": name, "error": error if reply.body is None else None, "response": response}
    return json.dumps(row | {"id": f"answer-{name.partition('/')[0]}"}).encode() + b"\n"


class Bits:
    """A set of integers >= 0, one bit each."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, number: int) -> None:
        """Adds an integer."""
        byte = number >> 3
        if byte >= len(self._bytes):
            self._bytes.extend(bytes(byte + 1 + len(self._bytes) // 8 - len(self._bytes)))
        self._bytes[byte] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bytes) and bool(self._bytes[byte] >> (number & 7) & 1)


def _scan(file: Any, parts: int) -> Iterator[tuple[int, int | None, bool]]:
    """(offset, number, whether it succeeded) of each answer; the number is row * parts + part.

    For a damaged line, which is no answer of this job, the number is None. Its request thus counts as not
    answered. An incomplete last line is left out.
    """
    offset = 0
    for line in file:
        try:
            answer = parse_answer(line)
            (row, part), good = row_and_part(answer.custom_id), answer.error is None
        except ValueError:
            part = parts
        if part < parts:
            yield offset, row * parts + part, good
        elif line.endswith(b"\n"):
            yield offset, None, False
        offset += len(line)


class SparseIntegers:
    """An integer for each index >= 0; 0 where none was set. Only blocks of indices that are used take memory,
    so that the last rows of a large manifest need no more than the first ones."""

    _BLOCK = 4096

    def __init__(self) -> None:
        self._blocks: dict[int, array[int]] = {}

    def __getitem__(self, index: int) -> int:
        number, place = divmod(index, self._BLOCK)
        return self._blocks[number][place] if number in self._blocks else 0

    def __setitem__(self, index: int, value: int) -> None:
        number, place = divmod(index, self._BLOCK)
        if number not in self._blocks:
            self._blocks[number] = array("q", [0]) * self._BLOCK
        self._blocks[number][place] = value


class AnswerIndex:
    """Finds the answers of a row. It holds eight bytes for each request, not the answers.

    If a request has several answers, the first one counts.

    Attributes:
        rows: one more than the last row with an answer.

    Args:
        folder: folder of a finished or running job.
    """

    def __init__(self, folder: Path) -> None:
        self._parts = int(read_record(folder)["parts"])
        self._file = (folder / ANSWERS).open("rb")
        self._places = SparseIntegers()  # offset + 1, because 0 stands for no answer
        self.rows = 0
        for offset, number, good in _scan(self._file, self._parts):
            if good and number is not None:
                self.rows = max(self.rows, number // self._parts + 1)
                self._places[number] = self._places[number] or offset + 1

    def __enter__(self) -> AnswerIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def of_row(self, row: int) -> tuple[Answer, ...]:
        """The answers of a row in the order of its parts. Failed requests and damaged lines are left out."""
        answers = []
        for number in range(row * self._parts, (row + 1) * self._parts):
            if place := self._places[number]:
                self._file.seek(place - 1)
                answers.append(parse_answer(self._file.readline()))
        return tuple(answers)


def read_answers(source: Path) -> Iterator[Answer]:
    """The answers and failures of a job's folder or of a file, in the order of the lines.

    Raises:
        FileNotFoundError: there are none. ValueError: a line is not an answer; an incomplete last line, which
        a killed run leaves, is left out instead.
    """
    path = source / ANSWERS if source.is_dir() else source
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_answer(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: {error}") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The settings of the job in a folder.

    Raises:
        FileNotFoundError: the folder holds no job. ValueError: its record is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise ValueError('expected an object with "settings"')
        if not is_positive(record.get("parts")):
            raise ValueError(f'"parts" must be an integer > 0, got {shown(record.get("parts"))}')
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no job (it has no {RECORD}); name the work folder of `generate`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return record


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers to a job depend on: its settings, and when its folder was begun.

    Servers do not repeat their answers, so a folder that is deleted and made again is another job.
    """
    return {**record["settings"], "begun": record.get("begun")}


def manifest_of(record: Mapping[str, Any]) -> Path:
    """The manifest that `generate` read. ValueError if its record names none."""
    path = record.get("manifest_path")
    if not isinstance(path, str) or not path:
        raise ValueError(f'{RECORD} of `generate` lacks "manifest_path"; name the manifest with --manifest')
    return Path(path)


def begin(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    parts: int,
    notes: Mapping[str, Any],
    asked: Sequence[RowRange] = (),
) -> None:
    """Records the settings of a job, or compares them with those of the job that the folder holds.

    A job without answers and job files, such as one whose model had a wrong name, starts over.

    Args:
        folder: the job's folder; the caller has locked it.
        settings: what the answers depend on.
        parts: the largest number of requests of a row.
        notes: what a later run may change, such as the version. Those of the last run are kept.
        asked: the rows of this run; empty: none are recorded. They are added to those of earlier runs, or
            replace them if the job has no answers and no job files.

    Raises:
        ValueError: the folder was begun with other settings; the message says which.
    """
    settings = dict(json.loads(json.dumps(settings)))  # as a later run reads them
    if (folder / RECORD).exists():
        record = read_record(folder)
        changed = _changes({**record["settings"], "parts": record["parts"]}, {**settings, "parts": parts})
        if not changed:
            changes = dict(notes)
            if asked:
                changes["rows"] = rows_as_json(union([*recorded_rows(folder), *asked]))
            if record != record | changes:
                files.write_json(folder / RECORD, record | changes)
            return
        if _has_results(folder, record["parts"]):
            remedy = "choose another folder (`judge`: another --name)"
            if not _has_answers(folder, record["parts"]):
                remedy = "it has no answers: delete its job files (jobs*.jsonl) to start over"
            raise ValueError(
                f"{folder} was begun with {listed(changed, separator='; ', width=400)}; {remedy}, or repeat "
                "the earlier settings"
            )
    elif (folder / ANSWERS).exists():
        raise ValueError(f"{folder} holds {ANSWERS} without {RECORD}; choose another folder")
    begun = datetime.now(timezone.utc).isoformat()
    record = {"settings": settings, "parts": parts, "begun": begun, **notes}
    if asked:
        record["rows"] = rows_as_json(union(asked))
    files.write_json(folder / RECORD, record)


def recorded_rows(folder: Path) -> list[RowRange]:
    """The rows that earlier runs of a job were asked for; empty if it has no answers and no job files.

    Raises:
        ValueError: its record is damaged.
    """
    if not (folder / RECORD).exists():
        return []
    record = read_record(folder)
    return asked_rows(record) if _has_results(folder, record["parts"]) else []


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, such as "sampling.temperature 0.6, not 0.7" or "other content of m.jsonl"."""
    before, after = by_path(earlier), by_path(now)
    changes = []
    for path in {**before, **after}:
        values = before.get(path), after.get(path)
        lead, _, key = path.rpartition(".")
        if values[0] == values[1] or key == "bytes":  # the size of a file whose "sha256" differs, too
            continue
        if key == "sha256" or path in _IN_WORDS:
            if None not in values:  # otherwise another setting says that the file is new
                changes.append(_IN_WORDS.get(path) or f"other content of {before.get(f'{lead}.name')}")
        else:
            # The lists of two settings may differ only in their last item, digests differ at their beginning.
            first, second = (shown(value, 200 if isinstance(value, list) else 40) for value in values)
            changes.append(f"{path} {first}, not {second}")
    return changes


def _has_results(folder: Path, parts: int) -> bool:
    """Whether the job has answers, or job files whose answers may come."""
    return any(folder.glob("jobs*.jsonl")) or _has_answers(folder, parts)


def _has_answers(folder: Path, parts: int) -> bool:
    with contextlib.suppress(FileNotFoundError), (folder / ANSWERS).open("rb") as file:
        return any(good for _, _, good in _scan(file, parts))
    return False


class AnswerFile:
    """The answers of a job, open for appending. An incomplete last line, which a killed run left, is cut off.

    Attributes:
        done: numbers (row * parts + part) of the requests that are answered.
        count: how many requests of the given rows are answered.
        damaged: lines that are no answers of this job. Their requests count as not answered.

    Args:
        folder: the job's folder; the caller has locked it.
        parts: the largest number of requests of a row.
        asked: the rows that `count` counts.
    """

    def __init__(self, folder: Path, parts: int, asked: Sequence[RowRange] = (ALL_ROWS,)) -> None:
        self._path = folder / ANSWERS
        self._parts = parts
        self._asked = [(first * parts, end * parts) for first, end in asked]
        self.done = Bits()
        self.count = self.damaged = 0
        with files.naming_full_disk(self._path):
            self._file = self._path.open("a+b", buffering=0)
            self._size = self._end_last_line()
        self._synced = self._size
        with self._path.open("rb") as file:
            for _, number, good in _scan(file, parts):
                if number is None:
                    self.damaged += 1
                elif good:
                    self._note_done(number)

    def _note_done(self, number: int) -> None:
        if number not in self.done:
            self.count += any(first <= number < end for first, end in self._asked)
        self.done.add(number)

    def _end_last_line(self) -> int:
        """Completes a last line that lacks only its line ending; cuts off an incomplete one.

        Returns the size of the file.
        """
        start = size = self._file.seek(0, 2)
        while start:
            before = max(0, start - 2**16)
            self._file.seek(before)
            place = self._file.read(start - before).rfind(b"\n")
            start = before + place + 1
            if place >= 0:
                break
        if start == size:
            return size
        self._file.seek(start)
        with contextlib.suppress(ValueError):
            parse_answer(self._file.read(min(size - start, _LONGEST_LINE)))
            self._file.write(b"\n")
            return size + 1
        self._file.truncate(start)
        return start

    def is_done(self, name: str) -> bool:
        """Whether the request is answered. ValueError if its id does not belong to this job."""
        return self._number(name) in self.done

    def _number(self, name: str) -> int:
        row, part = row_and_part(name)
        if part >= self._parts:
            raise ValueError(f"{name}: a row has at most {self._parts} requests")
        return row * self._parts + part

    def append(self, name: str, line: bytes, *, good: bool) -> None:
        """Appends a line. It is whole, or after a failure not there at all."""
        with files.naming_full_disk(self._path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(line)
        if good:
            self._note_done(self._number(name))

    def sync(self) -> None:
        """Writes the answers to the disk."""
        size = self._size
        if size != self._synced:
            with files.naming_full_disk(self._path):
                files.sync(self._file.fileno())
            self._synced = size

    def close(self) -> None:
        """Writes the answers to the disk and closes the file."""
        try:
            self.sync()
        finally:
            self._file.close()
