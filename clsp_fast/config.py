"""Configurations of models, training runs and embedding: frozen dataclasses that check their values.

The command line is derived from these classes, and the text under each field is its help. A saved model
stores `ModelConfig.to_dict()`, a run `TrainConfig.to_dict()`. The speech tower's fields have the names of the
reference recipe (icefall, CLSP).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from clsp_fast.checks import check_precision, is_positive, is_rate, reject_unknown_keys, require

__all__ = [
    "MODEL_PRESETS",
    "TRAIN_PRESETS",
    "Batching",
    "DataConfig",
    "EncodeConfig",
    "LongAudio",
    "ModelChoice",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "StackConfig",
    "TextConfig",
    "TrainConfig",
]


LongAudio: TypeAlias = Literal["whole", "window", "error"]
"""What is done with a recording longer than a window: embed it whole, average its windows, or refuse it."""

Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
"""Arithmetic of the towers. TF32 and float32 have the same weights."""

MAX_LAYERS = 1000
"""Most layers and stacks of a tower. Without limits, a hostile file could describe an endless model."""
MAX_SIZE = 2**24
"""Largest value of the other sizes of a tower: channels, heads, tokens and so on."""


def _is_size(value: object) -> bool:
    """Whether the value is an integer in [1, MAX_SIZE]."""
    return isinstance(value, int) and is_positive(value) and value <= MAX_SIZE


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower: RoBERTa, with the field names of Hugging Face's configuration."""

    vocab_size: int = 50265
    """Rows of the token embedding; at least the tokenizer's size."""
    hidden_size: int = 768
    """Width of the tower."""
    num_hidden_layers: int = 12
    """Transformer layers; 0 leaves embeddings, LayerNorm and pooling."""
    num_attention_heads: int = 12
    """Attention heads; must divide hidden_size."""
    intermediate_size: int = 3072
    """Width of the feed-forward layers."""
    hidden_dropout_prob: float = 0.1
    """Dropout after the embeddings and in each residual branch, while training."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout of the attention weights, while training."""
    max_position_embeddings: int = 514
    """Rows of the position embedding. The longest caption has pad_token_id + 1 tokens fewer than this."""
    type_vocab_size: int = 1
    """Rows of the token type embedding; only row 0 is used."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    pad_token_id: int = 1
    """Token that pads a batch."""
    bos_token_id: int = 0
    """Token that starts a caption."""
    eos_token_id: int = 2
    """Token that ends a caption."""
    pooling: Literal["cls", "mean"] = "cls"
    """"cls": tanh of a linear layer on the first token (RoBERTa). "mean": mean over the caption's tokens."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "type_vocab_size",
        ):
            require(_is_size(getattr(self, name)), f"text.{name}", "a positive integer", getattr(self, name))
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        legal = layers == 0 or (_is_size(layers) and layers <= MAX_LAYERS)
        require(legal, "text.num_hidden_layers", f"an integer in [0, {MAX_LAYERS}]", layers)
        expected = f"a divisor of hidden_size {self.hidden_size}"
        require(self.hidden_size % heads == 0, "text.num_attention_heads", expected, heads)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            require(is_rate(getattr(self, name)), f"text.{name}", "in [0, 1)", getattr(self, name))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(0 <= value < self.vocab_size, f"text.{name}", f"in [0, {self.vocab_size})", value)
        positions, fewest = self.max_position_embeddings, self.pad_token_id + 3
        legal = fewest <= positions <= MAX_SIZE
        require(legal, "text.max_position_embeddings", f"in [{fewest}, {MAX_SIZE}]", positions)
        require(self.layer_norm_eps > 0, "text.layer_norm_eps", "positive", self.layer_norm_eps)
        require(self.pooling in ("cls", "mean"), "text.pooling", '"cls" or "mean"', self.pooling)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption, special ones included. Its positions start at pad_token_id + 1."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON stores them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextConfig:
        """The inverse of `to_dict`; absent keys take their defaults, unknown ones raise ValueError."""
        reject_unknown_keys(cls, values)
        return cls(**values)


class StackConfig(NamedTuple):
    """One stack of the speech tower: its entries of the per-stack tuples of `ModelConfig`."""

    downsampling: int
    num_layers: int
    dim: int
    unmasked_dim: int
    feedforward_dim: int
    kernel: int
    num_heads: int
    query_head_dim: int
    value_head_dim: int
    pos_head_dim: int


_PER_STACK = (
    "num_encoder_layers",
    "encoder_dim",
    "encoder_unmasked_dim",
    "feedforward_dim",
    "cnn_module_kernel",
    "num_heads",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A CLSP model: Zipformer speech tower, RoBERTa text tower, one joint space. Defaults: the paper's model.

    Per-stack tuples have one entry for each stack, or a single one for all; `downsampling_factor` sets the
    number of stacks.
    """

    feature_dim: int = 128
    """Mel bins of the input features."""
    downsampling_factor: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1)
    """Factor by which each stack divides the convolutional front's frame rate, 50 Hz."""
    num_encoder_layers: tuple[int, ...] = (1, 2, 3, 4, 1, 1, 1)
    """Layers of each stack."""
    feedforward_dim: tuple[int, ...] = (3840,)
    """Width of the second feed-forward module of a layer. The first has 3/4 and the third 5/4 of it."""
    encoder_dim: tuple[int, ...] = (1280,)
    """Channels of each stack."""
    encoder_unmasked_dim: tuple[int, ...] = (768,)
    """Channels that the feature mask never drops. The mask is used while training."""
    cnn_module_kernel: tuple[int, ...] = (31, 31, 15, 15, 15, 31, 31)
    """Odd kernel length of the depthwise convolutions."""
    num_heads: tuple[int, ...] = (8,)
    """Attention heads."""
    query_head_dim: tuple[int, ...] = (32,)
    """Query and key dimension of a head."""
    value_head_dim: tuple[int, ...] = (12,)
    """Value dimension of a head."""
    pos_head_dim: tuple[int, ...] = (4,)
    """Relative-position dimension of a head."""
    pos_dim: int = 48
    """Dimension of the relative-position encoding; even."""
    output_downsampling_factor: int = 2
    """2: a learned downsampling by 2 ends the speech tower; 1: none."""
    post_encoder_downsampling_factor: int = 1
    """A learned downsampling after the tower, only with output_downsampling_factor 1; 1: none."""
    joint_dim: int = 512
    """Dimension of the joint embedding space."""
    text: TextConfig = TextConfig()
    """The text tower."""
    embed_channels: tuple[int, ...] = (8, 32, 128)
    """Three: channels of the front's 2-D convolutions (the paper). One: a cheap convolution over time."""
    audio_pooling: Literal["mean", "statistics"] = "mean"
    """"mean": mean of the tower's output over time (the paper). "statistics": of the tower's output and of
    the log-mel, the mean, standard deviation, mean change from frame to frame, and change from the first half
    to the second."""
    heads: Literal["mlp", "linear"] = "mlp"
    """Projection heads: "mlp" (the paper's four layers), or "linear" (running standardisation and one layer).
    With "linear", small models need far fewer steps, and the embedding of a short prompt is close to the sum
    of its words' embeddings."""
    dropout: float = 0.1
    """Dropout of the speech tower's feed-forward modules, its front and the heads, while training."""
    regularize: bool = True
    """Use the feature mask, layer skip, ConvNeXt skip and position dropout of the recipe while training."""

    def __post_init__(self) -> None:
        count = len(self.downsampling_factor)
        require(count <= MAX_LAYERS, "downsampling_factor", f"of at most {MAX_LAYERS} stacks", count)
        for name in ("downsampling_factor", *_PER_STACK, "embed_channels"):
            value = getattr(self, name)
            legal = isinstance(value, tuple) and len(value) > 0 and all(_is_size(v) for v in value)
            require(legal, name, "a tuple of positive integers", value)
            if name != "embed_channels":
                require(
                    len(value) in (1, count), name, f"of length 1 or {count} (the number of stacks)", value
                )
        for name in ("feature_dim", "pos_dim", "joint_dim", "post_encoder_downsampling_factor"):
            require(_is_size(getattr(self, name)), name, "a positive integer", getattr(self, name))
        self._check_stacks()
        require(self.feature_dim >= 7, "feature_dim", "at least 7", self.feature_dim)
        require(self.pos_dim % 2 == 0, "pos_dim", "even", self.pos_dim)
        front = self.embed_channels
        require(len(front) in (1, 3), "embed_channels", "one or three integers", front)
        output, post = self.output_downsampling_factor, self.post_encoder_downsampling_factor
        require(output in (1, 2), "output_downsampling_factor", "1 or 2", output)
        not_both = post == 1 or output == 1
        expected = "1 unless output_downsampling_factor is 1"
        require(not_both, "post_encoder_downsampling_factor", expected, post)
        pooling = self.audio_pooling
        require(self.heads in ("mlp", "linear"), "heads", '"mlp" or "linear"', self.heads)
        require(pooling in ("mean", "statistics"), "audio_pooling", '"mean" or "statistics"', pooling)
        require(is_rate(self.dropout), "dropout", "in [0, 1)", self.dropout)
        require(isinstance(self.text, TextConfig), "text", "a TextConfig", self.text)

    def _check_stacks(self) -> None:
        layers = sum(stack.num_layers for stack in self.stacks)
        require(layers <= MAX_LAYERS, "num_encoder_layers", f"at most {MAX_LAYERS} in all stacks", layers)
        for s, stack in enumerate(self.stacks):
            require(stack.kernel % 2 == 1, "cnn_module_kernel", f"odd in stack {s}", stack.kernel)
            for name, value in (("encoder_dim", stack.dim), ("feedforward_dim", stack.feedforward_dim)):
                require(value >= 2, name, f"at least 2 in stack {s}", value)
            expected = f"at most encoder_dim {stack.dim} in stack {s}"
            require(stack.unmasked_dim <= stack.dim, "encoder_unmasked_dim", expected, stack.unmasked_dim)

    @property
    def stacks(self) -> tuple[StackConfig, ...]:
        """The stacks, with single entries broadcast."""
        count = len(self.downsampling_factor)
        columns = []
        for name in ("downsampling_factor", *_PER_STACK):
            value: tuple[int, ...] = getattr(self, name)
            columns.append(value if len(value) == count else value * count)
        return tuple(StackConfig(*row) for row in zip(*columns, strict=True))

    @property
    def audio_dim(self) -> int:
        """Channels of the speech tower's output: the widest stack."""
        return max(stack.dim for stack in self.stacks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON stores them: tuples become lists, `text` a dictionary."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; absent keys take their defaults.

        Raises:
            ValueError: an unknown key (the nearest known one is named) or a value out of range.
        """
        reject_unknown_keys(cls, values)
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        if isinstance(plain.get("text"), Mapping):
            plain["text"] = TextConfig.from_dict(plain["text"])
        return cls(**plain)


MODEL_PRESETS: dict[str, ModelConfig] = {
    # Made for training on a CPU in minutes: a small front, one stack at a low frame rate, pooled statistics,
    # and a text tower without layers.
    "tiny": ModelConfig(
        downsampling_factor=(4,),
        num_encoder_layers=(2,),
        feedforward_dim=(128,),
        encoder_dim=(64,),
        encoder_unmasked_dim=(48,),
        cnn_module_kernel=(9,),
        num_heads=(4,),
        query_head_dim=(16,),
        output_downsampling_factor=1,
        joint_dim=128,
        embed_channels=(64,),
        audio_pooling="statistics",
        heads="linear",
        dropout=0.0,
        regularize=False,
        text=TextConfig(
            vocab_size=1024,
            hidden_size=96,
            num_hidden_layers=0,
            num_attention_heads=4,
            intermediate_size=192,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=130,
            pooling="mean",
        ),
    ),
    "small": ModelConfig(
        downsampling_factor=(1, 2, 4, 2),
        num_encoder_layers=(1, 2, 2, 1),
        feedforward_dim=(512, 640, 768, 640),
        encoder_dim=(192, 224, 256, 224),
        encoder_unmasked_dim=(128, 160, 192, 160),
        cnn_module_kernel=(31, 15, 15, 15),
        num_heads=(4, 4, 8, 4),
        joint_dim=256,
        text=TextConfig(
            vocab_size=8192,
            hidden_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=258,
            pooling="mean",
        ),
    ),
    "base": ModelConfig(
        num_encoder_layers=(1, 2, 3, 3, 1, 1, 1),
        feedforward_dim=(1536,),
        encoder_dim=(512,),
        encoder_unmasked_dim=(384,),
    ),
    "xlarge": ModelConfig(),
}
"""Named models. "xlarge" is the paper's: 724,244,405 parameters. The speech tower of "base" has 93 M."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How recordings are batched for a trained model. `CLSP.encode_audio` has the same defaults."""

    batch_seconds: float = 120.0
    """Most seconds of audio, padding included, that go through the model at once."""
    long_audio: LongAudio = "whole"
    """What is done with a recording longer than window_s: embed it in one piece (memory grows with its
    length squared), average its windows' embeddings, or refuse it."""
    window_s: float = 30.0
    """Length of a window in seconds."""
    slack_seconds: float = 0.1
    """A clip of a manifest may reach this many seconds past the end of its recording. If it reaches further,
    it counts as truncated."""

    def __post_init__(self) -> None:
        require(self.batch_seconds > 0, "batch_seconds", "positive", self.batch_seconds)
        require(self.window_s >= 1, "window_s", "at least 1 second", self.window_s)
        require(0 <= self.slack_seconds < math.inf, "slack_seconds", "at least 0", self.slack_seconds)
        known = self.long_audio in ("whole", "window", "error")
        require(known, "long_audio", '"whole", "window" or "error"', self.long_audio)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are read, and how they become batches."""

    manifest: Path | None = None
    """Training clips: a JSONL manifest or lhotse cuts (.jsonl, .jsonl.gz). None: the demo corpus, which is
    made first."""
    validation: Path | None = None
    """Clips for the retrieval metrics during training. None: no validation. The demo has its own clips."""
    test: Path | None = None
    """Clips for the final results table. None: the validation clips."""
    zeroshot: Path | None = None
    """JSON file of zero-shot tasks, {tag: {label: [prompts]}}. The label that the model predicts for a clip
    is compared with the clip's value of the tag."""
    tokenizer: Path | None = None
    """tokenizer.json or a RoBERTa folder. None: a byte-level BPE trained on the training captions."""
    batch_seconds: float = 800.0
    """Seconds of audio per rank and step, padding included: number of clips x longest duration of their
    bucket."""
    batch_clips: int = 1024
    """At most this many clips per rank and step."""
    buckets: int = 30
    """Duration buckets (quantiles) from which batches are drawn."""
    min_seconds: float = 0.3
    """Shorter clips are left out, and counted."""
    max_seconds: float = 30.0
    """Longer clips are left out, and counted."""
    slack_seconds: float = Batching.slack_seconds
    """A clip may reach this many seconds past the end of its recording. If it reaches further, it counts as
    truncated. Durations taken from MP3 headers can be a third of a second too long."""
    tail: Literal["reflect", "zero"] = "reflect"
    """How the last frame is completed: "reflect" as at inference, "zero" as in the reference's training."""
    augment: float = 0.0
    """Strength of log-mel augmentation (equaliser, noise floor, band limit): 0 none, 1 as in the demo."""
    threads: int = 0
    """Threads that decode and extract features; 0: one for each core, at most 16. The ranks of a machine
    share its cores."""
    prefetch: int = 4
    """Batches prepared ahead."""
    cache_mb: int = 1024
    """Memory in MiB in which features are kept, so that a clip is decoded only once; 0: none."""
    max_bad_share: float = 0.01
    """Training stops and lists the unreadable clips when they are more than 10 and more than this share of
    all clips. The clips of all ranks are counted."""
    demo_clips: int = 3000
    """Training clips of the demo corpus."""
    human: bool = False
    """Train on human speech together with the demo corpus: acted and read speech of four Debian packages
    (410 MB), with captions from measurements alone."""
    recordings: Path | None = None
    """With human: a folder that holds the four packages, as .deb files or unpacked. None: apt-get fetches
    them."""

    def __post_init__(self) -> None:
        for name in ("batch_seconds", "min_seconds", "max_seconds"):
            require(getattr(self, name) > 0, f"data.{name}", "positive", getattr(self, name))
        for name in ("batch_clips", "buckets", "prefetch", "demo_clips"):
            require(
                is_positive(getattr(self, name)), f"data.{name}", "a positive integer", getattr(self, name)
            )
        require(0 <= self.slack_seconds < math.inf, "data.slack_seconds", "at least 0", self.slack_seconds)
        if self.human and self.manifest is not None:
            raise ValueError(
                f"data.human cannot be combined with data.manifest, got {self.manifest}: human speech is "
                "trained on together with the demo corpus"
            )
        if self.recordings is not None and not self.human:
            raise ValueError(f"data.recordings needs data.human, got {self.recordings} without it")
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
    """The optimiser and its schedule. Each stage has its own warm-up and decay."""

    algorithm: Literal["adamw", "scaled_adam"] = "adamw"
    """"scaled_adam": the reference recipe's optimiser. It scales the step of a tensor with
    the tensor's root mean square, and clips gradients by the norms of earlier steps. It has no weight decay,
    and clip_norm is not used."""
    schedule: Literal["cosine", "eden"] = "cosine"
    """"eden": the reference recipe's schedule. It falls with steps and epochs, and does not depend on the
    length of the run."""
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
    """Steps of linear warm-up. Cosine: at most a tenth of the stage. Eden: starts at half the rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and filters of the speech tower and the heads. Vectors and the text
    tower have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moment estimates."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    average_steps: int = 0
    """The weights are averaged over about this many steps, and the average is validated, evaluated and saved
    as the model. It needs memory for a copy of the weights. 0: no average."""

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
class ModelChoice:
    """A trained model, its device and its precision."""

    model: str = "runs/demo/model"
    """Folder of the model, or the name of a repository on the Hugging Face hub."""
    device: str = "auto"
    """"auto": the CUDA device of this rank if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Arithmetic and weights of the towers. "tf32": float32 weights, and products that use TF32 on a GPU
    (relative error 5e-4, faster than fp32)."""

    def __post_init__(self) -> None:
        check_precision(self.precision)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Batching, ModelChoice):
    """A model, and how it embeds recordings: the options of every command that uses a trained model."""

    # `CLSP.encode_audio` has another default. Commands get files of any length, and an hour of audio embedded
    # in one piece would not fit in memory.
    long_audio: LongAudio = "window"
    """What is done with a recording longer than window_s: embed it in one piece (memory grows with its
    length squared), average its windows' embeddings, or refuse it."""

    def __post_init__(self) -> None:
        Batching.__post_init__(self)
        ModelChoice.__post_init__(self)

    @property
    def batching(self) -> dict[str, Any]:
        """The settings of `Batching`, as keywords of `CLSP.encode_audio`."""
        return {setting.name: getattr(self, setting.name) for setting in dataclasses.fields(Batching)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: stage 1 (one fine-grained caption a clip), then stage 2 (two captions a clip)."""

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
    """Folder of a saved model to start from. Its configuration must equal `model`; on the command line it is
    the default of the --model flags."""
    seed: int = 42
    """All random numbers depend only on this seed, the step and the rank."""
    device: str = "auto"
    """"auto": the CUDA device of this rank if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32. "tf32": products use TF32 on a GPU
    (relative error 5e-4, faster than fp32)."""
    micro_seconds: float = 0.0
    """Most seconds of audio, with padding, that go through the towers at once. The loss still compares the
    whole batch, but the towers need memory for one part only. About a third slower. 0: all at once."""
    recompute_layers: bool = False
    """Activation checkpointing: layers keep only their input, and are computed again in the backward pass.
    For long clips and large models; takes about a third more time."""
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
    """Training stops after this many steps in a row with a non-finite loss or gradient. Losses are read at
    each log line, and at least every 20 steps. So up to 20 steps may follow before training stops."""
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
        check_precision(self.precision)
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
    """Converts a value of a configuration to JSON types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _typed(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_plain` for the fields of `kind`: strings become paths, lists become tuples."""
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    restored = dict(values)
    for key, value in values.items():
        if types[key].startswith("Path") and value is not None:
            restored[key] = Path(value)
        elif types[key].startswith("tuple"):
            restored[key] = tuple(value)
    return restored


_TINY = TrainConfig(
    model=MODEL_PRESETS["tiny"],
    data=DataConfig(batch_clips=128, buckets=6, augment=1.0),
    optim=OptimConfig(lr=2e-3, stage2_lr=1e-3, text_lr_scale=4.0, head_lr_scale=2.0, warmup_steps=50),
    stage1_steps=500,
    stage2_steps=350,
    validate_every=250,
    save_every=250,
)
TRAIN_PRESETS: dict[str, TrainConfig] = {
    "tiny": _TINY,
    "human": dataclasses.replace(
        _TINY,
        run=Path("runs/human"),
        data=dataclasses.replace(_TINY.data, human=True),
        stage1_steps=900,
        stage2_steps=600,
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
