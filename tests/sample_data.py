"""Data and types that several test files share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
# Types of the fixtures `golden` and `make_clips`.
Golden = Callable[[str], dict[str, Tensor]]
MakeClips = Callable[[Path, int], list[Path]]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 96044\n"


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSON lines, and returns their path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Attack:
    """Creates the file attack_ran in the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (Path("attack_ran"),)
