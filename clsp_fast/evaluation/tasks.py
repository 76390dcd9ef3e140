"""Zero-shot tasks as data, and readers of the folders that the corpora behind them come in.

A file of its own because a task is a table's line and a layout is a corpus' habit: neither knows of models.
The tasks of the literature are in tasks.json; a user's file has the same form:

    {"my-task": {"field": "mood",                          # the clips' tag that holds the truth
                 "prompts": {"calm": ["A calm voice."], "tense": ["A tense voice.", "Someone tense."]},
                 "merge": {"relaxed": "calm"},             # in labels and in predictions
                 "below": {"young": 30, "old": null},      # the tag is a number: label of its range
                 "layout": "manifest"}}                    # how --source is read, unless --layout says so

"labels" with a "template" that has {} in it may stand for "prompts". {"tag": {"label": ["prompt"]}} is a
short form of a task whose field has its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsp_fast.checks import listed
from clsp_fast.data.manifest import Clip
from clsp_fast.evaluation.corpora import LAYOUTS
from clsp_fast.storage import textfile

_LARGEST_FILE = 2**20
_KEYS = {"field", "labels", "template", "prompts", "merge", "below", "layout"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A zero-shot task.

    Attributes:
        name: what it is called.
        field: the tag that holds the truth.
        prompts: label -> descriptions; their mean embedding stands for the label.
        merge: label -> the label that it counts as.
        below: label -> upper bound of its range, in rising order, None for the last; empty: no number.
        layout: key of `LAYOUTS`.
    """

    name: str
    field: str
    prompts: Mapping[str, tuple[str, ...]]
    merge: Mapping[str, str] = dataclasses.field(default_factory=dict)
    below: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    layout: str = "manifest"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"task {self.name!r}: {problem}")

    def _problem(self) -> str:
        if not isinstance(self.field, str) or not self.field:
            return f'"field" must be the name of a tag, got {self.field!r}'
        names = [self.name, self.field, *self.prompts, *self.merge, *self.below]
        unwritable = [name for name in names if not textfile.is_text(name)]
        if unwritable:
            got = f"half a surrogate pair, or bytes that are not UTF-8: {unwritable[0]!r}"
            return f"its names must be text, got {got}"
        texts = [text for own in self.prompts.values() for text in own]
        if not all(self.prompts.values()) or not all(
            isinstance(t, str) and t.strip() and textfile.is_text(t) for t in texts
        ):
            return '"prompts" must have a description or more for each label'
        for label, target in self.merge.items():
            if not isinstance(target, str) or target not in self.prompts or target in self.merge:
                return f'"merge" must lead to a label that has prompts and stays, got {label!r}: {target!r}'
        if len(self.names) < 2:
            return f"two labels at least must be left after merging, got {list(self.names)}"
        bounds = list(self.below.values())
        numbers = [b for b in bounds if isinstance(b, (int, float)) and not isinstance(b, bool)]
        rising = numbers == sorted(set(numbers)) and bounds[:-1] == numbers[: len(bounds) - 1]
        if bounds and (not rising or len(bounds) - len(numbers) > 1 or set(self.below) - set(self.prompts)):
            return '"below" must give labels with prompts rising bounds, null for the last at most'
        if self.layout not in LAYOUTS:
            return f'"layout" must be one of {", ".join(LAYOUTS)}, got {self.layout!r}'
        return ""

    @property
    def names(self) -> list[str]:
        """The labels that are left after merging."""
        return [label for label in self.prompts if label not in self.merge]

    def label_of(self, clip: Clip) -> str | None:
        """The clip's label after merging; None if it takes no part."""
        value = clip.tags.get(self.field)
        if value is not None and self.below:
            value = self._range_of(value)
        value = None if value is None else self.merge.get(value, value)
        return value if value in self.names else None

    def _range_of(self, value: str) -> str | None:
        try:
            number = float(value)
        except ValueError:
            return None
        if math.isnan(number):
            return None
        return next((name for name, bound in self.below.items() if bound is None or number < bound), None)


def read_tasks(path: Path | None = None) -> dict[str, Task]:
    """The tasks of a JSON file, by name; None: those of the package.

    Raises:
        ValueError: the file is not of the form; the message says where. FileNotFoundError: there is none.
    """
    path = Path(__file__).with_name("tasks.json") if path is None else path
    text = textfile.read_text(path, "a JSON file of tasks", most_bytes=_LARGEST_FILE)
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not content:
            raise ValueError("expected an object with a task or more")
        return {name: _task(name, value) for name, value in content.items()}
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _task(name: str, value: Any) -> Task:
    if not isinstance(value, dict):
        raise ValueError(f"task {name!r} must be an object, got {type(value).__name__}")
    if not _KEYS & set(value):
        value = {"field": name, "prompts": value}
    unknown = set(value) - _KEYS
    if unknown or "field" not in value or ("prompts" in value) == ("labels" in value):
        known, got = ", ".join(sorted(_KEYS)), listed(sorted(value))
        raise ValueError(f'task {name!r} must have "field" and "prompts" or "labels", of {known}; got {got}')
    prompts = value.get("prompts")
    if prompts is None:
        template, labels = value.get("template"), value["labels"]
        if not isinstance(template, str) or "{}" not in template or not isinstance(labels, list):
            raise ValueError(f'task {name!r}: "labels" must be a list, with a "template" that has {{}} in it')
        prompts = {str(label): [template.replace("{}", str(label))] for label in labels}
    parts = {"prompts": prompts, "merge": value.get("merge", {}), "below": value.get("below", {})}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f'task {name!r}: "{key}" must be an object')
    if not all(isinstance(own, (str, list)) for own in prompts.values()):
        raise ValueError(f'task {name!r}: "prompts" must have lists of descriptions')
    parts["prompts"] = {k: (own,) if isinstance(own, str) else tuple(own) for k, own in prompts.items()}
    return Task(name=name, field=value["field"], layout=value.get("layout", "manifest"), **parts)
