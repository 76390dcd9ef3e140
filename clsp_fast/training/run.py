"""A training run and its loop. Read `fit` first: it calls the parts of a step in the order in which they
happen. The functions below it are these parts."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from clsp_fast import contention, similarity
from clsp_fast.config import TrainConfig
from clsp_fast.data import Batch, ClipFeatures, DataError, Loader, bad_list
from clsp_fast.evaluation import figures, report
from clsp_fast.model import CLSP, ClspOutput
from clsp_fast.storage import model_folder
from clsp_fast.storage.log import RunLog
from clsp_fast.storage.ranks import Ranks
from clsp_fast.training import checkpoint, optim
from clsp_fast.training.corpus import Corpus
from clsp_fast.training.step import (
    average_and_clip_gradients,
    flag_bad_step,
    forward,
    update_running_statistics,
)

_READ_EVERY = 20
"""Losses are read from the device at least after every so many steps. A run that cannot go on stops then."""


class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint has been written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command resumes")
        self.exit_code = 128 + number


@dataclass
class Outcome:
    """A step whose loss has not been read from the device yet.

    Attributes:
        step: step of the run.
        clips: ids of its clips.
        audio_s: seconds of audio.
        waited_s: how long the host waited for the batch.
        values: loss, gradient norm, and 1 if the step was bad: float32 (3,) on the device.
    """

    step: int
    clips: list[str]
    audio_s: float
    waited_s: float
    values: Tensor


@dataclass
class Meter:
    """Sums over the steps since the last log line.

    Attributes:
        elapsed_s: time of all steps, without logging, validation and checkpoints.
        waited_s: the part of elapsed_s in which the host waited for batches of applied steps. A GPU may still
            have worked on earlier steps in this time, so this part is only an upper limit of what faster
            reading would save.
        audio_s: seconds of audio trained on.
        clips: clips trained on.
        losses: loss of each applied step.
        norms: gradient norm of each applied step.
    """

    elapsed_s: float = 0.0
    waited_s: float = 0.0
    audio_s: float = 0.0
    clips: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome, loss: float, norm: float) -> None:
        """Adds an applied step."""
        self.audio_s += outcome.audio_s
        self.clips += len(outcome.clips)
        self.waited_s += outcome.waited_s
        self.losses.append(loss)
        self.norms.append(norm)

    def means(self, world: int) -> dict[str, float]:
        """The figures of a log line; rates per second are for all `world` ranks together."""
        return {
            "loss": sum(self.losses) / max(1, len(self.losses)),
            "gradient_norm": sum(self.norms) / max(1, len(self.norms)),
            "step_s": self.elapsed_s / max(1, len(self.losses)),
            "audio_s_per_s": world * self.audio_s / self.elapsed_s,
            "clips_per_s": world * self.clips / self.elapsed_s,
            "data_wait": self.waited_s / self.elapsed_s,
        }


@dataclass
class Run:
    """The parts of a training run and its progress.

    Attributes:
        config: its settings.
        corpus: clips, tokenizer and zero-shot tasks.
        model: the model, on this rank's device.
        optimizer: its optimiser.
        ranks: the rank of this process, and communication with the other ranks.
        log: the run's records and printed lines.
        loader: the batches of this rank.
        first_step: step that this process starts with.
        bad_clips: clips that any rank could not read: id -> reason; the same on all ranks.
        outcomes: the steps since the last call of `read_outcomes`.
        bad_steps: number of steps since the last applied one, without `outcomes`.
        meter: sums for the next log line.
        signals: numbers of the stop signals that this process has received.
        validation_features: features of the validation clips, read once and kept.
    """

    config: TrainConfig
    corpus: Corpus
    model: CLSP
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    log: RunLog
    loader: Loader
    first_step: int
    bad_clips: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    bad_steps: int = 0
    meter: Meter = field(default_factory=Meter)
    signals: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.validation_features: ClipFeatures = figures.features_for(self.config.data)

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.config.stage1_steps + self.config.stage2_steps


def fit(run: Run) -> None:
    """Trains from `run.first_step` to the end of both stages.

    Raises:
        DataError: too many clips are unreadable. FloatingPointError: too many steps in a row were not finite.
        Interrupted: a signal came; the state was saved.
    """
    config, model, optimizer, ranks = run.config, run.model, run.optimizer, run.ranks
    with stop_signals(run.signals), unread_outcomes_recorded(run):
        started = time.perf_counter()
        for batch in run.loader.batches(run.first_step, run.total_steps):
            waited_s = time.perf_counter() - started
            share_bad_clips(run, batch)
            optim.set_learning_rate(optimizer, learning_rate(run, batch.step))
            # The random numbers depend only on seed, step and rank, so a resumed run draws the same ones.
            torch.manual_seed(config.seed * 1_000_003 + batch.step * ranks.world + ranks.rank)

            output, loss = forward(model, batch, ranks, config)
            torch.autograd.backward(loss)
            norm = average_and_clip_gradients(model, ranks, config.optim)

            # If the loss or the gradient is not finite on one rank, no rank applies the step. The host reads
            # this later: until then, it prepares the next steps while the GPU works.
            bad = flag_bad_step(loss, norm, ranks)
            apply_gradients(run, batch.step, bad)
            values = torch.stack([loss.detach(), norm, bad])
            run.outcomes.append(Outcome(batch.step, batch.ids, batch.seconds, waited_s, values))
            optimizer.zero_grad()
            contention.adapt_waits()

            (stopping,) = ranks.any(bool(run.signals))
            if stopping or is_read_after(run, batch.step):
                read_outcomes(run)
            run.meter.elapsed_s += time.perf_counter() - started
            after_step(run, batch.step, output, stopping)
            started = time.perf_counter()


@contextlib.contextmanager
def unread_outcomes_recorded(run: Run) -> Iterator[None]:
    """If an exception leaves this context, the bad steps that have not been read yet are recorded.

    The other ranks may have ended, so each rank uses only its own values. If the device has failed, its
    values are lost, and the exception is raised all the same.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):
            for outcome, loss, norm, bad in read_values(run):
                if bad:
                    record_bad_step(run, outcome.step, loss, norm, outcome.clips)
        raise


@contextlib.contextmanager
def stop_signals(received: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM append their number to `received`, which the loop checks once per step. A SIGINT
    after an earlier signal raises KeyboardInterrupt immediately."""

    def receive(number: int, _frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set handlers; in another thread, the caller handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_bad_clips(run: Run, batch: Batch) -> None:
    """Collects from all ranks the clips that could not be read for this step, and adds them to `bad_clips`.

    Raises:
        DataError: too many clips are bad, or a rank has no readable clip. All ranks raise it.
    """
    new = {clip: reason for clip, reason in batch.bad.items() if clip not in run.bad_clips}
    if not run.ranks.any(bool(new) or not batch.ids)[0]:
        return
    by_rank = run.ranks.gather((new, len(batch.ids)))
    for clips, _ in by_rank:
        run.bad_clips.update(clips)
    run.loader.check_bad(run.bad_clips)
    if not all(count for _, count in by_rank):
        raise DataError(f"step {batch.step}: a rank found no readable clip; {bad_list(run.bad_clips)}")


def learning_rate(run: Run, step: int) -> float:
    """The speech tower's learning rate; each stage has its own peak, warm-up and decay."""
    config, steps_per_epoch = run.config, run.loader.plan.steps_per_epoch
    steps, peak = config.stage1_steps, config.optim.lr
    if step >= steps:
        step, steps, peak = step - steps, config.stage2_steps, config.optim.stage2_lr
    return optim.learning_rate(step, steps, steps_per_epoch, peak, config.optim)


def apply_gradients(run: Run, step: int, bad: Tensor) -> None:
    """Updates the weights, the running statistics of the model and the running average of the weights. If the
    scalar `bad` is 1 instead of 0, weights and statistics do not change."""
    optim.step_unless(run.optimizer, bad)
    with torch.no_grad():
        run.model.log_logit_scale.clamp_(0.0, math.log(run.config.max_logit_scale))
    update_running_statistics(run.model, run.ranks, bad)
    if run.config.optim.average_steps:
        optim.update_average(run.optimizer, step + 1, run.config.optim.average_steps)


def is_read_after(run: Run, step: int) -> bool:
    """Whether `read_outcomes` is called after this step: before each log line, validation and checkpoint, and
    at least every `_READ_EVERY` steps."""
    config, done = run.config, step + 1
    periods = (config.log_every, config.validate_every, config.save_every)
    is_due = done == run.total_steps or any(done % period == 0 for period in periods)
    return is_due or len(run.outcomes) >= _READ_EVERY


def read_outcomes(run: Run) -> None:
    """Reads losses and gradient norms from the device. Adds the applied steps to the meter, and records the
    others; FloatingPointError if too many in a row were not applied."""
    for outcome, loss, norm, bad in read_values(run):
        if bad:
            by_rank = run.ranks.gather((outcome.clips, loss))
            clips = [clip for ids, _ in by_rank for clip in ids]
            loss = sum(rank_loss for _, rank_loss in by_rank) / run.ranks.world
            record_bad_step(run, outcome.step, loss, norm, clips)
            count_bad_step(run, outcome.step, clips)
        else:
            run.bad_steps = 0
            run.meter.add(outcome, loss, norm)


def read_values(run: Run) -> Iterator[tuple[Outcome, float, float, bool]]:
    """Reads the outcomes of this rank: (outcome, loss, gradient norm, whether the step was bad). Each outcome
    is removed from the run before it is given out."""
    if run.outcomes:
        rows = torch.stack([outcome.values for outcome in run.outcomes]).cpu().tolist()
        for loss, norm, bad in rows:
            yield run.outcomes.pop(0), loss, norm, bool(bad)


def record_bad_step(run: Run, step: int, loss: float, norm: float, clips: list[str]) -> None:
    """Records a step that was not applied."""
    run.log.record("bad_step", step, loss=str(loss), norm=str(norm), clips=clips)
    run.log.say(f"step {step}: loss {loss}, gradient norm {norm}: not applied; its clips are in log.jsonl")


def count_bad_step(run: Run, step: int, clips: list[str]) -> None:
    """Counts a step that was not applied; FloatingPointError if there were too many in a row."""
    run.bad_steps += 1
    if run.bad_steps >= run.config.max_bad_steps:
        run.outcomes.clear()  # the run ends with this step, so the later ones are not reported
        raise FloatingPointError(
            f"{run.bad_steps} steps in a row had a non-finite loss or gradient (last: step {step}, "
            f"clips {', '.join(clips[:8])} ...); lower --optim.lr or look at these clips"
        )


def after_step(run: Run, step: int, output: ClspOutput, stopping: bool) -> None:
    """Logs, validates and saves, each when it is due. Raises Interrupted if a signal came on any rank."""
    config, first_rank = run.config, run.ranks.first
    done, is_last = step + 1, step + 1 == run.total_steps
    if done % config.log_every == 0 or is_last:
        log_progress(run, step, output)
        run.meter = Meter()
    if first_rank and done % config.validate_every == 0 and not is_last:
        with optim.averaged(run.optimizer):
            validate(run, step)
    if first_rank and (done % config.save_every == 0 or is_last or stopping):
        save_checkpoint(run, done)
    if stopping:
        raise Interrupted(run.signals[0] if run.signals else signal.SIGTERM)


def log_progress(run: Run, step: int, output: ClspOutput) -> None:
    """Writes a log record and prints a line, if a step was applied since the last record."""
    if not run.meter.losses:
        return
    values = run.meter.means(run.ranks.world)
    values |= {
        "batch_R@1": batch_recall(output),
        "logit_scale": float(output.logit_scale.detach()),
        "lr": run.optimizer.param_groups[0]["lr"],
        "peak_memory_mib": run.ranks.peak_memory_mib(),
        "eta_s": (run.total_steps - step - 1) * values["step_s"],
    }
    skipped = Counter(run.bad_clips.values())
    run.log.record("train", step, **values, skipped=dict(skipped))
    rate = f"{values['audio_s_per_s']:.0f} audio-s/s  {values['clips_per_s']:.0f} clips/s"
    run.log.say(
        f"step {step + 1}/{run.total_steps}  loss {values['loss']:.3f}  R@1 {values['batch_R@1']:.3f}  "
        f"scale {values['logit_scale']:.1f}  lr {values['lr']:.1e}  {rate}  "
        f"wait {values['data_wait']:.1%}  {values['peak_memory_mib']:.0f} MiB  "
        f"skipped {sum(skipped.values())}  eta {_clock(values['eta_s'])}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def batch_recall(output: ClspOutput) -> float:
    """R@1 within the batch: the share of clips whose own first caption is the nearest one."""
    clips = len(output.audio)
    audio, text = (embeddings.detach().float() for embeddings in (output.audio, output.text[:clips]))
    if not (bool(audio.isfinite().all()) and bool(text.isfinite().all())):
        return 0.0
    _, nearest = similarity.topk(audio, text, 1)
    return float((nearest[:, 0] == torch.arange(clips, device=nearest.device)).float().mean())


def validate(run: Run, step: int) -> None:
    """Logs and prints the figures of the validation clips."""
    clips, tasks = run.corpus.validation, run.corpus.tasks
    if not clips:
        return
    try:
        results = figures.evaluate_clips(run.model, clips, run.validation_features, tasks)
    except (DataError, ValueError) as error:  # training can go on without these figures
        run.log.say(f"validation after step {step + 1} failed: {error}")
        return
    run.log.record("validation", step, results=results)
    run.log.say(f"validation after step {step + 1}: {report.summary(results)}")


def save_checkpoint(run: Run, step: int) -> None:
    """Writes a checkpoint after `step` steps."""
    tensors = optim.state_tensors(run.model, run.optimizer)
    state = {"bad": run.bad_clips, "loader": run.loader.state()}
    made = checkpoint.Checkpoint(step, run.model.state_dict(), tensors, state)
    checkpoint.save(run.config.run / "checkpoints", made, keep=run.config.keep_checkpoints)


def load_checkpoint(
    config: TrainConfig, model: CLSP, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Loads the newest checkpoint into the model and the optimiser.

    Returns:
        The number of steps done, and the state for `restore_data`; 0 and {} if there is no checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another model or optimiser.
    """
    newest = checkpoint.newest(config.run / "checkpoints")
    if newest is None:
        return 0, {}
    where = f"the checkpoint of step {newest.step} in {config.run} does not fit the model"
    model_folder.check_tensors(newest.model, model.state_dict(), where)
    model.load_state_dict(newest.model)
    averaged = config.optim.average_steps > 0
    tensors = {key: x for key, x in newest.optim.items() if averaged or not key.endswith("/average")}
    optim.load_state_tensors(model, optimizer, tensors)
    return newest.step, newest.state


def restore_data(run: Run, state: dict[str, Any]) -> None:
    """Restores the bad clips and the start of the batch plan from the state of a checkpoint."""
    known = {clip.id for clip in run.loader.clips}
    run.bad_clips.update({clip: reason for clip, reason in state.get("bad", {}).items() if clip in known})
    run.loader.check_bad(run.bad_clips)
    run.loader.bad.update(run.bad_clips)
    if "loader" in state and run.loader.resume(run.first_step, state["loader"]):
        run.log.say(
            f"the clips, batches or ranks have changed (ranks: {state['loader']['world']} then, "
            f"{run.ranks.world} now): a new epoch begins after step {run.first_step}"
        )
