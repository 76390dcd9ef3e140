"""CLSP as a whole: recorded embeddings and gradients, sizes, the public calls and their errors."""

from __future__ import annotations

import copy
import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import FEW, assert_agrees, assert_as_exact, in_float64
from sample_data import Golden
from torch import Tensor

from clsp_fast import features
from clsp_fast.audio import AudioError, AudioErrorReason
from clsp_fast.config import MODEL_PRESETS, ModelConfig, TextConfig
from clsp_fast.model import CLSP, ClspOutput

CAPTIONS = ["A calm, low-pitched male voice.", "A lively woman speaks fast.", "She whispers."]


def inputs(io: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("fbank", "fbank_lens", "input_ids", "attention_mask")
    return tuple(io[f"main.in.{name}"] for name in names)  # type: ignore[return-value]


# The reference computes the angles of its position tables in float32, also in its float64 run. An angle takes
# about 10 operations, and the table holds cosines of up to 24 times the angle. test_zipformer.py compares the
# tower with its formulas in float64.
TABLE_ROUNDINGS = 10 * 24
# Operations, one after the other, that compute an embedding: some 20 layers of some 10.
CHAIN = 200


def test_embeddings_match_the_recorded_ones(recorded: tuple[CLSP, dict[str, Tensor]]) -> None:
    model, io = recorded
    exact = in_float64(model)
    with torch.no_grad():
        output, truth = (m(*inputs(io), padding="batch") for m in (model, exact))
        alone, alone_truth = (m.encode_features(*inputs(io)[:2])[1] for m in (model, exact))
    assert isinstance(output, ClspOutput)
    for embedded, true, name in (
        (output.audio, truth.audio, "main.{}.audio_embedding"),
        (output.text, truth.text, "main.{}.text_embedding"),
        (alone[None], alone_truth[None], "single.{}.audio_embedding"),
    ):
        recorded64 = io[name.format("out64")]
        assert_agrees(true, recorded64, count=TABLE_ROUNDINGS, dtype=torch.float32, name=name)
        assert_as_exact(embedded, io[name.format("out")], recorded64, name=name)
    assert_agrees(output.logit_scale, io["main.out.logit_scale_exp"], count=8, dtype=torch.float32)


def test_parameter_gradients_match_the_recorded_ones_in_float64(
    recorded: tuple[CLSP, dict[str, Tensor]], golden: Golden
) -> None:
    model, io = recorded
    truth = golden("golden_a.gradients")
    output = model.double()(*inputs(io), padding="batch")
    logits = output.logit_scale * output.audio @ output.text.T
    loss = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert_agrees(loss, truth["loss"], count=TABLE_ROUNDINGS, dtype=torch.float32)
    loss.backward()
    checked = 0
    whole_norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.flatten()
        size = float(truth[f"statistics.{name}"][0])
        if name.endswith(
            "key.bias"
        ):  # it adds the same number to all scores of a query, so its gradient is 0
            assert_agrees(gradient, 0 * gradient, count=1e3, size=whole_norm, name=name)
            continue
        carrier = torch.cos(0.37 * torch.arange(len(gradient), dtype=torch.float64))
        statistics = torch.stack([gradient.norm(), gradient.sum(), (gradient * carrier).sum()])
        judgement = {"count": TABLE_ROUNDINGS, "dtype": torch.float32, "size": size, "name": name}
        assert_agrees(statistics, truth[f"statistics.{name}"], **judgement)
        if f"gradient.{name}" in truth:
            assert_agrees(gradient, truth[f"gradient.{name}"].flatten(), **judgement)
        checked += 1
    assert checked == len([k for k in truth if k.startswith("statistics.")]) - 2


def test_autocast_trains_every_parameter_and_stays_close(recorded: tuple[CLSP, dict[str, Tensor]]) -> None:
    model, io = recorded
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs(io), padding="batch")
    for embedded, name in ((output.audio, "audio_embedding"), (output.text, "text_embedding")):
        assert embedded.dtype == torch.float32
        assert float(F.cosine_similarity(embedded, io[f"main.out.{name}"]).min().detach()) >= 0.9995
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(*inputs(io))
    (output.logit_scale * output.audio @ output.text.T).trace().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all()), name


def count(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_xlarge_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = CLSP(MODEL_PRESETS["xlarge"])
    assert count(model) == 724_244_405
    assert len(model.state_dict()) == 815
    groups = {name: count(module) for name, module in model.named_children() if count(module)}
    assert groups == {
        "encoder_embed": 5_226_225,
        "encoder": 591_747_011,
        "text_encoder": 124_645_632,
        "audio_projection": 918_528,
        "audio_transform": 525_312,
        "text_projection": 656_384,
        "text_transform": 525_312,
    }
    layer = model.encoder.encoders[0].layers[0]
    assert count(layer) == 45_543_713
    assert len([name for name, _ in model.named_buffers() if name.endswith(".bypass_scale")]) == 13


@pytest.mark.parametrize(
    ("preset", "speech", "everything"),
    [
        ("tiny", (1e5, 5e5), (2e5, 7e5)),
        ("small", (8e6, 15e6), (10e6, 20e6)),
        ("base", (88e6, 95e6), (2.1e8, 2.3e8)),
    ],
)
def test_presets_have_their_size(
    preset: str, speech: tuple[float, float], everything: tuple[float, float]
) -> None:
    with torch.device("meta"):
        model = CLSP(MODEL_PRESETS[preset])
    assert speech[0] <= count(model.encoder) + count(model.encoder_embed) <= speech[1]
    assert everything[0] <= count(model) <= everything[1]
    assert not any(name.endswith("logit_scale") for name, _ in model.named_buffers())


def speech(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    return (0.2 * np.sin(2 * np.pi * 150 * time) + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_encode_audio_keeps_the_order_whatever_the_batches(
    tiny: CLSP, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [speech(s, seed=i) for i, s in enumerate((0.5, 2.0, 0.2, 1.1, 2.0))]
    together, truth = tiny.encode_audio(clips), in_float64(tiny).encode_audio(clips)
    assert_agrees(together.norm(dim=1), torch.ones(5), count=FEW, dtype=torch.float32)
    for batch_seconds in (0.1, 2.5):
        embedded = tiny.encode_audio(clips, batch_seconds=batch_seconds, progress=True)
        assert_as_exact(embedded, together, truth, name=f"batches of {batch_seconds} s")
    assert "encoded 5 of 5 clips" in capsys.readouterr().err
    batch = features.extract([clips[3]])
    assert_as_exact(tiny.encode_features(batch.values, batch.lengths)[0], together[3], truth[3])
    assert tiny.encode_audio([]).shape == (0, tiny.config.joint_dim)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batches"), [("tiny", 200), ("every layer", 15)])
def test_a_clip_has_one_embedding_in_any_batch(
    tiny: CLSP, recorded: tuple[CLSP, dict[str, Tensor]], kind: str, batches: int
) -> None:
    model = tiny if kind == "tiny" else recorded[0]
    rng = np.random.default_rng(0)
    clips = [speech(seconds, seed=i) for i, seconds in enumerate(rng.uniform(0.15, 0.9, 12))]
    exact = in_float64(model)
    alone, truth = (torch.cat([m.encode_audio([clip]) for clip in clips]) for m in (model, exact))
    assert torch.equal(alone[3:4], model.encode_audio([clips[3]]))
    for _ in range(batches):
        chosen = rng.permutation(len(clips))[: rng.integers(2, 6)]
        batch = features.extract([clips[i] for i in chosen])
        longer = torch.full((len(chosen), batch.values.shape[1] + int(rng.integers(0, 40)), 128), torch.nan)
        longer[:, : batch.values.shape[1]] = batch.values
        with torch.no_grad():
            together = model.encode_features(longer, batch.lengths)
        assert_as_exact(together, alone[chosen], truth[chosen])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_both_precisions_embed_alike(tiny: CLSP, tmp_path: Path, precision: torch.dtype) -> None:
    tiny.save_pretrained(tmp_path)
    model = CLSP.from_pretrained(tmp_path, dtype=precision)
    clips = [speech(s, seed=i) for i, s in enumerate((0.4, 1.0, 0.7))]
    for embedded, exact in (
        (model.encode_audio(clips), tiny.encode_audio(clips)),
        (model.encode_text(CAPTIONS), tiny.encode_text(CAPTIONS)),
    ):
        assert embedded.dtype == torch.float32
        if precision == torch.float32:
            assert torch.equal(embedded, exact)
        else:  # 1 - cos is half the square of an error of some 10 roundings
            assert float(F.cosine_similarity(embedded, exact).min()) > 0.999
    assert torch.equal(model.encode_audio(clips), model.encode_audio(clips))


def test_encode_audio_takes_files_tensors_and_other_rates(tiny: CLSP, tmp_path: Path) -> None:
    clips = [speech(0.7), speech(0.3, seed=3)]
    paths = [write_wav(tmp_path / f"{i}.wav", clip) for i, clip in enumerate(clips)]
    from_files = tiny.encode_audio([str(paths[0]), paths[1]])
    rounded = [torch.from_numpy((clip * 32767).astype("<i2").astype(np.float32) / 32768) for clip in clips]
    assert torch.equal(from_files, tiny.encode_audio(rounded))
    assert torch.equal(from_files, tiny.encode_audio([path.read_bytes() for path in paths]))
    slow = tiny.encode_audio([speech(1.0, rate=8000)], sample_rate=8000)
    assert torch.equal(
        slow[0], tiny.encode_audio([features.audio.resample(speech(1.0, 8000), from_hz=8000, to_hz=16000)])[0]
    )


def test_encode_audio_names_what_is_wrong(tiny: CLSP, tmp_path: Path) -> None:
    clip, path = speech(0.5), write_wav(tmp_path / "a.wav", speech(0.5))
    for single in (str(path), path, clip, torch.from_numpy(clip), path.read_bytes()):
        with pytest.raises(TypeError, match="list"):
            tiny.encode_audio(single)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="both"):
        tiny.encode_audio([path, clip])
    with pytest.raises(AudioError) as missing:
        tiny.encode_audio([path, tmp_path / "missing.wav"])
    assert missing.value.reason == AudioErrorReason.OPEN
    short = write_wav(tmp_path / "short.wav", speech(0.05))
    for item, name in ((short, "short.wav"), (speech(0.05), r"audio\[1\]")):
        with pytest.raises(AudioError, match=name) as error:
            tiny.encode_audio([path if item is short else clip, item])
        assert error.value.reason == AudioErrorReason.TOO_SHORT
    clip[100] = np.nan
    with pytest.raises((ValueError, AudioError), match=r"(?i)nan|finite"):
        tiny.encode_audio([clip])


def test_statistics_of_a_clip_do_not_depend_on_its_batch(tiny: CLSP) -> None:
    lengths = [9, 40, 33]
    x = torch.randn(3, 60, 128) * 3 - 8
    for row, length in enumerate(lengths):
        x[row, length:] = float("nan")
    exact = in_float64(tiny)
    with torch.no_grad():
        together = tiny.encode_features(x, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            clip = x[row : row + 1, :length], torch.tensor([length])
            single, truth = tiny.encode_features(*clip), exact.encode_features(*clip)
            assert_as_exact(together[row], single[0], truth[0], name=f"{length} frames")


def test_encode_text_batches_and_truncates(tiny: CLSP) -> None:
    captions = [*CAPTIONS, "calm " * 500]
    together = tiny.encode_text(captions)
    truth = in_float64(tiny).encode_text(captions, batch_size=1)
    assert_as_exact(together, tiny.encode_text(captions, batch_size=1), truth)
    assert_agrees(together.norm(dim=1), torch.ones(4), count=FEW, dtype=torch.float32)
    assert tiny.encode_text([]).shape == (0, tiny.config.joint_dim)
    with pytest.raises(TypeError, match="list"):
        tiny.encode_text("a caption")
    with pytest.raises(ValueError, match="empty"):
        tiny.encode_text([" "])


def test_classify_is_the_softmax_of_scaled_cosines(tiny: CLSP) -> None:
    clips = [speech(0.5), speech(0.8, seed=2)]
    probabilities = tiny.classify(clips, ["calm", "lively", "sad"])
    audio = tiny.encode_audio(clips)

    def by_definition(model: CLSP) -> Tensor:
        captions = [f"A speaker in a {label} tone." for label in ("calm", "lively", "sad")]
        logits = model.logit_scale.detach() * model.encode_audio(clips) @ model.encode_text(captions).T
        return logits.softmax(1)

    expected, truth = by_definition(tiny), by_definition(in_float64(tiny))
    assert_as_exact(probabilities, expected, truth)
    assert_as_exact(tiny.classify(audio, ["calm", "lively", "sad"]), expected, truth)
    for arguments, error in (
        ((clips, "calm"), TypeError),
        ((clips[0], ["calm"]), TypeError),
        ((clips, []), ValueError),
        ((clips, ["calm"], "no place"), ValueError),
    ):
        with pytest.raises(error):
            tiny.classify(*arguments)  # type: ignore[arg-type]


def test_encoding_is_deterministic_and_leaves_the_mode_alone(tiny: CLSP) -> None:
    config = replace(tiny.config, dropout=0.5, regularize=True)
    model = CLSP(config, tiny.tokenizer).train()
    model.text_encoder.eval()
    clips = [speech(0.5), speech(0.3)]
    assert torch.equal(model.encode_audio(clips), model.encode_audio(clips))
    assert model.training
    assert model.encoder.training
    assert not model.text_encoder.training
    assert not model.encode_audio(clips).requires_grad
    assert not model.encode_audio(clips).is_inference()


def test_logit_scale_is_the_multiplier_and_trains(tiny: CLSP) -> None:
    assert float(tiny.logit_scale.detach()) == pytest.approx(1 / 0.07)
    assert "logit_scale" in dict(tiny.named_parameters())
    assert dict(tiny.named_parameters())["logit_scale"] is tiny.log_logit_scale
    gradient = torch.autograd.grad(tiny.logit_scale, tiny.log_logit_scale)[0]
    assert float(gradient) == pytest.approx(1 / 0.07)


def test_wrong_inputs_are_named(tiny: CLSP) -> None:
    x, lengths = torch.zeros(2, 30, 128), torch.tensor([30, 20])
    ids = torch.tensor([[0, 5, 2], [0, 2, 1]])
    for arguments, message in (
        ((x[0], lengths), "features must"),
        ((x[..., :5], lengths), r"features must .*\(B, T, 128\)"),
        ((x.long(), lengths), "features must be floating"),
        ((x, lengths.float()), r"lengths must be int64 of shape \(2,\)"),
        ((x, lengths[:, None]), "lengths must be int64"),
        ((x, torch.tensor([31, 20])), r"lengths must be in \[9, 30\]"),
        ((x, torch.tensor([30, 8])), r"lengths must be in \[9, 30\] frames, got 8 to 30"),
        ((x[:0], lengths[:0]), "B >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.encode_features(*arguments)
    with pytest.raises(ValueError, match="padding must be"):
        tiny.encode_features(x, lengths, padding="zeros")  # type: ignore[arg-type]
    for arguments, message in (
        ((ids.int(), ids), "token_ids must be int64"),
        ((ids, (ids != 1).float()), "attention_mask must be int64"),
        ((ids, ids[:1]), "attention_mask must be int64"),
        ((ids + 5000, (ids != 1).long()), "vocab|token_ids must be in"),
        (
            (torch.zeros(1, 500, dtype=torch.int64), torch.ones(1, 500, dtype=torch.int64)),
            "at most 128 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.encode_tokens(*arguments)
    small = replace(tiny.config, text=replace(tiny.config.text, vocab_size=100))
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        CLSP(small, tiny.tokenizer)


def test_tokens_beyond_the_longest_caption_cost_and_change_nothing(tiny: CLSP) -> None:
    ids = torch.tensor([[0, 5, 9, 2, 1, 1, 1, 1], [0, 7, 2, 1, 1, 1, 1, 1]])
    mask = (ids != 1).long()
    seen: list[int] = []
    hook = tiny.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    whole, cut = tiny.encode_tokens(ids, mask), tiny.encode_tokens(ids[:, :4], mask[:, :4])
    hook.remove()
    assert torch.equal(whole, cut)
    assert seen == [4, 4]


def test_captions_of_different_lengths_keep_their_order(tiny: CLSP) -> None:
    lengths = torch.tensor([3, 60] * 40)
    mask = (torch.arange(60) < lengths[:, None]).long()
    ids = torch.randint(5, 300, mask.shape).where(mask > 0, 1)
    with torch.no_grad():
        expected, truth = (
            torch.cat([model.encode_tokens(ids[i : i + 1], mask[i : i + 1]) for i in range(80)])
            for model in (tiny, in_float64(tiny))
        )
        assert_as_exact(tiny.encode_tokens(ids, mask), expected, truth)


def test_configuration_round_trips_and_names_what_is_wrong() -> None:
    for config in MODEL_PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for change, message in (
        ({"encoder_dim": (64, 64)}, "encoder_dim must be of length 1 or 7"),
        ({"encoder_dim": (0,)}, "encoder_dim must be a tuple of positive integers"),
        ({"cnn_module_kernel": (4,)}, "cnn_module_kernel must be odd"),
        ({"encoder_unmasked_dim": (2000,)}, "encoder_unmasked_dim must be at most"),
        ({"pos_dim": 7}, "pos_dim must be even"),
        ({"post_encoder_downsampling_factor": 2}, "post_encoder_downsampling_factor must be 1 unless"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"embed_channels": (1, 2)}, "embed_channels"),
        ({"audio_pooling": "max"}, "audio_pooling"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"text.num_attention_heads must be a divisor of hidden_size 768, got 7"
    ):
        TextConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="nearest is 'hidden_size'"):
        ModelConfig.from_dict({"text": {"hidden_sizes": 3}})


def test_a_fresh_tiny_model_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = CLSP(MODEL_PRESETS["tiny"])
    x = torch.randn(16, 60, 128) + 2 * torch.randn(16, 1, 128) - 8
    ids, mask = torch.randint(5, 300, (16, 6)), torch.ones(16, 6, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    lengths, target = torch.full((16,), 60), torch.arange(16)
    losses = []
    for _ in range(25):
        output = model(x, lengths, ids, mask)
        losses.append(F.cross_entropy(output.logit_scale * output.audio @ output.text.T, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[0].detach()) > 2.5
    assert float(losses[-1].detach()) < 0.5


@pytest.mark.usefixtures("no_tf32")
def test_both_devices_embed_alike(tiny: CLSP, tmp_path: Path, each_device: torch.device) -> None:
    paths = [write_wav(tmp_path / f"{i}.wav", speech(0.5 + 0.3 * i, seed=i)) for i in range(5)]
    captions = ["A calm voice.", "A lively woman speaks fast, and then she whispers."]
    model = copy.deepcopy(tiny).to(each_device)
    for embed, settings in ((CLSP.encode_audio, {"batch_seconds": 2.5}), (CLSP.encode_text, {})):
        items = paths if settings else captions
        truth, plain = (embed(m, items, **settings) for m in (in_float64(tiny), tiny))
        result = embed(model, items, **settings)
        assert result.device.type == each_device.type
        if each_device.type == "cpu":
            assert_as_exact(result, plain, truth)
        else:
            # A card computes by other algorithms, so the CPU's error is no measure of its error.
            assert_agrees(result, truth, count=CHAIN, dtype=torch.float32)


def test_both_devices_embed_alike_in_bf16(tiny: CLSP, tmp_path: Path, each_device: torch.device) -> None:
    paths = [write_wav(tmp_path / f"{i}.wav", speech(0.5 + 0.3 * i, seed=i)) for i in range(5)]
    truth = in_float64(tiny).encode_audio(paths)
    with torch.autocast(each_device.type, torch.bfloat16):
        result = copy.deepcopy(tiny).to(each_device).encode_audio(paths)
    # The errors, of random signs, add up like the square root of their number.
    assert_agrees(result, truth, count=CHAIN**0.5, dtype=torch.bfloat16)
