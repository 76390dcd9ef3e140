"""The README's code runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from clsp_fast import convert, data, train
from clsp_fast.config import MODEL_PRESETS, TRAIN_PRESETS
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


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"python -m clsp_fast\.(\w+) (\w+)?", README)
    assert {"train", "data", "convert"} <= {name for name, _ in commands}
    for name, word in commands:
        if name == "train":
            assert not word or word in TRAIN_PRESETS
            continue
        with pytest.raises(SystemExit) as stop:
            {"data": data, "convert": convert}[name].main([word, "--help"])
        assert stop.value.code == 0
    flags = set(re.findall(r"--[a-z][\w.-]*", "".join(blocks("sh"))))
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = capsys.readouterr().out
    for flag in flags - {"--decode", "--nproc-per-node"}:
        assert flag in known, flag


def test_the_preset_sizes_are_those_of_the_readme() -> None:
    assert "724,244,405" in README
    assert set(re.findall(r"\b(tiny|small|base|xlarge)\b", README)) == set(TRAIN_PRESETS)
