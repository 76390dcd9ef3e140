"""The command line of training: a preset or a recipe file, --init, and flags that change single values."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from clsp_fast.config import TRAIN_PRESETS, TrainConfig
from clsp_fast.storage import model_folder, textfile


def parse(arguments: Sequence[str], *, description: str | None = None) -> TrainConfig:
    """Reads a configuration from a command line.

    The first word names a preset (default: tiny) or a recipe file: a JSON file, such as a run's config.json.
    Flags follow it. With --init, the saved model's configuration replaces the model section of the preset.

    Args:
        arguments: the words after `python -m clsp_fast.train`.
        description: what --help prints below the usage.

    Raises:
        SystemExit: an unknown preset, flag or key, with the nearest known name; a value out of range; --help.
    """
    # torchrun refuses --run, because two of its own options begin with it. So the option is called --run-dir.
    # Without torchrun, --run is accepted too.
    words = [re.sub(r"^--run(?=$|=)", "--run-dir", word) for word in arguments]
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    if name.endswith(".json"):
        default, has_model_section = _read_recipe(name)
    else:
        default, has_model_section = _preset(name), False
    init: str | Path | None = _init_flag(words)
    if init is None and not has_model_section:
        init = default.init
    if init is not None and init != "None":  # on a command line, "None" means no saved model
        default = _with_saved_model(default, init)
    return _apply_flags(default, words, description)


def _preset(name: str) -> TrainConfig:
    if name not in TRAIN_PRESETS:
        near = difflib.get_close_matches(name, TRAIN_PRESETS, n=1, cutoff=0.0)[0]
        sys.exit(f"clsp_fast.train: no preset {name!r}; did you mean {near!r}? ({', '.join(TRAIN_PRESETS)})")
    return TRAIN_PRESETS[name]


def _read_recipe(name: str) -> tuple[TrainConfig, bool]:
    """The configuration of a JSON file, and whether the file has a model section."""
    try:
        text = textfile.read_text(Path(name), "a configuration")
    except (OSError, ValueError) as error:  # its message names the file
        sys.exit(f"clsp_fast.train: {error}")
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        return TrainConfig.from_dict(values), "model" in values
    except (ValueError, TypeError, RecursionError) as error:
        sys.exit(f"clsp_fast.train: {name}: {error}")


def _init_flag(words: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--init")
    init: str | None = parser.parse_known_args(words)[0].init
    return init


def _with_saved_model(config: TrainConfig, init: str | Path) -> TrainConfig:
    """The configuration with the model section of the saved model `init`."""
    try:
        return dataclasses.replace(config, model=model_folder.read_config(model_folder.local_folder(init)))
    except (OSError, ValueError) as error:
        sys.exit(f"clsp_fast.train: --init: {error}")


def _apply_flags(default: TrainConfig, words: list[str], description: str | None) -> TrainConfig:
    """Replaces the values for which there are flags."""
    import tyro

    # The field `run` has the flag --run-dir. The flag is named in this subclass and not in config.py, because
    # config.py would then have to import tyro, which would slow down every import of the package.
    run_dir = Annotated[Path, tyro.conf.arg(name="run-dir")]
    flags = dataclasses.make_dataclass(
        "TrainConfig", [("run", run_dir)], bases=(TrainConfig,), frozen=True, kw_only=True
    )
    try:
        parsed = tyro.cli(
            flags,
            default=flags(**_values(default)),
            args=words,
            prog="python -m clsp_fast.train",
            description=description,
        )
    except SystemExit as stop:
        presets = [word for word in words if word in TRAIN_PRESETS]
        if stop.code and presets:
            print(f"A preset comes first: python -m clsp_fast.train {presets[0]} --flags", file=sys.stderr)
        raise
    return TrainConfig(**_values(parsed))


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
