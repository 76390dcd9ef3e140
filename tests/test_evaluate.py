"""The evaluation commands: figures equal their definitions, and bad input is named."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_data import MakeClips, write_rows

from clsp_fast import evaluate as command
from clsp_fast import metrics
from clsp_fast import similarity as ranking
from clsp_fast.evaluate import (
    RetrievalConfig,
    SimilarityConfig,
    ZeroshotConfig,
    retrieval,
    similarity,
    zeroshot,
)
from clsp_fast.evaluation.report import save_picture
from clsp_fast.model import CLSP

MOODS = ("calm", "tense", "tired")


@pytest.fixture
def manifest(tmp_path: Path, make_clips: MakeClips) -> Path:
    """Thirty clips with captions and a mood; one cannot be read, one has a mood that is no label."""
    make_clips(tmp_path / "clips", 30)
    (tmp_path / "clips/00004.wav").write_text("no audio")
    rows = []
    for i in range(30):
        row: dict[str, Any] = {"id": f"c{i}", "audio": f"clips/{i:05d}.wav", "tags": {"mood": MOODS[i % 3]}}
        row["global_captions"] = [f"Voice {i}.", f"Speaker {i}."][: 1 + i % 2]
        row["finegrained_captions"] = [f"Voice {i} {'rises ' * k}" for k in (1, 3, 2)][: i % 4]
        if i == 7:
            row["tags"] = {"mood": "unknown"}
        rows.append(row)
    return write_rows(tmp_path / "m.jsonl", rows)


def config(kind: type[Any], source: Path, model: Path, **options: Any) -> Any:
    return kind(source=source, model=str(model), device="cpu", resamples=50, **options)


def test_retrieval_takes_one_caption_a_clip(manifest: Path, model_folder: Path) -> None:
    results = retrieval(config(RetrievalConfig, manifest, model_folder))
    assert list(results["bad"]) == ["c4"]
    assert results["n"] == 29
    model = CLSP.from_pretrained(model_folder)
    readable = [i for i in range(30) if i != 4]
    for kind, texts in (
        ("global", {i: f"Voice {i}." for i in readable}),
        ("fine", {i: f"Voice {i} {'rises ' * (1, 3, 3)[i % 4 - 1]}".strip() for i in readable if i % 4}),
    ):
        audio = model.encode_audio([manifest.parent / f"clips/{i:05d}.wav" for i in texts])
        ranks = ranking.ranks(audio, model.encode_text(list(texts.values())))
        for direction in ("audio_to_text", "text_to_audio"):
            figures = results["retrieval"][kind][direction]
            expected = metrics.retrieval(getattr(ranks, direction))
            assert {name: figures[name] for name in expected} == pytest.approx(expected)
            assert figures["n"] == len(texts)
            assert figures["chance"]["R@5"] == pytest.approx(5 / len(texts))
            assert figures["curve"][4] == pytest.approx(expected["R@5"])
            assert figures["curve"][-1] == 1.0
            low, high = figures["interval"]["R@10"]
            assert low <= figures["R@10"] <= high
    only = retrieval(config(RetrievalConfig, manifest, model_folder, captions="fine"))
    assert only["retrieval"] == {"fine": results["retrieval"]["fine"]}


def test_retrieval_takes_every_caption_as_an_answer(manifest: Path, model_folder: Path) -> None:
    results = retrieval(config(RetrievalConfig, manifest, model_folder, captions="global", all_captions=True))
    model = CLSP.from_pretrained(model_folder)
    readable = [i for i in range(30) if i != 4]
    texts = [(i, f"{word} {i}.") for i in readable for word in ("Voice", "Speaker")[: 1 + i % 2]]
    audio = model.encode_audio([manifest.parent / f"clips/{i:05d}.wav" for i in readable])
    owner = torch.tensor([readable.index(i) for i, _ in texts])
    ranks = ranking.ranks(audio, model.encode_text([t for _, t in texts]), text_owner=owner)
    both = results["retrieval"]["global"]
    assert both["audio_to_text"]["n"] == 29
    assert both["text_to_audio"]["n"] == len(texts) == 44
    for direction in ("audio_to_text", "text_to_audio"):
        expected = metrics.retrieval(getattr(ranks, direction))
        assert {name: both[direction][name] for name in expected} == pytest.approx(expected)
    chance = np.mean([1 - math.comb(44 - n, 5) / math.comb(44, 5) for n in [1 + i % 2 for i in readable]])
    assert both["audio_to_text"]["chance"]["R@5"] == pytest.approx(chance)
    assert both["text_to_audio"]["chance"]["R@5"] == pytest.approx(5 / 29)


MOOD_PROMPTS = {"calm": ["A calm voice."], "tense": ["Tense.", "Very tense."], "tired": ["Tired."]}
TASKS = {
    "mood": {"field": "mood", "prompts": MOOD_PROMPTS},
    "awake": {
        "field": "mood",
        "template": "A {} speaker.",
        "labels": ["calm", "tense", "tired"],
        "merge": {"tense": "calm"},
    },
}


def test_zeroshot_merges_labels_and_predictions(manifest: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    options = {"task": ("mood", "awake"), "task_file": tmp_path / "tasks.json"}
    results = zeroshot(config(ZeroshotConfig, manifest, model_folder, **options))
    model = CLSP.from_pretrained(model_folder)
    readable = [i for i in range(30) if i not in (4, 7)]
    audio = model.encode_audio([manifest.parent / f"clips/{i:05d}.wav" for i in readable])
    assert list(results["bad"]) == ["c4"]
    for name, merge in (("mood", {}), ("awake", {"tense": "calm"})):
        figures = results["zeroshot"][name]
        prompts = list(MOOD_PROMPTS.values())
        if merge:
            prompts = [[f"A {mood} speaker."] for mood in MOODS]
        means = torch.nn.functional.normalize(
            torch.stack([model.encode_text(p).mean(0) for p in prompts]), dim=1
        )
        predicted = [MOODS[i] for i in (audio @ means.T).argmax(1).tolist()]
        labels = [MOODS[i % 3] for i in readable]
        predicted, labels = ([merge.get(x, x) for x in names] for names in (predicted, labels))
        assert figures["accuracy"] == metrics.accuracy(predicted, labels)
        assert figures["uar"] == metrics.unweighted_average_recall(predicted, labels)
        assert figures["n"] == sum(map(sum, figures["confusion"])) == 28
        assert figures["labels"] == (["calm", "tired"] if merge else list(MOODS))
        assert sum(figures["confusion"][i][i] for i in range(len(figures["labels"]))) == round(
            28 * figures["accuracy"]
        )
        assert figures["left_out"] == {"unknown": 1}
        assert figures["chance"] == 1 / len(figures["labels"])


def test_a_corpus_in_its_own_folder(tmp_path: Path, make_clips: MakeClips, model_folder: Path) -> None:
    for i, path in enumerate(make_clips(tmp_path / "clips", 16)):
        target = (
            tmp_path / f"RAVDESS/Actor_{i // 8 + 1:02d}/03-01-{i % 8 + 1:02d}-01-01-01-{i // 8 + 1:02d}.wav"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    tasks = ("ravdess-emotion", "ravdess-gender")
    results = zeroshot(config(ZeroshotConfig, tmp_path / "RAVDESS", model_folder, task=tasks))
    assert [results["zeroshot"][name]["n"] for name in tasks] == [16, 16]
    rows = [{"audio": str(p), "tags": {"gender": "male"}} for p in (tmp_path / "RAVDESS").rglob("*.wav")]
    write_rows(tmp_path / "m.jsonl", rows)
    results = zeroshot(config(ZeroshotConfig, tmp_path / "m.jsonl", model_folder, task=("ravdess-gender",)))
    assert results["zeroshot"]["ravdess-gender"]["majority"] == 1.0
    with pytest.raises(ValueError, match="task must be tasks of one layout"):
        zeroshot(config(ZeroshotConfig, tmp_path, model_folder, task=("ravdess-emotion", "crema-d-age")))
    with pytest.raises(ValueError, match="task must be one of iemocap-emotion"):
        zeroshot(config(ZeroshotConfig, tmp_path, model_folder, task=("emotion",)))


@pytest.fixture
def ratings(tmp_path: Path, make_clips: MakeClips, model_folder: Path) -> Path:
    """Two raters. Their mean rises with the cosine, and falls in the category "situational"."""
    names = [path.name for path in make_clips(tmp_path / "rated", 6)]
    model = CLSP.from_pretrained(model_folder)
    captions = ["A calm voice.", "She whispers."]
    cosine = model.encode_audio([tmp_path / "rated" / name for name in names]) @ model.encode_text(captions).T
    flat = cosine.flatten()
    level = ((cosine - flat.min()) / (flat.max() - flat.min())).sqrt() * 4
    path = tmp_path / "ratings.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "caption", "rater", "rating", "category"])
        for i, name in enumerate(names):
            for j, caption in enumerate(captions):
                for rater, shift in (("r1", 0.0), ("r2", 1.0)):
                    value = float(level[i, j]) + shift
                    if j:
                        value = 5 - value
                    category = "situational" if j else "intrinsic"
                    writer.writerow([f"rated/{name}", caption, rater, f"{value:.6f}", category])
    return path


def test_similarity_correlates_with_mean_ratings(ratings: Path, model_folder: Path) -> None:
    results = similarity(config(SimilarityConfig, ratings, model_folder))
    assert set(results["similarity"]) == {"all", "intrinsic", "situational"}
    assert [results["similarity"][name]["n"] for name in ("all", "intrinsic", "situational")] == [12, 6, 6]
    for name, sign in (("intrinsic", 1.0), ("situational", -1.0)):
        figures = results["similarity"][name]
        assert figures["spearman"] == pytest.approx(sign)
        assert figures["kendall"] == pytest.approx(sign)
        assert 0.8 < sign * figures["pearson"] <= 1.0
        assert figures["interval"]["kendall"] == (pytest.approx(sign), pytest.approx(sign))
        assert (figures["ratings"], figures["raters"]) == (12, 2)
    assert abs(results["similarity"]["all"]["spearman"]) < 0.9
    assert len(results["pairs"]) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its columns must be clip, caption"),
        ("clip,caption,rater,rating\n", "its columns must be"),
        (
            "clip,caption,rater,rating,category\nrated/00000.wav,a,r,6,x\n",
            r"row 2: rating must be in \[0, 5\], got 6",
        ),
        ("clip,caption,rater,rating,category\nrated/00000.wav,a,r,nan,x\n", r"row 2: rating must be in"),
        ("clip,caption,rater,rating,category\nrated/00000.wav,a,r,much,x\n", "could not convert"),
        ("clip,caption,rater,rating,category\nrated/00000.wav,a\n", "row 2: each column must have a value"),
        ("clip,caption,rater,rating,category\nrated/00000.wav,a,r,1,x\n", "at least 3 rated pairs"),
        ("clip,caption,rater,rating,category\n", "a table with at least one rating"),
        ('clip,caption,rater,rating,category\n"' + "x" * 200_000, "field larger than"),
    ],
)
def test_what_is_no_rating_is_named(ratings: Path, model_folder: Path, text: str, message: str) -> None:
    ratings.write_text(text)
    with pytest.raises(ValueError, match=message):
        similarity(config(SimilarityConfig, ratings, model_folder))


def test_nothing_to_evaluate_is_named(tmp_path: Path, manifest: Path, model_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        retrieval(config(RetrievalConfig, tmp_path / "none.jsonl", model_folder))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        retrieval(config(RetrievalConfig, manifest, tmp_path / "none"))
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"audio": "clips/00000.wav"}\n')
    with pytest.raises(ValueError, match="clips with global or fine captions"):
        retrieval(config(RetrievalConfig, bare, model_folder))
    bare.write_text('{"audio": "clips/00004.wav", "captions": ["a"]}\n')
    with pytest.raises(ValueError, match=r"no recording is readable: .*00004\.wav"):
        retrieval(config(RetrievalConfig, bare, model_folder))
    (tmp_path / "tasks.json").write_text(json.dumps({"age": {"young": ["a"], "old": ["b"]}}))
    with pytest.raises(ValueError, match="clips with a label of the tasks in the tags age"):
        zeroshot(
            config(ZeroshotConfig, manifest, model_folder, task=("age",), task_file=tmp_path / "tasks.json")
        )
    for kind, options, message in (
        (RetrievalConfig, {"captions": "short"}, "captions must be"),
        (RetrievalConfig, {"layout": "zip"}, "layout must be one of"),
        (ZeroshotConfig, {}, "task must be at least one task"),
        (SimilarityConfig, {"window_s": 0}, "window_s must be"),
    ):
        with pytest.raises(ValueError, match=message):
            config(kind, manifest, model_folder, **options)


def test_the_commands_write_print_and_draw(
    manifest: Path, ratings: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    options = [
        "--model",
        str(model_folder),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--resamples",
        "20",
    ]
    for words, shown in (
        (["retrieval", str(manifest)], "fine speech->text"),
        (
            [
                "zeroshot",
                str(manifest),
                "--task",
                "mood",
                "awake",
                "--task-file",
                str(tmp_path / "tasks.json"),
            ],
            "UAR",
        ),
        (["similarity", str(ratings)], "situational"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([*words, *options])
        assert stop.value.code in ((0 if words[0] == "similarity" else 3,))
        printed = capsys.readouterr()
        assert shown in printed.out
        assert f"picture: {tmp_path}/out/{words[0]}.png" in printed.out
        assert (tmp_path / f"out/{words[0]}.png").stat().st_size > 5000
        results = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail)
        assert results["kind"] == words[0]
        assert results["config"]["resamples"] == 20
    with pytest.raises(SystemExit) as stop:
        command.main(["retrieval", "nowhere.jsonl", *options])
    assert str(stop.value.code) == "clsp_fast.evaluate: nowhere.jsonl: no such file or folder"


def test_without_matplotlib_a_line_says_so(
    manifest: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = retrieval(config(RetrievalConfig, manifest, model_folder))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "not drawn, matplotlib is missing" in save_picture(results, tmp_path / "x.png")


@pytest.mark.parametrize(
    "words", [[], ["recall"], ["retrieval"], ["retrieval", "m.jsonl", "--captions", "none"]]
)
def test_wrong_words_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    capsys.readouterr()
