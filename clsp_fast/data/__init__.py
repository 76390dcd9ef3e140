"""From a manifest to the batches of a training run."""

import importlib
from typing import Any

from clsp_fast.data.loader import (
    Batch,
    ClipFeatures,
    DataError,
    Encode,
    Loader,
    bad_list,
    collate,
    segment,
    usable,
)
from clsp_fast.data.validation import validate

__all__ = [
    "Batch",
    "ClipFeatures",
    "DataError",
    "Encode",
    "Loader",
    "bad_list",
    "collate",
    "segment",
    "usable",
    "validate",
]


def __getattr__(name: str) -> Any:
    # __main__ is imported on use: if it were imported here first, `python -m clsp_fast.data` would warn.
    if name == "main":
        return importlib.import_module("clsp_fast.data.__main__").main
    raise AttributeError(f"module 'clsp_fast.data' has no attribute {name!r}")
