"""The text tower against recorded outputs of the reference, transformers, and its formulas."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from numerics import assert_agrees, assert_as_exact, in_float64
from sample_data import GOLDEN, Golden
from torch import Tensor

from clsp_fast import convert
from clsp_fast.config import TextConfig
from clsp_fast.towers import roberta
from clsp_fast.towers.roberta import Roberta, split_by_length

TEXT = TextConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=20,
)

# In float64: three layers of about 20 operations. Their random weights amplify errors.
CHAIN = 1e4


def captions(lengths: list[int]) -> tuple[Tensor, Tensor]:
    token_ids = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        token_ids[row, :length] = torch.randint(4, 50, (length,))
        token_ids[row, 0], token_ids[row, length - 1] = 0, 2
    return token_ids, (token_ids != 1).long()


def randomised(config: TextConfig, dtype: torch.dtype = torch.float64) -> Roberta:
    tower = Roberta(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    return tower


def test_pooler_output_matches_the_recorded_one(golden: Golden) -> None:
    config = json.loads((GOLDEN / "golden_a.config.json").read_text())
    tower = convert.from_reference(golden("golden_a.weights"), config).text_encoder
    io = golden("golden_a.io")
    with torch.no_grad():
        given = io["main.in.input_ids"], io["main.in.attention_mask"]
        pooled, truth = tower(*given), in_float64(tower)(*given)
    # About 50 operations in a chain. The recording is in float32.
    assert_agrees(truth, io["main.out.text_pooler"], count=50, dtype=torch.float32)
    assert_as_exact(pooled, io["main.out.text_pooler"], truth)


@pytest.mark.slow
def test_equals_transformers_in_float64() -> None:
    from transformers import RobertaConfig, RobertaModel

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    values = {name: getattr(TEXT, name) for name in names}
    config = RobertaConfig(
        **values, max_position_embeddings=TEXT.max_position_embeddings, type_vocab_size=1, layer_norm_eps=1e-5
    )
    reference = RobertaModel(config).double().eval()
    tower = Roberta(TEXT).double().eval()
    weights = {
        k: v for k, v in reference.state_dict().items() if not k.endswith(("position_ids", "type_ids"))
    }
    tower.load_state_dict(weights, strict=True)
    token_ids, mask = captions([18, 3, 7])
    with torch.no_grad():
        expected = reference(token_ids, mask)
        hidden = tower.hidden(token_ids, mask)
        pooled = tower(token_ids, mask)
    assert_agrees(pooled, expected.pooler_output, count=CHAIN)
    keep = mask.bool()
    assert_agrees(hidden[keep], expected.last_hidden_state[keep], count=CHAIN)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_caption_does_not_depend_on_its_batch(pooling: str) -> None:
    tower = randomised(replace(TEXT, pooling=pooling))  # type: ignore[arg-type]
    token_ids, mask = captions([18, 3, 7, 11])
    with torch.no_grad():
        together = tower(token_ids, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            single = tower(token_ids[row : row + 1, :length], mask[row : row + 1, :length])
            assert_agrees(together[row], single[0], count=CHAIN)


def test_tower_without_layers_is_the_mean_of_normalised_embeddings() -> None:
    tower = randomised(replace(TEXT, num_hidden_layers=0, pooling="mean"))
    token_ids, mask = captions([5, 9])
    e = tower.embeddings
    x = e.word_embeddings.weight[token_ids[0, :5]] + e.position_embeddings.weight[2:7]
    x = torch.nn.functional.layer_norm(
        x + e.token_type_embeddings.weight[0], (24,), e.LayerNorm.weight, e.LayerNorm.bias, 1e-5
    )
    assert_agrees(tower(token_ids, mask)[0], x.mean(0), count=100)


def test_fresh_tower_starts_as_its_embeddings_and_learns_from_the_first_step() -> None:
    config = replace(TEXT, pooling="mean", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tower = Roberta(config)
    roberta.initialise(tower)
    token_ids, mask = captions([6, 6])
    embedded = tower.embeddings(token_ids)
    # LayerNorm changes normalised values only by its epsilon.
    expected = embedded
    for _ in range(2 * config.num_hidden_layers):
        expected = torch.nn.functional.layer_norm(expected, (24,), eps=config.layer_norm_eps)
    assert_agrees(
        tower.hidden(token_ids, mask), expected, count=16 * config.num_hidden_layers, dtype=torch.float32
    )
    tower(token_ids, mask).pow(3).sum().backward()
    for layer in tower.encoder["layer"]:
        assert float(layer.output.dense.weight.grad.abs().max()) > 0
    bag = Roberta(replace(config, num_hidden_layers=0)).double()
    roberta.initialise(bag)
    order = torch.tensor([0, 3, 1, 2, 4, 5])
    assert_agrees(bag(token_ids[:, order], mask), bag(token_ids, mask), count=100)


def test_dropout_acts_only_in_training() -> None:
    tower = randomised(TEXT)
    token_ids, mask = captions([6, 4])
    evaluated = tower(token_ids, mask)
    assert torch.equal(evaluated, tower(token_ids, mask))
    assert not torch.equal(evaluated, tower.train()(token_ids, mask))


def test_short_and_long_captions_are_computed_apart_if_that_saves_work() -> None:
    mixed = torch.tensor([10, 90] * 40)
    short, long = split_by_length(mixed)
    assert short.tolist() == list(range(0, 80, 2))
    assert long.tolist() == list(range(1, 80, 2))
    for lengths in (torch.full((80,), 90), torch.tensor([10, 90]), torch.tensor([7]), torch.arange(80, 90)):
        (alone,) = split_by_length(lengths)
        assert alone.tolist() == lengths.argsort(stable=True).tolist()
