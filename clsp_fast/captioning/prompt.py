"""Prompts as text files that a user can edit. Those of the package are in prompts/."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clsp_fast.checks import listed
from clsp_fast.storage import textfile

FOLDER = Path(__file__).with_name("prompts")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_HEADING = re.compile(r"^\[(system|user)\][ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template. `[system]` and `[user]` on lines of their own begin the two messages; without them all of
    the text is the user's message. `{name}` stands for a value, and a line whose value is empty is left out.

    Attributes:
        name: the file, for errors.
        text: the template.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the template, which identifies the prompt in records and manifests."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def messages(self, values: Mapping[str, str]) -> list[tuple[str, str]]:
        """(role, text) of the messages, with `values` in place of the placeholders."""
        parts = _HEADING.split(self.text)
        pairs = [("user", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
        filled = [(role, self._fill(part, values)) for role, part in pairs]
        return [(role, text) for role, text in filled if text]

    def _fill(self, part: str, values: Mapping[str, str]) -> str:
        def value(match: re.Match[str]) -> str:
            return values.get(match[1], match[0])

        lines = []
        for line in part.strip().splitlines():
            named = [name for name in _PLACEHOLDER.findall(line) if name in values]
            if not named or any(values[name] for name in named):
                lines.append(_PLACEHOLDER.sub(value, line))
        return "\n".join(lines).strip()


def read_prompt(name: str, file: Path | None, placeholders: set[str]) -> Prompt:
    """Reads a prompt of the package, or the user's.

    Args:
        name: a file in prompts/, without its suffix.
        file: the user's file; None: that of the package.
        placeholders: names that must occur in the template.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is empty, no text, or lacks a placeholder.
    """
    path = FOLDER / f"{name}.txt" if file is None else file
    text = textfile.read_text(path, "a prompt (text)", most_bytes=2**20).replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{path} is empty; expected a prompt")
    if not textfile.is_text(text):
        raise ValueError(f"{path} is not UTF-8; save the prompt as UTF-8")
    missing = sorted(placeholders - set(_PLACEHOLDER.findall(text)))
    if missing:
        raise ValueError(
            f"{path} lacks {listed([f'{{{word}}}' for word in missing])}; see {FOLDER / name}.txt"
        )
    return Prompt(str(path), text)
