"""Reference checkpoints: names, wrappers, files, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clsp_fast import convert
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str], dict[str, Tensor]]
CONFIG = json.loads((GOLDEN / "golden_a.config.json").read_text())


@pytest.fixture
def weights(golden: Golden) -> dict[str, Tensor]:
    return golden("golden_a.weights")


def test_round_trip_is_strict_and_exact(weights: dict[str, Tensor]) -> None:
    state = convert.from_reference(weights, CONFIG).state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_wrappers_prefixes_and_old_buffers_are_dealt_with(weights: dict[str, Tensor]) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    wrapped["module.text_encoder.embeddings.position_ids"] = torch.arange(66)[None]
    checkpoint = {"model": wrapped, "optimizer": {"lr": 0.1}, "epoch": 3}
    model = convert.from_reference(checkpoint, CONFIG)
    assert torch.equal(model.state_dict()["logit_scale"], weights["logit_scale"])
    report = convert.match_keys(checkpoint, model)
    assert report.ignored == ["text_encoder.embeddings.position_ids"]
    assert len(report.matched) == len(weights)
    assert report.missing == report.extra == []


def test_model_does_not_share_memory_with_the_checkpoint(weights: dict[str, Tensor]) -> None:
    model = convert.from_reference(weights, CONFIG)
    before = model.log_logit_scale.item()
    weights["logit_scale"].add_(1)
    assert model.log_logit_scale.item() == before


def test_what_does_not_fit_is_listed(weights: dict[str, Tensor]) -> None:
    weights["encoder.surplus"] = torch.zeros(1)
    weights["logit_scale"] = torch.zeros(2)
    del weights["encoder_embed.out.bias"]
    with pytest.raises(ValueError, match=r"\(3\)") as error:
        convert.from_reference(weights, CONFIG)
    for part in ("missing: encoder_embed.out.bias", "unknown: encoder.surplus", "shape of logit_scale"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="tensors alone"):
        convert.from_reference({"a": 3}, CONFIG)
    with pytest.raises(ValueError, match="dictionary"):
        convert.from_reference({"model": 3}, CONFIG)


def test_configuration_of_the_reference_in_all_its_spellings() -> None:
    config = convert.reference_config(CONFIG)
    assert config.encoder_dim == (64, 96, 80)
    assert config.text.num_hidden_layers == 2
    strings = {**CONFIG, "encoder_dim": "64,96,80", "pos_head_dim": 4, "exp_dir": "somewhere"}
    assert convert.reference_config(strings) == config
    assert convert.reference_config({}) == MODEL_PRESETS["xlarge"]
    with pytest.raises(ValueError, match="hidden_act"):
        convert.reference_config({"roberta": {"hidden_act": "relu"}})
    with pytest.raises(ValueError, match="text_encoder_dim must be"):
        convert.reference_config({**CONFIG, "text_encoder_dim": 768})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_command_converts_a_file_to_a_folder(
    weights: dict[str, Tensor], tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / f"epoch-1{suffix}"
    if suffix == ".pt":
        others = {"epoch": 1, "exp_dir": Path("exp")}  # icefall stores its whole parameter set
        torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, **others}, checkpoint)
    else:
        save_file(weights, checkpoint)
    Tokenizer.train(["a calm voice"] * 3, 270).save(tmp_path / "tokenizer.json")
    convert.reference(
        checkpoint, tmp_path / "out", GOLDEN / "golden_a.config.json", tmp_path / "tokenizer.json"
    )
    assert "253 tensors, 0 ignored" in capsys.readouterr().out
    model = CLSP.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert model.encode_text(["a calm voice"]).shape == (1, 32)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("attack_ran"),)  # type: ignore[return-value]


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, "bad.pt")
    with pytest.raises(Exception, match=r"(?i)weights"):
        convert.read_checkpoint(Path("bad.pt"))
    assert not Path("attack_ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "--checkpoint", "nowhere.pt", "--out", "x"], "nowhere.pt"),
        (["reference", "--checkpoint", "{text}", "--out", "x"], "clsp_fast.convert: "),
        (["reference", "--out", "x"], "--checkpoint"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    words = [word.replace("{text}", str(tmp_path / "text.pt")) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        convert.main(words)
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
