"""Simulates paths that the user may not read. Tests may run as root, who may read every path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def refuse_forbidden_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every access to a path with "/forbidden" in it raise PermissionError."""
    stat, scandir = Path.stat, os.scandir

    def refuse(path: object) -> None:
        if "/forbidden" in str(path):
            raise PermissionError(13, "Permission denied", str(path))

    def checked_stat(path: Path, **options: bool) -> os.stat_result:
        refuse(path)
        return stat(path, **options)

    def checked_scandir(path: Any) -> Any:
        refuse(path)
        return scandir(path)

    monkeypatch.setattr(Path, "stat", checked_stat)
    monkeypatch.setattr(os, "scandir", checked_scandir)
