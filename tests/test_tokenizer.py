"""Captions to token ids: special tokens, truncation, determinism, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sample_data import LFS_POINTER
from tokenizers import Tokenizer as Engine
from tokenizers import models, processors

from clsp_fast import convert, train
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
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
    # 256 bytes, 5 special tokens, and the word with the space before it.
    assert Tokenizer.train(["a"], 1000).vocab_size == 262


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_of_any_unicode_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    content = Tokenizer.train([*CORPUS, "Z\u00fcrich \u58f0"], 400).to_json()
    trained = json.loads(content)["model"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in trained["merges"])
    files = {"plain/tokenizer.json": content, "plain/pair/merges.txt": merges}
    files["plain/pair/vocab.json"] = json.dumps(trained["vocab"], ensure_ascii=False)
    for name, text in files.items():
        for file, written_as in (
            (tmp_path / name, "utf-8"),
            (tmp_path / name.replace("plain", "x"), encoding),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("\n", "\r\n") if written_as == encoding else text, written_as)
    for folder in ("", "pair"):
        plain, other = (Tokenizer.from_file(tmp_path / root / folder) for root in ("plain", "x"))
        assert other.to_json() == plain.to_json()


def test_the_pair_of_files_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    trained = json.loads(Tokenizer.train(CORPUS, 400).to_json())["model"]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps(trained["vocab"]))
    merges.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in trained["merges"]))
    parsed = json.loads(Tokenizer.from_file(tmp_path).to_json())["model"]
    expected = json.loads(Engine(models.BPE.from_file(str(vocab), str(merges))).to_str())["model"]
    assert parsed == expected
    for content, message in (
        ("a b c\n", "line 1"),
        ("#version: 0.2\na\n", "line 2"),
        ("a zz\n", "tokenizer"),
    ):
        merges.write_text(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_file(tmp_path)


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
    with pytest.raises(ValueError, match=r"captions\[1\] must be text, got half a surrogate pair"):
        tokenizer.encode_batch(["a", "a \ud83d"], 64)
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.encode_batch(["a"], 2)
    with pytest.raises(ValueError, match="at least 261"):
        Tokenizer.train(CORPUS, 260)
    assert tokenizer.encode_batch([], 64)[0].shape == (0, 0)


ENDS = (("</s>", 2), ("<s>", 0))


def template(text: str) -> processors.TemplateProcessing:
    known = {"<s>": 0, "</s>": 2, "<mask>": 4}
    return processors.TemplateProcessing(
        single=text, special_tokens=[(t, known[t]) for t in dict.fromkeys(text.split()) if t in known]
    )


@pytest.mark.parametrize(
    "processor",
    [
        None,
        processors.ByteLevel(trim_offsets=False),
        template("$A"),
        template("<s> $A </s>"),
        processors.RobertaProcessing(*ENDS, add_prefix_space=False, trim_offsets=False),
        processors.BertProcessing(*ENDS),
        processors.Sequence([processors.ByteLevel(), template("<s> $A </s>")]),
        processors.Sequence([processors.ByteLevel()]),
    ],
)
@pytest.mark.parametrize("prefix_space", [True, False])
def test_captions_get_start_and_end_tokens_with_any_post_processor(
    tokenizer: Tokenizer, tmp_path: Path, processor: object, prefix_space: bool
) -> None:
    content = json.loads(tokenizer.to_json())
    content["post_processor"] = None
    content["pre_tokenizer"]["add_prefix_space"] = prefix_space
    engine = Engine.from_str(json.dumps(content))
    bare = engine.encode(CORPUS[0]).ids
    if processor is not None:
        engine.post_processor = processor
    engine.save(str(tmp_path / "tokenizer.json"))
    restored = Tokenizer.from_file(tmp_path)
    for loaded in (restored, Tokenizer(Engine.from_str(restored.to_json()))):
        token_ids, mask = loaded.encode_batch([CORPUS[0]], 64)
        assert token_ids[0].tolist() == [0, *bare, 2]
        assert bool((mask == 1).all())


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (template("$A </s>"), r"between <s> \(0\) and </s> \(2\), it gives \['.*'\] \.\.\. \['</s>'\]"),
        (template("<s> $A"), r"ids \[0\] \.\.\. \[\d+\]"),
        (template("</s> $A <s>"), r"ids \[2\] \.\.\. \[0\]"),
        (template("<s> <s> $A </s>"), "must put a caption between"),
        (template("<s> $A </s> </s>"), "must put a caption between"),
        (template("<mask> $A </s>"), r"\['<mask>'\] \.\.\. \['</s>'\]"),
        (processors.RobertaProcessing(("</s>", 7), ("<s>", 5)), r"ids \[5\] \.\.\. \[7\]"),
        (processors.BertProcessing(("</s>", 2), ("<s>", 9)), r"ids \[9\] \.\.\. \[2\]"),
    ],
)
def test_other_ends_than_those_of_the_text_tower_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, processor: object, message: str
) -> None:
    engine = Engine.from_str(tokenizer.to_json())
    engine.post_processor = processor
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_file(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_berts_kind_is_refused_by_name(tmp_path: Path) -> None:
    engine = Engine(
        models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}, unk_token="[UNK]")
    )
    engine.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"lacks.*<s>.*<pad>.*</s>"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<s>": 1, "</s>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocab\.json must have .* it lacks \['<pad>'\]"):
        Tokenizer.from_file(tmp_path)


def test_dropout_of_merges_stored_in_a_file_has_no_effect(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tokenizer.to_json())
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    restored = Tokenizer.from_file(tmp_path)
    for _ in range(3):
        assert torch.equal(
            restored.encode_batch(CORPUS[:3], 64)[0], tokenizer.encode_batch(CORPUS[:3], 64)[0]
        )


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=rf'{name} is a Git LFS pointer.*"git lfs pull"'):
        Tokenizer.from_file(tmp_path)


def renumbered(tokenizer: Tokenizer, swap: tuple[str, str]) -> Tokenizer:
    """The same tokenizer with the ids of two tokens exchanged."""
    content = json.loads(tokenizer.to_json())
    vocabulary = content["model"]["vocab"]
    first, second = vocabulary[swap[0]], vocabulary[swap[1]]
    vocabulary[swap[0]], vocabulary[swap[1]] = second, first
    for token in content["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    content["post_processor"] = None
    return Tokenizer(Engine.from_str(json.dumps(content)))


@pytest.mark.parametrize(
    ("swap", "field", "token_id", "expected"),
    [
        (("<pad>", "<mask>"), "pad_token_id", 4, 1),
        (("<s>", "<mask>"), "bos_token_id", 4, 0),
        (("</s>", "<unk>"), "eos_token_id", 3, 2),
    ],
)
def test_a_tokenizer_whose_ids_differ_from_the_configuration_is_refused_everywhere(
    tokenizer: Tokenizer, tmp_path: Path, swap: tuple[str, str], field: str, token_id: int, expected: int
) -> None:
    other = renumbered(tokenizer, swap)
    message = f"the tokenizer's {swap[0]} is {token_id}, and text.{field} is {expected}"
    config = MODEL_PRESETS["tiny"]
    with pytest.raises(ValueError, match=message):
        CLSP(config, other)
    model = CLSP(config, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.tokenizer = other
    model.save_pretrained(tmp_path / "m")
    other.save(tmp_path / "m/tokenizer.json")
    with pytest.raises(ValueError, match=message):
        CLSP.from_pretrained(tmp_path / "m")
    other.save(tmp_path / "other.json")
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    words = [
        "reference",
        "--checkpoint",
        str(tmp_path / "m/model.safetensors"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit, match=message):
        convert.main(
            [*words, "--config", str(tmp_path / "c.json"), "--tokenizer", str(tmp_path / "other.json")]
        )
    (tmp_path / "t.jsonl").write_text('{"audio": "a.wav", "captions": ["A man."]}\n')
    words = [
        "tiny",
        "--data.manifest",
        str(tmp_path / "t.jsonl"),
        "--run",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    for more in (["--data.tokenizer", str(tmp_path / "other.json")], ["--init", str(tmp_path / "m")]):
        with pytest.raises(SystemExit, match=message):
            train.main([*words, *more])
    assert not (tmp_path / "run/tokenizer.json").exists()
    # With a configuration that has these ids, the tokenizer is accepted.
    text = dataclasses.replace(config.text, **{field: token_id})
    CLSP(dataclasses.replace(config, text=text), other)


def test_a_vocabulary_beyond_the_embedding_is_named(tokenizer: Tokenizer) -> None:
    text = dataclasses.replace(MODEL_PRESETS["tiny"].text, vocab_size=319)
    with pytest.raises(ValueError, match=r"text\.vocab_size must be at least the tokenizer's 320, got 319"):
        CLSP(dataclasses.replace(MODEL_PRESETS["tiny"], text=text), tokenizer)
