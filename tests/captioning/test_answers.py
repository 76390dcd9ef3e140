"""The answers of a job: ids, the formats of lines, whole lines only, and the answers of a row."""

from __future__ import annotations

import contextlib
import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from clsp_fast.captioning.answers import (
    AnswerFile,
    AnswerIndex,
    Bits,
    SparseIntegers,
    answer_line,
    begin,
    custom_id,
    identity,
    manifest_of,
    parse_answer,
    read_answers,
    read_record,
    row_and_part,
)
from clsp_fast.captioning.client import Reply
from clsp_fast.captioning.rows import ALL_ROWS
from clsp_fast.storage.files import DiskFull


def body(*texts: str, reason: str = "stop") -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"content": text}, "finish_reason": reason} for i, text in enumerate(texts)
    ]
    return {"model": "m", "choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def job(folder: Path, parts: int = 1) -> AnswerFile:
    folder.mkdir(exist_ok=True)
    begin(folder, {"seed": 0}, parts=parts, notes={})
    return AnswerFile(folder, parts)


def test_ids_hold_the_row_and_never_break_a_line() -> None:
    assert custom_id("generate", 12, "spk1_utt2", 3) == "12.3/generate/spk1_utt2"
    for clip_id in ("a/b c", "déjà", "\udcff", "x" * 200, 'a"b\\c\n', ""):
        name = custom_id("verify", 7, clip_id)
        assert row_and_part(name) == (7, 0)
        assert name.isascii()
        assert len(name) < 80
        assert not set('"\\\n ') & set(name)
    long = "corpus/" * 10
    assert custom_id("generate", 0, long + "1") != custom_id("generate", 0, long + "2")
    for name in ("generate/12", "a.0/x", "1/x", "-1.0/x"):
        with pytest.raises(ValueError, match='custom_id must begin like "12'):
            row_and_part(name)


def test_bits_are_a_set() -> None:
    bits, numbers = Bits(), {0, 7, 8, 1000, 123_457}
    for number in numbers:
        bits.add(number)
    assert {number for number in range(200_000) if number in bits} == numbers


@pytest.mark.parametrize(
    ("row", "error"),
    [
        # As `vllm run-batch` and OpenAI write failures.
        ({"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}}, "too long"),
        ({"response": {"status_code": 400, "body": {"object": "error", "message": "flat"}}}, "flat"),
        ({"response": None, "error": {"code": "expired", "message": "expired"}}, "expired"),
        ({"response": {"status_code": 200, "body": None}, "error": "text"}, "text"),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, None),
        ({}, "no answer"),
    ],
)
def test_failures_of_other_programs(row: dict[str, Any], error: str | None) -> None:
    answer = parse_answer(json.dumps({"custom_id": "0.0/x/a", "error": None} | row))
    assert answer.texts == ()
    assert answer.error == (error or "{'choices': []}")


def test_answers_of_other_programs() -> None:
    response = {"status_code": 200, "request_id": "r", "body": body("one", "two")}
    response["body"]["choices"].reverse()
    response["body"]["choices"][0]["message"]["content"] = [{"type": "text", "text": "two"}]
    answer = parse_answer(
        json.dumps({"id": "v", "custom_id": "5.0/x/a", "response": response, "error": None})
    )
    assert answer.texts == ("one", "two")
    assert answer.finish_reasons == ("stop", "stop")
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert (answer.custom_id, answer.model, answer.error) == ("5.0/x/a", "m", None)


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[1]", b"null", b"\xff", b'{"custom_id": "1.0/a', b"[" * 100_000]
)
def test_other_lines_are_no_answers(line: bytes) -> None:
    with pytest.raises(ValueError, match="not an answer"):
        parse_answer(line)


def test_only_an_incomplete_last_line_is_cut_off(tmp_path: Path) -> None:
    first, second = (answer_line(f"{i}.0/x/a", Reply(200, body("t" * 100_000))) for i in (0, 1))
    for cut in (1, 100, 70_000, len(second) - 1):
        folder = tmp_path / str(cut)
        with contextlib.closing(job(folder)) as answers:
            answers.append("0.0/x/a", first, good=True)
        with (folder / "answers.jsonl").open("ab") as file:
            file.write(second[:cut])
        complete = cut == len(second) - 1  # only the line ending is missing
        names = ["0.0/x/a", "1.0/x/a"] if complete else ["0.0/x/a"]
        assert [answer.custom_id for answer in read_answers(folder)] == names
        with AnswerIndex(folder) as index:
            assert index.rows == len(names)
        with contextlib.closing(AnswerFile(folder, 1)) as answers:
            assert [number in answers.done for number in (0, 1)] == [True, complete]
            if not complete:
                answers.append("1.0/x/a", second, good=True)
        assert (folder / "answers.jsonl").read_bytes() == first + second
    (tmp_path / "1/answers.jsonl").write_bytes(second[:50])
    with contextlib.closing(AnswerFile(tmp_path / "1", 1)) as answers:
        assert answers.count == 0
        assert (tmp_path / "1/answers.jsonl").read_bytes() == b""
    (tmp_path / "1/answers.jsonl").write_bytes(second[:-1])
    with contextlib.closing(AnswerFile(tmp_path / "1", 1)) as answers:
        answers.append("0.0/x/a", first, good=True)
    assert (tmp_path / "1/answers.jsonl").read_bytes() == second + first


def test_a_damaged_line_counts_as_not_answered(tmp_path: Path) -> None:
    lines = [answer_line(f"{i}.0/x/a", Reply(200, body(str(i)))) for i in range(4)]
    with contextlib.closing(job(tmp_path)):
        pass
    half, whole = lines[1][:100], lines[1]
    damaged = (
        b"\0" * 30 + b"\n",  # as a disk leaves it that lost its power
        half + b"\0" * 30 + whole[130:],
        whole.replace(b'"choices"', b'"ch"ices"'),
        half + b"\n",
        half + lines[0],
        half + whole,
        answer_line("1.1/x/a", Reply(200, body("1"))),
    )
    for lines[1] in damaged:
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines))
        with contextlib.closing(AnswerFile(tmp_path, 1)) as answers:
            assert [number in answers.done for number in range(4)] == [True, False, True, True]
            assert answers.damaged == 1
        with AnswerIndex(tmp_path) as index:
            texts = [answer.texts for row in range(4) for answer in index.of_row(row)]
        assert texts == [("0",), ("2",), ("3",)]
    lines[1] = damaged[0]
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: not an answer"):
        list(read_answers(tmp_path))


def test_the_index_finds_the_answers_of_a_row(tmp_path: Path) -> None:
    with contextlib.closing(job(tmp_path, parts=3)) as answers:
        for row, part in ((5, 2), (0, 1), (5, 0), (0, 0)):
            name = custom_id("generate", row, "a", part)
            answers.append(name, answer_line(name, Reply(500, None, "bad")), good=False)
            answers.append(name, answer_line(name, Reply(200, body(f"{row} {part}"))), good=True)
            answers.append(name, answer_line(name, Reply(200, body("later"))), good=True)
        assert answers.count == 4
        with pytest.raises(ValueError, match="a row has at most 3 requests"):
            answers.is_done("0.3/generate/a")
    with AnswerIndex(tmp_path) as index:
        assert index.rows == 6
        assert [answer.texts for answer in index.of_row(5)] == [("5 0",), ("5 2",)]
        assert [answer.texts for answer in index.of_row(0)] == [("0 0",), ("0 1",)]
        assert index.of_row(3) == index.of_row(100) == ()


def test_late_rows_need_no_more_memory_than_early_ones() -> None:
    numbers = SparseIntegers()
    tracemalloc.start()
    for index in (0, 10**12, 10**12 + 1):
        numbers[index] = index + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [numbers[index] for index in (0, 1, 10**12, 10**12 + 1, 10**13)] == [
        1,
        0,
        10**12 + 1,
        10**12 + 2,
        0,
    ]
    assert 1_000 < peak < 1_000_000


@pytest.mark.parametrize(
    ("change", "texts", "usage"),
    [
        ({"usage": [1]}, ("a", "b"), {}),
        ({"usage": {"prompt_tokens": "3", "total_tokens": 5}}, ("a", "b"), {"total_tokens": 5}),
        ({"choices": [{"index": "a", "message": {"content": "a"}}]}, ("a",), None),
        ({"choices": [{"message": "a"}, {"message": {"content": ["b", {"text": "c"}]}}]}, ("", "c"), None),
    ],
)
def test_odd_answers_never_damage_a_folder(
    change: dict[str, Any], texts: tuple[str, ...], usage: dict[str, int] | None
) -> None:
    odd = body("a", "b") | change
    written = parse_answer(answer_line("0.0/generate/a", Reply(200, odd)))
    assert written.texts == texts
    assert written.usage == ({"prompt_tokens": 3, "completion_tokens": 2} if usage is None else usage)
    line = json.dumps({"custom_id": "0.0/generate/a", "response": {"status_code": 200, "body": odd}})
    assert parse_answer(line.encode()) == written


def write_answer(folder: Path) -> None:
    (folder / "answers.jsonl").write_bytes(answer_line("0.0/generate/a", Reply(200, body("a"))))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    manifest = {"name": "m.jsonl", "bytes": 8, "sha256": "0"}
    settings = {"seed": 0, "sampling": {"temperature": 0.6, "top_k": 20}, "manifest": manifest}
    begin(tmp_path, settings, parts=1, notes={"version": "1"})
    write_answer(tmp_path)
    begin(tmp_path, settings, parts=1, notes={"version": "2"})
    assert read_record(tmp_path)["version"] == "2"
    changed = {"seed": 1, "sampling": {"temperature": 0.7, "top_k": 20}}
    changed |= {"manifest": manifest | {"bytes": 9, "sha256": "1"}}
    with pytest.raises(ValueError, match="was begun with") as refusal:
        begin(tmp_path, changed, parts=2, notes={})
    assert str(refusal.value) == (
        f"{tmp_path} was begun with seed 0, not 1; sampling.temperature 0.6, not 0.7; other content of "
        "m.jsonl; parts 1, not 2; choose another folder (`judge`: another --name), or repeat the earlier "
        "settings"
    )
    with pytest.raises(ValueError, match=r"with sampling\.top_k 20, not None; choose"):
        begin(tmp_path, settings | {"sampling": {"temperature": 0.6}}, parts=1, notes={})


def test_a_damaged_or_missing_record_is_named(tmp_path: Path) -> None:
    begin(tmp_path, {"seed": 0}, parts=1, notes={})
    assert manifest_of({"manifest_path": "m.jsonl"}) == Path("m.jsonl")
    with pytest.raises(ValueError, match=r'lacks "manifest_path"; name the manifest with --manifest'):
        manifest_of(read_record(tmp_path))
    for text, match in (
        ("{", "damaged"),
        ('{"settings": {}}', r'job\.json is damaged: "parts" must be an integer > 0, got None'),
    ):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            read_record(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no job"):
        read_record(tmp_path / "other")
    (tmp_path / "job.json").unlink()
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds answers\.jsonl without job\.json"):
        begin(tmp_path, {}, parts=1, notes={})


def test_a_job_without_results_starts_over_with_other_settings(tmp_path: Path) -> None:
    begin(tmp_path, {"model": "typo"}, parts=1, notes={})
    (tmp_path / "answers.jsonl").write_bytes(answer_line("0.0/generate/a", Reply(404, None, "no model")))
    begin(tmp_path, {"model": "right"}, parts=2, notes={})
    assert read_record(tmp_path)["settings"] == {"model": "right"}
    assert read_record(tmp_path)["parts"] == 2
    (tmp_path / "jobs-00000.jsonl").touch()
    with pytest.raises(ValueError, match=r"not 'other'; it has no answers: delete its job files \(j"):
        begin(tmp_path, {"model": "other"}, parts=2, notes={})
    (tmp_path / "jobs-00000.jsonl").unlink()
    write_answer(tmp_path)
    with pytest.raises(ValueError, match="not 'other'; choose another folder"):
        begin(tmp_path, {"model": "other"}, parts=2, notes={})


def test_rows_of_all_runs_are_recorded_and_are_no_setting(tmp_path: Path) -> None:
    begin(tmp_path, {}, parts=1, notes={}, asked=[(0, 10)])
    first = read_record(tmp_path)
    write_answer(tmp_path)
    begin(tmp_path, {}, parts=1, notes={}, asked=[(50, 60)])
    begin(tmp_path, {}, parts=1, notes={}, asked=[(5, 20)])
    assert read_record(tmp_path)["rows"] == [[0, 20], [50, 60]]
    assert identity(read_record(tmp_path)) == identity(first)
    begin(tmp_path, {}, parts=1, notes={}, asked=[ALL_ROWS])
    assert read_record(tmp_path)["rows"] == [[0, None]]


def test_rows_of_a_run_without_results_are_replaced(tmp_path: Path) -> None:
    """Such as those of a run that reached no server. `filter` would count them as "without answer"."""
    begin(tmp_path, {}, parts=1, notes={}, asked=[(0, 10)])
    begin(tmp_path, {}, parts=1, notes={}, asked=[(0, 2)])
    assert read_record(tmp_path)["rows"] == [[0, 2]]
    (tmp_path / "jobs.jsonl").touch()
    begin(tmp_path, {}, parts=1, notes={}, asked=[(4, 6)])
    assert read_record(tmp_path)["rows"] == [[0, 2], [4, 6]]


def test_answers_to_other_rows_are_not_counted(tmp_path: Path) -> None:
    """A progress line that counted them would begin at more than all."""
    with contextlib.closing(job(tmp_path, 2)) as answers:
        for row in (0, 1, 2, 5):
            name = f"{row}.1/generate/a"
            answers.append(name, answer_line(name, Reply(200, body("a"))), good=True)
        assert answers.count == 4
    with contextlib.closing(AnswerFile(tmp_path, 2, [(2, 5), (7, 9)])) as answers:
        assert answers.count == 1
        assert answers.is_done("5.1/generate/a")


class FullFile:
    """A file on a disk with room for a few bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written: int = self._file.write(data[: self._room])
        self._room -= written
        return written


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    lines = [answer_line(f"{i}.0/x/a", Reply(200, body(str(i)))) for i in range(2)]
    with contextlib.closing(job(tmp_path)) as answers:
        answers.append("0.0/x/a", lines[0], good=True)
        file, answers._file = answers._file, FullFile(answers._file, 40)  # type: ignore[assignment]
        with pytest.raises(DiskFull, match=r"answers\.jsonl.*make room and run the same command again"):
            answers.append("1.0/x/a", lines[1], good=True)
        answers._file = file
        assert (tmp_path / "answers.jsonl").read_bytes() == lines[0]
        assert not answers.is_done("1.0/x/a")
        answers.append("1.0/x/a", lines[1], good=True)
    assert (tmp_path / "answers.jsonl").read_bytes() == b"".join(lines)
