"""The prepared run on a card: its dry run, and stages that fail, hang, or write no record."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import plot
from bench.card import checks, loss, needs, provenance, record, runner, sanitizer, timing, train, wheels
from bench.card.runner import STAGES, Stage, main
from clsp_fast.kernels import estimates
from clsp_fast.storage import files as storage

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
# Cases of each stage that the dry run must have, and a value that each of them must have.
EXPECTED = {
    "ceilings": {"ceilings/product": "tflops", "ceilings/copy": "tb_per_s"},
    "tests": {"tests/gpu": "passed"},
    "sanitizer": {"sanitizer/without the sanitizer": "passed", "sanitizer/memcheck": "missing"},
    "loss": {
        "loss/40/clsp_fast": "ms",
        "loss/40/clsp_fast, second time": "ms",
        "loss/40/dense, one product": "ms",
        "loss/40/the recipe's and open_clip's form": "ms",
        "loss/40/chunked cross-entropy": "ms",
        "loss/40/beside peers/softmax/memeff": "missing",
        "loss/40/beside peers/sigmoid/clsp_fast": "ms",
        "loss/40/clsp_fast/forward": "peak_mib",
        "loss/40/clsp_fast/backward": "peak_mib",
        "loss/40/sigmoid/clsp_fast": "ms",
        "loss/40/variants/clsp_fast, two captions": "ms",
    },
    "similarity": {"ranks/200/bfloat16/clsp_fast": "ms", "topk/2000/float32/torch.topk in chunks": "ms"},
    "model": {
        "model/tiny/forward, ragged": "audio_s_per_s",
        "model/tiny/step, equal": "audio_s_per_s",
        "model/tiny/step, equal, recomputed layers": "audio_s_per_s",
        "model/tiny/step, equal: kernels": "kernels",
        "model/depthwise convolution of 31 frames/both": "ms",
    },
    "train": {"train/card": "losses", "train/resumed": "equal", "train/CPU": "steps"},
    "sweep": {"sweep/panel/32 x 64 x 32, 4 warps, 1 stages": "ms"},
}
FAKES = {
    "good": "record.add('good/a', {'ms': 1.0, 'spread': 0.1, 'n': 3, 'peak_mib': 2.0})",
    "failing": "record.add('failing/a', {'ms': 2.0}); raise RuntimeError('a fault of the card')",
    "hanging": (
        "record.add('hanging/a', {'ms': 3.0});"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "record.path.with_name('child.txt').write_text(str(child.pid)); time.sleep(600)"
    ),
    "garbage": "record.cases['x'] = {}; record.path.write_text('[1, {')",
    "silent": "pass",
    "erring": "record.add('erring/a', {'error': 'disagrees'}); record.add('erring/b', {'ms': 4.0})",
    "without_peers": "record.add('without_peers/a', {'peer': True, 'error': 'no'})",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Stages that do not measure. They keep their deadlines in a dry run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, code in FAKES.items():
        text = f"import subprocess, sys, time\n\n\ndef run(record):\n    {code}\n"
        (folder / f"fake_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(runner, "DRY_RUN_DEADLINE_S", 0.0)
    return {name: Stage(name, 60.0, f"fake_{name}", name) for name in FAKES}


def results(out: Path) -> dict[str, Any]:
    (document,) = all_results(out).values()
    return document


def all_results(out: Path) -> dict[str, dict[str, Any]]:
    """File name -> results, in the order of the runs."""
    stages = tuple(f"{name}-" for name in (*EXPECTED, *FAKES))
    paths = [path for path in out.glob("*.json") if not path.name.startswith(stages)]
    documents = {path.name: json.loads(path.read_text()) for path in paths}
    return dict(sorted(documents.items(), key=lambda item: (item[1]["date"], item[1]["run"])))


def has_ended(process: int) -> bool:
    """Whether a process has ended. One that nobody has waited for still has an entry, in state Z."""
    path = Path(f"/proc/{process}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_the_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.card", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    document = results(tmp_path)
    assert list(document["stages"]) == [stage.name for stage in STAGES] == list(EXPECTED)
    assert document["dry_run"]
    assert {"triton", "driver", "torch", "numpy", "python", "clsp_fast"} <= document["machine"][
        "versions"
    ].keys()
    for stage, cases in EXPECTED.items():
        assert document["stages"][stage]["held"], document["stages"][stage]
        assert f"\n{stage} " in done.stdout
        for name, value in cases.items():
            case = document["cases"][name]
            assert case["stage"] == stage
            assert value in case, (name, case)
            assert "ms" not in case or case["ms"] > 0
    assert document["cases"]["train/resumed"]["equal"]
    assert "ceilings/noise" not in document["cases"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "log.txt", *all_results(tmp_path)}


@pytest.mark.slow
def test_a_bad_stage_costs_only_itself(
    tmp_path: Path, fakes: dict[str, Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    fakes["hanging"] = Stage("hanging", 15.0, "fake_hanging", "hangs")
    out = tmp_path / "out"
    assert main(["--dry-run", "--out", str(out)], stages=tuple(fakes.values())) == 1
    document = results(out)
    outcomes = document["stages"]
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "good": "done",
        "failing": "failed",
        "hanging": "deadline",
        "garbage": "failed",
        "silent": "failed",
        "erring": "done",
        "without_peers": "done",
    }
    assert [name for name, outcome in outcomes.items() if outcome["held"]] == ["good", "without_peers"]
    assert "a fault of the card" in outcomes["failing"]["reason"]
    assert "no readable record" in outcomes["garbage"]["reason"]
    assert "measured nothing" in outcomes["silent"]["reason"]
    assert outcomes["erring"]["reason"] == "erring/a: disagrees"
    times = {name: case["ms"] for name, case in document["cases"].items() if "ms" in case}
    assert times == {"good/a": 1.0, "failing/a": 2.0, "hanging/a": 3.0, "erring/b": 4.0}
    assert 15.0 <= outcomes["hanging"]["seconds"] < 30.0
    assert has_ended(int((out / "child.txt").read_text()))
    printed = capsys.readouterr().out
    assert "hanging     deadline" in printed
    assert "erring      errors" in printed
    assert "good/a" in printed


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """A shell starts background processes with SIGINT ignored, and this process would inherit it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_keeps_what_was_done(tmp_path: Path, fakes: dict[str, Stage]) -> None:
    out = tmp_path / "out"

    def interrupt() -> None:
        while not (out / "child.txt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    stages = (fakes["good"], fakes["hanging"], fakes["erring"])
    assert main(["--dry-run", "--out", str(out)], stages=stages) == 130
    document = results(out)
    assert {name: outcome["status"] for name, outcome in document["stages"].items()} == {
        "good": "done",
        "hanging": "interrupted",
    }
    assert document["cases"].keys() == {"good/a", "hanging/a"}
    assert has_ended(int((out / "child.txt").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_stage_outlives_the_run(tmp_path: Path, fakes: dict[str, Stage], number: signal.Signals) -> None:
    # Under nohup, a child would ignore SIGHUP.
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    code += "from bench.card.runner import *;"
    code += f"sys.exit(main(['--dry-run', '--out', {str(tmp_path)!r}], stages=({fakes['hanging']!r},)))"
    child = tmp_path / "child.txt"
    # A runner that is killed leaves a temporary folder.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) as process:
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        try:
            assert process.wait(30) == (130 if number != signal.SIGKILL else -number)
        finally:
            process.kill()
    if number != signal.SIGKILL:
        assert results(tmp_path)["stages"]["hanging"]["status"] == "interrupted"
        assert results(tmp_path)["cases"].keys() == {"hanging/a"}
    stops_at = time.monotonic() + 10
    while not has_ended(int(child.read_text())):
        assert time.monotonic() < stops_at
        time.sleep(0.05)


@pytest.fixture
def run_fake(tmp_path: Path, fakes: dict[str, Stage], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs stages that need no process: each measures `value` as "<stage>/a". Returns the exit code."""
    value = 0.0

    def run_stage(stage: Stage, path: Path, dry_run: bool) -> Any:
        cases = {f"{stage.name}/a": {"ms": value}}
        runner.record_of(stage, path).write_text(json.dumps(cases))
        outcome = {"status": "done", "held": True, "seconds": value, "deadline_s": 9.0}
        return outcome, cases

    def run(names: str, ms: float = 1.0) -> int:
        nonlocal value
        value = ms
        words = ["--dry-run", "--out", str(tmp_path / "out"), "--stages", names]
        return main(words, stages=tuple(fakes.values()))

    monkeypatch.setattr(runner, "run_stage", run_stage)
    return run


def test_only_the_named_stages_run(tmp_path: Path, run_fake: Any) -> None:
    assert run_fake("good, silent") == 0
    assert list(results(tmp_path / "out")["stages"]) == ["good", "silent"]


def times(document: dict[str, Any]) -> dict[str, float]:
    return {name: case["ms"] for name, case in document["cases"].items()}


def test_no_run_changes_the_results_of_another(
    tmp_path: Path, run_fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_fake("good,erring,silent") == 0
    (first,) = all_results(out)
    assert re.search(r"-dry-run-\d{4}-\d\d-\d\d\.json$", first)
    content = (out / first).read_text()
    assert run_fake("erring", 2.0) == 0
    assert run_fake("silent,failing", 3.0) == 0
    assert (out / first).read_text() == content
    documents = all_results(out)
    assert list(documents)[1:] == [first.replace("-dry-run-", f"-dry-run-run-{i}-") for i in (2, 3)]
    before, second, last = documents.values()
    assert times(before) == {"good/a": 1.0, "erring/a": 1.0, "silent/a": 1.0}
    assert times(second) == {"good/a": 1.0, "erring/a": 2.0, "silent/a": 1.0}
    assert times(last) == {"good/a": 1.0, "erring/a": 2.0, "silent/a": 3.0, "failing/a": 3.0}
    assert last["stages"].keys() == {"good", "erring", "silent", "failing"}
    assert f"taken over from {first}: good, silent, erring\n" in capsys.readouterr().out


def test_every_run_of_a_day_has_a_number(tmp_path: Path, run_fake: Any) -> None:
    for i in range(1, 12):
        run_fake("good", float(i))
    documents = all_results(tmp_path / "out")
    assert [document["run"] for document in documents.values()] == list(range(1, 12))
    assert [times(document)["good/a"] for document in documents.values()] == list(range(1, 12))
    names = [re.search(r"-run-(\d+)-\d{4}", name) for name in documents]
    assert [int(match[1]) if match else 1 for match in names] == list(range(1, 12))


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_ends_early_keeps_the_stages_it_did_not_reach(
    tmp_path: Path, run_fake: Any, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    class Killed(BaseException):
        """SIGKILL leaves the files as they are at that moment."""

    def end(stage: Stage, path: Path, dry_run: bool) -> Any:
        assert times(json.loads(path.read_text())) == {"good/a": 1.0, "erring/a": 1.0, "silent/a": 1.0}
        if killed:
            raise Killed
        outcome = {"status": "interrupted", "held": False, "seconds": 1.0, "deadline_s": 9.0}
        runner.record_of(stage, path).write_text("{}")
        return outcome, {"good/b": {"ms": 2.0}}

    assert run_fake("good,erring,silent") == 0
    monkeypatch.setattr(runner, "run_stage", end)
    with contextlib.suppress(Killed):
        assert run_fake("good,erring,silent") == 130
    _, last = all_results(tmp_path / "out").values()
    assert last["stages"].keys() == {"good", "erring", "silent"}
    first = {"good/a": 1.0} if killed else {"good/b": 2.0}
    assert times(last) == {**first, "erring/a": 1.0, "silent/a": 1.0}
    assert last["stages"]["good"]["status"] == ("done" if killed else "interrupted")


@pytest.mark.slow
def test_a_killed_run_leaves_the_results_of_the_run_before(tmp_path: Path, fakes: dict[str, Stage]) -> None:
    out = tmp_path / "out"
    stages = tuple(fakes[name] for name in ("hanging", "good", "without_peers"))
    assert main(["--dry-run", "--out", str(out), "--stages", "good,without_peers"], stages=stages) == 0
    code = "import sys; from bench.card.runner import *;"
    code += f"sys.exit(main(['--dry-run', '--out', {str(out)!r}], stages={stages!r}))"
    command = [sys.executable, "-c", code]
    child = out / "child.txt"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) as process:
        while not child.exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.kill()
    before, last = all_results(out).values()
    assert last["stages"] == before["stages"] != {}
    assert last["cases"] == before["cases"] != {}


@pytest.mark.parametrize("change", ["damaged", "code", "machine", "wheel", "cases"])
def test_results_that_do_not_fit_stay_where_they_are(tmp_path: Path, run_fake: Any, change: str) -> None:
    out = tmp_path / "out"
    run_fake("good")
    ((name, document),) = all_results(out).items()
    content = "{" if change == "damaged" else json.dumps(document | {change: "other"})
    (out / name).write_text(content)
    run_fake("erring")
    assert (out / name).read_text() == content
    (other,) = {path.name for path in out.glob("*-run-2-*.json")}
    assert times(json.loads((out / other).read_text())) == {"erring/a": 1.0}


def test_a_run_on_a_card_does_not_take_over_a_dry_run(tmp_path: Path) -> None:
    computer = {"gpu": "NVIDIA H100"}
    for dry_run in (True, False):
        document = runner.new_document(computer, dry_run)
        path, earlier = runner.new_results_file(tmp_path, document)
        path.write_text("{}")
        assert earlier == []
        assert ("dry-run" in path.name) == dry_run


def test_only_one_run_uses_a_folder(tmp_path: Path, run_fake: Any) -> None:
    with (
        storage.lock_folder(tmp_path / "out"),
        pytest.raises(SystemExit, match=r"^bench\.card: .*/out is in use by another process"),
    ):
        run_fake("good")


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/x", "/proc/x/y"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, run_fake: Any, folder: str) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / folder)
    with pytest.raises(SystemExit, match=rf"^bench\.card: cannot write to {folder}: .*; name another folder"):
        main(["--dry-run", "--out", folder])


def test_a_log_on_a_full_disk_is_named(tmp_path: Path, fakes: dict[str, Stage]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=r"^bench\.card\.runner: disk full: .*/log\.txt"):
        main(["--dry-run", "--out", str(tmp_path)], stages=(fakes["good"],))


def test_on_a_full_disk_no_stage_is_said_to_be_written(
    tmp_path: Path, run_fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = storage.write_json

    def write_twice(path: Path, value: Any) -> None:
        if len(value["stages"]) == 2:
            with storage.naming_full_disk(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, value)

    monkeypatch.setattr(runner.files, "write_json", write_twice)
    with pytest.raises(SystemExit, match="disk full"):
        run_fake("good,erring")
    assert list(results(tmp_path / "out")["stages"]) == ["good"]
    (kept,) = (tmp_path / "out").glob("erring-*.json")
    assert json.loads(kept.read_text()) == {"erring/a": {"ms": 1.0}}
    assert re.search(
        r"written to \S+\.json, without the new result of the stage erring\n", capsys.readouterr().out
    )


def test_nothing_of_a_killed_stage_stays_in_the_temporary_folder(
    tmp_path: Path, fakes: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(runner.tempfile, "tempdir", str(temporary))
    code = "import os, signal, tempfile; tempfile.mkdtemp(); print('  warnings.warn(error)', flush=True);"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "modules/fake_good.py").write_text(f"def run(record):\n    {code}\n")
    outcome, _ = runner.run_stage(fakes["good"], tmp_path / "results.json", dry_run=True)
    assert (outcome["status"], outcome["reason"]) == ("failed", "killed by signal 9")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("exit_code", "lines", "expected"),
    [
        (-9, [], "killed by signal 9"),
        (-9, ["a.py:1: UserWarning: an error", "  warnings.warn('error')"], "killed by signal 9"),
        (
            -6,
            ["CUDA error: unspecified launch failure"],
            "killed by signal 6: CUDA error: unspecified launch failure",
        ),
        (-15, ["ValueError: an earlier one", "step 3"], "killed by signal 15"),
        (
            -11,
            [
                "step 3",
                "Fatal Python error: Segmentation fault",
                "Current thread 0x00007f (most recent call first):",
                '  File "a.py", line 3 in f',
                "Extension modules: numpy._core._multiarray_umath, torch._C (total: 2)",
            ],
            "killed by signal 11: Fatal Python error: Segmentation fault",
        ),
        (
            -6,
            [
                "terminate called after throwing an instance of 'c10::Error'",
                "  what():  CUDA error: an illegal memory access was encountered",
                "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
                "Exception raised from c10_cuda_check_implementation at x.cpp:43 (most recent call first):",
                "frame #0: c10::Error::Error(c10::SourceLocation) + 0x80 (0x7f in libc10.so)",
            ],
            "killed by signal 6: terminate called after throwing an instance of 'c10::Error'; "
            "what(): CUDA error: an illegal memory access was encountered",
        ),
        (1, ["ValueError: no", "a.py:1: UserWarning: an error", "  warn()"], "exit code 1: ValueError: no"),
        (1, ["ValueError: no", "fake measured nothing"], "exit code 1: fake measured nothing"),
        (3, ["  indented"], "exit code 3"),
    ],
)
def test_the_reason_of_a_failure_is_an_error(exit_code: int, lines: list[str], expected: str) -> None:
    assert runner.failure(exit_code, lines) == expected


def test_missing_modules_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('torch', 'einops') else f(name, *a)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "bench.card", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "bench.card: not installed: torch, einops. Install the wheels of .card/ (docs/card.md, Run), "
        "or what is missing: pip install torch einops\n"
    )


def test_a_library_without_its_extension_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs.is_installed("clsp_fast.kernels")
    for name in ("clsp_fast", "clsp_fast.kernels"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "clsp_fast._C", SimpleNamespace(__version__="other"))
    assert not needs.is_installed("clsp_fast.kernels")


def test_only_the_stage_tests_needs_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "is_installed", lambda module: module != "pytest_timeout")
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"not installed: pytest_timeout\. .* or leave the stage tests out"):
        main(["--out", str(tmp_path), "--stages", "tests"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["--out", str(tmp_path), "--stages", "loss"])


def test_every_module_that_a_stage_imports_is_needed() -> None:
    code = "import sys; before = set(sys.modules); import bench.card.runner;"
    code += "".join(f"import {stage.module};" for stage in STAGES)
    code += "print(*{x for name in set(sys.modules) - before for x in (name.split('.')[0],)})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    direct = imported_by(
        ROOT / "bench/card", ROOT / "clsp_fast", ROOT / "kernels", *(ROOT / "bench").glob("*_cases.py")
    )
    third_party = (set(done.stdout.split()) & direct) - set(sys.stdlib_module_names) - {"bench", "clsp_fast"}
    assert third_party <= {module.split(".")[0] for module in needs.ALWAYS}
    assert {"torch", "einops", "soundfile"} <= third_party


def imported_by(*paths: Path) -> set[str]:
    """Names of the packages that Python files import."""
    sources = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    text = "\n".join(file.read_text() for file in sources)
    return set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "loss,los"], "unknown stage los; the stages are ceilings, tests, "),
        (["--stages", ","], "--stages names no stage; the stages are ceilings, tests, "),
        (["--stages", ""], "--stages names no stage"),
    ],
)
def test_an_unknown_stage_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_card_the_dry_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device was found; --dry-run"):
        main(["--out", str(tmp_path)])


def test_kernels_that_are_not_installed_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(runner._launch, "__file__", str(ROOT / "kernels/_launch.py"))
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    runner.check_installed_kernels()
    with (tmp_path / "kernels/rank.py").open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match=r"differ from kernels/ \(rank.py\): make the wheels again"):
        runner.check_installed_kernels()


def test_every_file_with_a_test_for_a_card_is_run() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = set(re.findall(r"^(tests/[\w/]+\.py)::", done.stdout, re.MULTILINE))
    assert len(files) >= 8, done.stdout[-2000:] + done.stderr[-2000:]
    assert files <= set(checks.files_with(checks.FOR_A_CARD))


def test_every_file_whose_tests_launch_kernels_is_run() -> None:
    # These compile kernels and measure the result, without a card.
    compilers = {"test_kernel_budgets.py", "test_kernel_sass.py", "test_kernel_tables.py"}
    kernels = {path.name for path in (ROOT / "tests").glob("test_kernel_*.py")} - compilers
    files = checks.whole_files()
    names = {Path(path).name for path in files}
    assert kernels | {"test_row_stream.py", "test_triton_positives.py", "test_loss.py"} <= names
    assert not names & compilers
    assert len(set(files)) == len(files)
    assert all((ROOT / path).exists() for path in files)


SLOW_TESTS = """
import time
import pytest

@pytest.mark.parametrize("i", range(2))
def test_good(i):
    pass

def test_bad():
    assert False, "a wrong result"

def test_hanging():
    time.sleep(600)
"""


def test_tests_that_do_not_end_cost_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    monkeypatch.setattr(checks, "WORKERS", 2)
    printed: list[str] = []
    echo = checks._echo

    def recorded(reader: Any) -> str:
        printed.append(echo(reader))
        return printed[-1]

    def now() -> float:
        # The time is over when all tests but the last one have ended, however slow this machine is.
        return 600.0 * (checks.read_tests("".join(printed)).counts == {"passed": 2, "failed": 1})

    monkeypatch.setattr(checks, "_echo", recorded)
    monkeypatch.setattr(checks, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    results = record.Record(tmp_path / "record.json")
    words = ["--rootdir", str(tmp_path), str(tmp_path / "test_slow.py")]
    checks.add_tests(results, "tests/gpu", words, 600.0)
    case = record.read_cases(results.path)["tests/gpu"]
    assert case["exit_code"] is None
    assert (case["passed"], case["failed"]) == (2, 1)
    assert case["error"].startswith("not finished after 600 s: ")
    assert [name for name in case["failures"] if "test_bad" in name] == case["failures"] != []
    assert "a wrong result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "counts", "bad"),
    [
        ("", {}, []),
        ("a.py::t[x y] PASSED [ 50%]\na.py::u FAILED  [100%]\n", {"passed": 1, "failed": 1}, ["a.py::u"]),
        (
            "[gw0] [ 50%] PASSED a.py::t \n[gw1] [100%] ERROR a.py::u \n"
            "FAILED a.py::v - x\n= 1 failed, 7 passed =",
            {"failed": 1, "passed": 7},
            ["FAILED a.py::v"],
        ),
    ],
)
def test_outcomes_are_read_from_what_pytest_prints(text: str, counts: dict[str, int], bad: list[str]) -> None:
    assert checks.read_tests(text) == (counts, bad)


@pytest.mark.parametrize(
    ("exit_code", "text", "expected"),
    [
        (0, "= 1 passed in 0.1s =", None),
        (1, "FAILED      [100%]\nFAILED a.py::t - x\n= 1 failed =", "1 tests failed: FAILED a.py::t"),
        (1, "python: No module named pytest", "exit code 1: python: No module named pytest"),
        (
            2,
            "a.py:1: in <module>\nE   ImportError: x\n\nERROR a.py\n! Interrupted: 1 error !\n= 1 error =",
            "exit code 2 (interrupted, or a file could not be imported): ImportError: x",
        ),
        (
            2,
            "a.py:1: in f\nE   ImportError: x\nb.py:2: in g\nE   assert 1 == 2\nE    +  where 1 = f()",
            "exit code 2 (interrupted, or a file could not be imported): assert 1 == 2",
        ),
        (
            2,
            "E   AssertionError: not close\nE   \nE   Mismatched: 1 / 3\nE   Greatest: 2\nERROR a.py",
            "exit code 2 (interrupted, or a file could not be imported): AssertionError: not close",
        ),
        (
            2,
            'E     File "a.py", line 1\nE       def f(\nE            ^\nE   SyntaxError: never closed',
            "exit code 2 (interrupted, or a file could not be imported): SyntaxError: never closed",
        ),
        (3, "INTERNALERROR> KeyError: 1\n\n= no tests ran =", "exit code 3 (an internal error): KeyError: 1"),
        (
            4,
            "ERROR: usage: x\nx: error: unrecognized arguments: -y\n  rootdir: z\n",
            "exit code 4 (wrong usage): x: error: unrecognized arguments: -y",
        ),
        (
            4,
            "= no tests ran =\nERROR: file not found: a.py",
            "exit code 4 (wrong usage): file not found: a.py",
        ),
        (5, "= 1 deselected in 0.1s =\n", "exit code 5 (no test was selected): = 1 deselected in 0.1s ="),
        (-9, "", "killed by signal 9: no output"),
    ],
)
def test_what_ends_pytest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, text: str, expected: str | None
) -> None:
    monkeypatch.setattr(checks, "run_for", lambda *_: (exit_code, text))
    results = record.Record(tmp_path / "record.json", dry_run=True)
    checks.add_tests(results, "tests/gpu", [], 60.0)
    error = results.cases["tests/gpu"].get("error")
    assert error == expected or re.fullmatch(f"pytest (ended with|was) {re.escape(str(expected))}", error)


@pytest.mark.parametrize(
    ("left_s", "code", "expected"),
    [
        (2.0, "sleep 600", {"error": "not finished after S s"}),
        (60.0, "echo 'ERROR SUMMARY: 0 errors'", {"passed": True, "errors": 0}),
        (60.0, "echo 'ERROR SUMMARY: 2 errors'; exit 9", {"error": "exit code 9: ERROR SUMMARY: 2 errors"}),
    ],
)
def test_the_sanitizer_has_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, code: str, expected: dict[str, Any]
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sanitizer.sys, "executable", shutil.which("true"))
    results = record.Record(tmp_path / "record.json", ends_at=time.time() + sanitizer.MARGIN_S + left_s)
    sanitizer.run(results)
    case = record.read_cases(results.path)["sanitizer/memcheck"]
    if "error" in case:
        case["error"] = re.sub(r"after [012] s", "after S s", case["error"])
    assert case == expected


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.0], None),
        ([0.5, 0.0], "the resumed model differs by 5.0e-01: only the resumed run differs"),
        ([0.5, 0.25], "the resumed model differs by 5.0e-01: two runs without a break differ as well"),
    ],
)
def test_a_resumed_run_that_differs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differences: list[float], expected: str | None
) -> None:
    whole = train.settings(tmp_path, tmp_path / "whole", "cpu", 4, dry_run=True)
    for step in (2, 4):
        (whole.run / f"checkpoints/step-{step}").mkdir(parents=True)
    monkeypatch.setattr(train, "_train", lambda config: 0.0)
    monkeypatch.setattr(train, "largest_difference", lambda *_: differences.pop(0))
    values = train.compare_resumed(whole)
    assert values["equal"] == (expected is None)
    assert values.get("error") == expected


def test_cublas_is_repeatable_from_the_first_product() -> None:
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ


def test_runs_that_are_compared_add_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = runner.torch
    orders = []

    def finish(config: Any) -> float:
        orders.append((config.run.name, torch.are_deterministic_algorithms_enabled()))
        rows = [{"step": 1, "loss": 2.0, "audio_s_per_s": 3.0, "data_wait": 0.0}]
        config.run.mkdir()
        (config.run / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return 1.0

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(train, "_train", finish)
    monkeypatch.setattr(train, "compare_resumed", lambda whole: {"equal": True})
    monkeypatch.setattr(train, "recordings", lambda count: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(
        train, "_run_on_the_cpu", lambda config: contextlib.nullcontext(subprocess.Popen("true"))
    )
    train.run(record.Record(tmp_path / "record.json", dry_run=True))
    assert orders == [("fast", False), ("whole", True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_stage_knows_when_it_ends(tmp_path: Path, fakes: dict[str, Stage]) -> None:
    code = "record.add('a', {'left_s': record.left_s})"
    (tmp_path / "modules/fake_good.py").write_text(f"def run(record):\n    {code}\n")
    outcome, cases = runner.run_stage(fakes["good"], tmp_path / "results.json", dry_run=True)
    assert outcome["held"]
    assert 0 < cases["a"]["left_s"] < 60


def test_the_run_takes_about_eight_minutes() -> None:
    assert sum(stage.deadline_s for stage in STAGES) <= 500


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one file of each kind, and the built-from.json of a wheel that was built from it."""
    for name in (
        *("CMakeLists.txt", "pyproject.toml", "csrc/a.cpp", "kernels/a.py"),
        *("clsp_fast/towers/a.py", "clsp_fast/evaluation/tasks.json", "bench/card/a.py"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    provenance.write_wheel(tmp_path / "built-from.json", tmp_path, "0123456789ab", False)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty", "wheel"),
    [
        (None, False, None),
        ("clsp_fast/towers/a.py", True, True),
        ("bench/card/a.py", True, True),
        ("clsp_fast/evaluation/tasks.json", True, True),
        ("csrc/a.cpp", True, False),
        ("kernels/a.py", True, False),
        ("pyproject.toml", True, False),
    ],
)
def test_the_code_that_is_measured_is_named(
    checkout: Path, changed: str | None, dirty: bool, wheel: bool | None
) -> None:
    if changed:
        (checkout / changed).write_text("2")
    built = provenance.read_wheel(checkout / "built-from.json")
    assert built
    for commit in ("unknown", "ffffffffffff"):
        document = provenance.identify(checkout, (commit, False), built)
        expected = ("0123456789ab", dirty) if commit == "unknown" else (commit, False)
        assert (document["commit"], document["dirty"]) == expected
        assert document["code"] == provenance.digest(checkout)
        of_the_wheel = {
            "commit": "0123456789ab",
            "dirty": False,
            "code": built.code,
            "same_compiled_files": wheel,
        }
        assert document.get("wheel") == (of_the_wheel if changed else None)
    without = provenance.identify(checkout, ("unknown", True), None)
    assert (without["commit"], without["dirty"]) == ("unknown", None)


@pytest.mark.parametrize("content", ["{", "[]", '{"commit": "0123456789ab", "dirty": false}'])
def test_a_damaged_note_about_the_wheel_is_named(tmp_path: Path, content: str) -> None:
    assert provenance.read_wheel(tmp_path / "built-from.json") is None
    (tmp_path / "built-from.json").write_text(content)
    with pytest.raises(SystemExit, match=r"built-from\.json is damaged or old: run `make card-wheels` again"):
        provenance.read_wheel(tmp_path / "built-from.json")


def test_every_file_of_the_package_is_in_the_digest_of_the_code() -> None:
    files = {path for pattern in provenance.CODE for path in ROOT.glob(pattern)}
    # Neither changes what is measured.
    files |= {ROOT / "clsp_fast/_C.pyi", ROOT / "clsp_fast/py.typed"}
    done = subprocess.run(
        ["git", "ls-files", "-z", "clsp_fast", "csrc"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 128:
        pytest.skip("not in git")
    assert {ROOT / name for name in done.stdout.split("\0") if name} <= files


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        (None, False),
        ("docs/a.md", False),
        ("docs/new.md", False),
        ("clsp_fast/ignored.py", False),
        ("clsp_fast/new/new.py", True),
        ("clsp_fast/evaluation/tasks.json", True),
        ("clsp_fast/towers/a.py", True),
        ("csrc/new.h", True),
        ("pyproject.toml", True),
    ],
)
def test_a_wheel_is_dirty_if_its_code_is(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None, differs: bool
) -> None:
    (checkout / "docs").mkdir()
    (checkout / "docs/a.md").write_text("1")
    (checkout / ".gitignore").write_text("ignored.py\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "a")):
        subprocess.run(["git", *words], cwd=checkout, check=True)
    if changed:
        (checkout / changed).parent.mkdir(exist_ok=True)
        (checkout / changed).write_text("2")
    monkeypatch.setattr(wheels, "ROOT", checkout)
    assert wheels.code_differs() == differs


def test_the_results_lie_beside_those_of_other_machines(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bench/results", tmp_path / "results")
    document = runner.new_document({"gpu": "NVIDIA H100"}, False)
    outcome = {"status": "done", "held": True, "seconds": 1.0, "deadline_s": 2.0}
    runner.add_stage(document, STAGES[0], outcome, {"ceilings/copy": {"ms": 1.5, "spread": 0.01}})
    document["date"] = "9999-12-31"
    (tmp_path / "results/card.json").write_text(json.dumps(document))
    for area in ("loss", "frontend"):
        assert plot.newest(tmp_path / "results", area) == plot.newest(ROOT / "bench/results", area)
    assert "ceilings/copy" in runner.table(document)


def test_a_provider_that_fails_costs_only_itself() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    device = runner.torch.device("cpu")
    times = timing.time_together({"a": [lambda: None], "b": [fail], "c": [lambda: None]}, device)
    assert "out of memory" in times["b"]["error"]
    assert all({"ms", "spread", "n", "host_ms"} <= times[name].keys() for name in "ac")


def test_a_call_that_waits_for_the_host_is_marked() -> None:
    assert timing.host_bound({"ms": 0.4, "host_ms": 0.35})
    assert not timing.host_bound({"ms": 0.4, "host_ms": 0.3})
    # The host queues this call while the buffer is overwritten.
    assert not timing.host_bound({"ms": 0.1, "host_ms": 0.19})
    case = {"ms": 0.4, "host_ms": 0.35, "host_bound": True}
    assert "host_bound True" in runner.table({"cases": {"a": case}, "stages": {}})


def test_the_first_time_holds_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    memory = timing._peak_memory
    monkeypatch.setattr(timing, "_wait", lambda device: events.append("wait"))
    monkeypatch.setattr(timing, "_peak_memory", lambda *words: events.append("time") or memory(*words))
    copies = [lambda: events.append("a"), lambda: events.append("b")]
    timing.time_together({"x": copies}, runner.torch.device("cpu"))
    assert events[:5] == ["a", "b", "wait", "time", "a"]


def test_the_products_are_those_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = loss.sigmoid_batch(40, runner.torch.bfloat16, "cpu")
    add, calls = loss._pairs.add_product, []

    def recorded(total: Any, a: Any, b: Any) -> Any:
        calls.append((None if total is None else total.dtype, a.dtype, b.dtype))
        return add(total, a, b)

    monkeypatch.setattr(loss._pairs, "add_product", recorded)
    loss.measure_products(record.Record(tmp_path / "record.json", dry_run=True), given)
    float32, bf16 = runner.torch.float32, runner.torch.bfloat16
    assert set(calls) == {(None, bf16, bf16), (float32, bf16, bf16)}


def test_the_docs_name_every_stage_with_its_deadline() -> None:
    text = (ROOT / "docs/card.md").read_text()
    for stage in STAGES:
        assert f"| `{stage.name}` | {stage.deadline_s:.0f} s |" in text
    assert f"All deadlines together are {sum(stage.deadline_s for stage in STAGES):.0f} s." in text


def test_every_wheel_has_a_fixed_version() -> None:
    versions = wheels.pinned_versions()
    packages = (*wheels.REQUIRED, *wheels.FOR_TESTS, *wheels.PEERS, *wheels.BUILD_TOOLS)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", wheels.requirement(name, versions)) for name in packages)
    required = re.findall(r'"(\w+)>=', re.split(r"^dependencies", PROJECT, flags=re.M)[1].split("]")[0])
    on_the_machine = {"numpy", "safetensors", "tokenizers", "torch"}
    brought = {"einops", "soundfile", "tyro"}
    assert set(required) == on_the_machine | brought
    assert brought <= set(wheels.REQUIRED)
    assert {"pytest-xdist", "pytest-timeout"} <= set(wheels.FOR_TESTS)


@pytest.fixture
def old_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .card/ with one file. Building and downloading write empty files."""
    target = tmp_path / ".card"
    target.mkdir()
    (target / "old.whl").write_text("")
    monkeypatch.setattr(wheels, "TARGET", target)
    monkeypatch.setattr(wheels, "find_python", lambda: "python3.12")
    monkeypatch.setattr(wheels, "build", lambda python, versions, folder: (folder / "new.whl").write_text(""))
    monkeypatch.setattr(wheels, "download", lambda package, versions, folder: True)
    return target


def test_new_wheels_replace_the_old_ones(old_wheels: Path) -> None:
    assert wheels.main([]) == 0
    assert [path.name for path in old_wheels.iterdir()] == ["new.whl"]
    assert list(old_wheels.parent.iterdir()) == [old_wheels]


def test_wheels_that_fail_leave_the_old_ones(old_wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise SystemExit("pip failed")

    monkeypatch.setattr(wheels, "download", lambda package, versions, folder: package != "einops")
    assert wheels.main([]) == 1
    monkeypatch.setattr(wheels, "build", fail)
    with pytest.raises(SystemExit, match="pip failed"):
        wheels.main([])
    assert [path.name for path in old_wheels.iterdir()] == ["old.whl"]
    assert list(old_wheels.parent.iterdir()) == [old_wheels]


def test_git_ignores_wheels_that_are_being_made() -> None:
    command = ["git", "check-ignore", ".card-x/new/a.whl", ".card/a.whl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not in git")
    assert len(done.stdout.splitlines()) == 2


def test_the_command_that_makes_wheels_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        wheels.main(["--help"])
    assert stop.value.code == 0
    assert "PYTHON312" in capsys.readouterr().out


def test_the_speeds_in_the_docs_follow_from_their_parts() -> None:
    text = (ROOT / "docs/card.md").read_text()
    rows = re.findall(r"^\| \w+ \| (\d+) ms \| (\d+) ms \| (\d+) ms \| ([\d,]+) \|", text, re.MULTILINE)
    assert len(rows) == 2
    for *parts_ms, speed in rows:
        assert 800e3 / sum(map(int, parts_ms)) == pytest.approx(int(speed.replace(",", "")), rel=0.02)
    cards = {card.name: card for card in estimates.CARDS}
    for name in ("H100", "H200"):
        product = round(estimates.LIBRARY_SHARE * cards[name].peak_tflops, -1)
        copy = estimates.MEMORY_SHARE * cards[name].memory_tbps
        assert f"{product:.0f} TFLOP/s and {copy:.1f} TB/s on an {name}" in re.sub(r"\s+", " ", text)
    for gb_per_s, time_ms in ((4800, "0.22"), (3350, "0.32"), (8000, "0.13")):
        assert f"{timing.FLUSHED_BYTES / gb_per_s / 1e6:.2f}" == time_ms
        assert f"{time_ms} ms" in text


def test_without_python_312_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYTHON312", raising=False)
    with pytest.raises(SystemExit, match=r"needs Python 3\.12.*set PYTHON312="):
        wheels.find_python()
    old = tmp_path / "python3.12"
    old.write_text("#!/bin/sh\necho 3.11\n")
    old.chmod(0o755)
    monkeypatch.setenv("PYTHON312", str(old))
    with pytest.raises(SystemExit, match="is not one"):
        wheels.find_python()
    old.write_text("#!/bin/sh\necho 3.12\n")
    assert wheels.find_python() == str(old)
    monkeypatch.delenv("PYTHON312")
    assert wheels.find_python() == str(old)
