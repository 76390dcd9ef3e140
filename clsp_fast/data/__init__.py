"""From a manifest to the batches of a training run."""

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
