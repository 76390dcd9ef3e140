"""From recordings without captions to a trained model: generate, verify, filter, judge, report, train.

The servers fail in every way that the stub knows. What must come out is computed from the requests alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import stub_server
from sample_data import write_rows
from stub_server import MODEL, StubServer

from clsp_fast import caption, train
from clsp_fast.captioning.generate import seed_of
from clsp_fast.captioning.verify import CHECKLIST
from clsp_fast.config import MODEL_PRESETS, DataConfig, OptimConfig, TrainConfig
from clsp_fast.console import INCOMPLETE
from clsp_fast.model import CLSP

Body = dict[str, Any]
CANDIDATES = 3
# Row -> what happens to its request. A fault of the transport passes when the request is sent again.
PASSING = ("429", "429 date", "500", "503", "reset", "slow", "no choices", "invalid JSON", "half JSON")
LASTING = ("400", "flat 400")
SPOILED = {
    "truncated": "truncated",
    "null content": "empty",
    "newline": "newline",
    "quotation": "quotation",
    "negation": "negation",
    "first speaker": "speakers",
    "short": "short",
    "think": "",
    "reasoning": "",
}
FAULTS = dict(enumerate((*PASSING, *LASTING, *SPOILED, "", "", "")))
"""The fault of each row; the texts of SPOILED concern the first candidate only."""


def row_of(body: Body) -> int:
    """The row of a request for candidates."""
    return {seed_of(0, row, 0): row for row in FAULTS}[body["seed"]]


def fault(body: Body, attempt: int) -> str:
    if "response_format" in body:  # of the verifier and the judge
        return ("500", "429", "")[min(attempt, 2)] if sum(map(ord, stub_server.key_of(body))) % 3 == 0 else ""
    name = FAULTS[row_of(body)]
    return name if name not in PASSING or attempt == 0 else ""


def violates(text: str) -> bool:
    """What the verifier of this test objects to."""
    return "murmur" in text


def content(body: Body) -> str | None:
    """The answers of verifier and judge. Every seventh first answer of the verifier is none."""
    if "response_format" not in body:
        return None
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    if "caption_1" in properties:
        return json.dumps({key: dict.fromkeys(entry["properties"], 4) for key, entry in properties.items()})
    if "better" in properties:
        return '{"better": "tie"}'
    text = body["messages"][-1]["content"].split("Description:\n")[1].split("\n")[0]
    if not body["seed"] and sum(map(ord, text)) % 7 == 0:
        return "I would say that it is fine."
    return json.dumps(dict.fromkeys(CHECKLIST, False) | {"background": violates(text)})


def expected(server: StubServer) -> tuple[dict[str, list[str]], Counter[str]]:
    """Clip -> captions that must be kept, and reason -> dropped candidates, from the requests alone."""
    kept: dict[str, list[str]] = {}
    dropped: Counter[str] = Counter()
    for body in {row_of(b): b for b in server.bodies if "response_format" not in b}.values():
        row = row_of(body)
        if FAULTS[row] in LASTING:
            continue
        captions = [stub_server.caption(stub_server.key_of(body), i) for i in range(CANDIDATES)]
        if reason := SPOILED.get(FAULTS[row]):
            dropped[reason] += 1
            del captions[0]
        good = {text for text in captions if not violates(text)}
        dropped["verifier: background"] += sum(violates(text) for text in captions)
        dropped["repeated"] += len(captions) - sum(map(violates, captions)) - len(good)
        if good:
            kept[f"clip{row}"] = sorted(good, key=lambda text: (len(text), text))
    return kept, +dropped


def run(*words: str | Path) -> int:
    """A subcommand of `caption`, in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        caption.main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """One clip for each fault."""
    random, rows = np.random.default_rng(0), []
    (tmp_path / "clips").mkdir()
    for row in FAULTS:
        soundfile.write(tmp_path / f"clips/{row}.wav", 0.1 * random.standard_normal(9600), 16000)
        caption = f"A calm voice (clip {row}) speaks in a measured and friendly way."
        rows.append({"id": f"clip{row}", "audio": f"clips/{row}.wav", "global_captions": [caption]})
    return write_rows(tmp_path / "m.jsonl", rows)


def settings(run_folder: Path, manifest: Path) -> TrainConfig:
    """A training run of three steps."""
    return TrainConfig(
        run=run_folder,
        model=MODEL_PRESETS["tiny"],
        data=DataConfig(manifest=manifest, validation=manifest, batch_clips=4, buckets=1, threads=1),
        optim=OptimConfig(warmup_steps=1),
        stage1_steps=2,
        stage2_steps=1,
        device="cpu",
    )


def options(server: StubServer) -> tuple[str, ...]:
    return ("--server.servers", server.url, "--server.model", MODEL, "--server.backoff-s", "0.01")


def test_from_recordings_to_a_model(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    with StubServer(fault=fault, content=content, keep=True, slow_s=0.05) as server:
        who = options(server)
        assert run("generate", manifest, work, "--candidates", str(CANDIDATES), *who) == INCOMPLETE
        assert run("verify", work, *who) == 0
        assert run("filter", work) == INCOMPLETE
        assert run("report", work) == 0
        captions = work / "captions.jsonl"
        assert run("judge", captions, work, "--clips", "6", "--rounds", "2", *who) == 0
        assert (
            run("judge", captions, work, "--against", captions, "--name", "same", "--clips", "3", *who) == 0
        )
    # Each fault was played, and survived.
    assert {name for name in FAULTS.values() if name} <= set(server.faults)
    kept, dropped = expected(server)
    lines = [json.loads(line) for line in captions.read_text().splitlines()]
    assert {line["id"]: line["finegrained_captions"] for line in lines} == kept
    assert len(kept) > 12
    assert dropped["verifier: background"] > 3
    counts = json.loads((work / "filter.json").read_text())
    assert counts["candidates"]["kept"] == sum(map(len, kept.values()))
    assert {name: count for name, count in counts["first_reasons"].items() if count} == dropped
    for line in lines:
        assert line["provenance"]["fine"]["model"] == MODEL
        assert line["global_captions"] == ["A calm voice speaks in a measured and friendly way."]
    assert {path.name for path in work.glob("report.*")} >= {"report.json", "report.md", "report.png"}
    scores = json.loads((work / "judge/judge.json").read_text())["scores"]
    assert (scores["clips"], scores["systems"]["captions.jsonl"]["mean"]["mean"]) == (6, 4)
    pairs = json.loads((work / "same/judge.json").read_text())["pairs"]
    assert (pairs["clips"], pairs["tie"]["mean"]) == (3, 1)
    capsys.readouterr()
    results = train.train(settings(tmp_path / "run", captions))
    assert results["validation"]["n"] == len(kept)
    assert CLSP.from_pretrained(tmp_path / "run/model").tokenizer is not None


def kill_in_the_middle(words: tuple[str | Path, ...], answers: Path, lines: int) -> None:
    """Starts a subcommand and kills it when it has written some answers."""
    command = [sys.executable, "-m", "clsp_fast.caption", *map(str, words), "--server.concurrency", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(caption.__file__).parent.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not answers.exists() or answers.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.multiproc
def test_a_kill_in_any_step_changes_nothing_in_the_manifest(manifest: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with StubServer(content=content, delay_s=0.05) as server:
        who = options(server)
        for work, kill in ((whole, False), (killed, True)):
            for step, words in (("generate", (manifest, work)), ("verify", (work,))):
                if kill:
                    kill_in_the_middle((step, *words, *who), work / step / "answers.jsonl", 5)
                assert run(step, *words, *who) == 0
            assert run("filter", work) == 0
    for step in ("generate", "verify"):
        answers = [(work / step / "answers.jsonl").read_bytes().splitlines() for work in (whole, killed)]
        assert sorted(answers[0]) == sorted(answers[1])
    assert (whole / "captions.jsonl").read_bytes() == (killed / "captions.jsonl").read_bytes()
