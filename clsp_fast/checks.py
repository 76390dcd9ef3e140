"""Checks settings, and writes lists and differences of values as one line of an error message."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST_ITEM = 160


class WrongValue(ValueError):
    """A setting has a value that it must not have. The message begins with the name of the setting."""


def is_rate(value: float) -> bool:
    """Whether the value is a number in [0, 1)."""
    return isinstance(value, (int, float)) and 0.0 <= value < 1.0


def is_positive(value: object) -> bool:
    """Whether the value is an integer > 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require(ok: bool, field: str, expected: str, got: object) -> None:
    """Raises WrongValue unless `ok`; the message names the field, what was expected and what was given."""
    if not ok:
        raise WrongValue(f"{field} must be {expected}, got {_shortened(repr(got))}")


def check_precision(precision: str) -> None:
    """Raises WrongValue unless the name is one of the three that `--precision` knows."""
    require(precision in ("fp32", "tf32", "bf16"), "precision", '"fp32", "tf32" or "bf16"', precision)


def _shortened(text: str, longest: int = _LONGEST_ITEM) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def counted(count: int, noun: str) -> str:
    """A number and a noun: "1 clip", "0 clips", "1,200 clips"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[str], *, separator: str = ", ", width: int = 120) -> str:
    """Joins the items to one line of `width` characters. If not all fit: "2 of 1,431: a, b, ...".

    At least one item is shown. An item of over `width` characters is cut.
    """
    shown = 1
    while shown < len(items) and len(separator.join(items[: shown + 1])) <= width:
        shown += 1
    text = separator.join(_shortened(item, width) for item in items[:shown])
    return text if shown >= len(items) else f"{shown} of {len(items):,}: {text}{separator}..."


def listed_groups(groups: Mapping[str, Sequence[str]]) -> str:
    """Joins several named lists to one line. Empty lists are left out; a list named "" has no label."""
    filled = {name: items for name, items in groups.items() if items}
    width = 120 // max(1, len(filled))
    parts = [(f"{name}: " if name else "") + listed(items, width=width) for name, items in filled.items()]
    return "; ".join(parts)


def differences(config: Any, other: Any) -> list[str]:
    """The fields in which two configurations of one class differ, each as "text.dim is 256, not 512"; 512 is
    the value in `other`."""
    values, others = by_path(dataclasses.asdict(config)), by_path(dataclasses.asdict(other))
    return [
        f"{path} is {value}, not {others[path]}" for path, value in values.items() if value != others[path]
    ]


def by_path(values: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """The values of nested mappings by their paths: {"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= by_path(value, f"{lead}{key}.") if isinstance(value, dict) else {lead + key: value}
    return flat


def reject_unknown_keys(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Raises ValueError if a key is not a field of `cls`. The message names the first such key and the field
    with the nearest spelling, or all fields if none is near."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:_LONGEST_ITEM], known, n=1)
            hint = f"the nearest is {near[0]!r}" if near else f"it has {listed(known)}"
            raise ValueError(f"{cls.__name__} has no key {_shortened(repr(key))}; {hint}")
