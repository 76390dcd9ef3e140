"""Work folders of `clsp_fast.caption` with given answers, without a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sample_data import write_rows

from clsp_fast.captioning.answers import ANSWERS, begin, custom_id, identity, read_record
from clsp_fast.captioning.generate import read_facts
from clsp_fast.captioning.rows import ALL_ROWS
from clsp_fast.captioning.verify import CHECKLIST

CLIP = {"id": "a", "audio": "clips/a.wav", "duration_s": 2.0}
Texts = Sequence[str | None]


def good(name: str, length: int = 150) -> str:
    """A caption that breaks no rule."""
    return f"{name} speaks in a warm voice that slows down and grows softer. ".ljust(length - 1, "y") + "."


def answer(name: str, texts: Texts, reasons: Sequence[str] | None = None) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"content": text}, "finish_reason": reasons[i] if reasons else "stop"}
        for i, text in enumerate(texts)
    ]
    body = {"choices": choices, "model": "m", "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    return {"custom_id": name, "error": None, "response": {"status_code": 200, "body": body}}


def failure(name: str) -> dict[str, Any]:
    return {"custom_id": name, "error": {"message": "boom"}, "response": None}


def make_job(
    work: Path,
    step: str,
    rows: Sequence[Mapping[str, Any]],
    parts: int,
    notes: Mapping[str, Any],
    **settings: Any,
) -> Path:
    """A job's folder with these answers."""
    folder = work / step
    folder.mkdir(parents=True, exist_ok=True)
    asked = settings.pop("asked", ALL_ROWS)
    known = {"step": step, "model": f"{step}-model", "prompt_digest": f"{step}-digest", "seed": 3}
    begin(
        folder,
        known | {"sampling": {"temperature": 0.6}} | settings,
        parts=parts,
        notes=notes,
        asked=[asked],
    )
    write_rows(folder / ANSWERS, rows)
    return folder


def make_work(
    tmp_path: Path,
    clips: Sequence[Mapping[str, Any]],
    texts: Mapping[int, Texts],
    *,
    work: Path | None = None,
    reasons: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    blank_lines: int = 0,
    candidates: int = 20,
    **settings: Any,
) -> Path:
    """A work folder in which each row of `texts` has one answer with these candidates.

    `blank_lines` stand before the clips in the manifest. `settings` are further ones of the job; "asked" are
    the rows that it was asked for.
    """
    manifest = write_rows(tmp_path / "m.jsonl", clips)
    manifest.write_bytes(b"\n" * blank_lines + manifest.read_bytes())
    work = work or tmp_path / "work"
    facts = read_facts(manifest)
    make_job(
        work,
        "generate",
        [answer(custom_id("generate", row, "x"), texts[row], reasons) for row in (order or texts)],
        1,
        {"manifest_path": str(manifest)},
        manifest={"name": facts.name, "bytes": facts.bytes, "sha256": facts.sha256},
        candidates=candidates,
        candidates_per_request=candidates,
        **settings,
    )
    return work


def make_verdicts(
    work: Path, violations: Mapping[tuple[int, int], Sequence[str] | None], **notes: str
) -> None:
    """Verdicts on candidates (row, number); None: an answer that is no verdict."""
    rows = []
    for (row, number), names in violations.items():
        content = "?" if names is None else json.dumps({item: item in names for item in CHECKLIST})
        rows.append(answer(custom_id("verify", row, "x", number), [content]))
    make_job(work, "verify", rows, 40, notes, generate=identity(read_record(work / "generate")))
