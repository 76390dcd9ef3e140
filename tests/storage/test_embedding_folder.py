"""Folders of embeddings are read as they were written, and hostile folders are refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsp_fast.storage import embedding_folder
from clsp_fast.storage.embedding_folder import EmbeddingHeader, Embeddings

ROWS = np.random.default_rng(0).standard_normal((7, 4))


def write(folder: Path, **change: Any) -> EmbeddingHeader:
    """Seven recordings in shards of four. The second recording has failed."""
    header = EmbeddingHeader(**{"model": "m", "frontend": "f", "dim": 4, "shard_rows": 4} | change)
    folder.mkdir(exist_ok=True)
    lines = [header.to_line()]
    for shard, rows in enumerate((ROWS[:3], ROWS[3:6])):
        embedding_folder.write_shard(header.shard(folder, shard), rows.astype(header.dtype))
    for i in range(7):
        where: dict[str, Any] = {"shard": i // 4, "row": (i - (i > 1)) % 4 if i < 4 else i - 4}
        lines.append(
            json.dumps({"id": f"c{i}", "audio": f"{i}.wav"} | ({"error": "open"} if i == 1 else where))
        )
    (folder / "index.jsonl").write_text("".join(line + "\n" for line in lines))
    return header


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shard_format", ["npy", "safetensors"])
def test_a_folder_round_trips(tmp_path: Path, dtype: str, shard_format: str) -> None:
    write(tmp_path, dtype=dtype, shard_format=shard_format)
    embeddings = Embeddings(tmp_path)
    assert (embeddings.clips, len(embeddings), len(embeddings.shards)) == (7, 6, 2)
    for shard, rows in zip(embeddings.shards, (ROWS[:3], ROWS[3:6]), strict=True):
        assert isinstance(shard, np.memmap)
        np.testing.assert_array_equal(shard, rows.astype(dtype))
    assert [line["id"] for line in embeddings.lines(0)] == ["c0", "c1", "c2", "c3"]
    assert [line.get("row") for line in embeddings.lines(0)] == [0, None, 1, 2]
    assert [line["id"] for line in embeddings.lines(1)] == ["c4", "c5", "c6"]


def test_other_tools_read_the_shards(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write(tmp_path / "a")
    np.testing.assert_array_equal(np.load(tmp_path / "a/shard-000000.npy"), ROWS[:3].astype("f4"))
    write(tmp_path / "b", shard_format="safetensors")
    rows = load_file(tmp_path / "b/shard-000001.safetensors")["embeddings"]
    np.testing.assert_array_equal(rows, ROWS[3:6].astype("f4"))


def test_a_shard_written_without_numpy_is_read_by_numpy(tmp_path: Path) -> None:
    for rows in (np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((0, 4), np.float16)):
        embedding_folder.write_shard(tmp_path / "a.npy", rows)
        loaded = np.load(tmp_path / "a.npy")
        assert loaded.dtype == rows.dtype
        assert np.array_equal(loaded, rows)


def test_an_empty_shard_is_allowed(tmp_path: Path) -> None:
    header = write(tmp_path)
    embedding_folder.write_shard(header.shard(tmp_path, 0), np.empty((0, 4), np.float32))
    assert embedding_folder.read_shard(header.shard(tmp_path, 0), header).shape == (0, 4)


@pytest.mark.parametrize("block", [1, 7, 60, 250, 10_000])
def test_lines_are_found_with_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    write(tmp_path)
    monkeypatch.setattr(embedding_folder, "_BLOCK", block)
    embeddings = Embeddings(tmp_path)
    assert embeddings.clips == 7
    assert [[line["id"] for line in embeddings.lines(shard)] for shard in (0, 1)] == [
        ["c0", "c1", "c2", "c3"],
        ["c4", "c5", "c6"],
    ]
    monkeypatch.setattr(embedding_folder, "LONGEST_LINE", 40)
    with (
        (tmp_path / "index.jsonl").open("rb") as file,
        pytest.raises(ValueError, match="line 2: cut short or over 40 bytes"),
    ):
        embeddings._find_lines(file, 0)
    monkeypatch.undo()
    monkeypatch.setattr(embedding_folder, "_BLOCK", block)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"id": "c7"')
    with pytest.raises(ValueError, match="line 9: cut short"):
        Embeddings(tmp_path)


def test_the_line_of_an_embedding_is_found_without_parsing_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    embeddings, read = Embeddings(tmp_path), []
    whole = embedding_folder.parse_object
    monkeypatch.setattr(embedding_folder, "parse_object", lambda text: read.append(text) or whole(text))
    assert [embeddings.line(0, row)["id"] for row in range(3)] == ["c0", "c2", "c3"]
    assert [embeddings.line(1, row)["id"] for row in range(3)] == ["c4", "c5", "c6"]
    assert len(read) == 8
    record(shard=0, row=2)(tmp_path)
    assert Embeddings(tmp_path).line(0, 2)["id"] == "c3"
    with pytest.raises(ValueError, match="no line for row 0 of shard 0"):
        Embeddings(tmp_path).line(0, 0)
    damaged_line(4, '{"id": "c3", "audio": "3.wav", "error": "open"}')(tmp_path)
    assert Embeddings(tmp_path).line(0, 2)["id"] == "a"


def damaged_line(number: int, text: str) -> Any:
    def damage(folder: Path) -> None:
        lines = (folder / "index.jsonl").read_text().splitlines()
        lines[number] = text
        (folder / "index.jsonl").write_text("".join(line + "\n" for line in lines))

    return damage


def header_with(**change: Any) -> Any:
    values = json.loads(EmbeddingHeader(model="m", frontend="f", dim=4, shard_rows=4).to_line()) | change
    return damaged_line(0, json.dumps(values))


def record(**change: Any) -> Any:
    return damaged_line(1, json.dumps({"id": "a", "audio": "b", "shard": 0, "row": 0} | change))


def shard_bytes(content: bytes) -> Any:
    return lambda folder: (folder / "shard-000000.npy").write_bytes(content)


def huge_safetensors(folder: Path) -> None:
    write(folder, shard_format="safetensors")
    with (folder / "shard-000000.safetensors").open("wb") as file:
        file.write((100 * 2**20).to_bytes(8, "little") + b'{"' + b" " * 2**20)
        file.truncate(101 * 2**20)


def huge_npy(folder: Path) -> None:
    with (folder / "shard-000000.npy").open("wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + (100 * 2**20).to_bytes(4, "little"))
        file.truncate(101 * 2**20)


def safetensors_with(text: str) -> Any:
    def damage(folder: Path) -> None:
        write(folder, shard_format="safetensors")
        raw = text.encode()
        (folder / "shard-000000.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 48)

    return damage


def npy_with(dtype: str, shape: tuple[int, ...]) -> bytes:
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + b"\0" * 48


BOMB = "[" * 100_000
HOSTILE = {
    "no index": (lambda folder: (folder / "index.jsonl").unlink(), "no index.jsonl"),
    "empty index": (lambda folder: (folder / "index.jsonl").write_text(""), "line 1"),
    "bomb in the header": (damaged_line(0, '{"format": ' + BOMB), "line 1.*nested too deeply"),
    "bomb in a line": (damaged_line(1, BOMB), "line 2.*nested too deeply"),
    "not an object": (damaged_line(1, "3"), "line 2.*JSON object"),
    "not JSON": (damaged_line(1, "{"), "line 2"),
    "no newline": (damaged_line(1, "x" * (embedding_folder.LONGEST_LINE + 5)), "line 2.*over 1048576 bytes"),
    "other format": (header_with(format="pickle"), "line 1.*format"),
    "later version": (header_with(version=2), "line 1.*version"),
    "unknown key": (header_with(exec="import os"), "has no key 'exec'"),
    "dim is text": (header_with(dim="4"), "dim must be of type int"),
    "dim is huge": (header_with(dim=2**40), "dim must be in"),
    "object dtype": (header_with(dtype="object"), "unknown dtype"),
    "path for a format": (header_with(shard_format="/../../etc/passwd"), "unknown dtype .* shard_format"),
    "shard_rows 0": (header_with(shard_rows=0), "shard_rows must be in"),
    "row beyond": (record(row=10**9), '"row" in'),
    "row is a path": (record(row="../../x"), '"row" in'),
    "shard of another": (record(shard=1), '"shard" must be 0'),
    "audio is a number": (record(audio=5), '"audio" must be a string'),
    "start is negative": (record(start_s=-1), '"start_s" must be'),
    "start is NaN": (record(start_s=float("nan")), "line 2: NaN is not a JSON number"),
    "a number that is infinite": (
        damaged_line(1, '{"id": "a", "audio": "b", "shard": 0, "row": 0, "more": 1e999}'),
        "line 2: 1e999 is too large",
    ),
    "rows that are not aligned": (
        safetensors_with('{"embeddings": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} }'),
        "begin at byte [0-9]+, not at a multiple of 4",
    ),
    "shard missing": (lambda folder: (folder / "shard-000001.npy").unlink(), "shard-000001.npy is missing"),
    "shard empty": (shard_bytes(b""), "shard-000000.npy is not a shard"),
    "shard cut": (shard_bytes(npy_with("<f4", (3, 4))[:-1]), "its size does not fit 3 rows"),
    "shard of objects": (shard_bytes(npy_with("|O", (3, 4))), "expected float32"),
    "shard of many rows": (shard_bytes(npy_with("<f4", (2**62, 4))), "its size"),
    "shard of negative rows": (shard_bytes(npy_with("<f4", (-1, 4))), "is not a shard"),
    "header is code": (shard_bytes(npy_with("<f4", (3, 4)).replace(b"(3, 4)", b"exit()")), "is not a shard"),
    "100 MB npy header": (huge_npy, "is not a shard"),
    "100 MB safetensors header": (huge_safetensors, "its header has 104857600 bytes"),
    "bomb in safetensors": (safetensors_with(BOMB[:60_000]), "nested too deeply"),
    "overlapping offsets": (
        safetensors_with('{"embeddings": {"dtype": "F32", "shape": [3, 4], "data_offsets": [8, 48]}}'),
        "at .8, 48.",
    ),
    "shape is text": (
        safetensors_with('{"embeddings": {"dtype": "F32", "shape": ["3", 4], "data_offsets": [0, 48]}}'),
        "is not a shard",
    ),
    "no tensor": (safetensors_with("{}"), "is not a shard"),
    "tensor is a list": (safetensors_with('{"embeddings": []}'), "is not a shard"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_by_name_and_quickly(tmp_path: Path, name: str) -> None:
    damage, message = HOSTILE[name]
    write(tmp_path)
    damage(tmp_path)
    start = time.thread_time()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Embeddings(tmp_path).lines(0)
    assert time.thread_time() - start < 1
