"""A clip, and checks of the values that a manifest's line gives for it.

Each check raises a ValueError that names the key, the expected value and the given one.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from clsp_fast.data.captions import Captions
from clsp_fast.storage.textfile import is_text, shown

LONGEST_NAME = 2**15
"""Characters of the longest path. A line of an embedding index must hold it twice, in JSON escapes."""
KINDS = ("global", "fine")
"""The kinds of captions, in the order of `Captions`."""
_GLOBAL_KEYS = ("global_captions", "short_captions")
_FINE_KEYS = ("finegrained_captions", "long_captions", "captions")


@dataclass(frozen=True, slots=True)
class Clip:
    """One stretch of speech and what is known about it.

    Attributes:
        id: unique within a manifest.
        audio: path of the file.
        start_s: offset in the file, seconds.
        duration_s: length in seconds; None: to the end of the file.
        channel: channel to read; None: the mean of all channels.
        captions: global and fine-grained captions.
        tags: labels such as speaker and gender. Zero-shot tasks take the true labels from here.
        claims: for each kind of caption ("global", "fine"), what each caption asserts (tag -> value), in the
            order of `captions`; empty where unknown. From the claims, evaluation finds all clips that a
            caption is true of.
        provenance: for each kind of caption, how the captions were made; a kind of which this is unknown is
            missing. Clips with the same provenance share the object, so it must not be changed.
    """

    id: str
    audio: str
    start_s: float
    duration_s: float | None
    channel: int | None
    captions: Captions
    tags: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, tuple[Mapping[str, str], ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def is_path(value: object) -> TypeGuard[str]:
    """Whether a file could have this path. Paths need not be UTF-8."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        return False
    if value.isascii():
        return True
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def captions_of(row: Mapping[str, Any]) -> Captions:
    """The global and fine-grained captions under any of their keys."""
    return Captions(*(_strings(row, keys) for keys in (_GLOBAL_KEYS, _FINE_KEYS)))


def _strings(row: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The value of the first key that the row has, as non-empty strings. A string counts as a list of one."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(f'"{key}" must be a list of strings')
        if any(not v.strip() for v in values):
            raise ValueError(f'"{key}" holds an empty caption')
        if not all(is_text(v) for v in values):
            what = "half a surrogate pair, or bytes that are not UTF-8"
            raise ValueError(f'"{key}" holds {what}, which is not text')
        if values:
            return tuple(v.strip() for v in values)
    return ()


def seconds_of(row: Mapping[str, Any], key: str, default: float | None) -> Any:
    """A time in seconds, or `default`. A duration must be positive, a start may be 0."""
    value = row.get(key)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and "duration" in key):
        raise ValueError(
            f'"{key}" must be seconds{" > 0" if "duration" in key else " >= 0"}, got {shown(value)}'
        )
    return float(value)


def channel_of(value: object) -> int | None:
    """The number of a channel; None: the mean of all channels."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31):
        return value
    raise ValueError(f'"channel" must be an integer in [0, 2147483648), got {shown(value)}')


def id_of(value: object, default: str) -> str:
    """An id as text, or `default`."""
    if value is not None and not is_text(str(value)):
        raise ValueError(f'"id" must be text, got {shown(value)}')
    return default if value is None else str(value)


def tags_of(value: object) -> dict[str, str]:
    """Tags with their values as text, such as "sad, slow" for a list. Null values are left out."""
    if not isinstance(value, Mapping):
        raise ValueError('"tags" must be an object')
    return {str(key): _tag(item) for key, item in value.items() if item is not None}


def _tag(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def claims_of(value: object, captions: Captions) -> dict[str, tuple[Mapping[str, str], ...]]:
    """The claims of each kind of caption, one object per caption."""
    if not isinstance(value, Mapping):
        raise ValueError('"claims" must be an object')
    claims: dict[str, tuple[Mapping[str, str], ...]] = {}
    for kind, texts in zip(KINDS, captions, strict=True):
        rows = value.get(kind, [])
        if not isinstance(rows, list) or len(rows) not in (0, len(texts)):
            raise ValueError(f'"claims"."{kind}" must have one object for each of the {len(texts)} captions')
        claims[kind] = tuple(tags_of(row) for row in rows)
    return claims


def provenance_of(value: object, captions: Captions) -> Mapping[str, Any]:
    """How the captions of each kind were made.

    Args:
        value: an object with the keys "global" and "fine", and "written_by" for the command that wrote the
            line. Anything else describes all captions of the clip.
        captions: of the clip.
    """
    if value is None:
        return {}
    return _provenance(json.dumps(value), *(bool(texts) for texts in captions))


@functools.lru_cache(16)
def _provenance(text: str, *present: bool) -> Mapping[str, Any]:
    """`provenance_of` for a value as JSON. The cache makes the lines of a manifest share one object."""
    value = json.loads(text)
    kinds = [kind for kind, is_present in zip(KINDS, present, strict=True) if is_present]
    if isinstance(value, dict) and value.keys() <= {*KINDS, "written_by"}:
        return {kind: value[kind] for kind in kinds if value.get(kind)}
    return dict.fromkeys(kinds, value)
