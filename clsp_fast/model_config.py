"""The model's part of the configuration: frozen dataclasses, validated at birth, and the model presets.

A file of its own for the sake of its length; import its names from config.py. A saved model stores
`ModelConfig.to_dict()`. Key names of the speech tower are those of the reference recipe (icefall, CLSP).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


def require(ok: bool, field: str, expected: str, got: object) -> None:
    """Raises ValueError, naming the field, what was expected and what came, unless `ok`."""
    if not ok:
        raise ValueError(f"{field} must be {expected}, got {_shortened(repr(got))}")


_LONGEST_ITEM = 160


def _shortened(text: str, longest: int = _LONGEST_ITEM) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def listed(items: Sequence[str], *, separator: str = ", ", width: int = 120) -> str:
    """The items as one screen line: all of them, or as many as fit, "2 of 1,431: a, b, ...". At least one
    item is shown; one of over `width` characters is cut."""
    shown = 1
    while shown < len(items) and len(separator.join(items[: shown + 1])) <= width:
        shown += 1
    text = separator.join(_shortened(item, width) for item in items[:shown])
    return text if shown >= len(items) else f"{shown} of {len(items):,}: {text}{separator}..."


def listed_groups(groups: Mapping[str, Sequence[str]]) -> str:
    """Several lists behind their names as one screen line; empty ones are left out, and so is a name ""."""
    some = {name: items for name, items in groups.items() if items}
    width = 120 // max(1, len(some))
    parts = [(f"{name}: " if name else "") + listed(items, width=width) for name, items in some.items()]
    return "; ".join(parts)


def differences(config: Any, other: Any) -> list[str]:
    """What differs between two configurations of one class, field by field: "text.dim is 256, not 512", where
    512 is the other's."""
    values, others = _by_path(dataclasses.asdict(config)), _by_path(dataclasses.asdict(other))
    return [
        f"{path} is {value}, not {others[path]}" for path, value in values.items() if value != others[path]
    ]


def _by_path(values: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _by_path(value, f"{lead}{key}.") if isinstance(value, dict) else {lead + key: value}
    return flat


def reject_unknown_keys(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first key that `cls` does not have, and one that is spelt like it, or
    those that it has."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:_LONGEST_ITEM], known, n=1)
            hint = f"the nearest is {near[0]!r}" if near else f"it has {listed(known)}"
            raise ValueError(f"{cls.__name__} has no key {_shortened(repr(key))}; {hint}")


MOST_LAYERS = 1000
"""Most layers and stacks of a tower."""
MOST_CHANNELS = 2**24
"""Most of anything else that a tower counts: a file must not make a model whose building never ends."""


def is_rate(value: float) -> bool:
    """Whether it is a number in [0, 1)."""
    return isinstance(value, (int, float)) and 0.0 <= value < 1.0


def is_positive(value: object) -> bool:
    """Whether it is an integer > 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: object) -> bool:
    """Whether it is an integer > 0, and none that no model has."""
    return isinstance(value, int) and is_positive(value) and value <= MOST_CHANNELS


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
    """Rows of the position embedding; captions may have up to this minus pad_token_id minus 1 tokens."""
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
        few = layers == 0 or (_is_size(layers) and layers <= MOST_LAYERS)
        require(few, "text.num_hidden_layers", f"an integer in [0, {MOST_LAYERS}]", layers)
        expected = f"a divisor of hidden_size {self.hidden_size}"
        require(self.hidden_size % heads == 0, "text.num_attention_heads", expected, heads)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            require(is_rate(getattr(self, name)), f"text.{name}", "in [0, 1)", getattr(self, name))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(0 <= value < self.vocab_size, f"text.{name}", f"in [0, {self.vocab_size})", value)
        positions, least = self.max_position_embeddings, self.pad_token_id + 3
        fits = least <= positions <= MOST_CHANNELS
        require(fits, "text.max_position_embeddings", f"in [{least}, {MOST_CHANNELS}]", positions)
        require(self.layer_norm_eps > 0, "text.layer_norm_eps", "positive", self.layer_norm_eps)
        require(self.pooling in ("cls", "mean"), "text.pooling", '"cls" or "mean"', self.pooling)

    @property
    def max_tokens(self) -> int:
        """Longest caption in tokens, special ones included; positions count from pad_token_id + 1."""
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
    """One stack of the speech tower, with every per-stack tuple of `ModelConfig` resolved."""

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
    """Frame-rate divisor of each stack, relative to the 50 Hz that leave the convolutional front."""
    num_encoder_layers: tuple[int, ...] = (1, 2, 3, 4, 1, 1, 1)
    """Layers of each stack."""
    feedforward_dim: tuple[int, ...] = (3840,)
    """Width of each stack's middle feed-forward module; the first has 3/4 and the third 5/4 of it."""
    encoder_dim: tuple[int, ...] = (1280,)
    """Channels of each stack."""
    encoder_unmasked_dim: tuple[int, ...] = (768,)
    """Channels that the feature mask of training never drops."""
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
    """"mean" over time (the paper), or "statistics" of the tower's output and of the log-mel: mean,
    deviation, change from frame to frame, change from half to half."""
    heads: Literal["mlp", "linear"] = "mlp"
    """Projection heads: "mlp" (the paper's four layers), or "linear": running standardisation and one layer.
    Small models learn with the latter in a fraction of the steps, and short prompts add up word by word."""
    dropout: float = 0.1
    """Dropout of the speech tower's feed-forward modules, its front and the heads, while training."""
    regularize: bool = True
    """Feature mask, layer skip, ConvNeXt skip and position dropout of the recipe, while training."""

    def __post_init__(self) -> None:
        count = len(self.downsampling_factor)
        require(count <= MOST_LAYERS, "downsampling_factor", f"of at most {MOST_LAYERS} stacks", count)
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
        only_one = post == 1 or output == 1
        expected = "1 unless output_downsampling_factor is 1"
        require(only_one, "post_encoder_downsampling_factor", expected, post)
        pooling = self.audio_pooling
        require(self.heads in ("mlp", "linear"), "heads", '"mlp" or "linear"', self.heads)
        require(pooling in ("mean", "statistics"), "audio_pooling", '"mean" or "statistics"', pooling)
        require(is_rate(self.dropout), "dropout", "in [0, 1)", self.dropout)
        require(isinstance(self.text, TextConfig), "text", "a TextConfig", self.text)

    def _check_stacks(self) -> None:
        layers = sum(stack.num_layers for stack in self.stacks)
        require(layers <= MOST_LAYERS, "num_encoder_layers", f"at most {MOST_LAYERS} in all stacks", layers)
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
    # CPU time decides here: a small front, one slow stack, pooled statistics, words without layers.
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
"""Named models. "xlarge" is the paper's (724,244,405 parameters); "base" has a speech tower of about 90 M."""
