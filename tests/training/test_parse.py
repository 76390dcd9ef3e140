"""The command line of training: --init takes the saved model's configuration; errors name their file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clsp_fast import train
from clsp_fast.config import MODEL_PRESETS, TRAIN_PRESETS, DataConfig, TrainConfig
from clsp_fast.tokenizer import Tokenizer
from clsp_fast.training import checkpoint


def test_a_saved_model_brings_its_configuration(model_folder: Path, tmp_path: Path) -> None:
    saved = str(model_folder)
    for words in (["small", "--init", saved], ["small", f"--init={saved}", "--model.joint-dim", "128"]):
        parsed = train.parse(words)
        assert (parsed.model, str(parsed.init)) == (MODEL_PRESETS["tiny"], saved)
        assert parsed.stage1_steps == TRAIN_PRESETS["small"].stage1_steps
    assert train.parse(["small", "--init", "None"]) == TRAIN_PRESETS["small"]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"init": saved, "stage1_steps": 3}))
    assert train.parse([str(file)]).model == MODEL_PRESETS["tiny"]
    file.write_text(json.dumps({"init": saved, "model": {"joint_dim": 8}}))
    assert train.parse([str(file)]).model.joint_dim == 8


def test_a_command_line_changes_no_class_and_an_error_names_its_file_once(tmp_path: Path) -> None:
    before = dict(TrainConfig.__annotations__)
    parsed = train.parse(["tiny", "--run-dir", "x"])
    assert type(parsed) is TrainConfig
    assert parsed == dataclasses.replace(TRAIN_PRESETS["tiny"], run=Path("x"))
    assert before == TrainConfig.__annotations__ == {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    for number, content in enumerate(
        (b"%PDF-1.7\0", b"{", b'{"no_such_key": 1}', b"[]", b"[" * 100_000, None)
    ):
        file = tmp_path / f"{number}.json"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            train.parse([str(file)])
        assert str(stop.value.code).startswith("clsp_fast.train: ")
        assert str(stop.value.code).count(file.name) == 1


def test_what_contradicts_a_saved_model_is_named(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "captions": ["A man."]}\n')
    words = ["small", "--init", str(model_folder), "--run-dir", str(tmp_path / "run")]
    words += ["--data.manifest", str(tmp_path / "m.jsonl")]
    with pytest.raises(SystemExit) as stop:
        train.main([*words, "--model.joint-dim", "8", "--model.text.vocab-size", "400"])
    expected = "model.joint_dim is 8, not 128; model.text.vocab_size is 400, not 1024; leave these out"
    assert expected in str(stop.value.code)


def test_an_init_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        SystemExit, match=r"--init: .*config\.json: .*a run keeps its model in its subfolder model"
    ):
        train.main(["--init", str(tmp_path)])
    with pytest.raises(SystemExit, match="--init: nowhere: no such folder"):
        train.main(["--init", "nowhere"])


def test_settings_of_human_speech_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"data\.human cannot be combined with data\.manifest, got m\.jsonl"):
        DataConfig(human=True, manifest=Path("m.jsonl"))
    with pytest.raises(ValueError, match=r"data\.recordings needs data\.human, got packages"):
        DataConfig(recordings=Path("packages"))


def test_a_checkpoint_of_another_model_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "captions": ["A man."]}\n')
    tensors = {f"layers.{i}.weight": torch.zeros(2) for i in range(1000)}
    checkpoint.save(tmp_path / "run/checkpoints", checkpoint.Checkpoint(3, tensors, {}, {}), keep=1)
    Tokenizer.train(["A man."], 300).save(tmp_path / "run/tokenizer.json")
    words = ["tiny", "--run", str(tmp_path / "run"), "--data.manifest", str(tmp_path / "m.jsonl")]
    with pytest.raises(
        SystemExit, match=r"step 3 .* does not fit the model: .*unknown: \d of 1,000: "
    ) as stop:
        train.main([*words, "--device", "cpu"])
    assert len(str(stop.value.code)) < 400 + len(str(tmp_path))


def test_a_preset_that_does_not_come_first_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--run-dir", "x", "tiny"])
    assert "A preset comes first: python -m clsp_fast.train tiny --flags" in capsys.readouterr().err
