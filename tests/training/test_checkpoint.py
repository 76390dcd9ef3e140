"""Checkpoints under every fault that storage and people can produce."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from clsp_fast.training import checkpoint
from clsp_fast.training.checkpoint import Checkpoint


def make(step: int, size: int = 100) -> Checkpoint:
    tensors = {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}
    return Checkpoint(step, tensors, {"a/exp_avg": tensors["a"] * 2}, {"bad": {"x": "open"}})


def assert_has_step(loaded: Checkpoint | None, step: int) -> None:
    assert loaded is not None
    assert loaded.step == step
    assert loaded.state == {"bad": {"x": "open"}}
    torch.testing.assert_close(loaded.model, make(step, len(loaded.model["a"])).model, rtol=0, atol=0)
    torch.testing.assert_close(loaded.optim["a/exp_avg"], loaded.model["a"] * 2, rtol=0, atol=0)


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert_has_step(checkpoint.newest(tmp_path), 100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 40)


def _empty(folder: Path) -> None:
    (folder / "optim.safetensors").write_bytes(b"")


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _half_json(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text[: len(text) // 2])


def _other_json(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def _missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _hollow(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("harm", [_truncate, _empty, _flip, _half_json, _other_json, _missing, _hollow])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm) -> None:
    checkpoint.save(tmp_path, make(1), keep=5)
    harm(checkpoint.save(tmp_path, make(2), keep=5))
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        assert_has_step(checkpoint.newest(tmp_path), 1)


def test_damaged_later_checkpoints_do_not_crowd_out_good_ones(tmp_path: Path) -> None:
    for step in (1000, 2000):
        _flip(checkpoint.save(tmp_path, make(step), keep=2))
    written = checkpoint.save(tmp_path, make(500), keep=2)
    assert written.exists()
    assert_has_step(checkpoint.newest(tmp_path), 500)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000500"]


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / "step-best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, make(3), keep=1)
    assert_has_step(checkpoint.newest(tmp_path), 3)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "step-best").exists()


def test_a_full_disk_costs_no_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make(1), keep=1)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, make(2), keep=1)
    assert_has_step(checkpoint.newest(tmp_path), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(4), keep=1)
    checkpoint.save(tmp_path, make(4, size=7), keep=1)
    loaded = checkpoint.newest(tmp_path)
    assert_has_step(loaded, 4)
    assert loaded is not None
    assert len(loaded.model["a"]) == 7


def _save_forever(folder: str) -> None:
    torch.set_num_threads(1)
    step = 1
    while True:
        checkpoint.save(Path(folder), make(step, size=200_000), keep=2)
        step += 1


@pytest.mark.multiproc
def test_kill_at_any_moment_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for round_ in range(4):
        folder = tmp_path / str(round_)
        process = context.Process(target=_save_forever, args=(str(folder),))
        process.start()
        try:
            while not list(folder.glob("step-*")):
                assert process.is_alive(), "ended before it saved anything"
                time.sleep(0.01)
            time.sleep(0.11 * round_ + 0.03)
            assert process.is_alive(), "ended before it could be killed"
        finally:
            process.kill()
            process.join()
        loaded = checkpoint.newest(folder)
        assert loaded is not None
        assert_has_step(loaded, loaded.step)
