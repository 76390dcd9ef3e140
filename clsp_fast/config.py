"""Typed configuration of a run: frozen dataclasses, validated at birth, and the named runs.

The command line is derived from these classes, and a run stores `TrainConfig.to_dict()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clsp_fast.model_config import (
    MODEL_PRESETS,
    ModelConfig,
    StackConfig,
    TextConfig,
    is_positive,
    is_rate,
    reject_unknown_keys,
    require,
)

__all__ = [
    "MODEL_PRESETS",
    "TRAIN_PRESETS",
    "DataConfig",
    "EncodeConfig",
    "ModelConfig",
    "OptimConfig",
    "StackConfig",
    "TextConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are read, and how they become batches."""

    manifest: Path | None = None
    """Training clips: a JSONL manifest or lhotse cuts (.jsonl, .jsonl.gz). None: the demo corpus, made on the
    spot."""
    validation: Path | None = None
    """Clips for the retrieval figures during training. None with a manifest: no validation."""
    test: Path | None = None
    """Clips for the final results table. None: the validation clips."""
    zeroshot: Path | None = None
    """JSON of zero-shot tasks, {tag: {label: [prompts]}}: the label is compared with the clip's tag of that
    name."""
    tokenizer: Path | None = None
    """tokenizer.json or a RoBERTa folder. None: a byte-level BPE trained on the training captions."""
    batch_seconds: float = 800.0
    """Audio per rank and step, in seconds, counted with padding: clips x upper bound of their duration
    bucket."""
    batch_clips: int = 1024
    """At most this many clips per rank and step."""
    buckets: int = 30
    """Duration buckets (quantiles) from which batches are drawn."""
    min_seconds: float = 0.3
    """Shorter clips are left out, and counted."""
    max_seconds: float = 30.0
    """Longer clips are left out, and counted."""
    slack_seconds: float = 0.1
    """How far a clip may reach behind the end of its recording before it counts as truncated. Lengths that
    were taken from the header of an MP3 can be a third of a second too long."""
    tail: Literal["reflect", "zero"] = "reflect"
    """How the last frame is completed: "reflect" as at inference, "zero" as the reference recipe trains."""
    augment: float = 0.0
    """Strength of log-mel augmentation (equaliser, noise floor, band limit): 0 none, 1 as the demo uses
    it."""
    threads: int = 0
    """Threads that decode and extract features; 0: one for each core, at most 16; the ranks of a machine
    share its cores."""
    prefetch: int = 4
    """Batches prepared ahead."""
    cache_mb: int = 1024
    """Features of clips already seen are kept in memory up to this many MiB; 0: never."""
    max_bad_share: float = 0.01
    """Training stops, with the list, when more than this share of the clips (and more than 10), over all
    ranks, cannot be read."""
    demo_clips: int = 3000
    """Training clips of the demo corpus."""

    def __post_init__(self) -> None:
        for name in ("batch_seconds", "min_seconds", "max_seconds"):
            require(getattr(self, name) > 0, f"data.{name}", "positive", getattr(self, name))
        for name in ("batch_clips", "buckets", "prefetch", "demo_clips"):
            require(
                is_positive(getattr(self, name)), f"data.{name}", "a positive integer", getattr(self, name)
            )
        require(0 <= self.slack_seconds < math.inf, "data.slack_seconds", "at least 0", self.slack_seconds)
        for name in ("threads", "cache_mb", "augment"):
            require(getattr(self, name) >= 0, f"data.{name}", "at least 0", getattr(self, name))
        longer = f"more than data.min_seconds {self.min_seconds}"
        require(self.max_seconds > self.min_seconds, "data.max_seconds", longer, self.max_seconds)
        enough = f"at least data.max_seconds {self.max_seconds}"
        require(self.batch_seconds >= self.max_seconds, "data.batch_seconds", enough, self.batch_seconds)
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", "in [0, 1]", self.max_bad_share)
        require(self.tail in ("reflect", "zero"), "data.tail", '"reflect" or "zero"', self.tail)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule; both stages have a warm-up and a decay of their own."""

    algorithm: Literal["adamw", "scaled_adam"] = "adamw"
    """"scaled_adam": the reference recipe's, whose steps are relative to the size of each tensor; it clips by
    earlier norms itself (no clip_norm), and nothing decays."""
    schedule: Literal["cosine", "eden"] = "cosine"
    """"eden": the reference recipe's, which falls with steps and epochs and does not know the last one."""
    lr_batches: float = 100_000.0
    """Steps after which Eden's rate falls."""
    lr_epochs: float = 100.0
    """Epochs after which Eden's rate falls."""
    lr: float = 1e-3
    """Peak learning rate of the speech tower in stage 1."""
    stage2_lr: float = 2e-4
    """Peak learning rate of the speech tower in stage 2."""
    text_lr_scale: float = 1.0
    """Learning rate of the text tower, relative to the speech tower's."""
    head_lr_scale: float = 1.0
    """Learning rate of the projection heads and logit_scale, relative to the speech tower's."""
    final_lr_share: float = 0.05
    """The cosine ends at this share of the peak."""
    warmup_steps: int = 500
    """Steps of linear warm-up; with the cosine at most a tenth of the stage, with Eden from half the rate."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices and filters of the speech tower and the heads; never of vectors or
    embeddings."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moment estimates."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    average_steps: int = 0
    """An average of the weights over about so many steps is what is validated, evaluated and saved as the
    model; 0: the weights themselves. Costs a copy of the weights."""

    def __post_init__(self) -> None:
        for name in (
            "lr",
            "stage2_lr",
            "text_lr_scale",
            "head_lr_scale",
            "clip_norm",
            "lr_batches",
            "lr_epochs",
        ):
            require(getattr(self, name) > 0, f"optim.{name}", "positive", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "average_steps"):
            require(getattr(self, name) >= 0, f"optim.{name}", "at least 0", getattr(self, name))
        require(0 <= self.final_lr_share <= 1, "optim.final_lr_share", "in [0, 1]", self.final_lr_share)
        known = '"adamw" or "scaled_adam"'
        require(self.algorithm in ("adamw", "scaled_adam"), "optim.algorithm", known, self.algorithm)
        require(self.schedule in ("cosine", "eden"), "optim.schedule", '"cosine" or "eden"', self.schedule)
        two = len(self.betas) == 2 and all(is_rate(beta) for beta in self.betas)
        require(two, "optim.betas", "two rates in [0, 1)", self.betas)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """A model, and how it embeds recordings: what every command that uses a trained model is told."""

    model: str = "runs/demo/model"
    """Folder of the model, or the name of a repository on the Hugging Face hub."""
    device: str = "auto"
    """"auto": the CUDA device of this rank if there is one, else the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic and weights of the towers."""
    batch_seconds: float = 120.0
    """Most seconds of audio, padding included, that go through the model at once."""
    long_audio: Literal["whole", "window", "error"] = "window"
    """What is done with a recording longer than window_s: embed it as one (memory grows with its length
    squared), average its windows, or refuse it."""
    window_s: float = 30.0
    """Length of a window in seconds."""
    slack_seconds: float = 0.1
    """How far a clip of a manifest may reach behind the end of its recording before it counts as
    truncated."""

    def __post_init__(self) -> None:
        require(self.batch_seconds > 0, "batch_seconds", "positive", self.batch_seconds)
        require(self.window_s >= 1, "window_s", "at least 1 second", self.window_s)
        require(0 <= self.slack_seconds < math.inf, "slack_seconds", "at least 0", self.slack_seconds)
        require(self.precision in ("fp32", "bf16"), "precision", '"fp32" or "bf16"', self.precision)
        known = self.long_audio in ("whole", "window", "error")
        require(known, "long_audio", '"whole", "window" or "error"', self.long_audio)

    @property
    def batching(self) -> dict[str, Any]:
        """What `CLSP.encode_audio` is told of it."""
        names = ("batch_seconds", "long_audio", "window_s", "slack_seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: stage 1 (one fine caption a clip), then stage 2 (two captions a clip)."""

    run: Path = Path("runs/demo")
    """Folder of the run: config.json, log.jsonl, checkpoints, results, model/. The same command resumes
    it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two towers."""
    data: DataConfig = DataConfig()
    """Clips and batches."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    stage1_steps: int = 100_000
    """Steps with one fine-grained caption a clip; 0 skips the stage."""
    stage2_steps: int = 4_000
    """Steps with a global and a fine-grained caption, or two fine-grained ones; 0 skips the stage."""
    init: Path | None = None
    """Folder of a saved model to start from. Its configuration must be `model`, and is the default of the
    command line's --model flags."""
    seed: int = 42
    """Everything random is a function of this, the step and the rank."""
    device: str = "auto"
    """"auto": the CUDA device of this rank if there is one, else the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32."""
    micro_seconds: float = 0.0
    """Most seconds of audio, with padding, that go through the towers at once. The contrast stays that of the
    whole batch and the memory becomes that of such a part, for about a third more time; 0: all at once."""
    recompute_layers: bool = False
    """Layers keep nothing but their input for the backward pass, and are computed again in it: for long clips
    and large models, for about a third more time."""
    max_logit_scale: float = 100.0
    """The learned logit_scale is clamped to [1, this] after each step."""
    log_every: int = 20
    """Steps between log lines."""
    validate_every: int = 1000
    """Steps between validations."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_bad_steps: int = 3
    """Training stops after this many steps in a row with a non-finite loss or gradient."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (extra [tensorboard])."""

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "save_every", "keep_checkpoints", "max_bad_steps"):
            require(is_positive(getattr(self, name)), name, "a positive integer", getattr(self, name))
        for name in ("stage1_steps", "stage2_steps", "seed"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        steps = self.stage1_steps + self.stage2_steps
        require(steps > 0, "stage1_steps + stage2_steps", "positive", steps)
        require(self.max_logit_scale >= 1, "max_logit_scale", "at least 1", self.max_logit_scale)
        require(self.precision in ("fp32", "bf16"), "precision", '"fp32" or "bf16"', self.precision)
        require(
            0 <= self.micro_seconds < math.inf, "micro_seconds", "finite and at least 0", self.micro_seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON stores them."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; absent keys take their defaults, unknown ones raise ValueError."""
        reject_unknown_keys(cls, values)
        plain = dict(values)
        if "model" in plain:
            plain["model"] = ModelConfig.from_dict(plain["model"])
        for key, kind in (("data", DataConfig), ("optim", OptimConfig)):
            if key in plain:
                reject_unknown_keys(kind, plain[key])
                plain[key] = kind(**_typed(kind, plain[key]))
        return cls(**_typed(cls, plain))


def _plain(value: Any) -> Any:
    """JSON's types for anything a configuration holds."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _typed(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Paths and tuples again, where `kind` has them."""
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    restored = dict(values)
    for key, value in values.items():
        if types[key].startswith("Path") and value is not None:
            restored[key] = Path(value)
        elif types[key].startswith("tuple"):
            restored[key] = tuple(value)
    return restored


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        model=MODEL_PRESETS["tiny"],
        data=DataConfig(batch_clips=128, buckets=6, augment=1.0),
        optim=OptimConfig(lr=2e-3, stage2_lr=1e-3, text_lr_scale=4.0, head_lr_scale=2.0, warmup_steps=50),
        stage1_steps=500,
        stage2_steps=350,
        validate_every=250,
        save_every=250,
    ),
    "small": TrainConfig(run=Path("runs/small"), model=MODEL_PRESETS["small"], stage1_steps=20_000),
    "base": TrainConfig(run=Path("runs/base"), model=MODEL_PRESETS["base"], precision="bf16"),
    "xlarge": TrainConfig(
        run=Path("runs/xlarge"),
        model=MODEL_PRESETS["xlarge"],
        precision="bf16",
        optim=OptimConfig(lr=2e-4, stage2_lr=2e-5, head_lr_scale=5.0),
    ),
}
"""Named runs: `python -m clsp_fast.train NAME`."""
