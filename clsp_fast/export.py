"""A model as ONNX, for runtimes without torch: `python -m clsp_fast.export MODEL --out FOLDER`.

audio.onnx takes features (B, T, F) float32, the log-mel of `features.extract`, and lengths (B,) int64 in
frames; text.onnx takes token_ids and attention_mask (B, L) int64. Each gives embeddings (B, D) float32, unit
norm; B, T and L are free, and a clip's or caption's embedding does not depend on its batch. The metadata of
both name the model and its logit_scale. tokenizer.json is copied beside them.
Shape suffixes: B clips or captions, T frames, F mel bins, L tokens, D joint dimension.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clsp_fast import features, folder
from clsp_fast.batches import MIN_FRAMES
from clsp_fast.model import CLSP
from clsp_fast.ops import frames_after_front, make_ragged

TOLERANCE = 1e-4
"""Most that an embedding may differ from the model's own."""

_CHECKED = ((1, MIN_FRAMES), (3, 77), (2, 64), (2, 512))


class _AudioTower(nn.Module):
    """`CLSP.encode_features` without a look at the lengths, which a graph could not repeat."""

    def __init__(self, model: CLSP) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        front_lengths = frames_after_front(lengths)
        ragged = make_ragged(front_lengths, frames_after_front(features.shape[1]), alone=True)
        hidden, hidden_lengths = self.model.run_encoder(features, front_lengths, ragged)
        return self.model.join_audio(hidden, hidden_lengths, features, lengths)


class _TextTower(nn.Module):
    """`CLSP.encode_tokens` without its checks."""

    def __init__(self, model: CLSP) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.join_text(self.model.text_encoder(token_ids, attention_mask))


def export(model: CLSP, out: Path) -> dict[str, float]:
    """Writes audio.onnx, text.onnx and tokenizer.json, each whole or not at all.

    Args:
        model: on the CPU, in float32.
        out: folder; weights over 2 GB are in files of their own beside the graphs.

    Returns:
        By file, the largest difference between embeddings of the graph and of the model on random batches of
        several sizes; empty if onnxruntime is not installed.

    Raises:
        ImportError: the extra [onnx] is not installed. ValueError: the model is not in float32 on the CPU, or
        a graph differs from it by more than `TOLERANCE`.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"model must be float32 on the CPU, got {model.dtype} on {model.device}")
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("ONNX export needs the extra: pip install 'clsp_fast[onnx]'")
    out.mkdir(parents=True, exist_ok=True)
    towers = {"audio.onnx": _AudioTower(model).eval(), "text.onnx": _TextTower(model).eval()}
    names = {"audio.onnx": ("features", "lengths"), "text.onnx": ("token_ids", "attention_mask")}
    metadata = {
        "model": folder.fingerprint(model.config, model.state_dict(), model.tokenizer),
        "frontend": features.identity(),
        "logit_scale": repr(float(model.logit_scale.detach())),
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary, torch.no_grad():
        for name, tower in towers.items():
            path = Path(temporary) / name
            # Sizes that no factor of the model divides: what holds for them is not taken for a rule.
            _write(tower, path, names[name], _example(model, name, 2, 101), metadata)
            if importlib.util.find_spec("onnxruntime") is not None:
                found[name] = _difference(model, tower, path, names[name])
        if model.tokenizer is not None:
            model.tokenizer.save(Path(temporary) / "tokenizer.json")
        for path in sorted(
            Path(temporary).iterdir(), reverse=True
        ):  # weights before the graph that needs them
            path.replace(out / path.name)
    return found


def _example(model: CLSP, name: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random inputs of a tower; the first row is as long as can be, the others are shorter."""
    generator = torch.Generator().manual_seed(rows * length)
    if name == "audio.onnx":
        values = 4 * torch.randn(rows, length, model.config.feature_dim, generator=generator) - 8
        lengths = torch.randint(MIN_FRAMES, length + 1, (rows,), generator=generator)
        lengths[0] = length
        return values, lengths
    text = model.config.text
    length = min(length, text.max_tokens)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    token_ids = torch.randint(text.pad_token_id + 1, text.vocab_size, (rows, length), generator=generator)
    return token_ids.where(mask == 1, text.pad_token_id), mask


def _write(
    tower: nn.Module,
    path: Path,
    names: tuple[str, str],
    example: tuple[Tensor, Tensor],
    metadata: dict[str, str],
) -> None:
    audio = path.name == "audio.onnx"
    rows = torch.export.Dim("batch")
    length = torch.export.Dim("frames", min=MIN_FRAMES) if audio else torch.export.Dim("tokens")
    second = {0: rows} if audio else {0: rows, 1: length}
    with _quiet():
        program: Any = torch.onnx.export(
            tower,
            example,
            dynamo=True,
            verbose=False,
            input_names=list(names),
            output_names=["embeddings"],
            dynamic_shapes=({0: rows, 1: length}, second),
        )
        program.model.metadata_props.update(metadata)
        program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own and other packages' affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The axis name|# The axis name")
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _difference(model: CLSP, tower: nn.Module, path: Path, names: tuple[str, str]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, length in _CHECKED:
        inputs = _example(model, path.name, rows, length)
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        worst = max(worst, float((torch.from_numpy(found) - tower(*inputs)).abs().max()))
    if not worst <= TOLERANCE:
        raise ValueError(f"{path.name} differs from the model by {worst:.1e}, more than {TOLERANCE}")
    return worst


def _command(model: str, /, *, out: Path) -> None:
    """Write a model as ONNX.

    Args:
        model: folder, or name of a repository on the Hugging Face hub.
        out: folder to write.
    """
    for name, difference in export(CLSP.from_pretrained(model, dtype=torch.float32), out).items():
        print(f"{out / name}: within {difference:.1e} of the model")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    try:
        tyro.cli(_command, args=arguments, prog="python -m clsp_fast.export", description=__doc__)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"clsp_fast.export: {error}")


if __name__ == "__main__":
    main()
