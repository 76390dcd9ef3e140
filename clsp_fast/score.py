"""How well clips fit descriptions, or each other: `python -m clsp_fast.score PAIRS.jsonl SCORES.jsonl`.

A line of PAIRS has "audio" and either "caption" or "other", a second recording; further keys are kept. SCORES
has the same lines with three more keys: "line" (the line's number), "model" (the beginning of the model's
hash), and either "score" (the cosine of the two embeddings) or "error". PAIRS must not have any of these
keys. NaN and Infinity, which are not JSON, become null.
Both files may be -, for standard input and output. Relative paths are relative to the folder of PAIRS, or to
the working directory if PAIRS is -. To continue a killed run, give the same command again. The exit code is 0
if every line has a score, and 3 if not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

import torch

from clsp_fast import console, precision
from clsp_fast.audio import AudioError
from clsp_fast.checks import require
from clsp_fast.config import EncodeConfig
from clsp_fast.console import INCOMPLETE, Progress
from clsp_fast.model import CLSP, load_model
from clsp_fast.storage import embedding_folder, files, text_kinds, textfile
from clsp_fast.storage.files import FolderInUse, lock_file
from clsp_fast.storage.paths import from_text
from clsp_fast.storage.ranks import Ranks
from clsp_fast.storage.textfile import Text

Row = dict[str, Any]

_WRITTEN_KEYS = ("line", "model", "score", "error")
_EXPECTED = 'pairs, one a line: {"audio": "a.wav", "caption": "A man speaks."}, or "other" for "caption"'


class _Line(NamedTuple):
    """A line of pairs: its 1-based number, its content, and what is wrong with it ("": nothing)."""

    number: int
    row: Row
    problem: str


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(EncodeConfig):
    """What is scored, and where the scores are written."""

    pairs: str
    """JSONL file, or - for standard input."""
    scores: str
    """JSONL file to write, or - for standard output. If an earlier run was not finished, this run continues
    it."""
    shard: str = "1/1"
    """"i/n": only every n-th line, starting with the i-th. n processes with i = 1 .. n score all lines."""
    rows_at_once: int = 1024
    """Lines that are embedded together. Each recording and caption among them is embedded once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        require(
            match is not None and 1 <= int(match[1]) <= int(match[2]),
            "shard",
            '"i/n", 1 <= i <= n',
            self.shard,
        )
        require(self.rows_at_once >= 1, "rows_at_once", "at least 1", self.rows_at_once)


class ScoreResult(NamedTuple):
    """Numbers of lines: written by this call, without a score in all calls, and written by earlier calls."""

    rows: int
    failed: int
    before: int


@precision.as_configured
def score(config: ScoreConfig, *, model: CLSP | None = None) -> ScoreResult:
    """Scores the lines of a file. Continues where an earlier call stopped.

    Args:
        config: what is scored, and where the scores are written.
        model: a loaded model to use instead of `config.model`.

    Raises:
        FileNotFoundError: no such file or model. ValueError: the file of scores was begun with other pairs
        or another model. FolderInUse: another process writes to the file.
    """
    for name, stream in (("pairs", sys.stdin), ("scores", sys.stdout)):
        require(
            getattr(config, name) != "-" or stream is not None, name, "a file: that stream is closed", "-"
        )
    with (
        files.naming_full_disk(None if config.scores == "-" else config.scores),
        contextlib.ExitStack() as stack,
    ):
        ranks = stack.enter_context(Ranks.join(config.device))
        require(ranks.world == 1, "processes", "1; under torchrun, give each its --shard", ranks.world)
        from_stdin = config.pairs == "-"
        source = sys.stdin.buffer if from_stdin else Path(config.pairs)
        pairs = stack.enter_context(textfile.open_text(source, _EXPECTED))
        _check_kind(pairs, config.pairs)
        base = Path() if from_stdin else Path(config.pairs).parent
        model = load_model(config, ranks.device) if model is None else model
        model_hash = model.fingerprint(config.precision)[:16]
        todo, before, failed = _lines(pairs.file, config.shard), 0, 0
        if config.scores == "-":
            out: IO[bytes] = sys.stdout.buffer
        else:
            path = Path(config.scores)
            path.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(path.open("a+b"))
            lock_file(out, path)
            before, failed = _resume(out, todo, model_hash, path)
        progress, rows = Progress(None, "lines"), 0
        while lines := list(itertools.islice(todo, config.rows_at_once)):
            results = _score_lines(lines, model, config, base)
            records = [_record(line, model_hash, result) for line, result in zip(lines, results, strict=True)]
            out.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            out.flush()
            if config.scores != "-":
                files.sync(out.fileno())
            bad = sum("error" in record for record in records)
            rows, failed = rows + len(lines), failed + bad
            progress.add(len(lines), bad)
        return ScoreResult(rows, failed, before)


def score_rows(
    rows: Sequence[Row], model: CLSP, config: EncodeConfig, *, base: Path = Path()
) -> list[float | str]:
    """The cosine of each row's two sides, or what is wrong with the row. Each recording is embedded once.

    Args:
        rows: {"audio": path, "caption": text} or {"audio": path, "other": path}.
        model: the model.
        config: how the model embeds; its `model`, `device` and `precision` are not used.
        base: the folder of relative paths.
    """
    results: list[float | str] = [_what_is_wrong(row) for row in rows]
    good = [row for row, wrong in zip(rows, results, strict=True) if not wrong]
    paths = list(dict.fromkeys(row[key] for row in good for key in ("audio", "other") if key in row))
    captions = list(dict.fromkeys(row["caption"] for row in good if "caption" in row))
    errors: dict[int, AudioError] = {}
    audio_ND = model.encode_audio(
        [base / from_text(path) for path in paths], errors=errors, **config.batching
    )
    audio_ND, text_MD = audio_ND.float().cpu(), model.encode_text(captions).float().cpu()
    clip_row, text_row = ({name: i for i, name in enumerate(names)} for names in (paths, captions))
    for number, row in enumerate(rows):
        if results[number]:
            continue
        sides = [clip_row[row[key]] for key in ("audio", "other") if key in row]
        bad = [errors[side] for side in sides if side in errors]
        if bad:
            results[number] = str(bad[0])
        else:
            other_D = text_MD[text_row[row["caption"]]] if "caption" in row else audio_ND[sides[1]]
            results[number] = float(torch.dot(audio_ND[sides[0]], other_D))
    return results


def _what_is_wrong(row: Row) -> str:
    if ("caption" in row) == ("other" in row):
        return 'a line must have "audio" and either "caption" or "other"'
    for key in ("audio", "caption" if "caption" in row else "other"):
        value = row.get(key)
        text = isinstance(value, str) and value.strip() and "\0" not in value
        if not text or not _encodable(str(value), path=key != "caption"):
            return f'"{key}" must be a non-empty text, got {value!a:.100}'
    return ""


def _encodable(value: str, *, path: bool) -> bool:
    try:
        value.encode("utf-8", "surrogateescape" if path else "strict")
    except UnicodeEncodeError:
        return False
    return True


def _check_kind(pairs: Text, name: str) -> None:
    """ValueError if the file begins like a table, a list, or another kind of manifest."""
    kind = text_kinds.kind_of_text(pairs.head)
    first_lines = [line for line in pairs.head.splitlines() if line.strip()]
    if not kind and first_lines and not any(line.lstrip().startswith("{") for line in first_lines):
        kind = f"no file of JSON lines: it begins with {first_lines[0]!a:.60}"
    if kind:
        raise ValueError(f"{name} is {kind}; expected {_EXPECTED}")


def _lines(file: TextIO, shard: str) -> Iterator[_Line]:
    """The lines of a shard that are not blank."""
    first, step = (int(part) for part in shard.split("/"))
    for number, text in textfile.lines(file, embedding_folder.LONGEST_LINE):
        if (number - first) % step:
            continue
        try:
            whole = textfile.is_whole(text, embedding_folder.LONGEST_LINE)
            require(whole, "a line", f"shorter than {embedding_folder.LONGEST_LINE} bytes", "a longer one")
            row = textfile.json_object(text)
            reserved = [key for key in _WRITTEN_KEYS if key in row]
            expected = f"other than {', '.join(_WRITTEN_KEYS)}, which the output has"
            require(not reserved, "keys", expected, reserved)
            yield _Line(number, row, "")
        except ValueError as error:
            yield _Line(number, {}, str(error))


def _resume(file: IO[bytes], todo: Iterator[_Line], model_hash: str, path: Path) -> tuple[int, int]:
    """Skips in `todo` the lines that `file` has, and cuts an incomplete last line off. Returns how many lines
    `file` has, and how many of them have an error."""
    file.seek(0)
    done, failed, size = 0, 0, 0
    while (text := file.readline()).endswith(b"\n"):
        try:
            record = embedding_folder.parse_object(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {done + 1}: {error}; choose another file") from error
        line = next(todo, None)
        pair = {key: value for key, value in record.items() if key not in _WRITTEN_KEYS}
        if line is None or (record.get("line"), pair) != (line.number, line.row):
            raise ValueError(f"{path}, line {done + 1}, does not belong to these pairs; choose another file")
        if record.get("model") != model_hash:
            raise ValueError(
                f"{path} was begun with the model {record.get('model')}, not {model_hash}; "
                "give the same --model and --precision, or choose another file"
            )
        done, failed, size = done + 1, failed + ("error" in record), size + len(text)
    file.truncate(size)
    return done, failed


def _score_lines(
    lines: Sequence[_Line], model: CLSP, config: EncodeConfig, base: Path
) -> Iterator[float | str]:
    scores = iter(score_rows([line.row for line in lines if not line.problem], model, config, base=base))
    return (line.problem or next(scores) for line in lines)


def _record(line: _Line, model_hash: str, result: float | str) -> Row:
    outcome: Row = {"error": result} if isinstance(result, str) else {"score": result}
    return line.row | {"line": line.number, "model": model_hash} | outcome


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    config = tyro.cli(
        ScoreConfig,
        args=arguments,
        prog="python -m clsp_fast.score",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        result = score(config)
    except (OSError, ValueError, FolderInUse) as error:
        sys.exit(f"clsp_fast.score: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    done = f", {result.before} were done before" if result.before else ""
    print(f"{result.rows} lines, {result.failed} failed{done}", file=sys.stderr)
    sys.exit(INCOMPLETE if result.failed else 0)


if __name__ == "__main__":
    main()
