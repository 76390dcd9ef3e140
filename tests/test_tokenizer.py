"""Captions to token ids: special tokens, truncation, determinism, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Engine

from clsp_fast.tokenizer import Tokenizer

CORPUS = [
    "A calm, low-pitched male voice that speaks slowly.",
    "A lively woman speaks fast, with a rising pitch.",
    "She whispers; the recording is quiet and noisy.",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 320)


def test_special_tokens_have_robertas_ids_and_frame_each_caption(tokenizer: Tokenizer) -> None:
    engine = Engine.from_str(tokenizer.to_json())
    assert [engine.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    token_ids, mask = tokenizer.encode_batch(["A calm voice.", "A calm, low-pitched male voice speaks."], 64)
    assert token_ids.dtype == mask.dtype == torch.int64
    assert token_ids.shape == mask.shape
    for ids, keep in zip(token_ids.tolist(), mask.tolist(), strict=True):
        length = sum(keep)
        assert keep == [1] * length + [0] * (len(ids) - length)
        assert ids[0] == 0
        assert ids[length - 1] == 2
        assert all(i == 1 for i in ids[length:])
        assert all(i > 4 for i in ids[1 : length - 1])
    assert mask[1].sum() == token_ids.shape[1]


def test_any_text_is_coded_without_unknown_tokens_and_comes_back(tokenizer: Tokenizer) -> None:
    text = "Zürich 日本語 🎤 — naïve\tvoice"
    token_ids, _ = tokenizer.encode_batch([text], 500)
    assert 3 not in token_ids[0].tolist()
    engine = Engine.from_str(tokenizer.to_json())
    assert engine.decode(token_ids[0].tolist()).strip() == text


def test_truncation_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    full, _ = tokenizer.encode_batch(["calm " * 50], 512)
    token_ids, mask = tokenizer.encode_batch(["calm " * 50, "calm"], 10)
    assert token_ids.shape == (2, 10)
    assert token_ids[0].tolist() == [*full[0, :9].tolist(), 2]
    assert mask[0].tolist() == [1] * 10
    assert token_ids[1, int(mask[1].sum()) - 1] == 2


def test_training_is_deterministic_and_keeps_to_the_size(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(CORPUS, 320).to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size == 320
    assert Tokenizer.train(["a"], 1000).vocab_size == 262  # the word with the space before it


def test_lowercase_folds_case() -> None:
    folded = Tokenizer.train(CORPUS, 320, lowercase=True)
    assert torch.equal(*(folded.encode_batch([t], 64)[0] for t in ("A Calm Voice", "a calm voice")))


def test_word_has_one_code_at_the_start_and_inside(tokenizer: Tokenizer) -> None:
    first, second = (tokenizer.encode_batch([t], 64)[0][0].tolist() for t in ("calm voice", "voice calm"))
    assert sorted(first) == sorted(second)


def test_files_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    caption = ["A calm voice, speaking fast."]
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        restored = Tokenizer.from_file(source)
        assert torch.equal(restored.encode_batch(caption, 64)[0], tokenizer.encode_batch(caption, 64)[0])


def test_reads_robertas_pair_of_files(tmp_path: Path) -> None:
    trained = json.loads(Tokenizer.train(CORPUS, 400).to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(trained["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in trained["merges"])
    )
    tokenizer = Tokenizer.from_file(tmp_path)
    token_ids, _ = tokenizer.encode_batch(["A calm voice."], 64)
    assert token_ids[0, 0] == 0
    assert token_ids[0, -1] == 2
    assert tokenizer.vocab_size == len(trained["vocab"])


def test_padding_or_truncation_stored_in_a_file_has_no_effect(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine.from_str(tokenizer.to_json())
    engine.enable_padding(length=40, pad_id=1, pad_token="<pad>")
    engine.enable_truncation(4)
    engine.save(str(tmp_path / "tokenizer.json"))
    caption = ["A calm voice, speaking fast."]
    restored = Tokenizer.from_file(tmp_path)
    assert torch.equal(restored.encode_batch(caption, 64)[0], tokenizer.encode_batch(caption, 64)[0])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00\xff"])
def test_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="tokenizer"):
        Tokenizer.from_file(tmp_path)


def test_file_without_special_tokens_and_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    plain = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    (tmp_path / "tokenizer.json").write_text(plain)
    with pytest.raises(ValueError, match="<pad>"):
        Tokenizer.from_file(tmp_path)


def test_wrong_arguments_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="list"):
        tokenizer.encode_batch("a caption", 64)
    with pytest.raises(TypeError, match=r"captions\[1\]"):
        tokenizer.encode_batch(["a", 3], 64)  # type: ignore[list-item]
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match=r"captions\[1\] must not be empty"):
            tokenizer.encode_batch(["a", empty], 64)
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.encode_batch(["a"], 2)
    with pytest.raises(ValueError, match="at least 261"):
        Tokenizer.train(CORPUS, 260)
    assert tokenizer.encode_batch([], 64)[0].shape == (0, 0)
