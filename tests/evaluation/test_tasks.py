"""Files of zero-shot tasks: those of the package, those of a user, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation.tasks import read_tasks, tasks_from_prompts


def clip(**tags: str) -> Clip:
    return Clip("a", "a.wav", 0.0, None, None, Captions((), ()), tags)


def test_the_tasks_of_the_package_are_those_of_the_literature() -> None:
    known = read_tasks()
    corpora = ("iemocap-emotion", "ravdess-emotion", "ravdess-gender")
    assert list(known) == [*corpora, "crema-d-emotion", "crema-d-gender", "crema-d-age"]
    iemocap = known["iemocap-emotion"]
    assert iemocap.names == ["happy", "angry", "sad", "neutral"]
    assert iemocap.prompts["excited"] == ("A speaker in a excited tone.",)
    assert iemocap.label_of(clip(emotion="excited")) == "happy"
    assert iemocap.label_of(clip(emotion="frustrated")) is None
    assert iemocap.label_of(clip()) is None
    assert len(known["ravdess-emotion"].names) == 8
    assert len(known["crema-d-emotion"].names) == 6
    age = known["crema-d-age"]
    labels = [age.label_of(clip(age=str(years))) for years in (7, 19.9, 20, 39, 40, 59, 60, 90)]
    names = ["child or young teenager", "adult", "middle-aged", "older or elder"]
    assert labels == [name for name in names for _ in range(2)]
    assert age.label_of(clip(age="unknown")) is None
    assert age.label_of(clip(age="nan")) is None
    assert known["ravdess-gender"].prompts == {"male": ("A male speaker.",), "female": ("A female speaker.",)}


def test_a_users_tasks(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    mood = {"field": "mood", "prompts": {"calm": "A calm voice.", "tense": ["x", "y"], "relaxed": ["z"]}}
    path.write_text(
        json.dumps({"mood": mood | {"merge": {"relaxed": "calm"}}, "sex": {"m": ["a"], "f": ["b"]}})
    )
    users_tasks = read_tasks(path)
    assert users_tasks["mood"].names == ["calm", "tense"]
    assert users_tasks["mood"].prompts["tense"] == ("x", "y")
    assert users_tasks["mood"].label_of(clip(mood="relaxed")) == "calm"
    assert (users_tasks["sex"].field, users_tasks["sex"].layout) == ("sex", "manifest")


GOOD = {"field": "a", "prompts": {"x": ["p"], "y": ["q"]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected an object with at least one task"),
        ("{}", "expected an object with at least one task"),
        (" " * (2**20 + 1), "at most 1048576 bytes"),
        ({"t": 3}, "task 't' must be an object, got int"),
        ({"t": GOOD | {"labls": 1}}, "got .*labls"),
        ({"t": {"prompts": {"x": ["p"], "y": ["q"]}}}, 'must have "field"'),
        ({"t": GOOD | {"field": 5}}, '"field" must be'),
        ({"t": GOOD | {"prompts": ["p"]}}, '"prompts" must be an object'),
        ({"t": GOOD | {"prompts": {"x": ["p"], "y": []}}}, '"prompts" must have at least one description'),
        ({"t": GOOD | {"prompts": {"x": ["p"], "y": [" "]}}}, '"prompts" must have at least one description'),
        ({"t": GOOD | {"prompts": {"x": ["p"], "y": 3}}}, '"prompts" must have lists'),
        ({"t": GOOD | {"prompts": {"x": ["p"]}}}, "at least two labels"),
        ({"t": GOOD | {"merge": {"x": "y"}}}, "at least two labels"),
        ({"t": GOOD | {"merge": {"z": "none"}}}, '"merge" must map to labels'),
        ({"t": GOOD | {"merge": {"x": "y", "y": "x"}}}, '"merge" must map'),
        ({"t": GOOD | {"merge": []}}, '"merge" must be an object'),
        ({"t": GOOD | {"below": {"x": 40, "y": 20}}}, '"below" must map'),
        ({"t": GOOD | {"below": {"x": None, "y": 20}}}, '"below" must map'),
        ({"t": GOOD | {"below": {"x": "20", "y": None}}}, '"below" must map'),
        ({"t": GOOD | {"below": {"z": 20, "y": None}}}, '"below" must map'),
        ({"t": GOOD | {"layout": "tar"}}, '"layout" must be one of manifest, ravdess'),
        ({"t": {"field": "a", "labels": ["x", "y"]}}, '"template" that has'),
        ({"t": {"caf\udce9": ["x"], "b": ["y"]}}, r"names and descriptions must hold text.*'caf\\udce9'"),
        (
            {"t\ud83d": {"a": ["x"], "b": ["y"]}},
            r"task 't\\ud83d': its names and descriptions must hold text",
        ),
        ({"t": GOOD | {"field": "\ud83d"}}, "names and descriptions must hold text"),
        ({"t": GOOD | {"merge": {"\ud83d": "x"}}}, "names and descriptions must hold text"),
        ({"t": {"field": "a", "labels": ["x", "y"], "template": "A."}}, '"template" that has'),
    ],
)
def test_what_is_no_task_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_tasks(path)


SHORT = {"speed": {"slow": ["slow"], "fast": ["fast"]}, "age": {"old": ["slow"], "young": ["fast"]}}


@pytest.mark.parametrize(
    "content", [[1], {"a": {"x": ["p"]}}, {"a": {"x": ["p"], "y": []}}, {"a": {"x": "p", "y": ["q"]}}]
)
def test_a_file_that_is_not_of_the_short_form_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tasks\.json must hold"):
        read_tasks(path, short=True)


def test_a_file_of_the_short_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(SHORT))
    assert read_tasks(path, short=True) == tasks_from_prompts(SHORT)


def test_a_bad_file_of_tasks_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for content in (b"RIFF\x10\0\0\0WAVEfmt " + bytes(99), b"{", b" " * (2**24 + 1)):
        path.write_bytes(content)
        for short in (True, False):
            with pytest.raises(ValueError, match=r"t\.json") as refusal:
                read_tasks(path, short=short)
            assert str(refusal.value).count("t.json") == 1


@pytest.mark.parametrize(
    "content",
    [
        {"t\ud83d": {"a": ["x"], "b": ["y"]}},
        {"t": {"a\udce9": ["x"], "b": ["y"]}},
        {"t": {"a": ["\ud83d"], "b": ["y"]}},
    ],
)
def test_tasks_of_training_must_be_text(tmp_path: Path, content: object) -> None:
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold text"):
        read_tasks(tmp_path / "t.json", short=True)
