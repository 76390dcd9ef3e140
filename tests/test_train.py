"""The trainer on a small folder of real files: learning, faults, signals, resume, several processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numerics import assert_agrees
from sample_data import write_rows

import clsp_fast
from clsp_fast import train
from clsp_fast.config import DataConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from clsp_fast.data import DataError
from clsp_fast.storage import log
from clsp_fast.training import checkpoint
from clsp_fast.training import run as run_module

FORMATS = [
    ("wav", "PCM_16", 16000),
    ("wav", "PCM_24", 44100),
    ("wav", "PCM_32", 48000),
    ("flac", "PCM_16", 16000),
    ("mp3", None, 44100),
    ("ogg", None, 48000),
]
PITCHES = {"low": 120.0, "middle": 400.0, "high": 1500.0}

MODEL = ModelConfig(
    downsampling_factor=(4,),
    num_encoder_layers=(1,),
    feedforward_dim=(32,),
    encoder_dim=(24,),
    encoder_unmasked_dim=(16,),
    cnn_module_kernel=(5,),
    num_heads=(2,),
    query_head_dim=(8,),
    output_downsampling_factor=1,
    joint_dim=16,
    embed_channels=(24,),
    audio_pooling="statistics",
    heads="linear",
    dropout=0.1,
    regularize=True,
    text=TextConfig(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=66,
        pooling="mean",
    ),
)


def tone(pitch_hz: float, rate_hz: int, seconds: float, random: np.random.Generator) -> np.ndarray:
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    wave = sum(np.sin(2 * np.pi * pitch_hz * k * time_s) / k for k in (1, 2, 3))
    return (0.2 * wave + 0.01 * random.standard_normal(len(time_s))).astype(np.float32)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 clips in six formats, three pitches; train.jsonl and validation.jsonl."""
    root, random, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for i in range(36):
        suffix, subtype, rate = FORMATS[i % len(FORMATS)]
        label, pitch = list(PITCHES.items())[i // len(FORMATS) % 3]
        path = root / f"clip{i}.{suffix}"
        wave = tone(pitch * random.uniform(0.9, 1.1), rate, random.uniform(0.5, 1.2), random)
        soundfile.write(path, wave, rate, subtype=subtype)
        rows.append(
            {
                "id": f"c{i}",
                "audio": path.name,
                "global_captions": [f"a {label} voice"],
                "finegrained_captions": [f"the voice is {label}", f"someone speaks with a {label} pitch"],
                "tags": {"pitch": label},
                "claims": {"global": [{"pitch": label}], "fine": [{"pitch": label}] * 2},
            }
        )
    write_rows(root / "train.jsonl", rows[:24])
    write_rows(root / "validation.jsonl", rows[24:])
    tasks = {"pitch": {label: [f"a {label} voice"] for label in PITCHES}}
    (root / "tasks.json").write_text(json.dumps(tasks))
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(folder: Path, run: Path, data: dict | None = None, **changes) -> TrainConfig:
    files = {
        "manifest": folder / "train.jsonl",
        "validation": folder / "validation.jsonl",
        "zeroshot": folder / "tasks.json",
    }
    defaults = {
        "run": run,
        "model": MODEL,
        "data": DataConfig(
            **files | {"batch_clips": 8, "buckets": 2, "threads": 1, "augment": 0.5} | (data or {})
        ),
        "optim": OptimConfig(lr=5e-3, stage2_lr=2e-3, warmup_steps=2, average_steps=3),
        "stage1_steps": 6,
        "stage2_steps": 4,
        "log_every": 1,
        "validate_every": 5,
        "save_every": 3,
        "device": "cpu",
    }
    return TrainConfig(**defaults | changes)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in log.read_log(run / "log.jsonl") if r["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return clsp_fast.CLSP.from_pretrained(run / "model").state_dict()


def assert_same_run(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_learns_and_writes_every_result(folder: Path, tmp_path: Path) -> None:
    settings = config(
        folder, tmp_path / "run", stage1_steps=90, stage2_steps=30, save_every=60, validate_every=60
    )
    results = train.train(settings)
    figures = results["validation"]
    assert figures["n"] == 12
    assert figures["zeroshot"]["pitch"]["accuracy"] >= 0.9
    assert figures["retrieval"]["fine"]["text_to_audio"]["hit@5"] >= 0.9
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    assert TrainConfig.from_dict(json.loads((tmp_path / "run/config.json").read_text())) == settings
    assert (tmp_path / "run/curves.png").stat().st_size > 5000
    model = clsp_fast.CLSP.from_pretrained(tmp_path / "run/model")
    clips = [folder / "clip0.wav", folder / "clip16.mp3"]
    best = model.classify(clips, list(PITCHES), template="a {} voice").argmax(1)
    assert best.tolist() == [0, 2]


@pytest.fixture(scope="session")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    train.train(config(folder, run))
    return run


def test_the_same_seed_gives_the_same_run(folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    train.train(config(folder, tmp_path / "run", data={"cache_mb": 0, "prefetch": 1}))
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resumes_bit_exactly_from_any_step(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    real = run_module.forward

    def crash(model, batch, ranks, settings):
        if batch.step == stop_at:
            raise RuntimeError("power cut")
        return real(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(config(folder, tmp_path / "run"))
    monkeypatch.setattr(run_module, "forward", real)
    train.train(config(folder, tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_the_recipes_optimiser_learns_and_resumes_bit_exactly(folder: Path, tmp_path: Path) -> None:
    recipe = OptimConfig(algorithm="scaled_adam", schedule="eden", lr=0.03, stage2_lr=0.01, warmup_steps=2)
    for name, stage1_steps in (("whole", 60), ("parts", 25), ("parts", 60)):
        settings = config(folder, tmp_path / name, stage1_steps=stage1_steps, stage2_steps=0, optim=recipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the configuration of")
            train.train(settings)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    values = [loss for _, loss in losses(tmp_path / "whole")]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


def without_dropout() -> ModelConfig:
    text = dataclasses.replace(MODEL.text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return dataclasses.replace(MODEL, dropout=0.0, regularize=False, text=text)


@pytest.fixture
def one_order_of_addition(each_device: torch.device) -> Iterator[None]:
    """On a card, some gradients of torch and cuDNN are sums in a random order, unless this is switched on."""
    torch.use_deterministic_algorithms(each_device.type == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("no_tf32", "one_order_of_addition")
# torch warns of each operator that has no fixed order.
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_devices_train_alike_and_resume_bit_exactly(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    each_device: torch.device,
    precision: str,
) -> None:
    settings = {"device": each_device.type, "precision": precision, "model": without_dropout()}
    settings |= {"data": {"augment": 0.0}}
    train.train(config(folder, tmp_path / "whole", **settings))
    real = run_module.forward

    def crash(model, batch, ranks, settings):
        if batch.step == 5:
            raise RuntimeError("power cut")
        return real(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(config(folder, tmp_path / "parts", **settings))
    monkeypatch.setattr(run_module, "forward", real)
    train.train(config(folder, tmp_path / "parts", **settings))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")

    train.train(config(folder, tmp_path / "cpu", **settings | {"device": "cpu", "stage1_steps": 1}))
    (_, first), *_ = losses(tmp_path / "whole")
    (_, expected), *_ = losses(tmp_path / "cpu")
    # The loss before the first update, after a chain of some 200 operations. Errors have random signs.
    dtype, count = (torch.bfloat16, 200**0.5) if precision == "bf16" else (torch.float32, 200)
    assert_agrees(first, expected, count=count, dtype=dtype)


def test_the_model_is_the_average_of_the_weights(uninterrupted: Path) -> None:
    newest = checkpoint.newest(uninterrupted / "checkpoints")
    saved = weights(uninterrupted)
    for name in ("encoder_embed.out.weight", "logit_scale"):
        assert torch.equal(saved[name], newest.optim[f"{name}/average"])
        assert not torch.equal(saved[name], newest.model[name])


def test_an_average_that_is_turned_off_is_dropped(folder: Path, tmp_path: Path) -> None:
    train.train(config(folder, tmp_path / "run", stage1_steps=3, stage2_steps=0))
    no_average = OptimConfig(lr=5e-3, stage2_lr=2e-3, warmup_steps=2)
    with pytest.warns(UserWarning, match="has changed"):
        train.train(config(folder, tmp_path / "run", stage1_steps=5, stage2_steps=0, optim=no_average))
    newest = checkpoint.newest(tmp_path / "run/checkpoints")
    assert not [key for key in newest.optim if key.endswith("/average")]
    assert torch.equal(weights(tmp_path / "run")["logit_scale"], newest.model["logit_scale"])


def test_a_finished_run_is_reported_not_repeated(folder: Path, uninterrupted: Path) -> None:
    before = losses(uninterrupted)
    results = train.train(config(folder, uninterrupted))
    assert losses(uninterrupted) == before
    assert results["validation"]["n"] == 12


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_same_command_continues(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, number = run_module.forward, signal.Signals[name]

    def interrupt(model, batch, ranks, settings):
        if batch.step == 4:
            os.kill(os.getpid(), number)
        return real(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", interrupt)
    with pytest.raises(train.Interrupted, match=name) as stop:
        train.train(config(folder, tmp_path / "run"))
    assert stop.value.exit_code == 128 + number
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.endswith("5")] == [
        "step-00000005"
    ]
    monkeypatch.setattr(run_module, "forward", real)
    train.train(config(folder, tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def poison(real: Callable, steps: set[int], where: str) -> Callable:
    def forward(model, batch, ranks, settings):
        output, loss = real(model, batch, ranks, settings)
        if batch.step in steps and where == "loss":
            loss = loss * float("nan")
        if batch.step in steps and where == "gradient":
            # The loss stays finite, its gradient does not: the square root has an infinite slope at zero.
            loss = loss + (model.log_logit_scale * 0).abs().sqrt()
        return output, loss

    return forward


def poison_moments(steps: set[int]) -> Callable:
    """`update_running_statistics` that receives moments of NaN in some of its calls."""
    real, calls = run_module.update_running_statistics, itertools.count()

    def update(model, ranks, bad):
        if next(calls) in steps:
            for norm in model.running_norms:
                norm.batch_moments = norm.batch_moments * float("nan")
        real(model, ranks, bad)

    return update


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(run_module, "forward", poison(run_module.forward, {0}, where))
    settings = config(folder, tmp_path / "run", stage1_steps=1, stage2_steps=0)
    train.train(settings)
    torch.manual_seed(settings.seed)
    fresh = clsp_fast.CLSP(MODEL)
    trained = weights(tmp_path / "run")
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, trained[name]), name
    (record,) = [r for r in log.read_log(tmp_path / "run/log.jsonl") if r["kind"] == "bad_step"]
    assert len(record["clips"]) == 8


def test_stops_after_bad_steps_in_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "forward", poison(run_module.forward, {0, 2, 3, 4}, "loss"))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        train.train(config(folder, tmp_path / "run"))
    assert [step for step, _ in losses(tmp_path / "run")] == [1]


def states(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and the optimiser's state after `step` steps, from the checkpoint."""
    saved = checkpoint._load(run / f"checkpoints/step-{step:08d}")
    return saved.model | saved.optim


@pytest.mark.parametrize("algorithm", ["adamw", "scaled_adam"])
def test_bad_steps_that_are_read_later_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, each_device: torch.device
) -> None:
    """Losses are read after step 3, together with those of the bad steps 1 and 2."""
    settings = config(
        folder,
        tmp_path / "run",
        stage1_steps=4,
        stage2_steps=0,
        log_every=3,
        save_every=1,
        keep_checkpoints=9,
        optim=OptimConfig(algorithm=algorithm, lr=5e-3, warmup_steps=2, average_steps=3),
        device=each_device.type,
    )
    monkeypatch.setattr(run_module, "is_read_after", lambda run, step: step in (2, 3))
    monkeypatch.setattr(run_module, "update_running_statistics", poison_moments({0, 1}))
    monkeypatch.setattr(run_module, "forward", poison(run_module.forward, {0, 1}, "loss"))
    train.train(settings)
    records = log.read_log(settings.run / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "bad_step"] == [0, 1]
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 3]
    after = {step: states(settings.run, step) for step in (1, 2, 3)}
    for name, value in after[1].items():
        assert torch.equal(value, after[2][name]), name
        assert value.isfinite().all(), name
    assert not torch.equal(after[2]["encoder_embed.out.weight"], after[3]["encoder_embed.out.weight"])
    assert all(value.isfinite().all() for value in after[3].values())


def test_bad_steps_are_recorded_if_the_run_fails_before_they_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = poison(run_module.forward, {1, 2}, "loss")

    def forward(model, batch, ranks, settings):
        if batch.step == 4:
            raise torch.OutOfMemoryError("no memory is left")
        return poisoned(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", forward)
    settings = config(folder, tmp_path / "run", log_every=100, save_every=100, validate_every=100)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        train.train(settings)
    records = [r for r in log.read_log(tmp_path / "run/log.jsonl") if r["kind"] == "bad_step"]
    assert [(r["step"], r["loss"], len(r["clips"])) for r in records] == [(1, "nan", 8), (2, "nan", 8)]


def test_the_error_of_a_run_is_raised_even_if_its_outcomes_cannot_be_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error of a GPU, all reads fail."""

    def forward(*_: object) -> object:
        raise ValueError("the first error")

    monkeypatch.setattr(run_module, "forward", forward)
    monkeypatch.setattr(run_module, "read_values", lambda run: 1 / 0)
    with pytest.raises(ValueError, match="the first error"):
        train.train(config(folder, tmp_path / "run"))


def test_outcomes_are_read_every_20_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run with rare log lines would compute for hours although no step is applied."""
    poisoned, steps = poison(run_module.forward, set(range(100)), "loss"), []

    def forward(model, batch, ranks, settings):
        steps.append(batch.step)
        return poisoned(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", forward)
    rarely = {"log_every": 100, "save_every": 100, "validate_every": 100}
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*last: step 2"):
        train.train(config(folder, tmp_path / "run", stage1_steps=30, stage2_steps=0, **rarely))
    assert steps == list(range(20))
    # The run ends because of step 2. The bad steps after it say nothing new.
    records = log.read_log(tmp_path / "run/log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "bad_step"] == [0, 1, 2]


def test_no_checkpoint_is_written_after_too_many_bad_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "forward", poison(run_module.forward, {3, 4, 5}, "gradient"))
    settings = config(folder, tmp_path / "run", log_every=100, save_every=2, validate_every=100)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*last: step 5"):
        train.train(settings)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def spoil(folder: Path, target: Path, faults: int) -> Path:
    """A manifest with a line that is not JSON, and clips that are missing, empty, text, cut, short or NaN."""
    target.mkdir()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(folder / row["audio"])
    (target / "empty.wav").write_bytes(b"")
    (target / "text.mp3").write_text("not audio at all " * 50)
    (target / "half.flac").write_bytes((folder / "clip3.flac").read_bytes()[:300])
    soundfile.write(target / "short.wav", np.zeros(300, np.float32), 16000)
    soundfile.write(target / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    names = ["missing.wav", "empty.wav", "text.mp3", "half.flac", "short.wav", "nan.wav"]
    bad = [rows[0] | {"id": f"bad{i}", "audio": names[i % len(names)]} for i in range(faults)]
    lines = [json.dumps(row) for row in bad + rows]
    (target / "spoiled.jsonl").write_text("\n".join(["{oops", *lines]) + "\n")
    return target / "spoiled.jsonl"


def test_bad_clips_are_counted_and_cost_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = spoil(folder, tmp_path / "bad", faults=6)
    train.train(config(folder, tmp_path / "run", data={"manifest": manifest}))
    records = [r for r in log.read_log(tmp_path / "run/log.jsonl") if r["kind"] == "train"]
    assert len(records) == 10
    (start,) = [r for r in log.read_log(tmp_path / "run/log.jsonl") if r["kind"] == "start"]
    skipped = records[-1]["skipped"] | start["left_out"]
    # The short clip is left out because of its header; the decoder names every other fault.
    assert sum(skipped.values()) == 6
    assert skipped["too_short"] == 1
    assert skipped["open"] == skipped["empty"] == skipped["non_finite"] == 1
    assert "line 1: not JSON" in capsys.readouterr().err


def test_too_many_bad_clips_stop_the_run_with_their_list(folder: Path, tmp_path: Path) -> None:
    manifest = spoil(folder, tmp_path / "bad", faults=18)
    message = r"clips cannot be read, more than data\.max_bad_share.*bad0 \(open\)"
    with pytest.raises(DataError, match=message):
        train.train(config(folder, tmp_path / "run", data={"manifest": manifest, "batch_clips": 32}))


def test_a_set_without_a_usable_clip_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    long = [row | {"audio": str(folder / row["audio"]), "duration_s": 31.0} for row in rows]
    write_rows(tmp_path / "long.jsonl", long)
    with pytest.raises(DataError, match=r"--data\.validation .*all clips are left out: .*too_long"):
        train.train(config(folder, tmp_path / "run", data={"validation": tmp_path / "long.jsonl"}))


def test_another_model_in_the_run_folder_is_refused(folder: Path, uninterrupted: Path) -> None:
    other = dataclasses.replace(MODEL, joint_dim=8)
    with pytest.raises(ValueError, match="holds a run with another model"):
        train.train(config(folder, uninterrupted, model=other))


def test_starts_from_a_saved_model(folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    lr = 1e-6
    slow = OptimConfig(lr=lr)
    settings = config(
        folder, tmp_path / "run", init=uninterrupted / "model", stage1_steps=1, stage2_steps=0, optim=slow
    )
    train.train(settings)
    trained, start = weights(tmp_path / "run"), weights(uninterrupted)
    for name, parameter in clsp_fast.CLSP(MODEL).named_parameters():
        # A step of AdamW moves a weight by about lr, plus weight decay and rounding; 10 lr is a wide bound.
        torch.testing.assert_close(trained[name], start[name], rtol=1e-6, atol=10 * lr, msg=name)
        assert parameter.shape == trained[name].shape
    assert not torch.equal(trained["encoder_embed.out.weight"], start["encoder_embed.out.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "--data.manifst", "x"], "--data.manifest"),
        (["--optim.lr", "-1"], "optim.lr must be positive"),
        (["nowhere.json"], "nowhere.json"),
        (["--data.manifest", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--device", "tpu9"], "device must be"),
        (["--device", "cuda"], "no CUDA device was found"),
        (["base", "--data.manifest", "{folder}/train.jsonl"], "give --data.tokenizer"),
    ],
)
def test_wrong_flags_are_named_with_the_fix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [word.replace("{folder}", str(folder)) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        train.main([*words, "--run-dir", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert stop.value.code not in (0, None)
    assert message in f"{stop.value.code} {captured.err} {captured.out}"


def test_a_config_file_repeats_a_run(folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    path = uninterrupted / "config.json"
    parsed = train.parse([str(path), "--run-dir", str(tmp_path / "run")])
    assert parsed == dataclasses.replace(config(folder, uninterrupted), run=tmp_path / "run")
    wrong = json.loads(path.read_text())
    wrong["data"]["batch_clip"] = 3
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit, match=r"batch_clip.*batch_clips"):
        train.parse([str(tmp_path / "wrong.json")])


COMMAND = [sys.executable, "-m", "clsp_fast.train"]


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_a_killed_run_ends_the_same_with_the_same_command(
    folder: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    path = tmp_path / "config.json"
    settings = config(folder, tmp_path / "run")
    path.write_text(json.dumps(settings.to_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*COMMAND, str(path)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while len(losses(tmp_path / "run")) < 5:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None, "ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    subprocess.run([*COMMAND, str(path)], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_two_ranks_train_like_one(folder: Path, tmp_path: Path) -> None:
    """Without dropout, two ranks of 4 clips and one of 8 see the same batches and take the same steps."""
    plain = dataclasses.replace(MODEL, dropout=0.0, regularize=False)
    text = dataclasses.replace(plain.text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = dataclasses.replace(plain, text=text)
    runs, slow = {}, OptimConfig(lr=1e-4, stage2_lr=1e-4)
    for world in (1, 2):
        runs[world] = tmp_path / f"run{world}"
        data = {"batch_clips": 8 // world, "buckets": 1, "augment": 0.0}
        settings = config(folder, runs[world], data=data, model=plain, optim=slow)
        path = tmp_path / f"{world}.json"
        path.write_text(json.dumps(settings.to_dict()))
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
        command = [*launch, "-m", "clsp_fast.train", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    records = [[r for r in log.read_log(runs[w] / "log.jsonl") if r["kind"] == "train"] for w in (1, 2)]
    for alone, together in zip(*records, strict=True):
        # Adam amplifies rounding errors, so only the first step agrees up to rounding: the rounding of some
        # hundred operations in float32, among them exponentials of logits of up to 14.
        tolerance = 1000 * torch.finfo(torch.float32).eps if alone["step"] == 0 else 2e-2
        for figure in ("loss", "gradient_norm"):
            assert together[figure] == pytest.approx(alone[figure], rel=tolerance), (alone["step"], figure)
    one, two = weights(runs[1]), weights(runs[2])
    torch.manual_seed(settings.seed)
    start = clsp_fast.CLSP(plain).state_dict()
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one)
    assert apart < 1e-2 * moved
