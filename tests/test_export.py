"""ONNX files give the embeddings of the model for batches of any size; failed exports are named."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_agrees, assert_as_exact, in_float64
from torch import Tensor

from clsp_fast import export
from clsp_fast.config import ModelConfig, TextConfig
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

EVERY_LAYER = ModelConfig(
    downsampling_factor=(1, 3),
    num_encoder_layers=(1,),
    feedforward_dim=(32,),
    encoder_dim=(16, 24),
    encoder_unmasked_dim=(16,),
    cnn_module_kernel=(7,),
    num_heads=(2,),
    query_head_dim=(8,),
    pos_dim=16,
    joint_dim=16,
    embed_channels=(2, 4, 4),
    text=TextConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
    ),
)
MISSING = [name for name in ("onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
# Exporting takes half a minute on a free CPU.
pytestmark = pytest.mark.timeout(900)
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"the extra [onnx] is not installed: {MISSING}")


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[CLSP, Path]:
    """A model with every kind of layer, as the command exports it."""
    torch.manual_seed(0)
    model = CLSP(EVERY_LAYER, Tokenizer.train(["calm voice"] * 3, 270)).eval()
    root = tmp_path_factory.mktemp("export")
    model.save_pretrained(root / "model")
    export.main([str(root / "model"), "--out", str(root / "onnx")])
    return model, root / "onnx"


def run(folder: Path, name: str, **inputs: Tensor) -> Tensor:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    return torch.from_numpy(embeddings)


def batch(clips: int, frames: int) -> tuple[Tensor, Tensor]:
    """Log-mel of clips of different lengths. Often all of them are shorter than the tensor."""
    return 4 * torch.randn(clips, frames, 128) - 8, torch.randint(9, frames + 1, (clips,))


@needs_onnx
@pytest.mark.slow
def test_embeddings_are_those_of_the_model(exported: tuple[CLSP, Path]) -> None:
    model, folder = exported
    exact = in_float64(model)
    for clips, frames in ((1, 9), (1, 10), (3, 11), (2, 14), (1, 17), (2, 31), (4, 333), (7, 100)):
        features, lengths = batch(clips, frames)
        with torch.no_grad():
            expected, truth = (m.encode_features(features, lengths) for m in (model, exact))
        embedded = run(folder, "audio.onnx", features=features, lengths=lengths)
        assert_as_exact(embedded, expected, truth)
    for captions in (["a"], ["a calm voice"], ["calm", "a calm voice", "voice " * 20]):
        token_ids, mask = model.tokenizer.encode_batch(captions, model.config.text.max_tokens)  # type: ignore[union-attr]
        embedded = run(folder, "text.onnx", token_ids=token_ids, attention_mask=mask)
        assert_as_exact(embedded, model.encode_text(captions), exact.encode_text(captions))


@needs_onnx
@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(exported: tuple[CLSP, Path]) -> None:
    model, folder = exported
    exact = in_float64(model)
    features, lengths = 4 * torch.randn(3, 90, 128) - 8, torch.tensor([90, 41, 10])
    together = run(folder, "audio.onnx", features=features, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        clip = features[row : row + 1, :length]
        alone = run(folder, "audio.onnx", features=clip, lengths=lengths[row : row + 1])
        with torch.no_grad():
            truth = exact.encode_features(clip, lengths[row : row + 1])
        assert_as_exact(together[row], alone[0], truth[0])


@needs_onnx
@pytest.mark.slow
def test_the_files_say_what_they_are(exported: tuple[CLSP, Path]) -> None:
    import onnxruntime

    model, folder = exported
    assert {path.name for path in folder.iterdir()} == {"audio.onnx", "text.onnx", "tokenizer.json"}
    session: Any = onnxruntime.InferenceSession(folder / "audio.onnx", providers=["CPUExecutionProvider"])
    assert {x.name: x.shape for x in session.get_inputs()} == {
        "features": ["batch", "frames", 128],
        "lengths": ["batch"],
    }
    session = onnxruntime.InferenceSession(folder / "text.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(float(model.logit_scale.detach()))
    assert {x.name for x in session.get_inputs()} == {"token_ids", "attention_mask"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"downsampling_factor": (4,)},
        {"downsampling_factor": (1, 3, 7)},
        {"downsampling_factor": (6, 5), "output_downsampling_factor": 1},
        {"output_downsampling_factor": 1, "post_encoder_downsampling_factor": 5},
        {"embed_channels": (8,), "audio_pooling": "statistics", "heads": "linear"},
        {"embed_channels": (8,), "heads": "linear", "downsampling_factor": (2, 1)},
        {"audio_pooling": "statistics", "output_downsampling_factor": 1},
    ],
)
def test_what_is_exported_computes_what_the_model_does(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Calls the code that replaces strides and slices in an export directly, without an exporter."""
    config = dataclasses.replace(EVERY_LAYER, **changes, encoder_dim=(16,))
    model = CLSP(config).double().eval()
    tower = export._AudioTower(model)
    with torch.no_grad():
        for frames in (*range(9, 25), 61, 128):
            features, lengths = batch(3, frames)
            features = features.double()
            expected = model.encode_features(features, lengths)
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_exporting", lambda: True)
                embedded = tower(features, lengths)
            assert_agrees(embedded, expected, count=1e5)


@needs_onnx
@pytest.mark.slow
def test_a_model_that_differs_in_every_choice_is_exported(tmp_path: Path) -> None:
    """The export itself compares the graphs with the model, for batches of several sizes."""
    config = dataclasses.replace(
        EVERY_LAYER,
        downsampling_factor=(3,),
        encoder_dim=(16,),
        output_downsampling_factor=1,
        post_encoder_downsampling_factor=5,
        embed_channels=(8,),
        audio_pooling="statistics",
        heads="linear",
    )
    differences = export.export(CLSP(config).eval(), tmp_path)
    assert set(differences) == {"audio.onnx", "text.onnx"}


@needs_onnx
@pytest.mark.parametrize("where", ["torch.export.export", "torch.onnx.export"])
@pytest.mark.parametrize(
    "error", [TypeError("no\nsecond line"), KeyError("no"), NotImplementedError("no"), RecursionError("no")]
)
def test_any_error_of_the_exporter_is_one_line(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(
        "torch.export.export", fails if where == "torch.export.export" else lambda *_, **__: 0
    )
    monkeypatch.setattr("torch.onnx.export", fails)
    with pytest.raises(SystemExit, match=r"^clsp_fast\.export: torch cannot write audio\.onnx: '?no'?$"):
        export.main([str(model_folder), "--out", str(tmp_path / "onnx")])
    assert list((tmp_path / "onnx").iterdir()) == []


def graph_of_means(path: Path, *, frames: int | None) -> None:
    """Writes a graph whose embeddings are means over time. With `frames`, it runs for that number only."""
    from onnx import TensorProto, helper, save

    sizes = helper.make_tensor("sizes", TensorProto.INT64, [3], [-1, frames or -1, 128])
    nodes = [helper.make_node("ReduceMean", ["x", "axis"], ["embeddings"], keepdims=0)]
    nodes.insert(
        0,
        helper.make_node(
            "Reshape" if frames else "Identity", ["features", "sizes"][: 1 + bool(frames)], ["x"]
        ),
    )
    inputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "frames", 128]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
    ]
    output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 128])
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "means", inputs, [output], [axis, sizes])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


@needs_onnx
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (None, r"audio\.onnx differs from the model by .*, more than 0\.0001, with a batch of 1 x 9$"),
        (101, r"onnxruntime cannot run audio\.onnx: "),
    ],
)
def test_a_graph_that_fails_leaves_no_file_and_one_line(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    frames: int | None,
    message: str,
) -> None:
    monkeypatch.setattr(export, "_write_graph", lambda tower, path, *_: graph_of_means(path, frames=frames))
    out = tmp_path / "onnx"
    with pytest.raises(SystemExit, match=message) as stop:
        export.main([str(model_folder), "--out", str(out)])
    assert len(str(stop.value.code).splitlines()) == 1
    assert capfd.readouterr().err == ""
    assert list(out.iterdir()) == []


@needs_onnx
def test_no_file_appears_before_all_are_checked(
    tmp_path: Path, tiny: CLSP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then, the files of an earlier export stay."""
    (tmp_path / "audio.onnx").write_text("earlier")
    seen = []

    def check(model: CLSP, path: Path) -> float:
        seen.append({p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()})
        if path.name == "text.onnx":
            raise ValueError("differs")
        return 0.0

    monkeypatch.setattr(export, "_write_graph", lambda tower, path, *_: path.write_text("new"))
    monkeypatch.setattr(export, "_largest_difference", check)
    with pytest.raises(ValueError, match="differs"):
        export.export(tiny, tmp_path)
    assert seen == [{"audio.onnx": "earlier"}] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["audio.onnx"]


def test_no_graph_stands_beside_the_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, out = tmp_path / "new", tmp_path / "out"
    for folder in (new, out):
        folder.mkdir()
        for name in ("audio.onnx", "audio.onnx.data", "text.onnx"):
            (folder / name).write_text(folder.name)
    replace, seen = Path.replace, []

    def replace_and_look(path: Path, target: Path) -> Path:
        result = replace(path, target)
        pair = [p.read_text() for p in sorted(out.glob("audio*"))]
        seen.append(len(set(pair)))
        return result

    monkeypatch.setattr(Path, "replace", replace_and_look)
    export._move_files(new, out)
    assert seen == [1, 1, 1]
    assert {path.read_text() for path in out.iterdir()} == {"new"}


@needs_onnx
def test_a_graph_for_some_numbers_of_frames_only_is_refused(
    tmp_path: Path, tiny: CLSP, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_multiples_of_101_frames(tower: Any, features: Tensor, lengths: Tensor) -> Tensor:
        return features.unflatten(1, (-1, 101)).sum((1, 2, 3))

    monkeypatch.setattr(export._AudioTower, "forward", needs_multiples_of_101_frames)
    with pytest.raises(ValueError, match=r"torch cannot write audio\.onnx"):
        export.export(tiny, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_16_bits_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = CLSP.from_pretrained(model_folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32 on the CPU"):
        export.export(model, tmp_path)


def test_the_extra_and_missing_models_are_named(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for model, message in ((str(model_folder), r"clsp_fast\[onnx\]"), ("nowhere", "no such folder")):
        with pytest.raises(SystemExit, match=message):
            export.main([model, "--out", str(tmp_path / "out")])
