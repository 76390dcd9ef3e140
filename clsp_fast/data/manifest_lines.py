"""Lines of the manifests that commands write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import KINDS, Clip
from clsp_fast.storage import paths

_LONGEST_LINE = 2**24


def manifest_line(
    clip: Clip,
    *,
    audio: str,
    captions: Captions,
    claims: Mapping[str, Sequence[Mapping[str, str]]],
    tags: Mapping[str, Any],
    made_by: Mapping[str, Mapping[str, Any]],
    written_by: str,
    **others: Any,
) -> dict[str, Any]:
    """A clip with other captions, as a line of a manifest. Keys without a value are left out.

    Args:
        clip: gives the part of the recording, and the provenance of the captions that it keeps.
        audio: path of the recording, as the manifest names it.
        captions: of the line.
        claims: kind of caption -> claims.
        tags: with speaker and gender, if they are known.
        made_by: kind of caption -> provenance, for the kinds whose captions are new.
        written_by: the command that writes the line.
        others: further keys; they replace those of the clip.
    """
    named = {key: tags[key] for key in ("speaker", "gender") if key in tags}
    provenance: dict[str, Any] = {"written_by": written_by}
    for kind, texts in zip(KINDS, captions, strict=True):
        made = made_by.get(kind) or clip.provenance.get(kind)
        provenance |= {kind: made} if texts and made else {}
    line = {
        "id": clip.id,
        "audio": audio,
        "start_s": clip.start_s or None,
        "duration_s": clip.duration_s,
        "channel": clip.channel,
        **named,
        "global_captions": list(captions.global_captions),
        "finegrained_captions": list(captions.fine_captions),
        "tags": {key: value for key, value in tags.items() if key not in named},
        "claims": {kind: [dict(row) for row in claims[kind]] for kind in KINDS if claims.get(kind)},
        **others,
        "provenance": provenance,
    }
    return {key: value for key, value in line.items() if value not in (None, [], {})}


def first_row(file: Path) -> dict[str, Any]:
    """The object in the first line of a file; empty if there is none."""
    try:
        with file.open("rb") as lines:
            row = json.loads(lines.readline(_LONGEST_LINE))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def refuse_other_file(out: Path, command: str) -> None:
    """ValueError if `out` is a file that the command did not write: the new manifest would replace it."""
    if paths.is_dir(out):
        raise ValueError(f"out must be a file, {out} is a folder")
    if not paths.exists(out):
        return
    provenance = first_row(out).get("provenance")
    if not isinstance(provenance, dict) or provenance.get("written_by") != command:
        raise ValueError(f"{out} exists and was not written by this command; name another file or remove it")
