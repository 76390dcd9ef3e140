"""Checkpoints of the reference recipe (icefall, CLSP) -> models of this library.

python -m clsp_fast.convert reference --checkpoint epoch-1.pt --out model/ [--config c.json] [--tokenizer dir]
"""

from __future__ import annotations

import json
import pathlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from clsp_fast.config import ModelConfig, TextConfig
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

IGNORED_KEYS = ("text_encoder.embeddings.position_ids", "text_encoder.embeddings.token_type_ids")
"""Buffers that old Hugging Face checkpoints carry and no forward pass needs."""


class KeyReport(NamedTuple):
    """What became of the keys of a checkpoint; the checkpoint lacks `missing`."""

    matched: list[str]
    missing: list[str]
    extra: list[str]
    ignored: list[str]


def reference_config(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from the reference's keys.

    Per-stack values may be lists, integers or strings such as "1,2,4", as the recipe's options are. The text
    tower is described by "roberta" (a Hugging Face configuration) or "text". Keys of the recipe that do not
    describe the model are ignored.

    Raises:
        ValueError: a text tower with another activation than GELU, or a value out of range.
    """
    known = {field.name for field in fields(ModelConfig)}
    plain = {key: value for key, value in values.items() if key in known and key != "text"}
    for field in fields(ModelConfig):
        if field.name in plain and isinstance(field.default, tuple):
            plain[field.name] = _to_tuple(plain[field.name])
    text = dict(values.get("roberta", values.get("text", {})))
    if text.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f'roberta.hidden_act must be "gelu", got {text["hidden_act"]!r}')
    names = {field.name for field in fields(TextConfig)}
    text_config = TextConfig(**{key: value for key, value in text.items() if key in names})
    if values.get("text_encoder_dim", text_config.hidden_size) != text_config.hidden_size:
        expected = f"roberta.hidden_size {text_config.hidden_size}"
        raise ValueError(f"text_encoder_dim must be {expected}, got {values['text_encoder_dim']}")
    return ModelConfig(**plain, text=text_config)


def _to_tuple(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.split(",")
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint: its "model" entry if there is one, without DDP's "module."
    prefixes."""
    inner = checkpoint.get("model", checkpoint)
    if not isinstance(inner, Mapping):
        raise ValueError(f'checkpoint["model"] must be a dictionary of tensors, got {type(inner).__name__}')
    other = [key for key, value in inner.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"state_dict must hold tensors alone, got others under {other[:3]}")
    return {str(key).removeprefix("module."): value for key, value in inner.items()}


def match_keys(state_dict: Mapping[str, Any], model: CLSP) -> KeyReport:
    """Compare the names of a reference checkpoint with those of a model."""
    names, wanted = set(unwrap(state_dict)), set(model.state_dict())
    ignored = names & set(IGNORED_KEYS)
    groups = (names & wanted, wanted - names, names - wanted - ignored, ignored)
    return KeyReport(*(sorted(group) for group in groups))


def from_reference(
    state_dict: Mapping[str, Any],
    config: ModelConfig | Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
) -> CLSP:
    """A model with the weights of a reference checkpoint.

    Args:
        state_dict: the reference's names; {"model": ...} wrappers and "module." prefixes are removed.
        config: ModelConfig, or the reference's keys (see `reference_config`).
        tokenizer: the tokenizer of the text tower, for `encode_text`.

    Returns:
        The model in evaluation mode; `model.state_dict()` has exactly the reference's keys, also
        those of tensors that no forward pass uses.

    Raises:
        ValueError: missing, unknown or misshapen tensors; the message lists them.
    """
    config = config if isinstance(config, ModelConfig) else reference_config(config)
    with torch.device("meta"):
        model = CLSP(config, tokenizer)
    report = match_keys(state_dict, model)
    tensors = unwrap(state_dict)
    problems = [f"missing: {name}" for name in report.missing] + [f"unknown: {name}" for name in report.extra]
    for name in report.matched:
        want, got = tuple(model.state_dict()[name].shape), tuple(tensors[name].shape)
        if want != got:
            problems.append(f"shape of {name}: expected {want}, got {got}")
    if problems:
        raise ValueError(
            f"state_dict does not fit the configuration ({len(problems)}): " + "; ".join(problems)
        )
    model.load_state_dict({name: tensors[name].clone() for name in report.matched}, strict=True, assign=True)
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors of a .safetensors or .pt file; the latter with weights_only=True: no code in it runs."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    # icefall stores its whole parameter set beside the weights, paths included.
    with torch.serialization.safe_globals([pathlib.PosixPath, pathlib.WindowsPath]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return dict(content)


def reference(checkpoint: Path, out: Path, config: Path | None = None, tokenizer: Path | None = None) -> None:
    """Convert a checkpoint of the reference recipe to a model folder.

    Args:
        checkpoint: .pt or .safetensors file.
        out: folder to write.
        config: JSON file with the reference's keys; without it, the paper's model.
        tokenizer: tokenizer.json, or a folder with it or with vocab.json and merges.txt.
    """
    values = json.loads(config.read_text(encoding="utf-8")) if config else {}
    state = read_checkpoint(checkpoint)
    words = None if tokenizer is None else Tokenizer.from_file(tokenizer)
    model = from_reference(state, values, tokenizer=words)
    report = match_keys(state, model)
    model.save_pretrained(out)
    print(f"{out}: {len(report.matched)} tensors, {len(report.ignored)} ignored")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    app = tyro.extras.SubcommandApp()
    app.command(reference)
    try:
        app.cli(args=arguments, prog="python -m clsp_fast.convert")
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"clsp_fast.convert: {error}")


if __name__ == "__main__":
    main()
