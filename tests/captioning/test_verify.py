"""The verifier: verdicts, answers that are none, the second attempt, job files, resuming."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from caption_jobs import CLIP, good, make_work
from sample_data import MakeClips, write_rows
from stub_server import MODEL, StubServer

from clsp_fast.captioning import answers, verify
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.filter import FilterConfig, filter
from clsp_fast.captioning.generate import GenerateConfig, generate
from clsp_fast.captioning.prompt import Prompt
from clsp_fast.captioning.rules import default_rules
from clsp_fast.captioning.verify import CHECKLIST, Verdict, Verdicts, VerifyConfig
from clsp_fast.console import INCOMPLETE

GOOD = json.dumps(dict.fromkeys(CHECKLIST, False))


def verdict(**violations: bool) -> str:
    """An answer of the verifier."""
    return json.dumps(dict.fromkeys(CHECKLIST, False) | violations)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, Verdict()),
        (f"<think>Hm.</think>\n```json\n{GOOD}\n```", Verdict()),
        (verdict(absence=True, background=True), Verdict(("background", "absence"))),
        (verdict(transcription=True), Verdict(("transcription",))),
        (json.dumps(json.loads(GOOD) | {"reason": "fine"}), Verdict()),
        ("", Verdict(fault="empty")),
        ("I am sorry, I cannot do that.", Verdict(fault="not a JSON object")),
        (GOOD[:-9], Verdict(fault="not a JSON object")),
        ('{"background": false}', Verdict(fault="key missing")),
        (GOOD.replace("false", '"no"'), Verdict(fault="wrong type")),
        (GOOD.replace("false", "0"), Verdict(fault="wrong type")),
    ],
)
def test_a_verdict_has_every_item_of_the_checklist(text: str, expected: Verdict) -> None:
    assert verify.parse_verdict(text, "stop") == expected
    assert expected.passed == (not expected.violations and not expected.fault)


def test_a_cut_or_withheld_answer_is_no_verdict() -> None:
    assert verify.parse_verdict(GOOD, "length") == Verdict(fault="truncated")
    assert verify.parse_verdict(GOOD, "content_filter") == Verdict(fault="refused")


@pytest.fixture
def work(tmp_path: Path, make_clips: MakeClips) -> Path:
    """A work folder with three candidates for each of four clips, all of which keep the rules."""
    rows = [
        {"id": f"clip{i}", "audio": str(path), "tags": {"accent": "Scottish", "transcript": f"Hello {i}"}}
        for i, path in enumerate(make_clips(tmp_path / "clips", 4))
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    with StubServer() as server:
        config = GenerateConfig(
            manifest=manifest, work=tmp_path / "work", candidates=3, server=at(server.url)
        )
        assert generate(config) == 0
    return tmp_path / "work"


def at(url: str) -> ServerConfig:
    return ServerConfig(servers=(url,), model=MODEL, concurrency=4, backoff_s=0.01, retries=2)


def candidate_of(body: dict[str, Any]) -> str:
    """The caption in a request of the verifier."""
    text: str = body["messages"][-1]["content"]
    return text.split("Description:\n")[1].split("\n")[0]


def verdicts_of(work: Path) -> list[tuple[int, int, Verdict]]:
    """(row, number of the candidate, verdict) of all verdicts."""
    with Verdicts(work) as verdicts:
        return [
            (row, number, verdict)
            for row in range(verdicts.rows)
            for number, verdict in sorted(verdicts.of_row(row).items())
        ]


def run(work: Path, content: Callable[[dict[str, Any]], str], **changes: Any) -> tuple[int, StubServer]:
    """Verifies the candidates of a folder. Returns the exit code and the server."""
    with StubServer(content=content, keep=True) as server:
        return verify.verify(VerifyConfig(work=work, server=at(server.url), **changes)), server


def test_every_candidate_that_keeps_the_rules_gets_a_verdict(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def content(body: dict[str, Any]) -> str:
        return verdict(absence="begins quietly" in candidate_of(body))

    code, server = run(work, content)
    assert code == 0
    texts = [candidate_of(body) for body in server.bodies]
    dropped = sum("begins quietly" in text for text in texts)
    assert len(texts) == 12
    assert 0 < dropped < 12
    given = verdicts_of(work)
    assert [(row, number) for row, number, _ in given] == [(r, n) for r in range(4) for n in range(3)]
    assert sum(not verdict.passed for _, _, verdict in given) == dropped
    assert {verdict.violations for _, _, verdict in given} == {(), ("absence",)}
    text = capsys.readouterr().out
    assert f"12 captions, {12 - dropped} passed, {dropped} with violations" in text


def test_a_request_holds_the_caption_the_tags_the_transcript_and_the_schema(work: Path) -> None:
    _, server = run(work, lambda body: GOOD)
    body = server.bodies[0]
    text = body["messages"][-1]["content"]
    assert "accent: Scottish" in text
    assert "Hello " in text
    assert body["temperature"] == 0
    schema = body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == list(CHECKLIST)
    starts = {text["messages"][-1]["content"][:800] for text in server.bodies}
    assert len(starts) == 1  # servers compute the beginning once


def test_limits_decide_which_candidates_are_sent(work: Path) -> None:
    for config in ({"min_characters": 700}, {"max_characters": 20, "min_characters": 10}):
        _, server = run(work, lambda body: GOOD, **config)
        assert server.bodies == []
    digest = answers.read_record(work / "verify")["rules_digest"]
    run(work, lambda body: GOOD, max_characters=700)
    assert answers.read_record(work / "verify")["rules_digest"] not in (digest, default_rules().digest)
    _, server = run(work, lambda body: GOOD)
    assert server.bodies == []
    assert answers.read_record(work / "verify")["rules_digest"] == default_rules().digest


def test_tags_and_transcript_can_be_left_out(work: Path) -> None:
    _, server = run(work, lambda body: GOOD, tags=(), transcript="")
    for body in server.bodies:
        text = body["messages"][-1]["content"]
        assert "Scottish" not in text
        assert "Hello" not in text
        assert "Words that are spoken in the recording" not in text


def test_an_answer_that_is_no_verdict_is_asked_for_once_more(work: Path) -> None:
    """One caption gets no verdict in any attempt, others only in the second one."""
    seen: Counter[str] = Counter()
    hopeless: list[str] = []

    def content(body: dict[str, Any]) -> str:
        text = candidate_of(body)
        hopeless[:] = hopeless or [text]
        seen[text] += 1
        if text == hopeless[0]:
            return "I cannot judge this."
        return GOOD if body["seed"] else '{"background": false}'

    code, server = run(work, content)
    assert code == 0
    captions = Counter(candidate_of(body) for body in server.bodies)
    assert set(captions.values()) <= {2 * times for times in range(1, 7)}
    assert sum(body["seed"] for body in server.bodies) == len(server.bodies) / 2 == 12
    assert {(body["seed"], body["temperature"]) for body in server.bodies} == {(0, 0.0), (1, 0.6)}
    unverified = [verdict for _, _, verdict in verdicts_of(work) if verdict.fault == "not a JSON object"]
    assert len(unverified) == captions[hopeless[0]] / 2
    assert sum(verdict.passed for _, _, verdict in verdicts_of(work)) == 12 - len(unverified)


def test_only_a_first_attempt_is_followed_by_another(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(body: dict[str, Any], attempt: int) -> str:
        return "400" if body["seed"] else ""

    with StubServer(content=lambda body: "?", fault=fault) as server:
        assert verify.verify(VerifyConfig(work=work, server=at(server.url))) == 0
    assert "12 answers are no verdicts; asking again" in capsys.readouterr().out
    code, server = run(work, lambda body: "?")
    assert (code, len(server.bodies)) == (0, 12)
    assert "asking again" not in capsys.readouterr().out


def test_prompts_of_answered_requests_are_not_filled(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    messages = Prompt.messages

    def count(prompt: Prompt, values: Mapping[str, str]) -> list[tuple[str, str]]:
        filled.append(1)
        return messages(prompt, values)

    monkeypatch.setattr(Prompt, "messages", count)
    run(work, lambda body: GOOD)
    assert len(filled) == 12
    run(work, lambda body: GOOD)
    assert len(filled) == 12


def test_a_second_run_asks_only_what_is_missing(work: Path) -> None:
    def fault(body: dict[str, Any], attempt: int) -> str:
        return "" if "Hello 2" in body["messages"][-1]["content"] else "400"

    with StubServer(content=lambda body: GOOD, fault=fault) as server:
        assert verify.verify(VerifyConfig(work=work, server=at(server.url))) == INCOMPLETE
    assert [(row, number) for row, number, _ in verdicts_of(work)] == [(2, 0), (2, 1), (2, 2)]
    code, server = run(work, lambda body: GOOD)
    assert code == 0
    assert "rows" not in answers.read_record(work / "verify")  # `generate` names them
    before = (work / "verify/answers.jsonl").read_bytes()
    assert len(verdicts_of(work)) == 12
    code, server = run(work, lambda body: GOOD)
    assert (code, server.bodies) == (0, [])
    assert (work / "verify/answers.jsonl").read_bytes() == before


def test_late_rows_need_no_more_memory_than_early_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array over all rows would hold 2.4 MB for the candidates and 4.8 MB for the verdicts."""
    rules = default_rules()  # reading them takes more memory than the rest
    monkeypatch.setattr("clsp_fast.captioning.verify.read_rules", lambda *_, **__: rules)
    peaks = []
    for first in (0, 300_000):
        folder = tmp_path / str(first)
        folder.mkdir()
        clips = [CLIP | {"id": f"c{i}"} for i in range(20)]
        texts = {row: [good(f"Ann {row}")] for row in range(first, first + 20)}
        work = make_work(folder, clips, texts, blank_lines=first, asked=(first, math.inf), candidates=1)
        tracemalloc.start()
        code, server = run(work, lambda body: GOOD)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (code, len(server.bodies)) == (0, 20)
    assert peaks[0] > 10_000
    assert peaks[1] < peaks[0] + 1_500_000  # a bit for each request is allowed: 75 kB


def test_job_files_and_their_answers_give_the_same_verdicts(work: Path, tmp_path: Path) -> None:
    """Another program sends the requests of the job file. Some answers are no verdicts, so a second job file
    asks again."""
    config = VerifyConfig(work=work, server=ServerConfig(model=MODEL), jobs_only=True)
    for attempt in (0, 1):
        assert verify.verify(config) == 0
        jobs = [json.loads(line) for line in (work / "verify/jobs.jsonl").read_text().splitlines()]
        assert len(jobs) == 12
        assert {job["body"]["seed"] for job in jobs} == {attempt}
        text = GOOD if attempt else "{}"
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
        response = {"status_code": 200, "body": {"choices": [choice]}}
        results = [{"custom_id": job["custom_id"], "response": response, "error": None} for job in jobs]
        path = write_rows(tmp_path / f"answers{attempt}.jsonl", results[::-1])
        config = VerifyConfig(work=work, server=ServerConfig(model=MODEL), jobs_only=True, answers=(path,))
    assert verify.verify(config) == 0
    assert not (work / "verify/jobs.jsonl").exists()
    assert [verdict for _, _, verdict in verdicts_of(work)] == [Verdict()] * 12


def test_a_changed_manifest_or_setting_is_refused(work: Path) -> None:
    run(work, lambda body: GOOD)
    with pytest.raises(ValueError, match=r"was begun with .*transcript"):
        run(work, lambda body: GOOD, transcript="text")
    manifest = work.parent / "m.jsonl"
    manifest.write_text(manifest.read_text().replace("Scottish", "Irish"))
    with pytest.raises(ValueError, match=r"m\.jsonl has changed since `generate` read it"):
        run(work, lambda body: GOOD)


def test_without_candidates_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="generate holds no job"):
        verify.verify(VerifyConfig(work=tmp_path, server=ServerConfig(model=MODEL)))


def test_ids_of_requests_begin_with_row_and_candidate(work: Path) -> None:
    run(work, lambda body: GOOD)
    names = [answer.custom_id for answer in answers.read_answers(work / "verify")]
    assert sorted(names) == sorted(f"{r}.{n}/verify/clip{r}" for r in range(4) for n in range(3))


def test_damaged_lines_are_asked_again_and_end_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both folders: the candidates that remain are filtered and verified."""
    assert run(work, lambda _: GOOD)[0] == 0
    for step in ("verify", "generate"):
        path = work / step / "answers.jsonl"
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(first[:100] + b"\n" + rest)
        assert filter(FilterConfig(work=work)) == INCOMPLETE
        sent = run(work, lambda _: GOOD)[1].sent.total()
        assert sent == (1 if step == "verify" else 0)
        assert "damaged lines in answers.jsonl, left out: 1" in capsys.readouterr().out
        if step == "verify":
            assert filter(FilterConfig(work=work)) == 0


def test_shards_are_only_for_job_files() -> None:
    with pytest.raises(ValueError, match="shard_rows must be given with --jobs-only, got 5"):
        VerifyConfig(work=Path("work"), server=ServerConfig(model=MODEL), shard_rows=5)
