"""`caption tags MANIFEST OUT.jsonl`: procedural captions from the tags of a manifest.

The attributes of `wording` get its words. Any other tag becomes a sentence such as "The accent is Indian."
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clsp_fast import __version__
from clsp_fast.captioning import wording
from clsp_fast.captioning.offline import describe_foreign, foreign_tags, known_labels
from clsp_fast.checks import counted, require
from clsp_fast.console import INCOMPLETE
from clsp_fast.data.audio_paths import AudioPaths
from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import KINDS, Clip
from clsp_fast.data.manifest import iterate_manifest
from clsp_fast.data.manifest_lines import manifest_line, refuse_other_file
from clsp_fast.data.tag_values import stated
from clsp_fast.storage import files

_VALUE = re.compile(r"[^\W\d_](?:[^\W_]|[ '-]){1,39}")
_FINE_CAPTIONS = 5
_SHARE = 0.8
_MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TagsConfig:
    """Writes captions from the tags of a manifest. Nothing is heard or measured, and no server is asked.

    The tags sex (or gender), pitch, speed, liveliness, loudness, quality and pauses get varied words where
    their labels are those of `caption offline`. A clip without any usable tag is left out.
    """

    manifest: Path
    """A manifest with tags, or lhotse cuts."""
    out: Path
    """The manifest to write. It must not be the one that is read."""
    others: tuple[str, ...] = ("accent", "age", "emotion", "speaking_rate", "style")
    """Other tags that become a sentence such as "The accent is Indian.\""""
    replace: bool = False
    """Writes new captions for clips that have some. Otherwise only a kind that a clip lacks is written."""
    seed: int = 0
    """Seed of the choice of words."""

    def __post_init__(self) -> None:
        require(self.out.name.endswith(".jsonl"), "out", "a file whose name ends in .jsonl", str(self.out))
        require(
            self.out.resolve() != self.manifest.resolve(), "out", "another file than manifest", str(self.out)
        )
        require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)


def tags(config: TagsConfig) -> int:
    """Writes the manifest.

    Returns:
        The exit code of the command: 0, or 3 if clips were left out.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, none of its clips has a usable tag, or
        `out` holds something that this command did not write.
        DiskFull: there is no room; nothing is left behind.
    """
    refuse_other_file(config.out, "tags")
    counts: Counter[str] = Counter()
    foreign: Counter[str] = Counter()
    name_audio = AudioPaths(config.manifest.parent, config.out.parent)

    def write(path: Path) -> None:
        with path.open("w", encoding="ascii") as file:
            for number, clip in iterate_manifest(config.manifest, need_captions=False):
                if not isinstance(clip, Clip):
                    counts["bad line"] += 1
                    if counts["bad line"] <= _MOST_SHOWN:
                        print(f"{config.manifest}, line {number}: {clip.message}", file=sys.stderr)
                    continue
                line = _line(clip, name_audio(clip.audio), config)
                counts["no tag" if line is None else "clip"] += 1
                if line is not None:
                    foreign.update(foreign_tags(clip, known_labels(clip, with_measured=True)))
                    file.write(json.dumps(line) + "\n")
        if not counts["clip"]:
            known = ", ".join((*wording.ATTRIBUTES, *config.others))
            raise ValueError(f"{config.manifest}: no clip has a usable tag; expected one of {known}")

    config.out.parent.mkdir(parents=True, exist_ok=True)
    files.replace_file(config.out, write)
    print(f"{config.out}: captions for {counted(counts['clip'], 'clip')}")
    if counts["bad line"]:
        print(f"left out: {counted(counts['bad line'], 'bad line')}")
    if counts["no tag"]:
        print(f"left out: {counted(counts['no tag'], 'clip')} without a usable tag")
    for text in describe_foreign(foreign):
        print(text)
    return INCOMPLETE if counts["bad line"] or counts["no tag"] else 0


def _line(clip: Clip, audio: str, config: TagsConfig) -> dict[str, Any] | None:
    """The clip's line in the manifest; None if it has no usable tag and lacks captions."""
    labels = {
        attribute: label for attribute, label in known_labels(clip, with_measured=True).items() if label
    }
    others = {key: clip.tags[key] for key in config.others if _is_usable(clip.tags.get(key, ""))}
    others = {key: value for key, value in others.items() if key not in labels}
    kept = Captions((), ()) if config.replace else clip.captions
    if not all(kept) and not labels and not others:
        return None
    captions: dict[str, Sequence[str]] = dict(zip(KINDS, kept, strict=True))
    claims: dict[str, Sequence[Mapping[str, str]]] = dict(clip.claims)
    made_by = {}
    digest = hashlib.sha256(clip.id.encode("utf-8", "surrogatepass")).digest()
    rng = np.random.default_rng([config.seed, int.from_bytes(digest[:8], "little")])
    for kind, pairs in ({} if all(kept) else write_captions(labels, others, rng)).items():
        if not captions[kind]:
            captions[kind], claims[kind] = [[*column] for column in zip(*pairs, strict=True)]
            made_by[kind] = {"by": "tags", "version": __version__, "seed": config.seed}
    return manifest_line(
        clip,
        audio=audio,
        captions=Captions(*(tuple(captions[kind]) for kind in KINDS)),
        claims=claims,
        tags={**clip.tags, **labels},
        made_by=made_by,
        written_by="tags",
    )


def _is_usable(value: str) -> bool:
    """Whether a tag's value can stand in a sentence."""
    return bool(_VALUE.fullmatch(value)) and bool(stated(value))


def write_captions(
    labels: Mapping[str, str], others: Mapping[str, str], rng: np.random.Generator
) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """Kind ("global", "fine") -> distinct captions with their claims.

    Args:
        labels: labels of the attributes of `wording`.
        others: other tags, at least one if `labels` has nothing besides "sex".
        rng: chooses words, and which of the other tags a caption mentions.
    """
    if labels.keys() - {"sex"}:
        written = wording.captions(labels, rng)
        bases = {
            "global": [*zip(written.global_captions, written.global_claims, strict=True)],
            "fine": [*zip(written.fine_captions, written.fine_claims, strict=True)],
        }
    else:
        sex = {key: labels[key] for key in ("sex",) if key in labels}
        subject = {"female": "A woman", "male": "A man"}.get(labels.get("sex", ""), "Someone")
        bases = {
            kind: [(f"{subject} speaks.", sex)] * count
            for kind, count in (("global", 1), ("fine", _FINE_CAPTIONS))
        }
    result: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for kind, pairs in bases.items():
        distinct: dict[str, dict[str, str]] = {}
        for text, claims in pairs:
            keys = [
                str(key) for key in rng.permutation(sorted(others)) if rng.random() < _SHARE or not distinct
            ]
            sentences = [f"The {key.replace('_', ' ')} is {others[key].strip()}." for key in keys]
            distinct[" ".join([text, *sentences])] = dict(claims) | {key: others[key] for key in keys}
        result[kind] = list(distinct.items())
    return result
