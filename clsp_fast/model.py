"""CLSP: a speech tower and a text tower with one joint embedding space (arXiv 2601.03065).

Semantics and parameter names are those of the reference recipe (icefall, CLSP). Shape suffixes: B clips or
captions, T frames, F mel bins, L tokens or labels, C channels, D dimensions of the joint space.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsp_fast import contention, copies
from clsp_fast.audio import AudioError
from clsp_fast.batches import MIN_FRAMES, embed_recordings
from clsp_fast.checks import check_precision
from clsp_fast.config import Batching, LongAudio, ModelChoice, ModelConfig
from clsp_fast.storage import model_folder
from clsp_fast.tokenizer import Tokenizer
from clsp_fast.towers import roberta, zipformer
from clsp_fast.towers.front import frames_after_front, make_front, standardise
from clsp_fast.towers.layers import (
    Ragged,
    RunningNorm,
    downsampled_lengths,
    make_ragged,
    pool_mean,
    pool_statistics,
)

Padding = Literal["alone", "batch"]


class ClspOutput(NamedTuple):
    """Unit-norm embeddings (B, D) of both towers, and the scalar that multiplies their cosines."""

    audio: Tensor
    text: Tensor
    logit_scale: Tensor


class Transform(nn.Module):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        parts = (nn.Linear(channels, channels), nn.ReLU(), nn.Dropout(dropout), nn.Linear(channels, channels))
        self.sequential = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.sequential(x)  # type: ignore[no-any-return]


def _head(channels: int, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """Projection and transform of one tower."""
    joint = config.joint_dim
    if config.heads == "linear":
        return nn.Sequential(RunningNorm(channels), nn.Linear(channels, joint)), nn.Identity()
    projection = nn.Sequential(nn.Linear(channels, joint), nn.ReLU(), nn.Linear(joint, joint))
    return projection, Transform(joint, config.dropout)


class CLSP(nn.Module):
    """Dual encoder of speech and of text that describes how something is said.

    Args:
        config: the architecture; `clsp_fast.config.MODEL_PRESETS` has named ones.
        tokenizer: only `encode_text` and `classify` need it.

    A new model has random weights; `from_pretrained` reads trained ones.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.encoder_embed = make_front(config)
        self.encoder = zipformer.Zipformer(config)
        if config.post_encoder_downsampling_factor > 1:
            self.encoder_downsample = zipformer.Downsample(config.post_encoder_downsampling_factor)
        pooled = config.audio_dim
        if config.audio_pooling == "statistics":
            pooled = 4 * (config.audio_dim + config.feature_dim)
        self.audio_projection, self.audio_transform = _head(pooled, config)
        self.text_encoder = roberta.Roberta(config.text)
        self.text_projection, self.text_transform = _head(config.text.hidden_size, config)
        # The reference saves the logarithm as "logit_scale". The public property below has the same name, so
        # the parameter cannot be set as an attribute.
        self._parameters["logit_scale"] = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.log_logit_scale.is_meta:
            zipformer.initialise(self.encoder_embed, self.encoder)
            roberta.initialise(self.text_encoder)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of `encode_text`. Setting one that does not fit `config.text` raises ValueError."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None:
            tokenizer.check_fits(self.config.text)
        self._tokenizer = tokenizer

    @property
    def log_logit_scale(self) -> nn.Parameter:
        """The learned logarithm of `logit_scale`; its state_dict name is "logit_scale"."""
        parameter = self._parameters["logit_scale"]
        assert parameter is not None
        return parameter

    @property
    def logit_scale(self) -> Tensor:
        """The scalar that multiplies the cosines: exp of the learned parameter."""
        return self.log_logit_scale.exp()

    @property
    def running_norms(self) -> list[RunningNorm]:
        """The running norms, if the configuration has them; training calls their `update_running`."""
        return [module for module in self.modules() if isinstance(module, RunningNorm)]

    def recompute_layers(self, on: bool) -> None:
        """Switches activation checkpointing on or off. With it, the towers' layers keep only their inputs for
        the backward pass, which computes the layers a second time."""
        for module in self.modules():
            if isinstance(module, (zipformer.ZipformerStack, roberta.Roberta)):
                module.recompute = on

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.log_logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.log_logit_scale.dtype

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        token_ids: Tensor,
        attention_mask: Tensor,
        padding: Padding = "alone",
    ) -> ClspOutput:
        """Embeds the clips and captions of a batch, with gradients. The arguments are those of
        `encode_features` and `encode_tokens`."""
        audio = self.encode_features(features, lengths, padding=padding)
        return ClspOutput(audio, self.encode_tokens(token_ids, attention_mask), self.logit_scale)

    def encode_features(self, features: Tensor, lengths: Tensor, *, padding: Padding = "alone") -> Tensor:
        """Embed log-mel features.

        Args:
            features: (B, T, F) floating point; frames beyond a clip's length are padding.
            lengths: (B,) int64, frames of each clip, 9 <= length <= T. Lengths on a GPU are copied to the
                CPU, which waits for the GPU.
            padding: "alone": every clip gets the embedding that the reference computes for it in a batch of
                one, so the other clips and the padding's values have no influence. "batch": every clip gets
                the embedding that the reference computes for it in this padded batch.

        Returns:
            (B, D) unit-norm embeddings, float32 or wider.

        Raises:
            ValueError: a wrong shape, dtype, length or padding.
        """
        hidden_BTC, hidden_lengths = self.encode_frames(features, lengths, padding=padding)
        return self.join_audio(hidden_BTC, hidden_lengths, features, lengths)

    def encode_frames(
        self, features: Tensor, lengths: Tensor, *, padding: Padding = "alone"
    ) -> tuple[Tensor, Tensor]:
        """The speech tower's output (B, T', C) and its lengths (B,), before pooling.

        Arguments and errors are those of `encode_features`. The paper's model gives 25 frames a second.
        """
        self._check_features(features, lengths, padding)
        lengths = lengths.cpu()
        frames = int(lengths.max())
        x = copies.to_device(features[:, :frames], self.device).to(self.dtype)
        lengths = frames_after_front(lengths)
        all_equal = bool((lengths == lengths[0]).all())
        lengths = copies.to_device(lengths, self.device)
        ragged = None
        if not all_equal:
            ragged = make_ragged(lengths, frames_after_front(frames), alone=padding == "alone")
        return self.run_encoder(x, lengths, ragged)

    def run_encoder(
        self, features_BTF: Tensor, lengths_B: Tensor, ragged: Ragged | None
    ) -> tuple[Tensor, Tensor]:
        """`encode_frames` without its checks. `lengths_B` and `ragged` count frames after the front."""
        x = self.encoder(self.encoder_embed(features_BTF, ragged), ragged)
        lengths_B = downsampled_lengths(lengths_B, self.config.output_downsampling_factor)
        if hasattr(self, "encoder_downsample"):
            x = self.encoder_downsample(x, ragged)[0]
            lengths_B = downsampled_lengths(lengths_B, self.config.post_encoder_downsampling_factor)
        return x, lengths_B

    def join_audio(
        self, hidden_BTC: Tensor, hidden_lengths_B: Tensor, features_BTF: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """Unit-norm embeddings (B, D) from the speech tower's output and input, each with its lengths."""
        if self.config.audio_pooling == "mean":
            pooled = pool_mean(hidden_BTC, hidden_lengths_B)
        else:
            hidden_statistics = pool_statistics(hidden_BTC, hidden_lengths_B)
            features_BTF = standardise(copies.to_device(features_BTF, self.device).to(self.dtype))
            feature_statistics = pool_statistics(features_BTF, copies.to_device(lengths_B, self.device))
            pooled = torch.cat([hidden_statistics, feature_statistics], dim=1)
        return _unit_norm(self.audio_transform(self.audio_projection(pooled)))

    def _check_features(self, features: Tensor, lengths: Tensor, padding: str) -> None:
        bins = self.config.feature_dim
        if features.dim() != 3 or features.shape[2] != bins or not features.is_floating_point():
            got = f"{features.dtype} {tuple(features.shape)}"
            raise ValueError(f"features must be floating point of shape (B, T, {bins}), got {got}")
        if lengths.dtype != torch.int64 or lengths.shape != features.shape[:1] or len(lengths) == 0:
            got = f"{lengths.dtype} {tuple(lengths.shape)}"
            raise ValueError(f"lengths must be int64 of shape ({len(features)},) with B >= 1, got {got}")
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < MIN_FRAMES or longest > features.shape[1]:
            expected = f"in [{MIN_FRAMES}, {features.shape[1]}]"
            raise ValueError(f"lengths must be {expected} frames, got {shortest} to {longest}")
        if padding not in ("alone", "batch"):
            raise ValueError(f'padding must be "alone" or "batch", got {padding!r}')

    def encode_tokens(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed tokenised captions.

        Args:
            token_ids: (B, L) int64, each row from <s> to </s>, then padding.
            attention_mask: (B, L) int64, 1 on tokens, 0 on padding.

        Returns:
            (B, D) unit-norm embeddings, float32 or wider.

        Raises:
            ValueError: a wrong shape or dtype, more tokens than the tower has positions, an id outside the
                vocabulary (checked only if the ids are on the CPU).
        """
        self._check_tokens(token_ids, attention_mask)
        if attention_mask.device.type != "cpu":
            return self.join_text(
                self.text_encoder(token_ids.to(self.device), attention_mask.to(self.device))
            )
        lengths = attention_mask.sum(1)
        groups, parts = roberta.split_by_length(lengths), []
        for group in groups:
            longest = int(lengths[group[-1]])
            rows = (x[group, :longest] for x in (token_ids, attention_mask))
            parts.append(self.text_encoder(*(copies.to_device(x, self.device) for x in rows)))
        order = copies.to_device(torch.cat(groups).argsort(), self.device)
        return self.join_text(torch.cat(parts)[order])

    def join_text(self, pooled_BC: Tensor) -> Tensor:
        """Unit-norm embeddings (B, D) from the text tower's output."""
        return _unit_norm(self.text_transform(self.text_projection(pooled_BC)))

    def _check_tokens(self, token_ids: Tensor, attention_mask: Tensor) -> None:
        text = self.config.text
        if token_ids.dtype != torch.int64 or token_ids.dim() != 2 or token_ids.numel() == 0:
            got = f"{token_ids.dtype} {tuple(token_ids.shape)}"
            raise ValueError(f"token_ids must be int64 of shape (B, L), not empty, got {got}")
        if attention_mask.dtype != torch.int64 or attention_mask.shape != token_ids.shape:
            got = f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
            raise ValueError(f"attention_mask must be int64 of shape {tuple(token_ids.shape)}, got {got}")
        if token_ids.shape[1] > text.max_tokens:
            raise ValueError(
                f"token_ids must have at most {text.max_tokens} tokens, got {token_ids.shape[1]}"
            )
        if token_ids.device.type == "cpu":
            smallest, largest = int(token_ids.min()), int(token_ids.max())
            if smallest < 0 or largest >= text.vocab_size:
                raise ValueError(f"token_ids must be in [0, {text.vocab_size}), got {smallest} to {largest}")

    def encode_audio(
        self,
        audio: Sequence[Any],
        *,
        sample_rate: int | None = None,
        batch_seconds: float = Batching.batch_seconds,
        long_audio: LongAudio = Batching.long_audio,
        window_s: float = Batching.window_s,
        slack_seconds: float = Batching.slack_seconds,
        errors: dict[int, AudioError] | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Tensor:
        """Embed recordings, without gradient and in evaluation mode.

        Args:
            audio: B recordings (paths, or other sources that `features.extract_files` accepts), or B mono
                waveforms (numpy arrays or tensors of shape (samples,)).
            sample_rate: rate of the waveforms in Hz; None: 16000. The rate of a file is in its header.
            batch_seconds: most seconds of audio, padding included, that go through the model at once; this
                bounds its memory. A longer clip forms a batch of its own.
            long_audio: what is done with a clip longer than `window_s`. "whole": embed it in one piece;
                the memory grows with its length squared. "window": split it into windows of `window_s`, and
                average their embeddings, weighted by length and scaled to unit norm. "error": refuse it. The
                default of the commands is "window" (see `EncodeConfig`).
            window_s: seconds; 30, as in the paper's training.
            slack_seconds: a `Segment` may reach this many seconds past the end of its recording; if it
                reaches further, it counts as truncated.
            errors: a dictionary that receives the error of each recording that cannot be used, by position.
                The row of such a recording is NaN. None: the first error is raised.
            progress: True: progress is shown on standard error; a function: called with the number of
                recordings embedded since its last call.

        Returns:
            (B, D) unit-norm embeddings in the order given, on the model's device. A clip's embedding does
            not depend on the other clips, except for rounding.

        Raises:
            TypeError: one path or waveform instead of a list, or recordings and waveforms mixed.
            ValueError: a waveform with NaN or infinity, or an option out of range.
            clsp_fast.audio.AudioError: a recording that cannot be read, is too short or, with "error", too
                long; a waveform far outside [-1, 1], such as one on the scale of 16-bit integers.
        """
        items = _as_list(audio, "audio")
        batching = Batching(
            batch_seconds=batch_seconds,
            long_audio=long_audio,
            window_s=window_s,
            slack_seconds=slack_seconds,
        )
        with self._evaluating():
            embedded = embed_recordings(
                self.encode_features,
                items,
                batching,
                device=self.device,
                sample_rate=sample_rate,
                errors=errors,
                progress=progress,
            )
        if embedded.shape[1] == 0:  # no recording could be embedded
            embedded = torch.full((len(items), self.config.joint_dim), torch.nan, device=self.device)
        return embedded

    def encode_text(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Embed captions, without gradient and in evaluation mode.

        Args:
            captions: B strings, none empty; a caption with more tokens than the text tower has positions is
                cut off.
            batch_size: captions that go through the model at once.

        Returns:
            (B, D) unit-norm embeddings, on the model's device.

        Raises:
            TypeError: a single string instead of a list.
            ValueError: an empty caption, or a model without tokenizer.
        """
        captions = _as_list(captions, "captions")
        if not captions:
            return torch.zeros(0, self.config.joint_dim, device=self.device)
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: give one to CLSP(...), or put tokenizer.json in its folder"
            )
        parts = []
        with self._evaluating():
            for start in range(0, len(captions), batch_size):
                batch = captions[start : start + batch_size]
                tokens = self.tokenizer.encode_batch(batch, self.config.text.max_tokens)
                parts.append(self.encode_tokens(*tokens))
                contention.adapt_waits()
        return torch.cat(parts)

    def classify(
        self, audio: Sequence[Any] | Tensor, labels: Sequence[str], template: str = "A speaker in a {} tone."
    ) -> Tensor:
        """Zero-shot classification: softmax over labels of logit_scale times the cosine.

        Args:
            audio: as in `encode_audio`, or (B, D) embeddings from it.
            labels: L words or phrases.
            template: a sentence with {} in place of the label.

        Returns:
            (B, L) probabilities; each row sums to 1.

        Raises:
            TypeError: a single string or waveform instead of a list.
            ValueError: no labels, or a template without {}.
        """
        labels = _as_list(labels, "labels")
        if not labels:
            raise ValueError("labels must have one entry or more, got none")
        if "{}" not in template:
            raise ValueError(f"template must contain {{}}, got {template!r}")
        if isinstance(audio, Tensor) and audio.dim() == 2 and audio.shape[1] == self.config.joint_dim:
            audio_BD = audio.to(self.device)
        else:
            audio_BD = self.encode_audio(cast(Sequence[Any], audio))
        text_LD = self.encode_text([template.replace("{}", label) for label in labels])
        with torch.no_grad():
            return (self.logit_scale * audio_BD @ text_LD.to(audio_BD.dtype).T).softmax(dim=1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CLSP:
        """Read a model that `save_pretrained` wrote.

        Args:
            source: a folder, or the name of a repository on the Hugging Face hub (needs the extra `hub`).
            device: device of the model; None: the CPU.
            dtype: dtype of the parameters; None: as saved. On a GPU, torch's settings decide whether products
                of float32 parameters use TF32; `clsp_fast.precision.products` changes them for a while.

        Returns:
            The model in evaluation mode; its tokenizer is None if the folder has none.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ValueError: a file that is damaged or does not fit the others.
        """
        path = model_folder.local_folder(source)
        config, file = model_folder.read_config(path), path / "tokenizer.json"
        tokenizer = Tokenizer.from_file(file) if file.exists() else None
        with torch.device("meta"):
            model = cls(config, tokenizer)
        # load_state_dict evaluates the property `logit_scale`, an exponential. On the meta device torch would
        # import its compiler for it. Therefore this parameter is on the CPU.
        model._parameters["logit_scale"] = nn.Parameter(torch.zeros(()))
        model.load_state_dict(model_folder.read_weights(path, model.state_dict()), strict=True, assign=True)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, README.md and, if there is one, tokenizer.json.

        Each file is replaced atomically; other files in the folder stay.
        """
        model_folder.write_model(Path(path), self.config, self.state_dict(), self._tokenizer_json)

    def fingerprint(self, precision: str = "fp32") -> str:
        """SHA-256 of the architecture, the weights with their dtypes, the tokenizer, and the use of TF32.

        Stored embeddings and results use it as the name of the model that made them.

        Args:
            precision: "fp32", "tf32" or "bf16", as the option of the commands. "tf32" gives another
                fingerprint, because the weights have the same dtype as with "fp32".

        Raises:
            ValueError: precision is none of the three.
        """
        check_precision(precision)
        return model_folder.fingerprint(
            self.config, self.state_dict(), self._tokenizer_json, tf32=precision == "tf32"
        )

    @property
    def _tokenizer_json(self) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.to_json()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients. Afterwards every module gets its previous mode back."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            # inference_mode is not used: a layer that is trained on top cannot take tensors made in it.
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def load_model(choice: ModelChoice, device: torch.device) -> CLSP:
    """Reads the model of a command's options, in the chosen precision, onto the device."""
    dtype = torch.bfloat16 if choice.precision == "bf16" else torch.float32
    return CLSP.from_pretrained(choice.model, device=device, dtype=dtype)


def _unit_norm(x_BD: Tensor) -> Tensor:
    return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=1)


def _as_list(values: Any, name: str) -> list[Any]:
    """`values` as a list; TypeError if it is a single item, which would be taken for a list of its parts."""
    single = isinstance(values, (str, bytes, os.PathLike))
    if single or hasattr(values, "shape") or hasattr(values, "read"):
        got = type(values).__name__
        raise TypeError(f"{name} must be a list, got a single {got}; put it into a list: [...]")
    return list(values)
