"""The towers and the training loop: forward, training step, and a short run from files to a model."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from bench.frontend_inputs import RATE_HZ, speech
from bench.measure import Call, Case, Provider, relative
from clsp_fast.config import MODEL_PRESETS, TRAIN_PRESETS, DataConfig, OptimConfig
from clsp_fast.loss import contrastive_loss
from clsp_fast.model import CLSP
from clsp_fast.towers.roberta import Roberta
from clsp_fast.train import train
from clsp_fast.training import optim

CLIPS = 16
TOKENS = 48


@dataclass(frozen=True)
class Ragged:
    """A batch of clips of 2 to 8 s with captions; the model's weights come from a seed.

    As in training, features are on the model's device, lengths and tokens on the CPU.
    """

    preset: str
    features_BTF: Tensor
    lengths_B: Tensor
    token_ids_BL: Tensor
    mask_BL: Tensor

    def model(self) -> CLSP:
        torch.manual_seed(0)
        with self.features_BTF.device:
            model = CLSP(MODEL_PRESETS[self.preset])
        return model.to(self.features_BTF.device)

    @property
    def audio_s(self) -> float:
        """Seconds of audio, without padding."""
        return float(self.lengths_B.sum()) / 100


def ragged(
    preset: str, clips: int = CLIPS, *, shortest: int = 200, longest: int = 800, device: str = "cpu"
) -> Ragged:
    """A batch of `clips` clips, whose lengths are spread evenly from `shortest` to `longest` frames."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.linspace(shortest, longest, clips).long()
    features_BTF = torch.randn(clips, longest, 128, generator=generator) * 3 - 8
    sizes_B1 = torch.linspace(8, TOKENS, clips).long()[:, None]
    mask_BL = (torch.arange(TOKENS) < sizes_B1).long()
    token_ids_BL = torch.randint(5, 1000, (clips, TOKENS), generator=generator)
    token_ids_BL = token_ids_BL.where(mask_BL > 0, 1)
    return Ragged(preset, features_BTF.to(device), lengths_B, token_ids_BL, mask_BL)


# Forward of the speech tower.


def forward(given: Ragged, *, half: bool = False, model: CLSP | None = None) -> Call:
    model = given.model() if model is None else model
    device = given.features_BTF.device.type

    def call() -> Tensor:
        model.eval()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            return model.encode_features(given.features_BTF, given.lengths_B)

    return call


def clip_by_clip(given: Ragged) -> Call:
    model = given.model().eval()
    clips = [given.features_BTF[i : i + 1, :length] for i, length in enumerate(given.lengths_B.tolist())]

    def call() -> Tensor:
        with torch.inference_mode():
            return torch.cat([model.encode_features(clip, torch.tensor([clip.shape[1]])) for clip in clips])

    return call


def forward_case(preset: str, device: str = "cpu", **settings: Any) -> Case:
    return Case(
        name=f"forward-{'cuda-' * (device == 'cuda')}{preset}",
        area="model",
        what=f"speech embeddings of {CLIPS} clips of 2 to 8 s, preset {preset}",
        inputs=partial(ragged, preset, device=device),
        expected=lambda given: clip_by_clip(given)(),
        gate=relative(1e-4),
        providers=(
            Provider("clsp_fast", forward),
            Provider("clsp_fast, bf16", partial(forward, half=True), gate=relative(5e-2)),
            Provider("clip by clip", clip_by_clip, note="the same model without batches"),
        ),
        amount=5.0 * CLIPS,
        unit="audio seconds",
        threads=2,
        device=device,
        memory=True,
        **settings,
    )


# A training step: forward, loss, backward, optimiser.


def training_step(given: Ragged, *, half: bool = False, model: CLSP | None = None) -> Call:
    model = given.model() if model is None else model
    optimizer = optim.build(model, OptimConfig(lr=1e-4))
    device = given.features_BTF.device.type

    def call() -> Tensor:
        model.train()
        torch.manual_seed(1)  # the same dropout for every provider
        with torch.autocast(device, torch.bfloat16, enabled=half):
            output = model(given.features_BTF, given.lengths_B, given.token_ids_BL, given.mask_BL)
        loss = contrastive_loss(
            output.audio.float(),
            output.text.float(),
            output.logit_scale,
            compute_dtype=torch.bfloat16 if half else None,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


def step_case(preset: str, device: str = "cpu", **settings: Any) -> Case:
    return Case(
        name=f"step-{'cuda-' * (device == 'cuda')}{preset}",
        area="model",
        what=f"training step of {CLIPS} clips of 2 to 8 s and their captions, preset {preset}",
        inputs=partial(ragged, preset, device=device),
        expected=lambda given: training_step(given)(),
        gate=relative(1e-5),
        providers=(
            Provider("clsp_fast", training_step),
            Provider("clsp_fast, bf16", partial(training_step, half=True), gate=relative(5e-2)),
        ),
        amount=5.0 * CLIPS,
        unit="audio seconds",
        threads=2,
        device=device,
        memory=True,
        **settings,
    )


# Forward of the text tower.


def text_tower(given: Ragged) -> Roberta:
    torch.manual_seed(0)
    return Roberta(MODEL_PRESETS[given.preset].text).eval()


def clsp_text(given: Ragged) -> Call:
    tower = text_tower(given)

    def call() -> Tensor:
        with torch.inference_mode():
            return without_padding(tower.hidden(given.token_ids_BL, given.mask_BL), given)

    return call


def transformers_text(given: Ragged) -> Call:
    from transformers import RobertaConfig, RobertaModel

    config = MODEL_PRESETS[given.preset].text
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("max_position_embeddings", "layer_norm_eps", "type_vocab_size", "pad_token_id")
    settings = {name: getattr(config, name) for name in names}
    tower = RobertaModel(RobertaConfig(**settings), add_pooling_layer=False).eval()
    tower.load_state_dict(text_tower(given).state_dict(), strict=False)

    def call() -> Tensor:
        with torch.inference_mode():
            hidden = tower(input_ids=given.token_ids_BL, attention_mask=given.mask_BL).last_hidden_state
            return without_padding(hidden, given)

    return call


def without_padding(hidden_BLC: Tensor, given: Ragged) -> Tensor:
    """Zeros at padding, where the values have no meaning."""
    return hidden_BLC * given.mask_BL[:, :, None]


def text_case(preset: str) -> Case:
    return Case(
        name=f"text-{preset}",
        area="model",
        what=f"text tower, {CLIPS} captions of 8 to {TOKENS} tokens, preset {preset}",
        inputs=partial(ragged, preset),
        expected=lambda given: clsp_text(given)(),
        gate=relative(1e-5),
        providers=(
            Provider("clsp_fast", clsp_text),
            Provider("transformers RobertaModel", transformers_text, "transformers"),
        ),
        amount=CLIPS,
        unit="captions",
        threads=2,
    )


# A run, from files to a saved model.


@dataclass(frozen=True)
class Recordings:
    """A manifest with its files, in a folder that is deleted with this object."""

    folder: tempfile.TemporaryDirectory  # type: ignore[type-arg]

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


def recordings(count: int = 300) -> Recordings:
    made = Recordings(tempfile.TemporaryDirectory(prefix="clsp-bench-"))
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        wave = speech(float(rng.uniform(2.0, 5.0)), seed=i)
        soundfile.write(made.path / f"{i}.wav", wave, RATE_HZ, subtype="PCM_16")
        rows.append({"audio": f"{i}.wav", "captions": [f"Voice {i % 37}, {'slow' if i % 2 else 'fast'}."]})
    (made.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def short_run(given: Recordings, steps: int = 24) -> Callable[[], dict[str, float]]:
    """The timed call is a run; it returns its last log record with throughput and time spent waiting."""
    preset = TRAIN_PRESETS["tiny"]
    data = DataConfig(manifest=given.path / "train.jsonl", batch_clips=64, buckets=4)
    every = {"log_every": steps, "validate_every": 10 * steps, "save_every": 10 * steps}
    config = replace(preset, data=data, stage1_steps=steps, stage2_steps=0, device="cpu", **every)

    def call() -> dict[str, float]:
        with (
            tempfile.TemporaryDirectory(prefix="clsp-bench-") as run,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train(replace(config, run=Path(run)))
            records = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        return next(record for record in reversed(records) if "audio_s_per_s" in record)

    return call


def finite_loss(expected: Any, record: dict[str, float]) -> tuple[bool, str]:
    return bool(np.isfinite(record["loss"])), f"loss {record['loss']:.3f}"


TRAIN = Case(
    name="train-tiny",
    area="train",
    what="24 steps of the tiny preset on 300 files of 2 to 5 s, from nothing to a saved model",
    inputs=recordings,
    expected=lambda given: None,
    gate=finite_loss,
    providers=(Provider("clsp_fast", short_run),),
    threads=2,
    figures=lambda record: {name: record[name] for name in ("audio_s_per_s", "data_wait", "peak_memory_mib")},
)

CASES = (
    forward_case("tiny"),
    forward_case("small", optional=True),
    step_case("tiny"),
    step_case("small", optional=True),
    forward_case("base", "cuda"),
    step_case("base", "cuda"),
    text_case("small"),
    TRAIN,
)
