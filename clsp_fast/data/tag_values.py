"""What the values of tags mean: which say nothing, and the many names of the two sexes."""

from __future__ import annotations

_UNKNOWN = {"", "-", "?", "u", "unk", "unknown", "unlabeled", "unlabelled", "unspecified", "undefined"}
_UNKNOWN |= {"n/a", "na", "nan", "nil", "none", "null", "missing", "not available", "not specified"}
_OTHER = {"other", "others"}
_SEXES = dict.fromkeys(("female", "f", "woman", "w", "girl"), "female")
_SEXES |= dict.fromkeys(("male", "m", "man", "boy"), "male")


def _plain(value: str) -> str:
    """In lower case, without brackets and quotes around it, and with single spaces."""
    return " ".join(value.replace("_", " ").casefold().split()).strip("<>[](){}'\" ")


def is_unknown(value: str) -> bool:
    """Whether the value stands for a missing one, such as "unknown" or "NaN"."""
    return _plain(value) in _UNKNOWN


def stated(value: str) -> str:
    """The value on one line, without the items of a list that say nothing.

    Those are unknown, or "other": none of the values that the data set has names for. Empty if none is left.
    """
    items = [item.strip() for item in " ".join(value.split()).split(",")]
    return ", ".join(item for item in items if not is_unknown(item) and _plain(item) not in _OTHER)


def sex_of(value: str) -> str:
    """ "female" or "male"; empty if the value is neither."""
    return _SEXES.get(_plain(value), "")
