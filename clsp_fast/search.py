"""Search by description or by example: `python -m clsp_fast.search FOLDER --text "A woman whispers."`.

FOLDER was written by `clsp_fast.embed` with the same model. The search is exact unless --index names a faiss
index. Under torchrun, each process searches a part of the shards. --html writes a page with players. The page
contains the recordings (16 kHz, at most 30 s each), so it can be sent to others.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import sys
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsp_fast import audio, console, features, precision, similarity
from clsp_fast.audio import AudioError
from clsp_fast.checks import require
from clsp_fast.config import EncodeConfig
from clsp_fast.model import CLSP, load_model
from clsp_fast.storage import files
from clsp_fast.storage.embedding_folder import Embeddings, parse_object
from clsp_fast.storage.ranks import Ranks
from clsp_fast.storage.textfile import is_text

_PLAYED_S = 30
_TRAINING_ROWS = 2**18
_FIX = "; remove it, and the same command builds it again, or give another --index-file"

_STYLE = """body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}
h2{border-top:1px solid #ccc;padding-top:1em}li{margin:.7em 0}audio{display:block;width:100%;margin:.2em 0}
.score{font-variant-numeric:tabular-nums;font-weight:bold}.where{color:#555;overflow-wrap:anywhere}"""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(EncodeConfig):
    """Where to search, and for what."""

    folder: Path
    """Folder of embeddings."""
    text: tuple[str, ...] = ()
    """Descriptions to search for."""
    clip: tuple[str, ...] = ()
    """Recordings. The search finds recordings that sound like them."""
    k: int = 10
    """Number of answers per query, at most 1,024."""
    index: str = "exact"
    """"exact", or "faiss:" and a factory string, such as faiss:HNSW32 (needs the extra [faiss])."""
    index_file: Path | None = None
    """File of the faiss index. It is read if it exists, otherwise it is built and written, with a .json file
    beside it that says what it was built from. None: the index is built and not kept. Use only files that you
    trust: faiss does not check what it reads."""
    html: Path | None = None
    """Also write a page with players."""
    json: bool = False
    """Print one JSON object per query instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.text or self.clip), "text or clip", "at least one query", "none")
        require(1 <= self.k <= similarity.LARGEST_K, "k", "in [1, 1024]", self.k)
        known = self.index == "exact" or (self.index.startswith("faiss:") and len(self.index) > 6)
        require(known, "index", '"exact" or "faiss:<factory string>"', self.index)
        fits = self.index_file is None or self.index != "exact"
        require(fits, "index_file", "given only with --index faiss:...", self.index_file)


class Hit(NamedTuple):
    """One answer; `score` is the cosine with the query."""

    score: float
    id: str
    audio: str
    start_s: float
    duration_s: float | None
    channel: int | None


class Result(NamedTuple):
    """A query, "text" or "clip", and its answers, best first."""

    kind: Literal["text", "clip"]
    query: str
    hits: list[Hit]


@precision.as_configured
def search(config: SearchConfig, *, model: CLSP | None = None) -> list[Result]:
    """Answers queries from a folder of embeddings, first texts and then clips.

    Args:
        config: where to search, and for what.
        model: a loaded model to use instead of `config.model`.

    Returns:
        A result for each query; an empty list on all ranks except the first.

    Raises:
        FileNotFoundError: no such folder or model. ValueError: the folder is damaged or of another model.
        AudioError: a clip cannot be read. ImportError: faiss is needed and not installed.
    """
    with Ranks.join(config.device) as ranks:
        exact = config.index == "exact"
        require(exact or ranks.world == 1, "index", '"exact" with several processes', config.index)
        embeddings = Embeddings(config.folder)
        require(len(embeddings) > 0, "folder", "a folder with embeddings", config.folder)
        model = load_model(config, ranks.device) if model is None else model
        _check_made_by(embeddings, model.fingerprint(config.precision), config.folder)
        queries_QD = _embed_queries(config, model)
        k = min(config.k, len(embeddings))
        if exact:
            scores_QK, number_QK = _exact(
                embeddings, queries_QD, k, range(ranks.rank, len(embeddings.shards), ranks.world)
            )
            parts = ranks.gather((scores_QK.cpu(), number_QK.cpu()))
            scores_QK, number_QK = _merge([scores for scores, _ in parts], [n for _, n in parts], k)
        else:
            scores_QK, number_QK = _faiss(embeddings, queries_QD, k, config.index[6:], config.index_file)
        if not ranks.first:
            return []
    names = [("text", text) for text in config.text] + [("clip", clip) for clip in config.clip]
    answers = zip(names, scores_QK.tolist(), number_QK.tolist(), strict=True)
    return [
        Result(kind, query, _hits(embeddings, scores, numbers))  # type: ignore[arg-type]
        for (kind, query), scores, numbers in answers
    ]


def _check_made_by(embeddings: Embeddings, fingerprint: str, path: Path) -> None:
    if embeddings.header.model != fingerprint:
        raise ValueError(
            f"{path} was made with the model {embeddings.header.model[:16]}..., "
            f"this one is {fingerprint[:16]}...: give the same --model and --precision, or embed again"
        )
    if embeddings.header.frontend != features.identity():
        raise ValueError(f"{path} was made with other features than this version's; embed again")


def _as_text(query: str) -> str:
    """Decodes a description from the command line as UTF-8. Python decodes it in the locale's encoding
    and replaces bytes that do not fit by surrogates."""
    if is_text(query):
        return query
    try:
        return os.fsencode(query).decode("utf-8")
    except ValueError as error:
        raise ValueError(f"text must be UTF-8, got {query!a}") from error


def _embed_queries(config: SearchConfig, model: CLSP) -> Tensor:
    texts_QD = model.encode_text([_as_text(query) for query in config.text])
    clips_QD = model.encode_audio(config.clip, **config.batching).to(texts_QD)
    return torch.cat([texts_QD, clips_QD]).float()


def _exact(embeddings: Embeddings, queries_QD: Tensor, k: int, shards: range) -> tuple[Tensor, Tensor]:
    """The best k of some shards. The number of an embedding is shard * shard_rows + row."""
    rows_of_shard = embeddings.header.shard_rows
    parts = [(shard * rows_of_shard, embeddings.shards[shard]) for shard in shards]
    parts = [(first, rows) for first, rows in parts if len(rows)]
    try:
        result = similarity.topk_of_parts(queries_QD, parts, min(k, sum(len(rows) for _, rows in parts)))
    except similarity.RowError as error:
        shard, row = divmod(error.row, rows_of_shard)
        name = embeddings.header.shard(Path(), shard)
        raise ValueError(f"{name}: database_ND must be finite, got NaN or infinity in row {row}") from error
    if result is not None:
        return result
    scores = [queries_QD.new_empty(len(queries_QD), 0)]
    numbers = [torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)]
    for shard in shards:
        rows = embeddings.shards[shard]
        if len(rows):
            try:
                best, index = similarity.topk(queries_QD, rows, min(k, len(rows)))
            except ValueError as error:
                raise ValueError(f"{embeddings.header.shard(Path(), shard)}: {error}") from error
            both = _merge([scores[0], best], [numbers[0], index + shard * embeddings.header.shard_rows], k)
            scores, numbers = [both[0]], [both[1]]
    return scores[0], numbers[0]


def _merge(scores: list[Tensor], numbers: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best k of all parts; equal scores are in the order of their numbers."""
    scores_QN, number_QN = torch.cat(scores, dim=1), torch.cat(numbers, dim=1)
    number_QN, order_QN = number_QN.sort(dim=1)
    scores_QN, order_QN = scores_QN.gather(1, order_QN).sort(dim=1, descending=True, stable=True)
    return scores_QN[:, :k], number_QN.gather(1, order_QN[:, :k])


def _faiss(
    embeddings: Embeddings, queries_QD: Tensor, k: int, factory: str, file: Path | None
) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("--index faiss:... needs the extra: pip install 'clsp_fast[faiss]'") from error
    index_file = None if file is None else _IndexFile(file, factory, embeddings)
    try:
        if index_file is not None and index_file.exists():
            index = faiss.read_index(str(file))
        else:
            index = faiss.index_factory(embeddings.header.dim, factory, faiss.METRIC_INNER_PRODUCT)
            rows = (np.ascontiguousarray(shard, np.float32) for shard in embeddings.shards if len(shard))
            if not index.is_trained:
                index.train(_first_rows(embeddings.shards, _TRAINING_ROWS))
            for shard in rows:
                index.add(shard)
            if index_file is not None:
                index_file.write(lambda path: faiss.write_index(index, str(path)))
    except RuntimeError as error:
        where = factory if file is None else f"{factory}, {file}"
        raise ValueError(f"index: faiss refuses {where}: {str(error).splitlines()[-1]}") from error
    if (index.ntotal, index.d) != (len(embeddings), embeddings.header.dim):
        expected = f"{len(embeddings)} embeddings of {embeddings.header.dim} dimensions"
        raise ValueError(
            f"{file} is not the index of this folder: expected {expected}, got {index.ntotal}, {index.d}"
        )
    scores_QK, position_QK = index.search(queries_QD.cpu().numpy(), k)
    counts = np.cumsum([0, *map(len, embeddings.shards)])
    shard_QK = np.searchsorted(counts, np.maximum(position_QK, 0), side="right") - 1
    number_QK = shard_QK * embeddings.header.shard_rows + position_QK - counts[shard_QK]
    return torch.from_numpy(scores_QK), torch.from_numpy(np.where(position_QK < 0, -1, number_QK))


class _IndexFile:
    """The file of an index, and its label, `<file>.json`, which says what the index was built from. Without
    a label, nobody would notice that an index of other embeddings gives wrong answers."""

    def __init__(self, file: Path, factory: str, embeddings: Embeddings) -> None:
        self._file, self._label = file, file.with_name(file.name + ".json")
        self._expected = {"factory": factory, "embeddings": embeddings.digest()}

    def exists(self) -> bool:
        """Whether the file exists. ValueError if its label has other embeddings or another factory."""
        if not self._file.exists():
            return False
        try:
            label = parse_object(self._label.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._label} does not say what {self._file.name} was built from: {error}{_FIX}"
            ) from error
        if label.get("embeddings") != self._expected["embeddings"]:
            raise ValueError(f"{self._file} was built from other embeddings than the folder has now{_FIX}")
        if label.get("factory") != self._expected["factory"]:
            was, now = label.get("factory"), self._expected["factory"]
            raise ValueError(f"{self._file} was built as {was!a}, not {now!a}{_FIX}")
        return True

    def write(self, write_to: Callable[[Path], None]) -> None:
        # The label is written first, because after a crash a label without an index does no harm.
        files.write_text(self._label, json.dumps(self._expected) + "\n")
        files.replace_file(self._file, write_to)


def _first_rows(shards: Sequence[NDArray[Any]], count: int) -> NDArray[np.float32]:
    """The first `count` rows of all shards; the other rows are not read."""
    parts: list[NDArray[np.float32]] = []
    for shard in shards:
        if count <= 0:
            break
        parts.append(np.asarray(shard[:count], np.float32))
        count -= len(parts[-1])
    return np.concatenate(parts)


def _hits(embeddings: Embeddings, scores: list[float], numbers: list[int]) -> list[Hit]:
    hits = []
    for score, number in zip(scores, numbers, strict=True):
        if number < 0:  # faiss returned fewer than k
            continue
        shard, row = divmod(number, embeddings.header.shard_rows)
        line = embeddings.line(shard, row)
        where = (line.get("start_s", 0.0), line.get("duration_s"), line.get("channel"))
        hits.append(Hit(score, line["id"], line["audio"], *where))
    return hits


def table(results: Sequence[Result]) -> str:
    """The results as text with one answer a line."""
    lines = []
    for result in results:
        lines.append(f"{result.kind}: {_printable(result.query)}")
        lines += [f"{hit.score:8.4f}  {_printable(_title(hit))}" for hit in result.hits]
    return "\n".join(lines)


def _title(hit: Hit) -> str:
    span = "" if hit.duration_s is None else f" {hit.start_s:g}-{hit.start_s + hit.duration_s:g} s"
    return hit.audio + span + ("" if hit.id == hit.audio else f"  ({hit.id})")


def _printable(text: str) -> str:
    """Replaces unprintable characters by escapes, because control characters would act on the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def page(results: Sequence[Result]) -> str:
    """The results as one HTML page, which contains the recordings. It forbids scripts and loads nothing."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Search results</title>',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; media-src data:; style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><h1>Search results</h1>",
    ]
    for result in results:
        parts.append(f"<h2>{_escaped(result.query)}</h2>")
        if result.kind == "clip":
            parts.append(_player(result.query, 0.0, None, None))
        parts.append("<ol>")
        for hit in result.hits:
            parts.append(f'<li><span class="score">{hit.score:.4f}</span> ')
            parts.append(f'<span class="where">{_escaped(_title(hit))}</span>')
            parts.append(_player(hit.audio, hit.start_s, hit.duration_s, hit.channel) + "</li>")
        parts.append("</ol>")
    return "\n".join([*parts, "</body></html>\n"])


def _escaped(text: str) -> str:
    return html.escape(_printable(text), quote=True)


def _player(path: str, start_s: float, duration_s: float | None, channel: int | None) -> str:
    try:
        samples = audio.load(path, start_s=start_s, duration_s=duration_s, channel=channel)
    except (AudioError, ValueError) as error:
        return f"<p>no player: {_escaped(str(error))}</p>"
    pcm = np.clip(samples[: 16000 * _PLAYED_S] * 32767, -32768, 32767).astype("<i2")
    with io.BytesIO() as file:
        with wave.open(file, "wb") as wav:
            wav.setparams((1, 2, 16000, len(pcm), "NONE", ""))
            wav.writeframes(pcm.tobytes())
        content = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/wav;base64,{content}"></audio>'


def _as_json(result: Result) -> str:
    hits: list[dict[str, Any]] = [hit._asdict() for hit in result.hits]
    return json.dumps({"kind": result.kind, "query": result.query, "hits": hits})


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    import tyro

    config = tyro.cli(
        SearchConfig,
        args=arguments,
        prog="python -m clsp_fast.search",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        results = search(config)
        if results and config.html is not None:
            files.write_text(config.html, page(results))
    except (OSError, ValueError, ImportError, AudioError) as error:
        sys.exit(f"clsp_fast.search: {error}")
    if results:
        print("\n".join(map(_as_json, results)) if config.json else table(results))


if __name__ == "__main__":
    main()
