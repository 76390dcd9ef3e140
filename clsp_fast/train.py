"""Training: `python -m clsp_fast.train [PRESET | CONFIG.json] [--flags]`; under torchrun, on several
processes.

Without arguments it makes a demo corpus and trains the tiny preset on it. Running the same command again
resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch

from clsp_fast import console, contention, similarity
from clsp_fast.checks import differences, listed
from clsp_fast.config import TRAIN_PRESETS, TrainConfig
from clsp_fast.data import Batch, ClipFeatures, DataError, Loader, bad_list
from clsp_fast.data.manifest import Clip
from clsp_fast.evaluation import figures
from clsp_fast.model import CLSP, ClspOutput
from clsp_fast.storage import files, model_folder, textfile
from clsp_fast.storage.log import RunLog, save_report
from clsp_fast.storage.ranks import Ranks
from clsp_fast.training import checkpoint, optim
from clsp_fast.training.corpus import Corpus
from clsp_fast.training.step import absorb_statistics, clip_gradients, forward


class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint has been written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command resumes")
        self.exit_code = 128 + number


@dataclass
class Meter:
    """Figures between two log lines."""

    seconds: float = 0.0
    clips: int = 0
    waited_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch, loss: float, norm: float, waited_s: float) -> None:
        self.seconds += batch.seconds
        self.clips += len(batch.ids)
        self.waited_s += waited_s
        self.losses.append(loss)
        self.norms.append(norm)

    def figures(self, world: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        return {
            "loss": sum(self.losses) / max(1, len(self.losses)),
            "gradient_norm": sum(self.norms) / max(1, len(self.norms)),
            "step_s": elapsed / max(1, len(self.losses)),
            "audio_s_per_s": world * self.seconds / elapsed,
            "clips_per_s": world * self.clips / elapsed,
            "data_wait": self.waited_s / elapsed,
        }


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a model as `config` says, or resumes or reports the run that is in its folder.

    Returns:
        The results of the finished run, as in results.json: figures of `evaluation.evaluate` by set of clips.

    Raises:
        DataError: the data cannot be trained on. ValueError: the run folder holds another model, or a file is
        not what its flag says. FloatingPointError: too many steps in a row were not finite. Interrupted: a
        signal came; the state was saved. files.FolderInUse: another process has the run folder.
    """
    with files.room_for(config.run), Ranks.join(config.device) as ranks, ranks.exclusive(config.run):
        corpus = ranks.first_then_all(lambda: Corpus.open(config))
        if ranks.first:
            claim(config)
        model = build_model(config, corpus).to(ranks.device)
        optimizer = optim.build(model, config.optim)
        first_step, state = resume(config, model, optimizer)
        if len(set(ranks.gather(first_step))) > 1:
            raise ValueError(
                f"the ranks see different checkpoints: --run-dir {config.run} must be a shared folder"
            )
        log = RunLog(config.run, first_step=first_step, tensorboard=config.tensorboard, active=ranks.first)
        with log:
            log.say(opening(config, corpus, model, ranks, first_step))
            fit(config, corpus, model, optimizer, ranks, log, first_step, state)
            with optim.averaged(optimizer):
                return finish(config, corpus, model, log) if ranks.first else {}


def fit(
    config: TrainConfig,
    corpus: Corpus,
    model: CLSP,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    log: RunLog,
    first_step: int,
    state: dict[str, Any],
) -> None:
    """The steps of both stages, from `first_step` on."""
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
    known = {clip.id for clip in loader.clips}
    bad: dict[str, str] = {clip: why for clip, why in state.get("bad", {}).items() if clip in known}
    loader.check_bad(bad)
    loader.bad.update(bad)
    if "loader" in state and loader.resume(first_step, state["loader"]):
        log.say(
            f"the batches are not those of the steps so far (ranks: {state['loader']['world']} then, "
            f"{ranks.world} now): a new epoch begins after step {first_step}"
        )
    log.record("start", first_step, left_out=dict(loader.left_out))
    log.say(f"{len(loader.clips)} clips; left out: {dict(loader.left_out) or 'none'}")
    total = config.stage1_steps + config.stage2_steps
    validation = figures.features_for(config.data)
    meter, bad_steps = Meter(), 0
    with stop_signals() as stop:
        waiting = time.perf_counter()
        for batch in loader.batches(first_step, total):
            waited_s, step = time.perf_counter() - waiting, batch.step
            note_bad(bad, batch, loader, ranks)
            optim.set_learning_rate(optimizer, learning_rate(config, step, loader.plan.steps_per_epoch))
            torch.manual_seed(config.seed * 1_000_003 + step * ranks.world + ranks.rank)
            output, loss = forward(model, batch, ranks, config)
            torch.autograd.backward(loss)
            norm = clip_gradients(model, ranks, config.optim)
            finite = math.isfinite(loss.item()) and math.isfinite(norm)
            stopping, spoiled = ranks.any(bool(stop), not finite)
            if not spoiled:
                optimizer.step()
                with torch.no_grad():
                    model.log_logit_scale.clamp_(0.0, math.log(config.max_logit_scale))
                absorb_statistics(model, ranks)
                if config.optim.average_steps:
                    optim.update_average(optimizer, step + 1, config.optim.average_steps)
                meter.add(batch, loss.item(), norm, waited_s)
                bad_steps = 0
            else:
                bad_steps = count_bad_step(bad_steps, batch, loss.item(), norm, config, log, ranks)
            optimizer.zero_grad()
            contention.look()
            done, other_work = step + 1, time.perf_counter()
            if done % config.log_every == 0 or done == total:
                progress(log, meter, output, step, total, bad, optimizer, ranks)
                meter = Meter(started=other_work)
            if done % config.validate_every == 0 and done < total and ranks.first:
                with optim.averaged(optimizer):
                    validate(log, model, corpus.validation, validation, corpus.tasks, step)
            if ranks.first and (done % config.save_every == 0 or done == total or stopping):
                save(config, model, optimizer, done, {"bad": bad, "loader": loader.state()})
            if stopping:
                raise Interrupted(stop[0] if stop else signal.SIGTERM)
            waiting = time.perf_counter()
            meter.started += waiting - other_work


def note_bad(bad: dict[str, str], batch: Batch, loader: Loader, ranks: Ranks) -> None:
    """Adds what any rank could not read for this step to `bad`; DataError, on all ranks, if that is too much
    to go on."""
    found = {clip: reason for clip, reason in batch.bad.items() if clip not in bad}
    if not ranks.any(bool(found) or not batch.ids)[0]:
        return
    by_rank = ranks.gather((found, len(batch.ids)))
    for found, _ in by_rank:
        bad.update(found)
    loader.check_bad(bad)
    if not all(clips for _, clips in by_rank):
        raise DataError(f"step {batch.step}: not one readable clip was found; {bad_list(bad)}")


def count_bad_step(
    so_far: int, batch: Batch, loss: float, norm: float, config: TrainConfig, log: RunLog, ranks: Ranks
) -> int:
    """Records a step that was not applied; FloatingPointError when there were too many in a row."""
    by_rank = ranks.gather((batch.ids, loss))
    clips = [clip for ids, _ in by_rank for clip in ids]
    loss = sum(other for _, other in by_rank) / ranks.world
    log.record("bad_step", batch.step, loss=str(loss), norm=str(norm), clips=clips)
    log.say(f"step {batch.step}: loss {loss}, gradient norm {norm}: not applied; its clips are in log.jsonl")
    if so_far + 1 >= config.max_bad_steps:
        raise FloatingPointError(
            f"{so_far + 1} steps in a row had a non-finite loss or gradient (last: step {batch.step}, "
            f"clips {', '.join(clips[:8])} ...); lower --optim.lr or look at these clips"
        )
    return so_far + 1


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The speech tower's rate: each stage has its own peak, warm-up and decay."""
    own, steps, peak = config.optim, config.stage1_steps, config.optim.lr
    if step >= steps:
        step, steps, peak = step - steps, config.stage2_steps, own.stage2_lr
    return optim.learning_rate(step, steps, steps_per_epoch, peak, own)


def build_model(config: TrainConfig, corpus: Corpus) -> CLSP:
    """A new model from the seed, or the one of `config.init`."""
    if config.init is None:
        torch.manual_seed(config.seed)
        return CLSP(config.model, tokenizer=corpus.tokenizer)
    model = CLSP.from_pretrained(config.init)
    if model.config != config.model:
        lines = [f"model.{line}" for line in differences(config.model, model.config)]
        text = listed(lines, separator="; ")
        raise ValueError(f"the model in --init {config.init} is another: {text}; leave these out")
    model.tokenizer = corpus.tokenizer
    return model


def claim(config: TrainConfig) -> None:
    """Writes the run's config.json; ValueError if its folder holds a run with another model."""
    path = config.run / "config.json"
    if path.exists() and checkpoint.exists(config.run / "checkpoints"):
        before = TrainConfig.from_dict(json.loads(path.read_text()))
        for name in ("model", "seed", "init"):
            if getattr(before, name) != getattr(config, name):
                raise ValueError(
                    f"{config.run} holds a run with another {name}; give another --run-dir, or delete it"
                )
        if before != config:
            text = listed(differences(config, before), separator="; ")
            warnings.warn(
                f"the configuration of {config.run} has changed since it was started: {text}", stacklevel=2
            )
    files.write_json(path, config.to_dict())


def resume(config: TrainConfig, model: CLSP, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Takes up the newest checkpoint; returns the step to go on with and the state that `save` was given."""
    found = checkpoint.newest(config.run / "checkpoints")
    if found is None:
        return 0, {}
    where = f"the checkpoint of step {found.step} in {config.run} does not fit the model"
    model_folder.check_tensors(found.model, model.state_dict(), where)
    model.load_state_dict(found.model)
    averaged = config.optim.average_steps > 0
    tensors = {key: x for key, x in found.optim.items() if averaged or not key.endswith("/average")}
    optim.load_state_tensors(model, optimizer, tensors)
    return found.step, found.state


def save(
    config: TrainConfig, model: CLSP, optimizer: torch.optim.Optimizer, step: int, state: dict[str, Any]
) -> None:
    """Writes a checkpoint after `step` steps."""
    made = checkpoint.Checkpoint(step, model.state_dict(), optim.state_tensors(model, optimizer), state)
    checkpoint.save(config.run / "checkpoints", made, keep=config.keep_checkpoints)


def progress(
    log: RunLog,
    meter: Meter,
    output: ClspOutput,
    step: int,
    total: int,
    bad: dict[str, str],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> None:
    """One log record and one line, unless no step was applied since the last."""
    if not meter.losses:
        return
    figures = meter.figures(ranks.world)
    figures |= {
        "batch_R@1": batch_recall(output),
        "logit_scale": float(output.logit_scale.detach()),
        "lr": optimizer.param_groups[0]["lr"],
        "peak_memory_mib": ranks.peak_memory_mib(),
        "eta_s": (total - step - 1) * figures["step_s"],
    }
    skipped = Counter(bad.values())
    log.record("train", step, **figures, skipped=dict(skipped))
    rate = f"{figures['audio_s_per_s']:.0f} audio-s/s  {figures['clips_per_s']:.0f} clips/s"
    log.say(
        f"step {step + 1}/{total}  loss {figures['loss']:.3f}  R@1 {figures['batch_R@1']:.3f}  "
        f"scale {figures['logit_scale']:.1f}  lr {figures['lr']:.1e}  {rate}  "
        f"wait {figures['data_wait']:.1%}  {figures['peak_memory_mib']:.0f} MiB  "
        f"skipped {sum(skipped.values())}  eta {_clock(figures['eta_s'])}"
    )


def batch_recall(output: ClspOutput) -> float:
    """Share of clips whose own first caption is nearer than those of the batch's other clips."""
    own = len(output.audio)
    audio, text = (x.detach().float() for x in (output.audio, output.text[:own]))
    if not (bool(audio.isfinite().all()) and bool(text.isfinite().all())):
        return 0.0  # nothing is nearest
    _, best = similarity.topk(audio, text, 1)
    return float((best[:, 0] == torch.arange(own, device=best.device)).float().mean())


def validate(
    log: RunLog,
    model: CLSP,
    clips: Sequence[Clip],
    features: ClipFeatures,
    tasks: figures.Tasks,
    step: int,
) -> None:
    """Logs and prints the figures of the validation clips."""
    if not clips:
        return
    try:
        results = figures.evaluate_clips(model, clips, features, tasks)
    except (DataError, ValueError) as error:  # not worth the run
        log.say(f"validation after step {step + 1} failed: {error}")
        return
    log.record("validation", step, results=results)
    log.say(f"validation after step {step + 1}: {figures.summary(results)}")


def finish(config: TrainConfig, corpus: Corpus, model: CLSP, log: RunLog) -> dict[str, Any]:
    """Evaluates the final model and leaves results.json, curves.png and model/ in the run folder."""
    results: dict[str, Any] = {}
    model.save_pretrained(config.run / "model")
    features = figures.features_for(config.data)
    for name, clips in corpus.final_sets.items():
        results[name] = figures.evaluate_clips(model, clips, features, corpus.tasks)
        log.say("\n" + figures.table(results[name], name) + "\n")
    files.write_json(config.run / "results.json", results)
    log.say(save_report(config.run))
    log.say(f"model: {config.run / 'model'}  (clsp_fast.CLSP.from_pretrained reads it)")
    if corpus.is_demo:
        log.say(
            "The demo corpus is synthetic speech: these figures say that the software works, not how well the"
        )
        log.say("paper's model does.")
    return results


def opening(config: TrainConfig, corpus: Corpus, model: CLSP, ranks: Ranks, first_step: int) -> str:
    """What is about to be trained, where."""
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


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM put their number into the list; the loop looks once a step. A second SIGINT
    interrupts."""
    seen: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller owns the signals
        before = {}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a command line: a preset's name or a config.json first (default: tiny), then
    flags. With --init the saved model's configuration stands in place of the preset's.

    Raises:
        SystemExit: an unknown preset, flag or key, with the nearest known name; a value out of range; --help.
    """
    import tyro

    # The option is called --run-dir: torchrun refuses --run, with which two of its own options begin. Without
    # torchrun the short form is understood, too.
    words = [re.sub(r"^--run(?=$|=)", "--run-dir", word) for word in arguments]
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    stated: Any = {}
    if name.endswith(".json"):
        try:
            text = textfile.read_text(Path(name), "a configuration")
        except (OSError, ValueError) as error:  # names the file itself
            sys.exit(f"clsp_fast.train: {error}")
        try:
            stated = json.loads(text)
            if not isinstance(stated, dict):
                raise ValueError(f"expected a JSON object, got {type(stated).__name__}")
            default = TrainConfig.from_dict(stated)
        except (ValueError, TypeError, RecursionError) as error:
            sys.exit(f"clsp_fast.train: {name}: {error}")
    elif name in TRAIN_PRESETS:
        default = TRAIN_PRESETS[name]
    else:
        near = difflib.get_close_matches(name, TRAIN_PRESETS, n=1, cutoff=0.0)[0]
        sys.exit(f"clsp_fast.train: no preset {name!r}; did you mean {near!r}? ({', '.join(TRAIN_PRESETS)})")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--init")
    init = finder.parse_known_args(words)[0].init
    if init is None and "model" not in stated:
        init = default.init
    if init not in (None, "None"):  # the second: how a flag says that there is none
        try:
            default = dataclasses.replace(
                default, model=model_folder.read_config(model_folder.local_folder(init))
            )
        except (OSError, ValueError) as error:
            sys.exit(f"clsp_fast.train: --init: {error}")
    # The field keeps its name in scripts and in config.json, and importing tyro where TrainConfig is would
    # slow down every import: the option gets its name in a subclass.
    named = Annotated[Path, tyro.conf.arg(name="run-dir")]
    flags = dataclasses.make_dataclass(
        "TrainConfig", [("run", named)], bases=(TrainConfig,), frozen=True, kw_only=True
    )
    try:
        parsed = tyro.cli(
            flags,
            default=flags(**_values(default)),
            args=words,
            prog="python -m clsp_fast.train",
            description=__doc__,
        )
    except SystemExit as stop:
        late = [word for word in words if word in TRAIN_PRESETS]
        if stop.code and late:
            print(f"A preset comes first: python -m clsp_fast.train {late[0]} --flags", file=sys.stderr)
        raise
    return TrainConfig(**_values(parsed))


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        train(config)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        sys.exit(130)
    except Interrupted as stop:
        print(f"clsp_fast.train: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (DataError, ValueError, OSError, FloatingPointError, ImportError, files.FolderInUse) as error:
        sys.exit(f"clsp_fast.train: {error}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


if __name__ == "__main__":
    main()
