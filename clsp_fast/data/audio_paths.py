"""How a manifest that a command writes names the recordings of its source."""

from __future__ import annotations

import functools
import os
from pathlib import Path


class AudioPaths:
    """The paths of recordings in a new manifest.

    Recordings in the folder of the new manifest get relative paths, so that all of it can be moved together.
    If the source's folder contains that folder, its recordings also get relative paths. Other paths are
    absolute. Links to folders are resolved, because ".." leads out of the folder that a link points to.

    Args:
        source: folder of the manifest, or of the recordings, that the command reads.
        out: folder of the manifest that it writes.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self._out, source = out.resolve(), source.resolve()
        self._top = source if self._out.is_relative_to(source) else self._out
        self._resolved = functools.lru_cache(1024)(_resolved)

    def __call__(self, audio: str) -> str:
        """The path of a recording; `audio` is relative to the current folder."""
        path = self._resolved(Path(audio).parent) / Path(audio).name
        if path.is_relative_to(self._top):
            return os.path.relpath(path, self._out)
        return str(path)


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, or a zero byte: no file has this path
        return folder.absolute()
