"""Training: `python -m clsp_fast.train [PRESET | CONFIG.json] [--flags]`; under torchrun, on several
processes.

Without arguments it makes a demo corpus and trains the tiny preset on it. To resume a run, give the same
command again.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clsp_fast import console, precision
from clsp_fast.checks import differences, listed
from clsp_fast.config import TrainConfig
from clsp_fast.data import DataError, Loader
from clsp_fast.evaluation import figures, report, voices
from clsp_fast.model import CLSP
from clsp_fast.storage import files
from clsp_fast.storage.log import RunLog
from clsp_fast.storage.ranks import Ranks
from clsp_fast.training import checkpoint, optim
from clsp_fast.training.corpus import HUMAN_SET, Corpus
from clsp_fast.training.curves import draw_curves
from clsp_fast.training.parse import parse
from clsp_fast.training.run import Interrupted, Run, fit, load_checkpoint, restore_data


@precision.as_configured
def train(config: TrainConfig) -> dict[str, Any]:
    """Trains the model that `config` describes. If the run folder already holds a run, resumes it; a finished
    run is only evaluated.

    Returns:
        The results of the finished run, as in results.json: for each set of clips its figures, as
        `evaluation.figures.evaluate_clips` returns them. Only the first rank has them; the others return {}.

    Raises:
        DataError: the data cannot be trained on. ValueError: the run folder holds another model, or a file
        does not fit its flag. FloatingPointError: too many steps in a row were not finite. Interrupted: a
        signal came; the state was saved. files.FolderInUse: another process uses the run folder.
    """
    with (
        files.naming_full_disk(config.run),
        Ranks.join(config.device) as ranks,
        ranks.exclusive(config.run),
        open_run(config, ranks) as run,
    ):
        fit(run)
        with optim.averaged(run.optimizer):
            return finish(run) if ranks.first else {}


@contextlib.contextmanager
def open_run(config: TrainConfig, ranks: Ranks) -> Iterator[Run]:
    """Starts a run, or resumes the one in the run folder from its newest checkpoint."""
    corpus = ranks.first_then_all(lambda: Corpus.open(config))
    if ranks.first:
        claim_folder(config)
    model = build_model(config, corpus).to(ranks.device)
    optimizer = optim.build(model, config.optim)
    first_step, state = load_checkpoint(config, model, optimizer)
    if len(set(ranks.gather(first_step))) > 1:
        raise ValueError(
            f"the ranks see different checkpoints: --run-dir {config.run} must be a shared folder"
        )
    log = RunLog(config.run, first_step=first_step, tensorboard=config.tensorboard, active=ranks.first)
    with log:
        log.say(describe_run(config, corpus, model, ranks, first_step))
        loader = Loader(
            corpus.train,
            corpus.encode,
            config.data,
            seed=config.seed,
            stage1_steps=config.stage1_steps,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
        )
        run = Run(config, corpus, model, optimizer, ranks, log, loader, first_step)
        restore_data(run, state)
        log.record("start", first_step, left_out=dict(loader.left_out))
        log.say(f"{len(loader.clips)} clips; left out: {dict(loader.left_out) or 'none'}")
        yield run


def claim_folder(config: TrainConfig) -> None:
    """Writes the run's config.json. ValueError if the folder holds a run with another model, seed or init."""
    path = config.run / "config.json"
    if path.exists() and checkpoint.exists(config.run / "checkpoints"):
        before = TrainConfig.from_dict(json.loads(path.read_text()))
        for name in ("model", "seed", "init"):
            if getattr(before, name) != getattr(config, name):
                raise ValueError(
                    f"{config.run} holds a run with another {name}; choose another --run-dir, or delete it"
                )
        if before != config:
            text = listed(differences(config, before), separator="; ")
            warnings.warn(
                f"the configuration of {config.run} has changed since it was started: {text}", stacklevel=2
            )
    files.write_json(path, config.to_dict())


def build_model(config: TrainConfig, corpus: Corpus) -> CLSP:
    """A new model that is initialised from the seed, or the saved model that `config.init` names."""
    if config.init is None:
        torch.manual_seed(config.seed)
        return CLSP(config.model, tokenizer=corpus.tokenizer)
    model = CLSP.from_pretrained(config.init)
    if model.config != config.model:
        lines = [f"model.{line}" for line in differences(config.model, model.config)]
        text = listed(lines, separator="; ")
        raise ValueError(
            f"the settings differ from the model in --init {config.init}: {text}; leave these out"
        )
    model.tokenizer = corpus.tokenizer
    return model


def describe_run(config: TrainConfig, corpus: Corpus, model: CLSP, ranks: Ranks, first_step: int) -> str:
    """Data, model, steps and processes, in the lines that a run prints first."""
    parts = Counter[str]()
    for name, parameter in model.named_parameters():
        parts[optim.part_of(name)] += parameter.numel()
    sizes = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    resumed = f", resumed after step {first_step}" if first_step else ""
    return (
        f"{corpus.describe()}\n"
        f"model: {sum(parts.values()):,} parameters ({sizes})\n"
        f"run: {config.run}, {config.stage1_steps} + {config.stage2_steps} steps on "
        f"{ranks.describe()}{resumed}"
    )


def finish(run: Run) -> dict[str, Any]:
    """Evaluates the final model and leaves results.json, curves.png and model/ in the run folder."""
    folder, corpus, log = run.config.run, run.corpus, run.log
    results: dict[str, Any] = {}
    run.model.save_pretrained(folder / "model")
    features = figures.features_for(run.config.data)
    for name, clips in corpus.final_sets.items():
        results[name] = figures.evaluate_clips(run.model, clips, features, corpus.tasks)
        if name == HUMAN_SET:
            results[name] |= voices.evaluate_voices(run.model, clips, features, corpus.tasks)
        log.say("\n" + report.table_with_bounds(results[name], name) + "\n")
        if name == HUMAN_SET:
            log.say(voices.table(results[name]["voices"]) + "\n")
    files.write_json(folder / "results.json", results)
    log.say(draw_curves(folder))
    log.say(f"model: {folder / 'model'}  (clsp_fast.CLSP.from_pretrained reads it)")
    if corpus.is_demo:
        log.say(
            "The demo corpus is synthetic speech. These figures show that the software works. They do not"
        )
        log.say("show how good the paper's model is.")
    return results


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    config = parse(sys.argv[1:] if arguments is None else arguments, description=__doc__)
    try:
        train(config)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        sys.exit(130)
    except Interrupted as stop:
        print(f"clsp_fast.train: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (DataError, ValueError, OSError, FloatingPointError, ImportError, files.FolderInUse) as error:
        sys.exit(f"clsp_fast.train: {error}")


if __name__ == "__main__":
    main()
