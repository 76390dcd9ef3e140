"""The README's code runs, and its commands exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import clsp_fast
from clsp_fast import convert, data, embed, evaluate, export, score, search, train
from clsp_fast.config import MODEL_PRESETS, TRAIN_PRESETS
from clsp_fast.embed import EmbedConfig
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wave = 0.1 * np.sin(np.arange(24000) * 0.05)
    for name in ("a.wav", "b.flac", "c.mp3"):
        soundfile.write(name, wave, 24000)
    tokenizer = Tokenizer.train(["a woman speaks slowly", "a man whispers"], 300, lowercase=True)
    CLSP(MODEL_PRESETS["tiny"], tokenizer).save_pretrained("runs/demo/model")
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["speech"].shape == (3, 128)
    assert names["features"].values.shape == (2, 100, 128)
    assert np.isfinite(names["loss"].item())
    assert "tensor" in capsys.readouterr().out


def test_the_training_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"python -m clsp_fast\.(train|data|convert) (\w+)?", README)
    assert {"train", "data", "convert"} <= {name for name, _ in commands}
    for name, word in commands:
        if name == "train":
            assert not word or word in TRAIN_PRESETS
            continue
        with pytest.raises(SystemExit) as stop:
            {"data": data, "convert": convert}[name].main([word, "--help"])
        assert stop.value.code == 0
    training = [line for line in "".join(blocks("sh")).splitlines() if "clsp_fast.train" in line]
    flags = {flag for line in training for flag in re.findall(r"--[a-z][\w.-]*", line)}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = capsys.readouterr().out
    assert len(flags) > 3
    for flag in flags - {"--nproc-per-node"}:
        assert flag in known, flag


def test_the_commands_for_a_trained_model_run_as_they_stand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    make_clips: Callable[[Path, int], object],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "runs/demo/model")
    make_clips(Path("clips"), 16)
    for i in range(16):
        target = Path(f"RAVDESS/Actor_{i // 8 + 1:02d}/03-01-{i % 8 + 1:02d}-01-01-01-{i // 8 + 1:02d}.wav")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"clips/{i:05d}.wav", target)
    rows = [{"audio": f"clips/{i:05d}.wav", "caption": f"Voice {i}."} for i in range(5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"audio": row["audio"], "captions": [row["caption"]]} for row in rows]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratings = [f"clips/{i:05d}.wav,Voice.,r{i % 2},{i % 6},intrinsic" for i in range(8)]
    Path("ratings.csv").write_text("\n".join(["clip,caption,rater,rating,category", *ratings, ""]))
    modules = {"embed": embed, "search": search, "score": score, "evaluate": evaluate, "export": export}
    # tests/test_export.py exports and looks at the result.
    monkeypatch.setattr(export, "export", lambda model, out: {})
    ran = []
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        name = words[2].removeprefix("clsp_fast.") if words[:2] == ["python", "-m"] else ""
        if name in modules:
            code: object = 0
            try:
                modules[name].main([*words[3:], *([] if name == "export" else ["--device", "cpu"])])
            except SystemExit as stop:
                code = stop.code
            assert code == 0, line
            ran.append(name)
    assert set(ran) == set(modules)
    assert {"embeddings", "answers.html", "scores.jsonl", "evaluation"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert clsp_fast.embed.embed(EmbedConfig(source="clips/", out=Path("embeddings"))).complete


def test_the_preset_sizes_are_those_of_the_readme() -> None:
    assert "724,244,405" in README
    assert set(re.findall(r"\b(tiny|small|base|xlarge)\b", README)) == set(TRAIN_PRESETS)
