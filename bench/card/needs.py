"""Names the modules that a run needs and that are not installed, before the first of them is imported.

Only the standard library is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "einops": "einops",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "soundfile": "soundfile",
    "clsp_fast._C": ".",
    "clsp_fast.kernels": ".",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "lhotse": "lhotse",
}
"""Module -> what pip installs for it; "." is this library."""
FOR_TESTS = ("pytest", "xdist", "pytest_timeout", "hypothesis", "lhotse")
"""Modules that only the stage `tests` needs."""
ALWAYS = tuple(module for module in PACKAGES if module not in FOR_TESTS)


def check(modules: Iterable[str], otherwise: str = "") -> None:
    """Checks that modules are installed.

    Args:
        modules: keys of PACKAGES.
        otherwise: what else the user can do, as the end of the message.

    Raises:
        SystemExit: some are not installed. The message names them and says how to install them.
    """
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[module] for module in missing))
        raise SystemExit(
            f"bench.card: not installed: {', '.join(missing)}. Install the wheels of .card/ "
            f"(docs/card.md, Run), or what is missing: pip install {packages}{otherwise}"
        )


def is_installed(module: str) -> bool:
    """Whether a module can be found. Only `clsp_fast` is imported, if it is the parent.

    Without its extension, or with one of another version, that import fails.
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
