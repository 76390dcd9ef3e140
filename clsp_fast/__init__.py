"""Trains, loads and uses models of contrastive language-speech pre-training (CLSP, arXiv 2601.03065).

A model embeds speech, and text that describes how something is said, in one joint space. The public names are
`CLSP`, the modules `audio`, `config`, `features`, `loss`, `similarity` and `metrics`, and the commands
`caption`, `convert`, `embed`, `evaluate`, `export`, `score` and `search`. Each is imported when it is first
used, so `import clsp_fast` loads little more than the compiled extension.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout without a built extension, this finds `_C` and `kernels` of the installed package.
__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from clsp_fast import (
        audio,
        caption,
        config,
        convert,
        embed,
        evaluate,
        export,
        features,
        loss,
        metrics,
        score,
        search,
        similarity,
    )
    from clsp_fast.model import CLSP

__all__ = [
    "CLSP",
    "__version__",
    "audio",
    "caption",
    "config",
    "convert",
    "embed",
    "evaluate",
    "export",
    "features",
    "loss",
    "metrics",
    "score",
    "search",
    "similarity",
]


def _check_extension() -> None:
    """Raises ImportError, naming the fix, if the compiled extension is missing or has another version."""
    fix = "run `pip install .` again in the source tree"
    try:
        extension = importlib.import_module("clsp_fast._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"clsp_fast is not installed: its extension clsp_fast._C was not found; {fix}"
        ) from error
    if extension.__version__ != __version__:
        raise ImportError(f"clsp_fast is {__version__} but its extension is {extension.__version__}; {fix}")


_check_extension()


def __getattr__(name: str) -> Any:
    if name == "CLSP":
        return importlib.import_module("clsp_fast.model").CLSP
    if name in __all__:
        return importlib.import_module(f"clsp_fast.{name}")
    raise AttributeError(f"module 'clsp_fast' has no attribute {name!r}")
