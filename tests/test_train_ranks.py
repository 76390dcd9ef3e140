"""The trainer in several processes: unreadable clips, a bad step on one rank, killed workers, exit codes; and
runs that resume with other batches."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.multiprocessing as mp
from sample_data import write_rows
from test_train import COMMAND, assert_same_run, config, losses

from clsp_fast import train
from clsp_fast.config import TrainConfig
from clsp_fast.data import DataError
from clsp_fast.storage import log
from clsp_fast.training import run as run_module

BAD_FILES = {"open": "missing.wav", "empty": "empty.wav", "format": "text.wav"}
pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """many.jsonl: 1,000 clips of 0.35 s, 137 of them unreadable. few.jsonl: 40 good ones."""
    root, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    (root / "empty.wav").touch()
    (root / "text.wav").write_text("no audio " * 50)
    rows: list[dict[str, Any]] = []
    for i in range(1000):
        captions = [f"caption {i % 7}", f"words {i % 5}"]
        rows.append({"id": f"c{i}", "audio": f"{i}.wav", "captions": captions, "duration_s": 0.35})
        if i < 863:
            soundfile.write(root / f"{i}.wav", 0.1 * random.standard_normal(5600), 16000)
        else:
            rows[-1]["audio"] = list(BAD_FILES.values())[i % 3]
    for name, chosen in (("few", rows[:40]), ("many", rows)):
        write_rows(root / f"{name}.jsonl", chosen)
    return root


def run_config(
    clips: Path, run: Path, *, steps: int, data: dict[str, Any], save_every: int = 100
) -> TrainConfig:
    files = {"validation": None, "zeroshot": None, "buckets": 1}
    return config(
        clips, run, data=files | data, stage1_steps=steps, stage2_steps=0, save_every=save_every, log_every=1
    )


def on_two_ranks(scenario: Callable[[int, Path, Path], Any], clips: Path, folder: Path) -> list[Any]:
    """Runs a function on two ranks and returns both results."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    mp.spawn(_rank, args=(scenario, clips, folder, ports), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(
    rank: int, scenario: Callable[[int, Path, Path], Any], clips: Path, folder: Path, ports: list[int]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": str(rank)}
    join, ports_left = train.Ranks.join, iter(ports)

    def join_elsewhere(device: str) -> Any:
        # The store of the previous run may still hold its port.
        os.environ["MASTER_PORT"] = str(next(ports_left))
        return join(device)

    train.Ranks.join = join_elsewhere  # type: ignore[method-assign]
    train.draw_curves = lambda _: "no curves: they take longer than a run"
    torch.save(scenario(rank, clips, folder), folder / f"rank{rank}.pt")


def _meets_bad_clips(_rank: int, clips: Path, folder: Path) -> dict[str, Any]:
    """Two epochs at the limit, the same with a crash in the second, and a run over the limit."""
    real, steps, crash_at = run_module.forward, [], -1

    def forward(model, batch, ranks, settings):
        if batch.step == crash_at:
            raise RuntimeError("power cut")
        steps.append(batch.step)
        return real(model, batch, ranks, settings)

    run_module.forward = forward
    results: dict[str, Any] = {}
    for name, share in (("whole", 0.137), ("crashed", 0.137), ("crashed", 0.137), ("over", 0.136)):
        steps.clear()
        crash_at = 7 if name == "crashed" and name not in results else -1
        data = {"manifest": clips / "many.jsonl", "batch_clips": 100, "max_bad_share": share}
        error = ""
        try:
            train.train(run_config(clips, folder / name, steps=11, data=data, save_every=4))
        except (DataError, RuntimeError) as caught:
            error = str(caught)
        results[name] = [*steps, error]
    return results


def test_bad_clips_are_counted_over_ranks_and_stop_all_of_them(clips: Path, tmp_path: Path) -> None:
    first, second = on_two_ranks(_meets_bad_clips, clips, tmp_path)
    assert first == second
    assert first["whole"] == [*range(11), ""]
    assert first["crashed"] == [*range(4, 11), ""]
    skipped = {}
    for name in ("whole", "crashed"):
        records = [r for r in log.read_log(tmp_path / name / "log.jsonl") if r["kind"] == "train"]
        skipped[name] = [r["skipped"] for r in records]
    assert skipped["whole"][-1] == {"open": 46, "empty": 45, "format": 46}
    assert skipped["whole"] == skipped["crashed"]
    assert losses(tmp_path / "whole") == losses(tmp_path / "crashed")
    counts_by_step = [sum(counts.values()) for counts in skipped["whole"]]
    # An epoch has five steps of 200 clips; 136 bad clips are within the limit of the last run.
    assert counts_by_step == sorted(counts_by_step)
    assert counts_by_step[4] == 137
    *steps, message = first["over"]
    assert steps == list(range(counts_by_step.index(137)))
    assert "137 of 1000 clips cannot be read, more than data.max_bad_share 0.136" in message
    assert "c863 (" in message


def test_a_checkpoint_without_the_state_of_the_loader_is_resumed(clips: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = {"manifest": clips / "few.jsonl", "batch_clips": 8}
    whole, run = (
        run_config(clips, tmp_path / name, steps=7, data=data, save_every=4) for name in ("whole", "run")
    )
    train.train(whole)
    shutil.copytree(whole.run, run.run)
    shutil.rmtree(run.run / "checkpoints/step-00000007")
    path = run.run / "checkpoints/step-00000004/state.json"
    record = json.loads(path.read_text())
    assert record["state"].pop("loader")["world"] == 1
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="has changed since it was started"):  # config.run differs
        train.train(run)
    assert_same_run(run.run, whole.run)


def test_other_batches_begin_a_new_epoch(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"manifest": clips / "few.jsonl", "batch_clips": 8}
    train.train(run_config(clips, tmp_path / "run", steps=3, data=data))
    real, seen = run_module.forward, []

    def record_ids(model, batch, ranks, settings):
        seen.extend(batch.ids)
        return real(model, batch, ranks, settings)

    monkeypatch.setattr(run_module, "forward", record_ids)
    changed = "has changed since it was started: data.batch_clips is 10, not 8; stage1_steps is 7, not 3"
    with pytest.warns(UserWarning, match=changed):
        train.train(run_config(clips, tmp_path / "run", steps=7, data=data | {"batch_clips": 10}))
    assert "(ranks: 1 then, 1 now): a new epoch begins after step 3" in capsys.readouterr().out
    assert sorted(seen) == sorted(f"c{i}" for i in range(40))


def test_without_a_readable_clip_the_run_ends_with_the_list(clips: Path, tmp_path: Path) -> None:
    rows = (clips / "many.jsonl").read_text().splitlines(keepends=True)[-3:]
    (clips / "none.jsonl").write_text("".join(rows))
    with pytest.raises(DataError, match=r"step 0: a rank found no readable clip; .*c999 \(open\)"):
        train.train(run_config(clips, tmp_path / "run", steps=3, data={"manifest": clips / "none.jsonl"}))


def _poisons_one_rank(rank: int, clips: Path, folder: Path) -> dict[str, Any]:
    """Parameters before and after a step that is not finite on one rank, and the clips of that step."""
    real, seen = run_module.forward, {}

    def forward(model, batch, ranks, settings):
        seen[f"before {batch.step}"] = {name: x.clone() for name, x in model.state_dict().items()}
        seen[f"clips {batch.step}"] = batch.ids
        output, loss = real(model, batch, ranks, settings)
        if batch.step == 1 and rank == bad_rank:
            # Either the loss is NaN and its gradients are finite, or the other way round.
            loss = loss + (float("nan") if where == "loss" else (model.log_logit_scale * 0).abs().sqrt())
        return output, loss

    run_module.forward = forward
    results = {}
    for where in ("loss", "gradient"):
        for bad_rank in range(2):
            seen.clear()
            data = {"manifest": clips / "few.jsonl", "batch_clips": 4}
            train.train(run_config(clips, folder / f"{where}{bad_rank}", steps=4, data=data))
            results[f"{where}{bad_rank}"] = dict(seen)
    return results


def test_a_step_that_one_rank_spoils_changes_nothing_on_any(clips: Path, tmp_path: Path) -> None:
    ranks = on_two_ranks(_poisons_one_rank, clips, tmp_path)
    for name in ("loss0", "loss1", "gradient0", "gradient1"):
        first, second = (results[name] for results in ranks)
        for key, value in first["before 1"].items():
            for other in (second["before 1"], first["before 2"], second["before 2"]):
                assert torch.equal(value, other[key]), (name, key)
            assert torch.equal(first["before 3"][key], second["before 3"][key]), (name, key)
        assert not torch.equal(first["before 3"]["logit_scale"], first["before 2"]["logit_scale"])
        (record,) = [r for r in log.read_log(tmp_path / name / "log.jsonl") if r["kind"] == "bad_step"]
        assert record["step"] == 1
        assert record["clips"] == first["clips 1"] + second["clips 1"]
        assert "nan" in (record["loss"], record["norm"])


def _trains(_rank: int, clips: Path, folder: Path) -> None:
    train.train(long_run(clips, folder / "whole"))


def long_run(clips: Path, run: Path) -> TrainConfig:
    return run_config(
        clips, run, steps=80, data={"manifest": clips / "few.jsonl", "batch_clips": 4}, save_every=5
    )


def processes(word: str) -> dict[int, dict[str, str]]:
    """Environments of the processes with a word in their command line."""
    environments = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text().split("\0"):
                pairs = [pair.partition("=") for pair in (folder / "environ").read_text().split("\0")]
                environments[int(folder.name)] = {name: value for name, _, value in pairs}
        except OSError:  # it has ended
            continue
    return environments


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command on a run's config.json; after the test its processes are killed."""
    path, started = tmp_path / "config.json", []

    def start(command: list[str], settings: TrainConfig) -> subprocess.Popen[bytes]:
        path.write_text(json.dumps(settings.to_dict()))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([*command, str(path)], env=environment, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for pid in processes(str(path)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float) -> float:
    """Seconds until a condition holds."""
    started = time.monotonic()
    while not holds():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() - started < limit_s
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_torchrun_resumes_a_run_after_killed_workers(clips: Path, tmp_path: Path, launched) -> None:
    on_two_ranks(_trains, clips, tmp_path)
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher = launched([*torchrun, "--max-restarts=2", "-m", "clsp_fast.train"], long_run(clips, run))

    def has_step(step: int) -> bool:
        return any(done >= step for done, _ in losses(run))

    for rank, step in (("1", 10), ("0", 40)):
        wait_until(lambda step=step: has_step(step), launcher, 120)
        (victim,) = [
            pid
            for pid, environment in processes(str(tmp_path / "config.json")).items()
            if environment.get("RANK") == rank
        ]
        os.kill(victim, signal.SIGKILL)
        last = max(done for done, _ in losses(run))
        assert wait_until(lambda last=last: has_step(last + 3), launcher, 60) < 60
    assert launcher.wait(timeout=60) == 0
    assert processes(str(tmp_path / "config.json")) == {}
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_command_with_its_code(
    clips: Path, tmp_path: Path, launched, name: str, code: int
) -> None:
    run = tmp_path / "run"
    process = launched(COMMAND, long_run(clips, run))
    wait_until(lambda: len(losses(run)) > 2, process, 120)
    process.send_signal(signal.Signals[name])
    assert process.wait(timeout=60) == code
    last = losses(run)[-1][0]
    assert last < 79
    assert (run / f"checkpoints/step-{last + 1:08d}").is_dir()
