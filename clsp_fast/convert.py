"""Converts checkpoints of the reference recipe (icefall, CLSP) to models of this library.

python -m clsp_fast.convert reference --checkpoint epoch-1.pt --out model/ [--config c.json] [--tokenizer dir]
python -m clsp_fast.convert reference --speech spear.pt --text roberta-base/ --out model/
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clsp_fast import console
from clsp_fast.checks import listed, listed_groups
from clsp_fast.config import ModelConfig, TextConfig
from clsp_fast.model import CLSP
from clsp_fast.storage import files, textfile
from clsp_fast.tokenizer import Tokenizer

SPEECH = ("encoder_embed.", "encoder.")
"""Prefixes of the tensor names of the speech tower."""
TEXT = ("text_encoder.",)
"""Prefix of the tensor names of the text tower."""
IGNORED_KEYS = ("text_encoder.embeddings.position_ids", "text_encoder.embeddings.token_type_ids")
"""Buffers in old Hugging Face checkpoints that no forward pass needs."""

# File names of a checkpoint in a folder. The first file that exists is read.
_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin", "pretrained.pt")
_WRAPPERS = ("model", "state_dict")
# What DDP, torch.compile, FSDP and activation checkpointing insert into tensor names, in any order and
# number. They can wrap the whole model or parts of it. No module of a model has one of these names.
_WRAPPING = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class KeyReport(NamedTuple):
    """Keys of a checkpoint, compared with those of a model. `missing`: only the model has them. `extra`: only
    the checkpoint has them. `ignored`: only the checkpoint has them, and they are not needed."""

    matched: list[str]
    missing: list[str]
    extra: list[str]
    ignored: list[str]

    def __str__(self) -> str:
        """The size of each group, and the first names of each except `matched`."""
        lines = [", ".join(f"{len(names)} {group}" for group, names in self._asdict().items())]
        for group, names in self._asdict().items():
            if group != "matched" and names:
                lines.append(f"  {group}: {listed(names)}")
        return "\n".join(lines)


def reference_config(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from the reference's keys.

    Per-stack values may be lists, integers or strings such as "1,2,4", as in the recipe's options. The text
    tower is described by "roberta" (a Hugging Face configuration) or "text". Keys of the recipe that do not
    describe the model are ignored.

    Raises:
        ValueError: there are keys, but none is known; the text tower has another activation than GELU; or a
        value has a wrong type or is out of range.
    """
    names = [field.name for field in fields(ModelConfig)]
    _require_known(values, [*names, "roberta", "text_encoder_dim"], "the configuration")
    try:
        return _reference_config(values)
    except TypeError as error:
        raise ValueError(f"the configuration has a value of another type than expected: {error}") from error


def _require_known(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """ValueError if there are keys, but none describes a model. Then it is probably the wrong file."""
    if values and not set(values) & set(known):
        got, expected = listed(sorted(map(str, values))), listed(known)
        raise ValueError(f"{what} must have keys of the model ({expected}), got only others ({got})")


def _reference_config(values: Mapping[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    plain = {key: value for key, value in values.items() if key in known and key != "text"}
    for field in fields(ModelConfig):
        if field.name in plain and isinstance(field.default, tuple):
            plain[field.name] = _to_tuple(plain[field.name])
    text = values.get("roberta", values.get("text", {}))
    if not isinstance(text, Mapping):
        raise ValueError(f'"roberta" must be an object, got {type(text).__name__}')
    names = [field.name for field in fields(TextConfig)]
    _require_known(text, [*names, "hidden_act"], '"roberta"')
    if text.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f'roberta.hidden_act must be "gelu", got {text["hidden_act"]!r}')
    text_config = TextConfig(**{key: value for key, value in text.items() if key in names})
    if values.get("text_encoder_dim", text_config.hidden_size) != text_config.hidden_size:
        expected = f"roberta.hidden_size {text_config.hidden_size}"
        raise ValueError(f"text_encoder_dim must be {expected}, got {values['text_encoder_dim']}")
    return ModelConfig(**plain, text=text_config)


def _to_tuple(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.split(",")
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def unwrap(checkpoint: Mapping[str, Any], *, averaged: bool = False) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, from its "model" or "state_dict" entry if there is one.

    What DDP ("module."), torch.compile ("_orig_mod."), FSDP and a wrapping class ("model.") add to the names
    is removed, in any order and number.

    Args:
        checkpoint: as from `read_checkpoint`.
        averaged: take the running average "model_avg" that icefall saves with the weights, as float32.

    Raises:
        ValueError: it has values that are not tensors, two tensors of the same name, or no average.
    """
    if averaged and "model_avg" not in checkpoint:
        raise ValueError('checkpoint must have "model_avg" for averaged weights, it has none')
    key = "model_avg" if averaged else next((name for name in _WRAPPERS if name in checkpoint), None)
    inner = checkpoint if key is None else checkpoint[key]
    if not isinstance(inner, Mapping):
        raise ValueError(f'checkpoint["{key}"] must be a dictionary of tensors, got {type(inner).__name__}')
    others = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"state_dict must hold only tensors, got other values under {listed(others)}")
    bare = {str(key): _without_wrapping(str(key)) for key in inner}
    while bare and all(name.startswith("model.") for name in bare.values()):
        bare = {key: name.removeprefix("model.") for key, name in bare.items()}
    twice = [name for name, count in Counter(bare.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"checkpoint must name each tensor once, but without wrappers names are equal: {listed(twice)}"
        )
    tensors = {bare[str(key)]: value for key, value in inner.items()}
    if averaged:  # icefall saves the average in float64
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


def _without_wrapping(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPING)


def average_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the tensors of several checkpoints. Integer tensors are taken from the last one.

    Raises:
        ValueError: a checkpoint has other names or shapes than the first.
    """
    first = states[0]
    for number, state in enumerate(states[1:], 2):
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in first.items()}:
            raise ValueError(f"checkpoint {number} has other names or shapes than the first")
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else states[-1][name]
        for name, tensor in first.items()
    }


def match_keys(state_dict: Mapping[str, Any], model: CLSP) -> KeyReport:
    """Compares the tensor names of a reference checkpoint with those of a model."""
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
        state_dict: tensors under the reference's names; wrappers are removed as by `unwrap`.
        config: ModelConfig, or the reference's keys (see `reference_config`).
        tokenizer: the tokenizer of the text tower, for `encode_text`.

    Returns:
        The model in evaluation mode. `model.state_dict()` has exactly the reference's keys, also those of
        tensors that no forward pass uses.

    Raises:
        ValueError: tensors are missing, unknown, or of a wrong shape or dtype; the message lists them.
    """
    config = config if isinstance(config, ModelConfig) else reference_config(config)
    with torch.device("meta"):
        model = CLSP(config, tokenizer)
    report = match_keys(state_dict, model)
    tensors = unwrap(state_dict)
    wrong = _mismatches(model.state_dict(), tensors, report.matched)
    _require_fit("state_dict", {"missing": report.missing, "unknown": report.extra, "": wrong})
    model.load_state_dict({name: tensors[name].clone() for name in report.matched}, strict=True, assign=True)
    return model.eval()


def _require_fit(what: str, problems: Mapping[str, Sequence[str]]) -> None:
    """ValueError that lists the problems, if there are any."""
    count = sum(map(len, problems.values()))
    if count:
        raise ValueError(f"{what} does not fit the configuration ({count:,}): {listed_groups(problems)}")


def _mismatches(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], names: Sequence[str]
) -> list[str]:
    """Tensors of these names with a wrong shape or dtype. Quantised tensors, for example, have integers."""
    problems = []
    for name in names:
        want, got = expected[name], tensors[name]
        if want.shape != got.shape:
            problems.append(f"shape of {name}: expected {tuple(want.shape)}, got {tuple(got.shape)}")
        elif not got.is_floating_point():
            problems.append(f"dtype of {name}: expected floating point, got {got.dtype}")
    return problems


def load_tower(model: CLSP, state_dict: Mapping[str, Any], tower: tuple[str, ...]) -> KeyReport:
    """Initialises one tower from a checkpoint of that tower alone, in place.

    The names may share any prefix, such as "roberta." or "text_encoder.". The pooler of a text tower may be
    missing, as in masked language models; then the model's pooler is not changed.

    Args:
        model: a model with this tower.
        state_dict: tensors of SPEAR or of RoBERTa, wrapped or not.
        tower: `SPEECH` or `TEXT`.

    Returns:
        The compared keys. `ignored` are the keys of other parts of the checkpoint.

    Raises:
        ValueError: the checkpoint does not have the tower, or its tower does not fit or has more tensors,
        such as further layers; the message lists names.
    """
    strip = "text_encoder." if tower == TEXT else ""
    expected = {
        name.removeprefix(strip): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(tower)
    }
    anchor = "embeddings.word_embeddings.weight" if tower == TEXT else "encoder_embed.out.weight"
    tensors = unwrap(state_dict)
    prefix = next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), None)
    if prefix is None:
        raise ValueError(f"checkpoint must have the tower: no name of a tensor ends with {anchor}")
    bare = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    matched, missing = sorted(expected.keys() & bare.keys()), sorted(expected.keys() - bare.keys())
    buffers = {key.removeprefix(strip) for key in IGNORED_KEYS}
    parts = tuple({name.partition(".")[0] + "." for name in expected})
    extra = sorted(name for name in bare.keys() - expected.keys() - buffers if name.startswith(parts))
    needed = [name for name in missing if not name.startswith("pooler.")]
    wrong = _mismatches(expected, bare, matched)
    _require_fit("the tower", {"missing": needed, "unknown": extra, "": wrong})
    with torch.no_grad():
        for name in matched:  # the tensors share memory with the parameters
            expected[name].copy_(bare[name])
    ignored = sorted(name for name in tensors if name.removeprefix(prefix) not in expected)
    return KeyReport(matched, missing, extra, ignored)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a .safetensors or .pt file, or a folder with such a file or with shards and their index. Pickles
    are read with weights_only=True, so that no code in them runs."""
    if path.is_dir():
        path = _file_in(path)
    files.refuse_pointer(path)
    if path.suffixes[-2:] == [".index", ".json"]:
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    # icefall saves all its options with the weights, and some of them are paths.
    with torch.serialization.safe_globals([pathlib.PosixPath, pathlib.WindowsPath]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # the errors of damaged and hostile files have no common base
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{path} is not a checkpoint of tensors alone: {reason[0]:.200}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    files.refuse_pointer(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error


def _file_in(folder: Path) -> Path:
    """The checkpoint in a folder."""
    known = [folder / name for name in _FILES if (folder / name).is_file()]
    others = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
    if not known and len(others) != 1:
        names = ", ".join(path.name for path in others) or "none"
        raise ValueError(f"{folder} must hold one checkpoint, got {names}; name the file")
    return (known or others)[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of all shards that an index names."""
    try:
        names = {str(name) for name in _read_object(index)["weight_map"].values()}
    except (KeyError, AttributeError) as error:
        raise ValueError(f'{index} must have a "weight_map" from tensors to files') from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        tensors |= _read_safetensors(index.parent / name)
    return tensors


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    files.refuse_pointer(file)
    text = textfile.read_text(file, "a JSON object")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def reference(
    out: Path,
    checkpoint: tuple[Path, ...] = (),
    speech: Path | None = None,
    text: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    averaged: bool = False,
) -> None:
    """Convert a checkpoint of the reference recipe, or of SPEAR and RoBERTa, to a model folder.

    Args:
        out: folder to write.
        checkpoint: .pt or .safetensors file, or a folder with one. Several checkpoints are averaged.
        speech: checkpoint that the speech tower starts from (SPEAR), instead of `checkpoint`.
        text: checkpoint that the text tower starts from (RoBERTa), instead of `checkpoint`.
        config: JSON file with the reference's keys; without it, config.json in the checkpoint's folder, or
            else the paper's model.
        tokenizer: tokenizer.json, or a folder with it or with vocab.json and merges.txt; without it, the
            tokenizer in the folder of the checkpoint or text tower, if there is one.
        averaged: take the running average in checkpoints ("model_avg") instead of the last weights.
    """
    towers = {tower: path for tower, path in ((SPEECH, speech), (TEXT, text)) if path is not None}
    if bool(checkpoint) == bool(towers):
        raise ValueError("give either --checkpoint, or --speech or --text or both")
    folder = text if towers else checkpoint[0] if checkpoint[0].is_dir() else checkpoint[0].parent
    tokens = _tokenizer(tokenizer, folder)
    architecture = _configuration(config, folder if checkpoint else None, text)
    if checkpoint:
        states = [unwrap(read_checkpoint(path), averaged=averaged) for path in checkpoint]
        state = states[0] if len(states) == 1 else average_states(states)
        model = from_reference(state, architecture, tokenizer=tokens)
        print(match_keys(state, model))
    else:
        model = CLSP(architecture, tokens)
        for tower, path in towers.items():
            print(f"{path}: {load_tower(model, read_checkpoint(path), tower)}")
        model.eval()
    model.save_pretrained(out)
    print(f"{out}: written")


def _configuration(config: Path | None, folder: Path | None, text: Path | None) -> ModelConfig:
    """The configuration in `config`, or else in config.json beside the checkpoints, or else the paper's."""
    beside = [path / "config.json" for path in (folder, text) if path is not None]
    file = config or next((path for path in beside if path.is_file()), None)
    if file is None:
        return reference_config({})
    values = _read_object(file)
    try:
        if not values:
            raise ValueError("it must have keys of the model, but it is empty")
        is_roberta = config is None and folder is None
        return reference_config({"roberta": values} if is_roberta else values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _tokenizer(path: Path | None, folder: Path | None) -> Tokenizer | None:
    """The tokenizer at `path`; without it, in the folder; None if there is none."""
    if path is None and folder is not None and folder.is_dir():
        complete = [{"tokenizer.json"}, {"vocab.json", "merges.txt"}]
        names = {file.name for file in folder.iterdir()}
        path = folder if any(required <= names for required in complete) else None
    return None if path is None else Tokenizer.from_file(path)


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    app = tyro.extras.SubcommandApp()
    app.command(reference)
    try:
        app.cli(args=arguments, prog="python -m clsp_fast.convert")
    except (OSError, ValueError) as error:
        sys.exit(f"clsp_fast.convert: {error}")


if __name__ == "__main__":
    main()
