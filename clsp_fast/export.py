"""Exports a model to ONNX, for runtimes without torch: `python -m clsp_fast.export [MODEL] [--out FOLDER]`.

audio.onnx takes features (B, T, F) float32, the log-mel of `features.extract`, and lengths (B,) int64 in
frames; text.onnx takes token_ids and attention_mask (B, L) int64. Each gives unit-norm embeddings (B, D)
float32. B, L and T >= 9 are dynamic. The embedding of a clip or caption does not depend on its batch. The
metadata of both files hold the model's fingerprint and logit_scale. tokenizer.json is written beside them.
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

from clsp_fast import console, features
from clsp_fast.batches import MIN_FRAMES
from clsp_fast.model import CLSP
from clsp_fast.storage import files
from clsp_fast.towers.front import frames_after_front
from clsp_fast.towers.layers import frames_in_graph, make_ragged

TOLERANCE = 1e-4
"""Largest accepted difference between an embedding of a graph and one of the model."""

# Sizes of the batches with which the graphs are checked: (clips, frames) for audio.onnx, and (captions,
# tokens + 8) for text.onnx. They include the fewest frames, and even, odd and prime numbers, because a graph
# may be right for one parity or one remainder only.
_CHECKED_SIZES = ((1, 9), (2, 10), (1, 11), (3, 13), (2, 31), (5, 64), (3, 77), (1, 128), (2, 211), (2, 520))
_INPUTS = {"audio.onnx": ("features", "lengths"), "text.onnx": ("token_ids", "attention_mask")}


class _AudioTower(nn.Module):
    """`CLSP.encode_features` without its checks, for any number of frames."""

    def __init__(self, model: CLSP) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        front_lengths = frames_after_front(lengths)
        frames = frames_in_graph(front_lengths)
        # The front needs 2 * frames + 7 frames of features. If there are fewer, the last one is
        # repeated as padding.
        index_T = torch.arange(2 * frames + 7).clamp(max=features.shape[1] - 1)
        ragged = make_ragged(front_lengths, frames, alone=True)
        hidden, hidden_lengths = self.model.run_encoder(
            features.index_select(1, index_T), front_lengths, ragged
        )
        return self.model.join_audio(hidden, hidden_lengths, features, lengths)


class _TextTower(nn.Module):
    """`CLSP.encode_tokens` without its checks."""

    def __init__(self, model: CLSP) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.join_text(self.model.text_encoder(token_ids, attention_mask))


def export(model: CLSP, out: Path) -> dict[str, float]:
    """Writes audio.onnx, text.onnx and tokenizer.json.

    Before any file appears in `out`, both graphs are run with onnxruntime and compared with the model at
    several sizes. Each file then appears atomically.

    Args:
        model: a model on the CPU, in float32.
        out: folder; weights over 2 GB get separate files beside the graphs.

    Returns:
        {name of a graph's file: largest difference between embeddings of the graph and of the model}.

    Raises:
        ImportError: the extra [onnx] is not installed.
        ValueError: the model is not in float32 on the CPU, the exporter refuses it, or a graph does not run
            or differs from the model by more than `TOLERANCE`.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"model must be float32 on the CPU, got {model.dtype} on {model.device}")
    if any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")):
        raise ImportError("ONNX export needs the extra: pip install 'clsp_fast[onnx]'")
    out.mkdir(parents=True, exist_ok=True)
    towers = {"audio.onnx": _AudioTower(model).eval(), "text.onnx": _TextTower(model).eval()}
    metadata = {
        "model": model.fingerprint(),
        "frontend": features.identity(),
        "logit_scale": repr(float(model.logit_scale.detach())),
    }
    differences = {}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary, torch.no_grad():
        for name, tower in towers.items():
            path = Path(temporary) / name
            _write_graph(tower, path, _example_inputs(model, name, 2, 101), metadata)
            differences[name] = _largest_difference(model, path)
        if model.tokenizer is not None:
            model.tokenizer.save(Path(temporary) / "tokenizer.json")
        _move_files(Path(temporary), out)
    return differences


def _move_files(temporary: Path, out: Path) -> None:
    """Moves the finished files. Separate weights are moved before the graph that needs them."""
    for path in sorted(temporary.iterdir(), reverse=True):
        if path.name.endswith(".onnx.data"):
            # Otherwise the graph of an earlier export would read the new weights.
            (out / path.name.removesuffix(".data")).unlink(missing_ok=True)
        path.replace(out / path.name)


def _example_inputs(model: CLSP, name: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random inputs of a tower. The first row has the full length, the others have random lengths."""
    generator = torch.Generator().manual_seed(rows * length)
    if name == "audio.onnx":
        values = 4 * torch.randn(rows, length, model.config.feature_dim, generator=generator) - 8
        lengths = torch.randint(MIN_FRAMES, length + 1, (rows,), generator=generator)
        lengths[0] = length
        return values, lengths
    text = model.config.text
    length = min(length - MIN_FRAMES + 1, text.max_tokens)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    token_ids = torch.randint(text.pad_token_id + 1, text.vocab_size, (rows, length), generator=generator)
    return token_ids.where(mask == 1, text.pad_token_id), mask


def _write_graph(
    tower: nn.Module, path: Path, example: tuple[Tensor, Tensor], metadata: dict[str, str]
) -> None:
    rows = torch.export.Dim("batch", min=1)
    if path.name == "audio.onnx":
        shapes = ({0: rows, 1: torch.export.Dim("frames", min=MIN_FRAMES)}, {0: rows})
    else:
        shapes = ({0: rows, 1: torch.export.Dim("tokens", min=1)},) * 2
    axes = tuple({axis: size.__name__ for axis, size in shape.items()} for shape in shapes)
    try:
        with _quiet_exporter():
            # torch.export raises an error if a size cannot stay dynamic. If torch.onnx.export called it, that
            # size would silently become a constant.
            program = torch.export.export(tower, example, dynamic_shapes=shapes, strict=False)
            graph: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(_INPUTS[path.name]),
                output_names=["embeddings"],
                dynamic_shapes=axes,
            )
            graph.model.metadata_props.update(metadata)
            graph.save(path)
    except OSError:  # an error of the disk, whose message is clear
        raise
    except Exception as error:  # the exporter raises errors of any class
        raise ValueError(f"torch cannot write {path.name}: {_first_line(error)}") from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences the exporter's log and its warnings, which are about its internals and other packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _largest_difference(model: CLSP, path: Path) -> float:
    """Largest difference between embeddings of a graph and of the model; ValueError if it is too large."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    names, largest = _INPUTS[path.name], 0.0
    encode = model.encode_features if path.name == "audio.onnx" else model.encode_tokens
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for rows, length in _CHECKED_SIZES:
            inputs = _example_inputs(model, path.name, rows, length)
            arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            (embeddings,) = session.run(None, arrays)
            difference = float((torch.from_numpy(embeddings) - encode(*inputs)).abs().max())
            if not difference <= TOLERANCE:
                size = " x ".join(map(str, inputs[0].shape[:2]))
                raise ValueError(
                    f"{path.name} differs from the model by {difference:.1e}, more than {TOLERANCE}, with a "
                    f"batch of {size}"
                )
            largest = max(largest, difference)
    except ValueError:
        raise
    except Exception as error:  # onnxruntime's errors have no other common base
        raise ValueError(f"onnxruntime cannot run {path.name}: {_first_line(error)}") from error
    return largest


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _command(model: str = "runs/demo/model", /, *, out: Path = Path("onnx")) -> None:
    """Write a model as ONNX.

    Args:
        model: folder, or name of a repository on the Hugging Face hub.
        out: folder to write.
    """
    with files.naming_full_disk(out):
        differences = export(CLSP.from_pretrained(model, dtype=torch.float32), out)
    for name, difference in differences.items():
        print(f"{out / name}: within {difference:.1e} of the model")


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    try:
        tyro.cli(_command, args=arguments, prog="python -m clsp_fast.export", description=__doc__)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"clsp_fast.export: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
