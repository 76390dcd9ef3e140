"""A folder of embeddings of recordings: what `embed` writes and `search` reads.

The first line of index.jsonl says how the embeddings were made. Each further line describes one recording, in
the order of the input. It holds either "shard" and "row" of the embedding, or "error" and "detail" if the
recording could not be embedded. Recording i belongs to shard i // shard_rows. A shard is a file
shard-<s>.npy or shard-<s>.safetensors with a matrix: one row for each recording that could be embedded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from clsp_fast.checks import reject_unknown_keys
from clsp_fast.storage import text_kinds
from clsp_fast.storage.files import replace_file

FORMAT = text_kinds.INDEX_FORMAT
LONGEST_LINE = 2**20
"""Largest size of a line of the index, in bytes."""
_LONGEST_HEADER = 2**16
_BLOCK = 2**24
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


@dataclass(frozen=True, kw_only=True)
class EmbeddingHeader:
    """How the embeddings of a folder were made: the first line of its index."""

    model: str
    """`fingerprint` of the model."""
    frontend: str
    """`features.identity()`."""
    dim: int
    """Columns of a shard."""
    dtype: str = "float32"
    """"float32" or "float16"."""
    shard_rows: int = 1024
    """Lines of the index that belong to one shard."""
    shard_format: str = "npy"
    """"npy" or "safetensors"."""
    long_audio: str = "window"
    """What was done with recordings longer than window_s."""
    window_s: float = 30.0
    """Seconds."""
    slack_seconds: float = 0.1
    """How far clips were allowed to reach beyond the end of their recordings."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) not in _TYPES[str(field.type)]:
                raise ValueError(f"{field.name} must be of type {field.type}, got {value!r}")
        for name, smallest, largest in (("dim", 1, 2**16), ("shard_rows", 1, 2**20)):
            if not smallest <= getattr(self, name) <= largest:
                raise ValueError(f"{name} must be in [{smallest}, {largest}], got {getattr(self, name)}")
        if self.dtype not in ("float32", "float16") or self.shard_format not in ("npy", "safetensors"):
            raise ValueError(f"unknown dtype {self.dtype!r} or shard_format {self.shard_format!r}")

    def shard(self, folder: Path, number: int) -> Path:
        """The path of the shard with this number."""
        return folder / f"shard-{number:06d}.{self.shard_format}"

    def to_line(self) -> str:
        """The index's first line."""
        return json.dumps({"format": FORMAT, "version": 1} | dataclasses.asdict(self))

    @classmethod
    def from_line(cls, line: str | bytes) -> EmbeddingHeader:
        """The inverse of `to_line`. ValueError says what is wrong with the line."""
        values = parse_object(line)
        if values.pop("format", None) != FORMAT or values.pop("version", None) != 1:
            raise ValueError(f'expected "format": "{FORMAT}", "version": 1')
        reject_unknown_keys(cls, values)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


class Embeddings:
    """A finished folder of embeddings. Shards are mapped into memory; lines are read when they are needed.

    Args:
        folder: what `python -m clsp_fast.embed` wrote.

    Raises:
        FileNotFoundError: it has no index.jsonl, or a shard is missing.
        ValueError: a file is damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self._index = folder / "index.jsonl"
        if not self._index.is_file():
            unfinished = (folder / ".parts").is_dir()
            fix = (
                "run the same embed command again to finish it"
                if unfinished
                else "make it with clsp_fast.embed"
            )
            raise FileNotFoundError(f"{folder} has no index.jsonl; {fix}")
        with self._index.open("rb") as file:
            try:
                self.header = EmbeddingHeader.from_line(file.readline(LONGEST_LINE))
            except ValueError as error:
                raise ValueError(f"{self._index}, line 1: {error}") from error
            self.clips, self._offsets = self._find_lines(file, file.tell())
        self.shards = [
            read_shard(self.header.shard(folder, number), self.header) for number in range(len(self._offsets))
        ]

    def _find_lines(self, file: BinaryIO, at: int) -> tuple[int, list[int]]:
        """Counts the lines from byte `at` on, and finds where the first line of each shard begins."""
        count, offsets = 0, list[int]()
        start = position = at
        while block := file.read(_BLOCK):
            ends = position + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts = np.concatenate([[start], ends])
            long = np.flatnonzero(np.diff(starts) > LONGEST_LINE)
            if len(long):
                self._refuse_line(count + int(long[0]))
            # Every shard_rows-th line begins a shard. The last line ends in the next block.
            offsets += starts[:-1][-count % self.header.shard_rows :: self.header.shard_rows].tolist()
            count, start, position = count + len(ends), int(starts[-1]), position + len(block)
            if position - start > LONGEST_LINE:
                self._refuse_line(count)
        if position > start:
            self._refuse_line(count)
        return count, offsets

    def _refuse_line(self, clip: int) -> NoReturn:
        raise ValueError(f"{self._index}, line {clip + 2}: cut short or over {LONGEST_LINE} bytes")

    def __len__(self) -> int:
        """The number of embeddings, without the recordings that failed."""
        return sum(map(len, self.shards))

    def lines(self, shard: int) -> list[dict[str, Any]]:
        """The lines of the index that belong to a shard; ValueError names a damaged one."""
        return [self._record(shard, number, text) for number, text in enumerate(self._texts(shard))]

    def line(self, shard: int, row: int) -> dict[str, Any]:
        """The index line of an embedding.

        Raises:
            ValueError: no line names this row, or a line that is read during the search is damaged.
        """
        texts = self._texts(shard)
        # A recording that failed has a line but no row. So the line of row r is line r of the shard or later.
        for number in (*range(row, len(texts)), *range(min(row, len(texts)))):
            record = self._record(shard, number, texts[number])
            if record.get("row") == row:
                return record
        raise ValueError(f"{self._index} has no line for row {row} of shard {shard}")

    def digest(self) -> str:
        """SHA-256 of the index and of the first row of each shard.

        The index depends on the model, the list and the settings. The rows change if other recordings replace
        the old ones under the same names.
        """
        digest = hashlib.sha256()
        with self._index.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        for shard in self.shards:
            digest.update(shard[:1].tobytes())
        return digest.hexdigest()

    def _texts(self, shard: int) -> list[bytes]:
        rows = self.header.shard_rows
        with self._index.open("rb") as file:
            file.seek(self._offsets[shard])
            return [file.readline(LONGEST_LINE) for _ in range(min(rows, self.clips - shard * rows))]

    def _record(self, shard: int, number: int, text: bytes) -> dict[str, Any]:
        try:
            return check_record(parse_object(text), shard, len(self.shards[shard]))
        except ValueError as error:
            line = shard * self.header.shard_rows + number + 2
            raise ValueError(f"{self._index}, line {line}: {error}") from error


def check_record(record: dict[str, Any], shard: int, rows: int) -> dict[str, Any]:
    """Returns the record of an index line unchanged; ValueError if a value is missing or wrong."""
    for key in ("id", "audio"):
        if not isinstance(record.get(key), str):
            raise ValueError(f'"{key}" must be a string, got {record.get(key)!r}')
    for key in ("start_s", "duration_s", "channel"):
        value = record.get(key, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise ValueError(f'"{key}" must be a number >= 0, got {value!r}')
    if "error" not in record:
        row = record.get("row")
        if record.get("shard") != shard or not isinstance(row, int) or not 0 <= row < rows:
            raise ValueError(
                f'"shard" must be {shard} and "row" in [0, {rows}), got {record.get("shard")!r}, {row!r}'
            )
    return record


def write_shard(file: Path, rows_ND: NDArray[Any]) -> None:
    """Writes a shard whole or not at all."""
    if file.suffix == ".npy":
        replace_file(file, lambda path: _save_npy(path, rows_ND), size=rows_ND.nbytes)
    else:
        tensors = {"embeddings": rows_ND}
        replace_file(file, lambda path: safetensors.numpy.save_file(tensors, path), size=rows_ND.nbytes)


def _save_npy(file: Path, rows_ND: NDArray[Any]) -> None:
    with file.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, np.lib.format.header_data_from_array_1_0(rows_ND))
        handle.write(rows_ND.tobytes())  # numpy's own writer loses errno, which reveals a full disk


def read_shard(file: Path, header: EmbeddingHeader) -> NDArray[Any]:
    """Maps a shard (N, dim) into memory, read-only. A damaged file cannot make it allocate memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a shard that fits the header.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        rows, offset = (_npy_layout if file.suffix == ".npy" else _safetensors_layout)(file, header)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a shard of embeddings: {error}") from error
    dtype = np.dtype(header.dtype)
    if rows > header.shard_rows or file.stat().st_size != offset + rows * header.dim * dtype.itemsize:
        raise ValueError(f"{file} is not a shard of embeddings: its size does not fit {rows} rows")
    if offset % dtype.itemsize:
        what = f"its rows begin at byte {offset}, not at a multiple of {dtype.itemsize}"
        raise ValueError(f"{file} is not a shard of embeddings: {what}")
    if rows == 0:
        return np.empty((0, header.dim), dtype)
    return np.memmap(file, dtype, "r", offset, (rows, header.dim))


def _npy_layout(file: Path, header: EmbeddingHeader) -> tuple[int, int]:
    """(number of rows, byte at which they begin)."""
    with file.open("rb") as handle:
        if np.lib.format.read_magic(handle) != (1, 0):  # version 1.0 has at most 64 KiB of header
            raise ValueError("expected version 1.0 of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
        if fortran or dtype != np.dtype(header.dtype) or len(shape) != 2 or shape[1] != header.dim:
            raise ValueError(f"expected {header.dtype} with {header.dim} columns, got {dtype} {shape}")
        return int(shape[0]), handle.tell()


def _safetensors_layout(file: Path, header: EmbeddingHeader) -> tuple[int, int]:
    """(number of rows, byte at which they begin)."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, over {_LONGEST_HEADER}")
        content = parse_object(handle.read(length))
    tensor = content["embeddings"]
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    rows = shape[0] if len(shape) == 2 and isinstance(shape[0], int) and shape[0] >= 0 else -1
    expected = {"float32": "F32", "float16": "F16"}[header.dtype]
    size = rows * header.dim * np.dtype(header.dtype).itemsize
    if rows < 0 or shape[1] != header.dim or dtype != expected or offsets != [0, size]:
        raise ValueError(f"expected {expected} with {header.dim} columns, got {dtype} {shape} at {offsets}")
    return rows, 8 + length


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object. ValueError for other JSON, NaN, infinity and nesting that is too deep."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):  # such as 1e999, which Python would write as Infinity: not JSON
        raise ValueError(f"{digits:.20} is too large for a number")
    return value
