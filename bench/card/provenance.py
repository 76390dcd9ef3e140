"""The code that a run measures: the commit of the checkout and that of the installed wheel.

Only the standard library is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPILED = ("CMakeLists.txt", "pyproject.toml", "csrc/*", "kernels/*.py")
"""Files that a run takes from the wheel, and the settings of its build."""
CODE = (*COMPILED, *(f"clsp_fast/**/*.{kind}" for kind in ("py", "json", "txt")), "bench/**/*.py")
"""Patterns that mean the same to `Path.glob` and to git's `:(glob)`."""


@dataclass(frozen=True)
class Wheel:
    """What built-from.json says about the wheel: the code from which it was built.

    Attributes:
        commit: the commit of the checkout.
        dirty: whether the checkout's code differed from it.
        code: digest of CODE.
        compiled: digest of COMPILED.
    """

    commit: str
    dirty: bool
    code: str
    compiled: str


def digest(root: Path, patterns: Iterable[str] = CODE) -> str:
    """Digest of the names and contents of the files that match a pattern."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def write_wheel(path: Path, root: Path, commit: str, dirty: bool) -> None:
    """Writes built-from.json for a wheel that was built from the files in `root`."""
    wheel = Wheel(commit, dirty, digest(root), digest(root, COMPILED))
    path.write_text(json.dumps(asdict(wheel)) + "\n")


def read_wheel(path: Path) -> Wheel | None:
    """Reads built-from.json; None if there is no such file.

    Raises:
        SystemExit: the file is damaged, or an older version has written it.
    """
    try:
        wheel = Wheel(**json.loads(path.read_text()))
        if all(type(value) is (bool if key == "dirty" else str) for key, value in asdict(wheel).items()):
            return wheel
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        pass
    raise SystemExit(f"{path} is damaged or old: run `make card-wheels` again, or delete the file")


def identify(root: Path, checkout: tuple[str, bool], wheel: Wheel | None) -> dict[str, Any]:
    """What the results say about the code.

    Args:
        root: folder of the checkout.
        checkout: its commit, "unknown" outside git, and whether its code differs from it.
        wheel: the wheel in .card/.

    Returns:
        "commit" and "dirty" of the checkout; "code", the digest of its files; and "wheel", if the wheel was
        built from other code. Outside git, the wheel's commit is that of the checkout, which is "dirty" if
        its files are not those from which the wheel was built. Without a wheel, "dirty" is None: not known.
    """
    code = digest(root)
    commit, dirty = checkout[0], checkout[1] if checkout[0] != "unknown" else None
    if commit == "unknown" and wheel:
        commit, dirty = wheel.commit, wheel.dirty or wheel.code != code
    document: dict[str, Any] = {"commit": commit, "dirty": dirty, "code": code}
    if wheel and wheel.code != code:
        compiled = wheel.compiled == digest(root, COMPILED)
        document["wheel"] = {
            "commit": wheel.commit,
            "dirty": wheel.dirty,
            "code": wheel.code,
            "same_compiled_files": compiled,
        }
    return document
