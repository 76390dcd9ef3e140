"""Reference checkpoints: names, wrappers, files, and weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sample_data import GOLDEN, LFS_POINTER, Attack, Golden
from torch import Tensor

from clsp_fast import convert
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

CONFIG = json.loads((GOLDEN / "golden_a.config.json").read_text())


@pytest.fixture
def weights(golden: Golden) -> dict[str, Tensor]:
    return golden("golden_a.weights")


def test_round_trip_is_strict_and_exact(weights: dict[str, Tensor]) -> None:
    state = convert.from_reference(weights, CONFIG).state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_wrappers_prefixes_and_old_buffers_are_removed(weights: dict[str, Tensor]) -> None:
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
    with pytest.raises(ValueError, match="only tensors"):
        convert.from_reference({"a": 3}, CONFIG)
    with pytest.raises(ValueError, match="dictionary"):
        convert.from_reference({"model": 3}, CONFIG)


def test_what_does_not_fit_is_listed_on_one_line_whatever_the_names(weights: dict[str, Tensor]) -> None:
    for i in range(3):
        weights[f"{i}" * 300] = torch.zeros(1)
    del weights["encoder_embed.out.bias"]
    with pytest.raises(ValueError, match=r"1 of 3: 0000") as error:
        convert.from_reference(weights, CONFIG)
    assert len(str(error.value)) < 250


def test_whole_numbers_for_weights_are_refused(weights: dict[str, Tensor]) -> None:
    name = "text_encoder.encoder.layer.0.output.dense.weight"
    weights[name] = weights[name].to(torch.int8)
    with pytest.raises(ValueError, match=rf"\(1\): dtype of {name}: expected floating point, got torch.int8"):
        convert.from_reference(weights, CONFIG)
    model = CLSP(convert.reference_config(CONFIG))
    with pytest.raises(ValueError, match=r"\(1\): dtype of encoder.layer.0.output.dense.weight"):
        convert.load_tower(model, weights, convert.TEXT)


@pytest.mark.parametrize("prefix", ["", "roberta.", "text_encoder."])
def test_a_tower_with_more_layers_is_refused(weights: dict[str, Tensor], prefix: str) -> None:
    text = {f"{prefix}{k[13:]}": v for k, v in weights.items() if k.startswith("text_encoder.")}
    text |= {f"{prefix}embeddings.position_ids": torch.arange(66)[None], "lm_head.bias": torch.zeros(3)}
    model = CLSP(convert.reference_config(CONFIG))
    report = convert.load_tower(model, text, convert.TEXT)
    assert report.extra == []
    assert report.ignored == ["lm_head.bias", f"{prefix}embeddings.position_ids"][:: -1 if not prefix else 1]
    text[f"{prefix}encoder.layer.2.output.dense.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(1\): unknown: encoder.layer.2.output.dense.bias"):
        convert.load_tower(model, text, convert.TEXT)
    weights["encoder.encoders.9.surplus"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(1\): unknown: encoder.encoders.9.surplus"):
        convert.load_tower(model, weights, convert.SPEECH)


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
        others = {"epoch": 1, "exp_dir": Path("exp")}  # icefall saves all its options
        torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, **others}, checkpoint)
    else:
        save_file(weights, checkpoint)
    Tokenizer.train(["a calm voice"] * 3, 270).save(tmp_path / "tokenizer.json")
    convert.reference(
        tmp_path / "out",
        (checkpoint,),
        config=GOLDEN / "golden_a.config.json",
        tokenizer=tmp_path / "tokenizer.json",
    )
    assert "253 matched, 0 missing, 0 extra, 0 ignored" in capsys.readouterr().out
    model = CLSP.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert model.encode_text(["a calm voice"]).shape == (1, 32)


def folder_of(tmp_path: Path, layout: str, weights: dict[str, Tensor]) -> Path:
    """A checkpoint in a folder, with its configuration and tokenizer beside it."""
    folder = tmp_path / layout
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    Tokenizer.train(["a calm voice"] * 3, 270).save(folder / "tokenizer.json")
    names = sorted(weights)
    if layout == "shards":
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, half in halves.items():
            save_file({name: weights[name] for name in half}, folder / file)
        index = {name: file for file, half in halves.items() for name in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    elif layout == "wrapped":
        save_file({f"model.{name}": weights[name] for name in names}, folder / "model.safetensors")
    else:
        torch.save({"state_dict": weights}, folder / "epoch-3.pt")
    return folder


@pytest.mark.parametrize("layout", ["shards", "wrapped", "pickle", "file"])
def test_command_converts_a_folder_as_it_is(weights: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    checkpoint = folder_of(tmp_path, layout, weights)
    if layout == "file":  # the files beside a checkpoint are used as well if the checkpoint itself is given
        checkpoint /= "epoch-3.pt"
    convert.main(["reference", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "m")])
    model = CLSP.from_pretrained(tmp_path / "m")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert model.tokenizer is not None


def test_averages_of_one_checkpoint_or_of_several_are_converted(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    average = {name: tensor.double() + 0.25 for name, tensor in weights.items()}
    torch.save({"model": weights, "model_avg": average}, tmp_path / "a.pt")
    torch.save({"model": {name: tensor + 1 for name, tensor in weights.items()}}, tmp_path / "b.pt")
    words = ["reference", "--out", str(tmp_path / "m"), "--config", str(GOLDEN / "golden_a.config.json")]
    for more, shift in ((["a.pt", "--averaged"], 0.25), (["a.pt", "b.pt"], 0.5)):
        files = [str(tmp_path / word) if word.endswith(".pt") else word for word in more]
        convert.main([*words, "--checkpoint", *files])
        state = CLSP.from_pretrained(tmp_path / "m").state_dict()
        for name, tensor in weights.items():
            assert state[name].dtype == torch.float32
            rounding = 4 * torch.finfo(torch.float32).eps  # of the two terms, the tensor and the shift
            torch.testing.assert_close(state[name], tensor + shift, atol=rounding, rtol=rounding)
    with pytest.raises(SystemExit, match="model_avg"):
        convert.main([*words, "--checkpoint", str(tmp_path / "b.pt"), "--averaged"])
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="checkpoint 2 has other names"):
        convert.main([*words, "--checkpoint", str(tmp_path / "a.pt"), str(tmp_path / "c.pt")])


def test_each_tower_may_start_from_another_checkpoint(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = {f"speech.{k}": v for k, v in weights.items() if k.startswith(convert.SPEECH)}
    text = {f"roberta.{k[13:]}": v for k, v in weights.items() if k.startswith("text_encoder.")}
    text = {name: tensor for name, tensor in text.items() if ".pooler." not in name}
    torch.save({"model": speech | {"decoder.weight": torch.zeros(3)}}, tmp_path / "spear.pt")
    (tmp_path / "roberta").mkdir()
    save_file(text | {"lm_head.bias": torch.zeros(9)}, tmp_path / "roberta/model.safetensors")
    words = ["reference", "--out", str(tmp_path / "m"), "--config", str(GOLDEN / "golden_a.config.json")]
    convert.main([*words, "--speech", str(tmp_path / "spear.pt"), "--text", str(tmp_path / "roberta")])
    caught = capsys.readouterr().out
    assert "ignored: decoder.weight" in caught
    assert "ignored: lm_head.bias" in caught
    assert "missing: pooler.dense.bias, pooler.dense.weight" in caught
    state = CLSP.from_pretrained(tmp_path / "m").state_dict()
    for name, tensor in weights.items():
        of_tower = name.startswith(("encoder", "text_encoder.")) and ".pooler." not in name
        # The heads start from random values. A tensor that starts from a constant may be equal by chance.
        assert not of_tower or torch.equal(state[name], tensor), name
    assert not torch.equal(state["audio_projection.0.weight"], weights["audio_projection.0.weight"])
    convert.main([*words, "--text", str(tmp_path / "roberta")])
    del speech["speech.encoder_embed.out.bias"]
    torch.save(speech, tmp_path / "spear.pt")
    for files, message in (
        (["--speech", str(tmp_path / "spear.pt")], r"\(1\): missing: encoder_embed.out.bias"),
        (["--speech", str(tmp_path / "roberta")], "no name of a tensor ends with encoder_embed"),
        (["--speech", "x", "--checkpoint", "y"], "give either --checkpoint, or --speech"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([*words, *files])


def test_a_folder_without_one_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold one checkpoint, got none"):
        convert.read_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"got a\.pt, b\.pt; name the file"):
        convert.read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')
    with pytest.raises(ValueError, match="not a file beside it"):
        convert.read_checkpoint(tmp_path)


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


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module.")
PREFIXES += (
    "module.model._orig_mod.",
    "_orig_mod._orig_mod.",
    "module.module.",
    "model.model._orig_mod.module.",
)
PREFIXES += ("_fsdp_wrapped_module.", "module._fsdp_wrapped_module._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_prefixes_of_wrappers_are_removed_in_any_order(
    weights: dict[str, Tensor], prefix: str, wrapper: str | None
) -> None:
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    assert convert.unwrap(wrapped if wrapper is None else {wrapper: wrapped}).keys() == weights.keys()


def test_parts_of_a_model_may_be_wrapped_alone(weights: dict[str, Tensor]) -> None:
    compiled = {
        name.replace("encoder.encoders.", "encoder._orig_mod.encoders.", 1).replace(
            "text_encoder.", "text_encoder.module._checkpoint_wrapped_module.", 1
        ): tensor
        for name, tensor in weights.items()
    }
    assert compiled.keys() != weights.keys()
    state = convert.from_reference(compiled, CONFIG).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match=r"name each tensor once.*logit_scale"):
        convert.unwrap(weights | {"module.logit_scale": weights["logit_scale"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "but it is empty"),
        ({"learning_rate": 1, "epochs": 3}, r"got only others \(epochs, learning_rate\)"),
        ({f"option_{i}": i for i in range(1000)}, r"of 1,000: option_0, .*, \.\.\.\)"),
        ({"format": "clsp_fast", "model": {"joint_dim": 3}}, r"got only others \(format, model\)"),
        ({"roberta": {"n_layer": 3}}, r'"roberta" must have keys of the model .*got only others \(n_layer\)'),
        ({"roberta": 3}, '"roberta" must be an object, got int'),
        ({"encoder_dim": None}, "another type"),
        ({"encoder_dim": "a,b"}, "a"),
        ({"roberta": {"pad_token_id": None}}, "another type"),
    ],
)
def test_a_configuration_of_something_else_is_refused_by_name(
    weights: dict[str, Tensor], tmp_path: Path, content: dict[str, object], message: str
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    save_file(weights, tmp_path / "w.safetensors")
    words = ["reference", "--checkpoint", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "m")]
    with pytest.raises(SystemExit, match=message) as stop:
        convert.main([*words, "--config", str(tmp_path / "c.json")])
    assert f"{tmp_path}/c.json: " in str(stop.value.code)
    assert len(str(stop.value.code)) < 600
    assert not (tmp_path / "m").exists()


def test_long_lists_of_names_take_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    others = {f"other.{name}": tensor for name, tensor in weights.items()}
    grown = {name: torch.zeros(*tensor.shape, 2) for name, tensor in weights.items()}
    text = {k: v for k, v in weights.items() if k.startswith("text_encoder.")}
    more = text | {f"text_encoder.encoder.layer.{i}.x": torch.zeros(1) for i in range(9, 500)}
    model = CLSP(convert.reference_config(CONFIG))
    model.save_pretrained(tmp_path)
    messages = []
    for attempt in (
        lambda: convert.from_reference(others, CONFIG),
        lambda: convert.from_reference(grown, CONFIG),
        lambda: convert.from_reference({}, CONFIG),
        lambda: convert.load_tower(model, more, convert.TEXT),
        lambda: convert.unwrap({f"key {i}": i for i in range(1000)}),
        lambda: convert.unwrap(weights | {f"module.{name}": x for name, x in weights.items()}),
    ):
        with pytest.raises(ValueError, match=r"\d of [\d,]+: ") as caught:
            attempt()
        messages.append(str(caught.value))
    for tensors in (others, grown):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*\d of \d+: ") as caught:
            CLSP.from_pretrained(tmp_path)
        messages.append(str(caught.value).replace(str(tmp_path), ""))
    for message in messages:
        assert len(message) < 400, message
        assert "\n" not in message
    assert max(map(len, str(convert.match_keys(others, model)).splitlines())) < 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_configurations_and_indexes_of_any_unicode_encoding_are_read(
    weights: dict[str, Tensor], tmp_path: Path, encoding: str
) -> None:
    folder, out = tmp_path / "sharded", tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding)
    (tmp_path / "c.json").write_text((GOLDEN / "golden_a.config.json").read_text(), encoding)
    words = ["reference", "--checkpoint", str(folder), "--config", str(tmp_path / "c.json")]
    convert.main([*words, "--out", str(out)])
    (out / "config.json").write_text((out / "config.json").read_text(), encoding)
    assert CLSP.from_pretrained(out).config == convert.reference_config(
        json.loads((GOLDEN / "golden_a.config.json").read_text())
    )


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "model.safetensors.index.json", "c.json"])
def test_a_git_lfs_pointer_in_place_of_a_file_is_named(
    weights: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    save_file(weights, tmp_path / "good.safetensors")
    (tmp_path / name).write_text(LFS_POINTER)
    checkpoint = tmp_path / ("good.safetensors" if name == "c.json" else name)
    words = ["reference", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "m")]
    words += ["--config", str(tmp_path / "c.json")] if name == "c.json" else []
    with pytest.raises(SystemExit, match=rf'{name} is a Git LFS pointer.*"git lfs pull"'):
        convert.main(words)
