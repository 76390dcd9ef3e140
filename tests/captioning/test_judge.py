"""The judge: its sample, the orders of its rounds, its answers, position bias, resuming."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from sample_data import MakeClips, write_rows
from stub_server import MODEL, StubServer

from clsp_fast.captioning import judge
from clsp_fast.captioning.client import ServerConfig
from clsp_fast.captioning.json_answers import BadAnswer
from clsp_fast.captioning.judge import JudgeConfig, Round
from clsp_fast.captioning.scores import ASPECTS
from clsp_fast.console import INCOMPLETE

Body = dict[str, Any]


def at(url: str) -> ServerConfig:
    return ServerConfig(servers=(url,), model=MODEL, concurrency=4, backoff_s=0.01, retries=2)


@pytest.fixture
def manifests(tmp_path: Path, make_clips: MakeClips) -> tuple[Path, Path]:
    """Captions of two systems for the same twelve clips. The text names the system and the clip."""
    paths = make_clips(tmp_path / "clips", 12)
    files = []
    for name in ("good", "poor"):
        rows = [
            {
                "id": f"c{i}",
                "audio": str(path),
                "finegrained_captions": [f"{name} caption of {i}, first.", f"{name} caption of {i}, second."],
                "global_captions": [f"{name} global of {i}."],
            }
            for i, path in enumerate(paths)
        ]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return files[0], files[1]


def shown(body: Body) -> list[str]:
    """The captions that a request shows, in their order."""
    text = next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
    return re.findall(r"^caption_\d+:\n(.*)$", text, re.MULTILINE)


def properties(body: Body) -> Body:
    """The keys of the answer that a request asks for."""
    keys: Body = body["response_format"]["json_schema"]["schema"]["properties"]
    return keys


def honest(body: Body) -> str:
    """A judge who gives 4, 3, 5 to a good caption and 2, 1, 3 to a poor one, whatever their order."""
    captions = shown(body)
    if "better" in properties(body):
        return json.dumps({"better": "caption_1" if captions[0].startswith("good") else "caption_2"})
    scores = {
        "good": dict(zip(ASPECTS, (4, 3, 5), strict=True)),
        "poor": dict(zip(ASPECTS, (2, 1, 3), strict=True)),
    }
    return json.dumps({f"caption_{i + 1}": scores[text[:4]] for i, text in enumerate(captions)})


def run(
    manifests: tuple[Path, ...], content: Callable[[Body], str], **changes: Any
) -> tuple[int, list[Body], Body]:
    """Judges a manifest, or two against each other. Returns exit code, requests and judge.json."""
    work = manifests[0].parent / "work"
    options = {"manifest": manifests[0], "work": work, "resamples": 100} | changes
    if len(manifests) == 2:
        options["against"] = manifests[1]
    with StubServer(content=content, keep=True) as server:
        code = judge.judge(JudgeConfig(server=at(server.url), **options))
    return code, server.bodies, json.loads((work / options.get("name", "judge") / "judge.json").read_text())


def test_known_scores_are_recovered_for_one_system(manifests: tuple[Path, Path]) -> None:
    code, bodies, results = run(manifests[:1], honest)
    assert code == 0
    assert len(bodies) == 12 * 5
    figures = results["scores"]["systems"]["good.jsonl"]
    assert [figures[aspect]["mean"] for aspect in (*ASPECTS, "mean")] == [4, 3, 5, 4]
    assert results["scores"]["clips"] == results["sample"] == 12
    assert results["answers"] == {"asked": 60, "usable": 60}
    assert "pairs" not in results


def test_the_judge_hears_the_recording(manifests: tuple[Path, Path]) -> None:
    _, bodies, _ = run(manifests[:1], honest, clips=1, rounds=1)
    sound = bodies[0]["messages"][-1]["content"][0]
    assert sound["type"] == "input_audio"
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])))
    row = json.loads((manifests[0].parent / "work/judge/clips.jsonl").read_text())["row"]
    original, _ = soundfile.read(manifests[0].parent / f"clips/{row:05d}.wav")
    assert rate == 16000
    assert np.abs(waveform - original).max() < 2**-14


def test_two_systems_are_scored_together_and_compared(
    manifests: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, bodies, results = run(manifests, honest)
    assert code == 0
    assert len(bodies) == 12 * (5 + 2)
    systems = results["scores"]["systems"]
    assert [systems[name]["mean"]["mean"] for name in ("good.jsonl", "poor.jsonl")] == [4, 2]
    assert results["scores"]["difference"]["coverage"] == {"mean": 2.0, "interval": [2.0, 2.0]}
    pairs = results["pairs"]
    assert [pairs[name]["mean"] for name in ("better", "tie", "worse")] == [1, 0, 0]
    assert (pairs["position"]["mean"], pairs["agreement"]["mean"]) == (0, 1)
    assert "12 clips compared in both orders" in capsys.readouterr().out
    lines = [
        json.loads(line) for line in (manifests[0].parent / "work/judge/clips.jsonl").read_text().splitlines()
    ]
    assert [line["row"] for line in lines] == list(range(12))
    assert {line["preference"] for line in lines} == {1.0}
    assert lines[3]["scores"]["poor.jsonl"] == dict(zip(ASPECTS, (2, 1, 3), strict=True))


def test_a_judge_who_prefers_a_position_prefers_no_system(manifests: tuple[Path, Path]) -> None:
    def biased(body: Body) -> str:
        if "better" in properties(body):
            return '{"better": "caption_1"}'
        return json.dumps({key: dict.fromkeys(ASPECTS, 6 - int(key[-1])) for key in properties(body)})

    _, _, results = run(manifests, biased, rounds=4)
    pairs = results["pairs"]
    assert pairs["tie"]["mean"] == pairs["position"]["mean"] == 1
    assert pairs["preference"]["mean"] == pairs["agreement"]["mean"] == 0
    # Over an even number of rounds each caption stands first equally often.
    assert {
        aspect: figure["mean"] for aspect, figure in results["scores"]["difference"].items()
    } == dict.fromkeys((*ASPECTS, "mean"), 0.0)


def test_the_orders_vary_and_are_functions_of_the_seed(manifests: tuple[Path, Path]) -> None:
    _, bodies, _ = run(manifests, honest)
    _, repeated, _ = run(manifests, honest, name="repeated")
    _, other, _ = run(manifests, honest, name="other", seed=1)
    as_set = [{json.dumps(body) for body in group} for group in (bodies, repeated, other)]
    assert as_set[0] == as_set[1]
    assert not as_set[0] & as_set[2]
    rounds = [body for body in bodies if "better" not in properties(body)]
    first = Counter(shown(body)[0][:4] for body in rounds)
    assert abs(first["good"] - first["poor"]) <= 12
    orders = Counter(tuple(properties(body)["caption_1"]["properties"]) for body in rounds)
    assert len(orders) == 6
    for body in rounds:
        text = body["messages"][-1]["content"][1]["text"]
        explained = re.findall(r"^- (\w+):", text, re.MULTILINE)
        assert tuple(explained) == tuple(properties(body)["caption_1"]["properties"])
    pairs = Counter(tuple(shown(body)) for body in bodies if "better" in properties(body))
    assert all(pairs[captions] == pairs[captions[::-1]] == 1 for captions in pairs)


def test_a_larger_sample_continues_the_work_of_a_smaller_one(manifests: tuple[Path, Path]) -> None:
    _, bodies, _ = run(manifests[:1], honest, clips=5)
    assert len(bodies) == 25
    _, bodies, results = run(manifests[:1], honest, clips=8)
    assert len(bodies) == 15
    assert results["scores"]["clips"] == 8
    _, bodies, same = run(manifests[:1], honest, clips=8)
    assert (bodies, same) == ([], results)


@pytest.mark.parametrize(
    ("text", "reason", "fault"),
    [
        ('{"caption_1": {"correctness": 4, "coverage": 3, "naturalness": 6}}', "stop", "out of range"),
        ('{"caption_1": {"correctness": 4, "coverage": 3, "naturalness": 0}}', "stop", "out of range"),
        ('{"caption_1": {"correctness": 4, "coverage": 3}}', "stop", "key missing"),
        ('{"correctness": 4, "coverage": 3, "naturalness": 3}', "stop", "key missing"),
        ('{"caption_1": [4, 3, 3]}', "stop", "wrong type"),
        ('{"caption_1": {"correctness": "4", "coverage": 3, "naturalness": 3}}', "stop", "wrong type"),
        ("Correctness: 4", "stop", "not a JSON object"),
        ("", "stop", "empty"),
        ('{"caption_1": {"correctness": 4, "coverage": 3, "naturalness": 3}}', "length", "truncated"),
    ],
)
def test_bad_scores_are_refused_with_a_reason(text: str, reason: str, fault: str) -> None:
    with pytest.raises(BadAnswer, match=rf"^{fault}$"):
        judge.parse_scores(text, reason, Round((0,), ASPECTS))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"better": "caption_3"}', "out of range"),
        ('{"better": 1}', "wrong type"),
        ('{"best": 1}', "key missing"),
    ],
)
def test_bad_comparisons_are_refused_with_a_reason(text: str, fault: str) -> None:
    with pytest.raises(BadAnswer, match=rf"^{fault}$"):
        judge.parse_preference(text, "stop")


def test_a_comparison_prefers_the_first_caption_the_second_or_none() -> None:
    for value, preference in (("caption_1", 1), ("tie", 0), ("caption_2", -1)):
        assert judge.parse_preference(json.dumps({"better": value}), "stop") == preference


def test_scores_are_assigned_to_systems_and_aspects_in_any_order() -> None:
    text = (
        '{"caption_2": {"naturalness": 1, "correctness": 2, "coverage": 3},'
        ' "caption_1": {"coverage": 4, "naturalness": 5, "correctness": 1}}'
    )
    scores_SA = judge.parse_scores(text, "stop", Round((1, 0), ("naturalness", "coverage", "correctness")))
    assert scores_SA.tolist() == [[2, 3, 1], [1, 4, 5]]


def test_bad_answers_are_counted_and_left_out_of_the_means(manifests: tuple[Path, Path]) -> None:
    def content(body: Body) -> str:
        caption = shown(body)[0]
        if "caption of 0," in caption:
            return '{"caption_1": {"correctness": 9, "coverage": 9, "naturalness": 9}}'
        return "no" if "caption of 1," in caption else honest(body)

    def fault(body: Body, attempt: int) -> str:
        return "400" if "caption of 2," in shown(body)[0] else ""

    work = manifests[0].parent / "work"
    with StubServer(content=content, fault=fault) as server:
        config = JudgeConfig(manifest=manifests[0], work=work, server=at(server.url), resamples=50)
        assert judge.judge(config) == INCOMPLETE
    results = json.loads((work / "judge/judge.json").read_text())
    expected = {"asked": 60, "usable": 45, "out of range": 5, "not a JSON object": 5, "without answer": 5}
    assert results["answers"] == expected
    assert results["scores"]["clips"] == 9
    assert results["scores"]["systems"]["good.jsonl"]["correctness"]["mean"] == 4


def test_recordings_that_cannot_be_read_are_in_no_job_file(
    manifests: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    next(manifests[0].parent.glob("clips/*")).unlink()
    config = JudgeConfig(
        manifest=manifests[0],
        work=manifests[0].parent / "w",
        server=ServerConfig(model=MODEL),
        jobs_only=True,
    )
    assert judge.judge(config) == INCOMPLETE
    assert "left out: 5 requests that cannot be made (5 x " in capsys.readouterr().out


def test_a_comparison_needs_usable_answers_in_both_orders(manifests: tuple[Path, Path]) -> None:
    def content(body: Body) -> str:
        captions = shown(body)
        half = "better" in properties(body) and captions[0].startswith("poor caption of 5,")
        return '{"best": "caption_1"}' if half else honest(body)

    code, _, results = run(manifests, content)
    assert code == 0
    assert results["pairs"]["clips"] == 11
    assert results["answers"]["key missing"] == 1


def test_a_prompt_must_explain_every_aspect(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("{captions}\n- correctness: true?\n- coverage: all?\n")
    with pytest.raises(ValueError, match=r'p\.txt must have one line that begins with "- correctness:"'):
        judge.read_judge_prompt(path)
    path.write_text("{captions}\n- correctness: true?\n- coverage: all?\n- naturalness: well?\n")
    prompt = judge.in_order_of(judge.read_judge_prompt(path), ("naturalness", "correctness", "coverage"))
    assert prompt.text == "{captions}\n- naturalness: well?\n- correctness: true?\n- coverage: all?\n"


def test_another_judgement_in_the_same_folder_is_refused(manifests: tuple[Path, Path]) -> None:
    run(manifests[:1], honest, clips=1)
    with pytest.raises(ValueError, match=r"against\.name None, not 'poor\.jsonl'; choose another folder"):
        run(manifests, honest, clips=1)
    with manifests[0].open("a") as file:
        file.write("\n")
    message = r"with other content of good\.jsonl; choose another folder \(`judge`: another --name\), or"
    with pytest.raises(ValueError, match=message):
        run(manifests[:1], honest, clips=1)


def test_a_manifest_can_be_compared_with_itself(manifests: tuple[Path, Path]) -> None:
    _, _, results = run((manifests[0], manifests[0]), lambda body: '{"better": "tie"}', clips=2, rounds=1)
    assert results["pairs"]["tie"]["mean"] == 1
    assert results["answers"] == {"asked": 6, "usable": 4, "key missing": 2}
    names = judge._names([manifests[0], manifests[0]])
    assert len(set(names)) == 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "generate", "verify"])
def test_a_name_that_is_no_folder_of_the_judge_is_refused(name: str) -> None:
    server = ServerConfig(model=MODEL)
    with pytest.raises(ValueError, match="name must be the name of a new folder"):
        judge.JudgeConfig(manifest=Path("m.jsonl"), work=Path("work"), server=server, name=name)
