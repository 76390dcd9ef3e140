"""Zero-shot tasks as data. Those of the literature are in tasks.json; to add one, add an entry there.

A user's file has the same form:

    {"my-task": {"field": "mood",                          # the clips' tag that holds the true label
                 "prompts": {"calm": ["A calm voice."], "tense": ["A tense voice.", "Someone tense."]},
                 "merge": {"relaxed": "calm"},             # "relaxed" counts as "calm"
                 "below": {"young": 30, "old": null},      # for tags that are numbers: under 30 is "young"
                 "layout": "manifest"}}                    # how SOURCE is read without --layout

Instead of "prompts", a task may have "labels" and a "template", in which {} stands for the label. The short
form {"tag": {"label": ["prompt"]}} is a task with the same name and field. Training (--data.zeroshot) accepts
only the short form.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsp_fast.checks import listed
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation.corpora import LAYOUTS
from clsp_fast.storage import textfile

_LARGEST_FILE = 2**20
_LARGEST_SHORT_FILE = 2**24
_KEYS = {"field", "labels", "template", "prompts", "merge", "below", "layout"}
_SHORT_FORM = '{tag: {label: ["prompt", ...], ...}, ...}, with at least two labels per tag'


@dataclass(frozen=True, kw_only=True)
class Task:
    """A zero-shot task.

    Attributes:
        name: name of the task.
        field: the tag that holds the true label.
        prompts: label -> descriptions; their mean embedding stands for the label.
        merge: label -> the label that it counts as, in labels and in predictions.
        below: label -> upper bound (exclusive) of its range. The bounds rise; the last may be None: no bound.
            Empty: the tag is not a number.
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
        texts = [text for descriptions in self.prompts.values() for text in descriptions]
        if not all(self.prompts.values()) or not all(isinstance(text, str) for text in texts):
            return '"prompts" must have at least one description for each label'
        names = [self.name, self.field, *self.prompts, *self.merge, *self.below]
        unwritable = [text for text in names + texts if not textfile.is_text(text)]
        if unwritable:
            got = f"half a surrogate pair, or bytes that are not UTF-8: {unwritable[0]!r}"
            return f"its names and descriptions must hold text, got {got}"
        for label, target in self.merge.items():
            if not isinstance(target, str) or target not in self.prompts or target in self.merge:
                return (
                    f'"merge" must map to labels with prompts that are not merged, got {label!r}: {target!r}'
                )
        if len(self.names) < 2:
            return f"at least two labels must be left after merging, got {list(self.names)}"
        bounds = list(self.below.values())
        numbers = [b for b in bounds if isinstance(b, (int, float)) and not isinstance(b, bool)]
        rising = numbers == sorted(set(numbers)) and bounds[:-1] == numbers[: len(bounds) - 1]
        if bounds and (not rising or len(bounds) - len(numbers) > 1 or set(self.below) - set(self.prompts)):
            return '"below" must map labels with prompts to rising bounds; only the last bound may be null'
        if self.layout not in LAYOUTS:
            return f'"layout" must be one of {", ".join(LAYOUTS)}, got {self.layout!r}'
        return ""

    @property
    def names(self) -> list[str]:
        """The labels that are left after merging."""
        return [label for label in self.prompts if label not in self.merge]

    def label_of(self, clip: Clip) -> str | None:
        """The clip's label after merging; None if the clip has no label of this task."""
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


Tasks = Mapping[str, Task]
"""Tasks by name."""


def tasks_from_prompts(prompts: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Task]:
    """Tasks of the short form, tag -> label -> descriptions."""
    return {
        tag: Task(name=tag, field=tag, prompts={label: tuple(texts) for label, texts in labels.items()})
        for tag, labels in prompts.items()
    }


def read_tasks(path: Path | None = None, *, short: bool = False) -> dict[str, Task]:
    """The tasks of a JSON file, by name.

    Args:
        path: the file; None: the tasks of the package.
        short: accept only the short form. Then the file may be without tasks.

    Raises:
        ValueError: the file does not have this form; the message says where. FileNotFoundError: no such file.
    """
    path = Path(__file__).with_name("tasks.json") if path is None else path
    most_bytes = _LARGEST_SHORT_FILE if short else _LARGEST_FILE
    text = textfile.read_text(path, "a JSON file of tasks", most_bytes=most_bytes)
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if short:
        problem = _problem_with_short_form(content)
        if problem is not None:
            raise ValueError(f"{path} must hold {_SHORT_FORM}{problem}")
    try:
        if short:
            return tasks_from_prompts(content)
        if not isinstance(content, dict) or not content:
            raise ValueError("expected an object with at least one task")
        return {name: _task(name, value) for name, value in content.items()}
    except RecursionError:  # a message that quotes a deeply nested value
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _problem_with_short_form(content: Any) -> str | None:
    """The end of an error message, which says where the short form is violated; None if it is not."""
    if not isinstance(content, dict):
        return ""
    for tag, labels in content.items():
        if not isinstance(labels, dict) or len(labels) < 2:
            return f"; the tag {tag!r} violates this"
        for prompts in labels.values():
            if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
                return f"; the tag {tag!r} violates this"
    return None


def _task(name: str, value: Any) -> Task:
    if not isinstance(value, dict):
        raise ValueError(f"task {name!r} must be an object, got {type(value).__name__}")
    if not _KEYS & set(value):
        value = {"field": name, "prompts": value}
    unknown = set(value) - _KEYS
    if unknown or "field" not in value or ("prompts" in value) == ("labels" in value):
        known, got = ", ".join(sorted(_KEYS)), listed(sorted(value))
        expected = f'"field", either "prompts" or "labels", and no keys other than {known}'
        raise ValueError(f"task {name!r} must have {expected}; got {got}")
    if not isinstance(value["field"], str) or not value["field"]:
        raise ValueError(f'task {name!r}: "field" must be the name of a tag, got {value["field"]!r}')
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
    if not all(isinstance(texts, (str, list)) for texts in prompts.values()):
        raise ValueError(f'task {name!r}: "prompts" must have lists of descriptions')
    prompts = {
        label: (texts,) if isinstance(texts, str) else tuple(texts) for label, texts in prompts.items()
    }
    if any(isinstance(text, str) and not text.strip() for texts in prompts.values() for text in texts):
        raise ValueError(f'task {name!r}: "prompts" must have at least one description for each label')
    layout = value.get("layout", "manifest")
    return Task(name=name, field=value["field"], layout=layout, **parts | {"prompts": prompts})
