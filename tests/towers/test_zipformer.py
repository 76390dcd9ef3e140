"""The speech tower against recorded outputs of the reference and against its formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import tower_formulas
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_agrees, assert_as_exact, in_float64, norm
from sample_data import Golden
from torch import Tensor

from clsp_fast.config import ModelConfig, TextConfig
from clsp_fast.model import CLSP
from clsp_fast.towers import zipformer
from clsp_fast.towers.layers import make_ragged
from clsp_fast.towers.zipformer import position_encoding

CPU = torch.device("cpu")
# In float64: about 100 operations in a chain, whose random weights, softmaxes and norms amplify an error by
# up to 1e4. A wrong formula causes errors of more than 1e-3, which is 1e13 roundings.
CHAIN = 1e6
# In float32, with trained weights: about 100 operations in a chain.
FORWARD = 100

TEXT = TextConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=0,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=12,
    pooling="mean",
)
SMALL = ModelConfig(
    feature_dim=20,
    downsampling_factor=(2, 1, 8, 3, 2),
    num_encoder_layers=(1, 2, 1, 1, 1),
    feedforward_dim=(21, 18, 30, 16, 22),
    encoder_dim=(18, 27, 33, 14, 22),
    encoder_unmasked_dim=(9,),
    cnn_module_kernel=(5, 9, 3, 7, 1),
    num_heads=(2, 3, 1, 2, 4),
    query_head_dim=(5, 4, 8, 3, 2),
    value_head_dim=(3, 4, 5, 2, 3),
    pos_head_dim=(2, 3, 4, 1, 2),
    pos_dim=10,
    joint_dim=6,
    embed_channels=(2, 3, 5),
    text=TEXT,
)
CONFIGS = [
    SMALL,
    replace(SMALL, output_downsampling_factor=1),
    replace(SMALL, output_downsampling_factor=1, post_encoder_downsampling_factor=3),
    replace(
        SMALL,
        downsampling_factor=(1,),
        num_encoder_layers=(2,),
        feedforward_dim=(13,),
        encoder_dim=(11,),
        cnn_module_kernel=(15,),
        num_heads=(2,),
        query_head_dim=(4,),
        value_head_dim=(5,),
        pos_head_dim=(4,),
    ),
]


def randomised(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> CLSP:
    """A model in which every tensor matters: without the zeros, ones and small scales of a fresh model."""
    torch.manual_seed(seed)
    model = CLSP(config).eval().to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "encoder" in name and "text" not in name and tensor.dim() < 2:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif "encoder" in name and "text" not in name:
                tensor.copy_(torch.randn_like(tensor) * 1.2 / tensor[0].numel() ** 0.5)
    return model


def clips(lengths: list[int], bins: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    features = torch.randn(len(lengths), max(lengths), bins, dtype=dtype) * 2 - 4
    for row, length in enumerate(lengths):
        features[row, length:] = -23.02585
    return features, torch.tensor(lengths)


def by_formulas(model: CLSP, features: Tensor, lengths: Tensor) -> Tensor:
    """The tower's output in the model's dtype from its formulas, in plain torch."""
    with torch.no_grad():
        return tower_formulas.frames(model.state_dict(), model.config, features.to(model.dtype), lengths)[0]


def stacks_and_output(model: CLSP, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The output of each stack, and the tower's output and lengths, under the recording's names."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        encoder.register_forward_hook(lambda module, args, y, s=s: outputs.update({f"stack{s}": y}))  # type: ignore[misc]
        for s, encoder in enumerate(model.encoder.encoders)
    ]
    with torch.no_grad():
        outputs["encoder_out"], outputs["lengths"] = model.encode_frames(features, lengths, padding="batch")
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("batch", ["main", "single"])
def test_tower_matches_recorded_outputs_of_the_reference(
    recorded: tuple[CLSP, dict[str, Tensor]], batch: str
) -> None:
    model, io = recorded
    given = io[f"{batch}.in.fbank"], io[f"{batch}.in.fbank_lens"]
    outputs, exact = (stacks_and_output(m, *given) for m in (model, in_float64(model)))
    assert torch.equal(outputs.pop("lengths"), io[f"{batch}.out.encoder_out_lens"])
    plain, truth = by_formulas(model, *given), by_formulas(in_float64(model), *given)
    assert_as_exact(outputs["encoder_out"], plain, truth)
    for name, value in outputs.items():
        if f"{batch}.out.{name}" in io:
            recording = io[f"{batch}.out.{name}"]
            assert_agrees(exact[name], recording, count=FORWARD, dtype=torch.float32, name=name)
            assert_as_exact(value, recording, exact[name], name=name)


def test_a_clip_in_any_batch_gives_the_output_of_the_reference_for_the_clip_alone(
    recorded: tuple[CLSP, dict[str, Tensor]],
) -> None:
    model, io = recorded
    given = io["main.in.fbank"], io["main.in.fbank_lens"]
    with torch.no_grad():
        hidden, lengths = model.encode_frames(*given)
    frames = int(given[1][1])
    truth = by_formulas(in_float64(model), given[0][1:2, :frames], given[1][1:2])[0]
    assert_as_exact(hidden[1, : lengths[1]], io["single.out.encoder_out"][0], truth)
    assert not torch.allclose(hidden[3], io["main.out.encoder_out"][3], atol=1e-4)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=["odd strides", "no output stride", "post stride", "one stack"]
)
@pytest.mark.parametrize("lengths", [[9], [10], [41, 41], [57, 30, 9, 23]], ids=str)
def test_tower_follows_the_formulas(config: ModelConfig, lengths: list[int]) -> None:
    model = randomised(config)
    features, lens = clips(lengths, config.feature_dim)
    with torch.no_grad():
        hidden, out_lens = model.encode_frames(features, lens, padding="batch")
        expected, expected_lens = tower_formulas.frames(model.state_dict(), config, features, lens)
    assert torch.equal(out_lens, expected_lens)
    assert hidden.shape == expected.shape
    assert_agrees(hidden, expected, count=CHAIN)


@settings(max_examples=25, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(9, 70), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    index=st.integers(0, len(CONFIGS) - 1),
)
def test_alone_does_not_depend_on_the_batch(lengths: list[int], seed: int, index: int) -> None:
    model = randomised(CONFIGS[index], seed)
    features, lens = clips(lengths, 20)
    for row, length in enumerate(lengths):
        features[row, length:] = float("nan")  # padding must not matter
    with torch.no_grad():
        hidden, out_lens = model.encode_frames(features, lens)
        for row, length in enumerate(lengths):
            single, single_len = model.encode_frames(
                features[row : row + 1, :length], lens[row : row + 1], padding="batch"
            )
            assert int(out_lens[row]) == int(single_len[0]) == single.shape[1]
            assert_agrees(hidden[row, : single.shape[1]], single[0], count=CHAIN)


def test_alone_in_float32_is_batch_invariant(recorded: tuple[CLSP, dict[str, Tensor]]) -> None:
    model, _ = recorded
    features, lens = clips([300, 120, 31, 9, 299, 77], 128, torch.float32)
    with torch.no_grad():
        together = model.encode_features(features, lens)
        apart, truth = (
            torch.cat(
                [m.encode_features(features[i : i + 1, :n], lens[i : i + 1]) for i, n in enumerate(lens)]
            )
            for m in (model, in_float64(model))
        )
    assert_as_exact(together, apart, truth)


def test_padding_semantics_differ_only_where_clips_differ_in_length() -> None:
    model = randomised(SMALL)
    features, lens = clips([40, 40, 40], 20)
    with torch.no_grad():
        assert torch.equal(
            model.encode_features(features, lens), model.encode_features(features, lens, padding="batch")
        )
        features, lens = clips([40, 17, 33], 20)
        alone, batch = (model.encode_features(features, lens, padding=p) for p in ("alone", "batch"))  # type: ignore[arg-type]
    assert_agrees(alone[0], batch[0], count=CHAIN)
    assert (alone[1] - batch[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("frames", "dim"), [(1, 48), (5, 48), (40, 48), (17, 32)])
def test_position_encoding_is_the_recorded_one(golden: Golden, frames: int, dim: int) -> None:
    """Compares with the formula in float64, and with the recording, whose float32 logarithms depend on the
    machine."""
    table = position_encoding(dim, frames, dtype=torch.float32, device=CPU)
    formula = torch.stack([tower_formulas.encoding(dim, offset) for offset in range(1 - frames, frames)])
    assert_agrees(table, formula, count=1, dtype=torch.float32)
    # An angle takes about 10 operations, and the table holds cosines of up to dim / 2 times the angle.
    recording = golden("units")[f"posenc.T{frames}.D{dim}"]
    assert_agrees(table, recording, count=10 * dim / 2, dtype=torch.float32)


def test_position_table_is_not_rounded_by_use_in_another_dtype() -> None:
    before = position_encoding(48, 300, dtype=torch.float32, device=CPU).clone()
    position_encoding(48, 300, dtype=torch.bfloat16, device=CPU)
    with torch.inference_mode():
        position_encoding(48, 5000, dtype=torch.float32, device=CPU)
    assert torch.equal(before, position_encoding(48, 300, dtype=torch.float32, device=CPU))
    long = position_encoding(48, 5000, dtype=torch.float32, device=CPU)
    assert torch.equal(before, long[4700:5299])
    assert not long.is_inference()


def test_gradients_agree_with_the_formulas() -> None:
    model = randomised(SMALL)
    features, lens = clips([45, 12], 20)
    hidden, _ = model.encode_frames(features, lens, padding="batch")
    direction = torch.randn_like(hidden)
    (hidden * direction).sum().backward()
    copies = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected, _ = tower_formulas.frames(copies, SMALL, features, lens)
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder.", "encoder_embed.")):
            assert parameter.grad is not None, name
            size = norm([norm(copy.grad) for copy in copies.values() if copy.grad is not None])
            assert_agrees(
                parameter.grad, copies[name].grad, count=CHAIN, dtype=torch.float64, size=size, name=name
            )


def test_unregularised_training_equals_evaluation() -> None:
    model = randomised(replace(SMALL, dropout=0.0, regularize=False))
    features, lens = clips([45, 12], 20)
    evaluated = model.encode_frames(features, lens)[0]
    assert torch.equal(evaluated, model.train().encode_frames(features, lens)[0])


@pytest.mark.parametrize("change", [{"dropout": 0.0}, {"regularize": False}])
def test_each_regulariser_acts_only_in_training_and_follows_the_seed(change: dict[str, object]) -> None:
    model = randomised(replace(SMALL, **change))  # type: ignore[arg-type]
    features, lens = clips([45, 45], 20)
    evaluated = model.encode_frames(features, lens)[0]
    assert torch.equal(evaluated, model.encode_frames(features, lens)[0])
    model.train()
    first, second, repeated = (
        (torch.manual_seed(seed), model.encode_frames(features, lens)[0])[1] for seed in (1, 2, 1)
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluated)


def test_feature_mask_spares_the_unmasked_channels_and_nests_the_two_groups() -> None:
    model = CLSP(SMALL).train()
    masks = [m for m in model.encoder._feature_masks(torch.zeros(2000, 1, 18)) if m is not None]
    assert [m.shape[2] for m in masks] == [18, 27, 33, 14, 22]
    mask = masks[2][:, 0]
    middle = 9 + (33 - 9) // 2
    assert bool((mask[:, :9] == 1).all())
    assert abs(float(mask[:, 9].mean()) - 0.875) < 0.03
    assert abs(float(mask[:, -1].mean()) - 0.875**2) < 0.03
    assert bool((mask[:, middle] <= mask[:, middle - 1]).all())
    assert torch.equal(masks[0][:, 0, 9], mask[:, 9])


def test_layer_skip_returns_some_clips_unchanged() -> None:
    bypass = zipformer.Bypass(4, skip_rate=0.5).train()
    original, x = torch.zeros(400, 2, 4), torch.ones(400, 2, 4)
    kept = bypass(original, x)[:, 0, 0]
    assert set(kept.tolist()) == {0.0, 0.5}
    assert 0.35 < float((kept == 0).float().mean()) < 0.65
    assert torch.equal(bypass.eval()(original, x), torch.full_like(x, 0.5))


def test_fresh_layers_start_near_the_identity() -> None:
    torch.manual_seed(0)
    model = CLSP(SMALL).eval()
    x = torch.randn(2, 20, 27)
    layer = model.encoder.encoders[1].layers[0]
    encoding = position_encoding(10, 20, dtype=torch.float32, device=CPU)
    y = layer(x, encoding, make_ragged(torch.tensor([20, 11]), 20, alone=True).pad_NT)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=2)
    assert float(cosine.detach().min()) > 0.9
    weights = layer.self_attn1.out_proj.weight
    assert float(weights.detach().abs().max()) <= 0.05 / (3 * 4) ** 0.5 * (1 + torch.finfo(torch.float32).eps)


def test_bfloat16_stays_close_to_float32(recorded: tuple[CLSP, dict[str, Tensor]]) -> None:
    model, io = recorded
    arguments = io["main.in.fbank"], io["main.in.fbank_lens"]
    with torch.no_grad():
        half = model.to(torch.bfloat16).encode_features(*arguments, padding="batch")
        model.float()
    assert half.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(half, io["main.out.audio_embedding"])
    assert float(cosine.min()) >= 0.9995
