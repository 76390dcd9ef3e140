"""Files made to run code, fill the memory or hang the reader are refused by name, quickly and cheaply."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import peak_memory
from sample_data import Attack

from clsp_fast import convert
from clsp_fast.data.manifest import read_source
from clsp_fast.evaluation.tasks import read_tasks
from clsp_fast.model import CLSP
from clsp_fast.storage import embedding_folder
from clsp_fast.storage.model_folder import FORMAT, read_config
from clsp_fast.tokenizer import Tokenizer

DEEP = 100_000
SECONDS = 10.0  # of all threads; a refusal takes 0.1 s, and several times as long on a busy machine
MEGABYTES = 200


def header(content: bytes, size: int | None = None) -> bytes:
    """The beginning of a .safetensors file."""
    return (len(content) if size is None else size).to_bytes(8, "little") + content


def tensor(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}


SAFETENSORS = {
    "a pickle by another name": pickle.dumps({"model": Attack()}),
    "an empty file": b"",
    "a header of 2^63 bytes": header(b"{}", 2**63),
    "a header of 4 GB": header(b"{}", 2**32),
    "a header of 90 MB": header(b'{"a":' + b" " * 90_000_000 + b"3}"),
    "nesting": header(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "overlapping tensors": header(json.dumps({"a": tensor(0, 64), "b": tensor(32, 96)}).encode()) + bytes(96),
    "data beyond the end": header(json.dumps({"a": tensor(0, 2**40)}).encode()) + bytes(64),
    "a shape that overflows": header(
        json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    ),
}
JSON = {
    "nesting": "[" * DEEP + "]" * DEEP,
    "no text": b"\xff\xfe\x00".decode("latin-1"),
    "another type": "3",
    "an endless number": '{"format": ' + "9" * 100_000 + "}",
}


@pytest.fixture(autouse=True, scope="module")
def _warm(model_folder: Path) -> None:
    """Loads a model first, so that imports do not count as the cost of a hostile file."""
    CLSP.from_pretrained(model_folder)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(read: Callable[[], object], match: str | None = None) -> None:
    """Asserts that `read` raises ValueError within the limits of time and memory, and runs no attack."""
    started = time.process_time()
    with peak_memory() as peak, pytest.raises(ValueError, match=match):
        read()
    assert time.process_time() - started < SECONDS
    assert peak.bytes < MEGABYTES * 1e6
    assert not Path("attack_ran").exists()


@pytest.mark.parametrize("name", SAFETENSORS)
def test_weights(name: str, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SAFETENSORS[name])
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    refused(lambda: CLSP.from_pretrained(tmp_path), r"model\.safetensors (is damaged|does not fit)")
    refused(lambda: convert.read_checkpoint(file), r"model\.safetensors is not a checkpoint")


@pytest.mark.parametrize("name", JSON)
def test_json(name: str, model_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json", "tasks.json"):
        (tmp_path / file).write_text(JSON[name], encoding="latin-1")
    refused(lambda: read_config(tmp_path), r"config\.json")
    refused(lambda: Tokenizer.from_file(tmp_path), "not a tokenizer|cannot be read|config")
    refused(lambda: convert.read_checkpoint(tmp_path), r"index\.json")
    for short in (True, False):
        refused(lambda short=short: read_tasks(tmp_path / "tasks.json", short=short), r"tasks\.json")
    refused(lambda: embedding_folder.parse_object(JSON[name]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_encoder_layers", [10**9]),
        ("downsampling_factor", [1] * 10**5),
        ("encoder_dim", [10**15]),
        ("joint_dim", 10**15),
        ("text", {"num_hidden_layers": 10**9}),
        ("text", {"vocab_size": 10**15}),
    ],
)
def test_sizes_that_no_model_has(key: str, value: object, tmp_path: Path) -> None:
    content = {"format": FORMAT, "format_version": 1, "model": {key: value}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(header(b"{}"))
    refused(lambda: CLSP.from_pretrained(tmp_path), r"config\.json")
    refused(lambda: convert.from_reference({}, {"roberta" if key == "text" else key: value}), key)


def archive(entries: dict[str, bytes], *, compress: bool = False) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED, compresslevel=1
        ) as zipped:
            for name, content in entries.items():
                zipped.writestr(name, content)
        return file.getvalue()


def saved(value: object, **options: Any) -> bytes:
    with io.BytesIO() as file:
        torch.save(value, file, **options)
        return file.getvalue()


def traversing_tar() -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in ("../../attack_ran", "pickle", "storages", "tensors", "sys_info"):
                member = tarfile.TarInfo(name)
                tar.addfile(member, io.BytesIO(b""))
        return file.getvalue()


PICKLES: dict[str, Callable[[], bytes]] = {
    "code": lambda: saved({"model": Attack()}),
    "code in the old format": lambda: saved({"model": Attack()}, _use_new_zipfile_serialization=False),
    "a plain pickle": lambda: pickle.dumps(Attack()),
    "a tar that leaves its folder": traversing_tar,
    "a zip that leaves its folder": lambda: archive({"../../attack_ran": b"", "a/data.pkl": b"\x80\x02N."}),
    "a zip of zeros": lambda: archive({"a/data.pkl": b"0" * 300_000_000}, compress=True),
    "half a file": lambda: saved({"model": torch.zeros(1000)})[:2000],
    "a storage that is not there": lambda: saved({"model": torch.zeros(1000)}).replace(
        b"\x4d\xe8\x03", b"\x4a\xff\xff\xff\x7f"[:3]
    ),
    "no mapping": lambda: saved([1, 2, 3]),
    "no file of any kind": lambda: b"\x00" * 64,
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, tmp_path: Path) -> None:
    (tmp_path / "epoch.pt").write_bytes(PICKLES[name]())
    refused(lambda: convert.unwrap(convert.read_checkpoint(tmp_path / "epoch.pt")), r"epoch\.pt|checkpoint")


def test_lines_of_manifests_and_indexes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([*(text.replace("\n", " ") for text in JSON.values()), '{"audio": "a.wav"}']))
    started = time.process_time()
    clips, problems = read_source(str(path))
    assert time.process_time() - started < SECONDS
    assert [clip.audio for clip in clips] == [str(tmp_path / "a.wav")]
    assert [problem.line for problem in problems] == [1, 2, 3, 4]
