"""ONNX files against the model itself, whatever the size of a batch; what cannot be exported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clsp_fast import export
from clsp_fast.config import ModelConfig, TextConfig
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

EVERY_LAYER = ModelConfig(
    downsampling_factor=(1, 2),
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
# Exporting takes half a minute of a free CPU.
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
    (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    return torch.from_numpy(found)


@needs_onnx
@pytest.mark.slow
def test_embeddings_are_those_of_the_model(exported: tuple[CLSP, Path]) -> None:
    model, folder = exported
    for clips, frames in ((1, 9), (1, 10), (2, 31), (4, 333), (7, 100)):
        features, lengths = 4 * torch.randn(clips, frames, 128) - 8, torch.randint(9, frames + 1, (clips,))
        with torch.no_grad():
            expected = model.encode_features(features, lengths)
        found = run(folder, "audio.onnx", features=features, lengths=lengths)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for captions in (["a calm voice"], ["calm", "a calm voice", "voice " * 20]):
        token_ids, mask = model.tokenizer.encode_batch(captions, model.config.text.max_tokens)  # type: ignore[union-attr]
        found = run(folder, "text.onnx", token_ids=token_ids, attention_mask=mask)
        torch.testing.assert_close(found, model.encode_text(captions), atol=1e-5, rtol=0)


@needs_onnx
@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(exported: tuple[CLSP, Path]) -> None:
    _, folder = exported
    features, lengths = 4 * torch.randn(3, 90, 128) - 8, torch.tensor([90, 41, 10])
    together = run(folder, "audio.onnx", features=features, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        own = features[row : row + 1, :length]
        alone = run(folder, "audio.onnx", features=own, lengths=lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


@needs_onnx
@pytest.mark.slow
def test_the_files_say_what_they_are(exported: tuple[CLSP, Path]) -> None:
    import onnxruntime

    model, folder = exported
    assert {path.name for path in folder.iterdir()} == {"audio.onnx", "text.onnx", "tokenizer.json"}
    session: Any = onnxruntime.InferenceSession(folder / "text.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(float(model.logit_scale.detach()))
    assert {x.name for x in session.get_inputs()} == {"token_ids", "attention_mask"}


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
