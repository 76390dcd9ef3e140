"""From a manifest to the batches of a training run.

The names below are imported on use, so that reading a manifest needs neither torch nor the frontend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clsp_fast.data.__main__ import main
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
    "main",
    "segment",
    "usable",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'clsp_fast.data' has no attribute {name!r}")
    file = {"main": "__main__", "validate": "validation"}.get(name, "loader")
    return getattr(importlib.import_module(f"clsp_fast.data.{file}"), name)
