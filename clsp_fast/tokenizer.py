"""Captions -> token ids: byte-level BPE with RoBERTa's special tokens, with Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from clsp_fast.config import TextConfig
from clsp_fast.storage import files, textfile

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_REQUIRED_TOKENS = ("<s>", "<pad>", "</s>")
_PROBE = "A calm voice"
_MAX_BYTES = 2**28
"""Largest tokenizer file that is read. The file of a vocabulary of 250,000 tokens has about 2**24 bytes."""


class Tokenizer:
    """Captions -> token ids between <s> and </s>. The alphabet is bytes, so any text can be encoded.

    Args:
        engine: a tokenizer whose vocabulary has <s>, <pad> and </s>. If it adds no tokens to a caption, it
            gets RoBERTa's template. Its padding, truncation and BPE dropout are switched off.

    Raises:
        ValueError: it lacks one of the three tokens, or puts other tokens around a caption.
    """

    def __init__(self, engine: Engine) -> None:
        vocabulary = engine.get_vocab(with_added_tokens=True)
        missing = [token for token in _REQUIRED_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer must have the tokens <s>, <pad> and </s>, it lacks {missing}")
        engine.no_padding()
        engine.no_truncation()
        if getattr(engine.model, "dropout", None):
            engine.model.dropout = None
        self._engine = engine
        self.bos_id, self.pad_id, self.eos_id = (vocabulary[token] for token in _REQUIRED_TOKENS)
        self._ensure_template()

    def _ensure_template(self) -> None:
        """Makes sure that every caption stands between <s> and </s>: training and pooling rely on it."""
        bare = self._engine.encode(_PROBE, add_special_tokens=False).ids
        framed = self._engine.encode(_PROBE).ids
        if framed == bare:
            self._engine.post_processor = _roberta_template(self._engine, add_prefix_space=True)
        elif framed != [self.bos_id, *bare, self.eos_id]:
            tokens = self._engine.encode(_PROBE).tokens
            expected = f"<s> ({self.bos_id}) and </s> ({self.eos_id})"
            raise ValueError(
                f"tokenizer must put a caption between {expected}, it gives {tokens[:1]} ... {tokens[-1:]} "
                f"(ids {framed[:1]} ... {framed[-1:]}); give it RoBERTa's post_processor, or none"
            )

    def check_fits(self, config: TextConfig) -> None:
        """Raises ValueError unless the tokenizer fits a text tower of this configuration: <pad>, <s> and </s>
        must have the same ids in both, and every id must have a row in the tower's embedding."""
        for token, token_id, field in (
            ("<pad>", self.pad_id, "pad_token_id"),
            ("<s>", self.bos_id, "bos_token_id"),
            ("</s>", self.eos_id, "eos_token_id"),
        ):
            expected = getattr(config, field)
            if token_id != expected:
                raise ValueError(
                    f"the tokenizer's {token} is {token_id}, and text.{field} is {expected}: use the "
                    f"tokenizer that the model was trained with, or for a new model set text.{field} to "
                    f"{token_id}"
                )
        if self.vocab_size > config.vocab_size:
            raise ValueError(
                f"text.vocab_size must be at least the tokenizer's {self.vocab_size}, got {config.vocab_size}"
            )

    @property
    def vocab_size(self) -> int:
        """Largest token id, special tokens included, plus 1."""
        return max(self._engine.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, *, lowercase: bool = False) -> Tokenizer:
        """Byte-level BPE trained on captions. The same captions give the same tokenizer.

        Args:
            captions: the corpus.
            vocab_size: largest number of tokens, at least 261 (256 bytes and 5 special tokens); a small
                corpus gives fewer.
            lowercase: convert captions to lower case before encoding.

        Raises:
            ValueError: vocab_size below 261.
        """
        fewest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < fewest:
            raise ValueError(f"vocab_size must be at least {fewest}, got {vocab_size}")
        engine = Engine(models.BPE())
        if lowercase:
            engine.normalizer = normalizers.Lowercase()
        # A space is added before the first word, so that a word has the same tokens wherever it stands.
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator(captions, trainer)
        engine.post_processor = _roberta_template(engine, add_prefix_space=True)
        return cls(engine)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json, or a folder with one or with RoBERTa's vocab.json and merges.txt.

        Raises:
            FileNotFoundError: neither is there.
            ValueError: a file is not a tokenizer, lacks RoBERTa's special tokens, or puts other tokens around
            a caption.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        pair = (path / "vocab.json", path / "merges.txt")
        for part in (file, *pair):
            files.refuse_pointer(part)
        in_one_file = file.is_file()
        if not in_one_file and not all(part.is_file() for part in pair):
            raise FileNotFoundError(f"{path}: no tokenizer.json, nor vocab.json and merges.txt")
        texts = [
            textfile.read_text(part, "a file of a tokenizer", most_bytes=_MAX_BYTES)
            for part in ((file,) if in_one_file else pair)
        ]
        try:
            return cls(Engine.from_str(*texts) if in_one_file else _roberta_engine(*texts))
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} is not a tokenizer: it is neither UTF-8 nor UTF-16") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one tokenizer.json."""
        self._engine.save(str(path))

    def to_json(self) -> str:
        """The content that `save` writes."""
        return self._engine.to_str(pretty=True)

    def encode_batch(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Token ids, padded to the longest caption of the batch.

        Args:
            captions: B strings, none empty or blank.
            max_length: most tokens per caption, <s> and </s> included, at least 3; a longer caption is cut
                off and still ends with </s>.

        Returns:
            (token_ids, attention_mask), both int64 of shape (B, L); the mask is 1 on tokens and 0 on padding.

        Raises:
            TypeError: a single string instead of a list.
            ValueError: a caption is empty or holds half a surrogate pair, or max_length is below 3.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, got a single string; put it into a list")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3, got {max_length}")
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise TypeError(f"captions[{index}] must be a string, got {type(caption).__name__}")
            if not caption.strip():
                raise ValueError(f"captions[{index}] must not be empty, got {caption!r}")
            if not textfile.is_text(caption):
                what = "half a surrogate pair, or bytes that are not UTF-8"
                raise ValueError(f"captions[{index}] must be text, got {what}: {textfile.shown(caption)}")
        rows = [encoding.ids for encoding in self._engine.encode_batch(list(captions))]
        rows = [row if len(row) <= max_length else [*row[: max_length - 1], self.eos_id] for row in rows]
        token_ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id, dtype=torch.int64)
        for row, ids in enumerate(rows):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return token_ids, (torch.arange(token_ids.shape[1]) < lengths[:, None]).long()


def _roberta_engine(vocab: str, merges: str) -> Engine:
    """A tokenizer from the content of RoBERTa's original two files.

    Args:
        vocab: content of vocab.json, a JSON object from tokens to ids.
        merges: content of merges.txt, two tokens per line.
    """
    ids, pairs = json.loads(vocab), list[tuple[str, str]]()
    if not isinstance(ids, dict):
        raise ValueError(f"vocab.json must hold a JSON object, got {type(ids).__name__}")
    for number, line in enumerate(merges.split("\n"), 1):
        if line.strip() and not line.startswith("#version"):
            left, space, right = line.partition(" ")
            if not (left and space and right) or " " in right:
                raise ValueError(f"merges.txt, line {number}: expected two tokens, got {line!a:.60}")
            pairs.append((left, right))
    engine = Engine(models.BPE(ids, pairs))
    known = engine.get_vocab()
    missing = [token for token in _REQUIRED_TOKENS if token not in known]
    if missing:  # if they were added here, they would get ids that no model was trained with
        raise ValueError(f"vocab.json must have the tokens <s>, <pad> and </s>, it lacks {missing}")
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([token for token in SPECIAL_TOKENS if token in known])
    engine.post_processor = _roberta_template(engine, add_prefix_space=False)
    return engine


def _roberta_template(engine: Engine, *, add_prefix_space: bool) -> processors.RobertaProcessing:
    """Puts <s> before and </s> after a caption."""
    ends = [(token, int(engine.token_to_id(token) or 0)) for token in ("</s>", "<s>")]
    return processors.RobertaProcessing(ends[0], ends[1], add_prefix_space=add_prefix_space)
