"""A model's folder: config.json, model.safetensors, README.md and tokenizer.json.

Each file is written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clsp_fast.checks import listed_groups
from clsp_fast.config import ModelConfig
from clsp_fast.storage import files, textfile

FORMAT = "clsp_fast"
FORMAT_VERSION = 1

_CARD = """---
library_name: clsp_fast
tags: [speech, text, contrastive-learning, speaking-style, retrieval]
---

# A CLSP model

Dual encoder of speech and of free-text descriptions of how something is said (contrastive language-speech
pre-training, arXiv 2601.03065), written by `clsp_fast`. {parameters:,} parameters; embeddings have
{joint_dim} dimensions and unit norm.

```python
from clsp_fast import CLSP

model = CLSP.from_pretrained("this folder")
audio = model.encode_audio(["clip.wav"])
text = model.encode_text(["A calm, low-pitched male voice."])
print(model.logit_scale * audio @ text.T)
print(model.classify(["clip.wav"], ["calm", "excited"]))
```

Input: mono speech, resampled to 16 kHz, {feature_dim} log-mel bins at 100 Hz. Please add the data that
this model was trained on, its results, and its licence.
"""


def local_folder(source: str | os.PathLike[str]) -> Path:
    """Returns `source` if it is a folder, else a local copy of the Hugging Face hub repository of that name.

    Raises:
        FileNotFoundError: neither exists; the message says what to do.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        fix = "to fetch a model of that name from the Hugging Face hub, pip install 'clsp_fast[hub]'"
        raise FileNotFoundError(f"{source}: no such folder; {fix}") from error
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # the hub's errors have no common base: not found, gated, offline, HTTP
        raise FileNotFoundError(f"{source}: no such folder, and the hub answers: {error}") from error


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json. A FileNotFoundError or ValueError names the file."""
    file = _existing(folder / "config.json")
    files.refuse_pointer(file)
    text = textfile.read_text(file, "a model's configuration")
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            hint = "; a run keeps its model in its subfolder model" if (folder / "model").is_dir() else ""
            raise ValueError(f'expected "format": "{FORMAT}"{hint}')
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version must be {FORMAT_VERSION}, got {content.get('format_version')!r}"
            )
        return ModelConfig.from_dict(content["model"])
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply") from None
    except (ValueError, TypeError, KeyError) as error:  # JSON's errors are ValueErrors
        raise ValueError(f"{file}: {error}") from error


def read_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the weights of a folder to the CPU. Names and shapes must be exactly those of `expected`."""
    file = _existing(folder / "model.safetensors")
    files.refuse_pointer(file)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    check_tensors(tensors, expected, f"{file} does not fit config.json")
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError if names or shapes are not those of `expected`. The message begins with `what`."""
    wrong = []
    for name in sorted(expected.keys() & tensors.keys()):
        want, got = expected[name], tensors[name]
        if want.shape != got.shape or not got.is_floating_point():
            wrong.append(f"{name} must have shape {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}")
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [name for name in tensors if name not in expected],
        "": wrong,
    }
    if any(problems.values()):
        raise ValueError(f"{what}: {listed_groups(problems)}")


def write_model(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], tokenizer: str | None
) -> None:
    """Writes the folder. Each file replaces the old one atomically; the weights are written last.

    Args:
        tokenizer: content of tokenizer.json; None: the model has no tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.to_dict()}
    parameters = sum(tensor.numel() for tensor in state.values())
    card = _CARD.format(parameters=parameters, joint_dim=config.joint_dim, feature_dim=config.feature_dim)
    tensors = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    texts = {"config.json": json.dumps(content, indent=2) + "\n", "README.md": card}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer
    for name, text in texts.items():
        files.write_text(folder / name, text)
    files.replace_file(
        folder / "model.safetensors",
        lambda file: save_file(tensors, file, metadata={"format": "pt"}),
        size=sum(tensor.nbytes for tensor in tensors.values()),
    )


def fingerprint(
    config: ModelConfig, state: Mapping[str, Tensor], tokenizer: str | None, *, tf32: bool = False
) -> str:
    """SHA-256 of the architecture, of every tensor with its dtype, of tokenizer.json, if there is one, and of
    the word "tf32", if products use TF32."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    digest.update((tokenizer or "").encode())
    digest.update(b"tf32" if tf32 else b"")
    return digest.hexdigest()


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a model's folder has config.json and model.safetensors"
        )
    return file
