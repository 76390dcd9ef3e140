"""The benchmark times no provider whose result disagrees, and the docs state only recorded numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import frontend_cases, kernel_cases, loss_cases, machine, measure, plot, run, similarity_cases
from bench.cases import CASES
from bench.frontend_inputs import speech
from bench.measure import Case, Provider, close, correlated, equal, peak_memory, relative, run_case, summary
from clsp_fast import features

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # peers warn about how the bench uses them


def spend(seconds: float, result: Any = 1.0, calls: list[str] | None = None, name: str = "") -> Any:
    """A provider's `prepare`: its call takes a while and returns `result`."""

    def call() -> Any:
        if calls is not None:
            calls.append(name)
        time.sleep(seconds)
        return result

    return lambda _: call


def case_of(*providers: Provider, **settings: Any) -> Case:
    given = {
        "name": "made-up",
        "area": "made-up",
        "what": "a number",
        "inputs": lambda: 0,
        "expected": lambda _: 1.0,
        "gate": close(0.1),
        "providers": providers,
        "threads": 2,  # the wall time is judged; sleeping takes no CPU time
    }
    return Case(**(given | settings))


def missing(_: Any) -> Any:
    raise ImportError("No module named 'peer'")


# Gates.


@pytest.mark.parametrize(
    ("gate", "good", "bad"),
    [
        (equal, np.arange(3.0), np.arange(3.0) + 1e-7),
        (close(1e-3), np.arange(3.0) + 9e-4, np.arange(3.0) + 2e-3),
        (close(1.0, rms=1e-3), np.arange(3.0), np.arange(3.0) + 0.5),
        (relative(1e-2), np.arange(3.0) * 1.005, np.arange(3.0) * 1.05),
        (correlated(0.99), 2 * np.arange(3.0), np.array([0.0, 2.0, 1.0])),
    ],
)
def test_gates_tell_good_from_bad(gate: Any, good: Any, bad: Any) -> None:
    expected = np.arange(3.0)
    assert gate(expected, good)[0]
    assert not gate(expected, bad)[0]
    assert not gate(expected, np.arange(4.0))[0]


@pytest.mark.parametrize("gate", [close(1.0), relative(1.0), correlated(0.5)])
def test_gates_refuse_nan(gate: Any) -> None:
    assert not gate(np.arange(3.0), np.array([0.0, 1.0, np.nan]))[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:, ::-1],
        lambda x: np.roll(x, 5, axis=0),
        lambda x: x[:-10],
        lambda x: np.zeros_like(x),
        lambda x: np.random.default_rng(0).permutation(x),
    ],
)
def test_the_gate_for_other_definitions_refuses_other_features(spoil: Callable[[Any], Any]) -> None:
    expected = features.reference(speech(3))
    assert frontend_cases.like_features(expected, 0.7 * expected[:-2] + 9)[0]
    assert not frontend_cases.like_features(expected, spoil(expected))[0]


# Running.


def test_providers_that_disagree_fail_or_are_missing_are_named_and_not_timed() -> None:
    def failing(_: Any) -> Any:
        raise RuntimeError("broken")

    record = run_case(
        case_of(
            Provider("subject", spend(0.001)),
            Provider("wrong", spend(0.001, 2.0)),
            Provider("broken", failing),
            Provider("peer", missing),
        ),
        rounds=2,
    )
    rows = record["providers"]
    assert [row["status"] for row in rows.values()] == ["timed", "disagrees", "failed", "missing"]
    assert [name for name, row in rows.items() if "wall_s" in row] == ["subject"]
    printed = run.table("made-up", record)
    assert "DISAGREES, not timed: max 1.0e+00" in printed
    assert "missing: No module named 'peer'" in printed


def test_results_hold_no_folder_of_the_machine() -> None:
    def failing(_: Any) -> Any:
        raise ImportError(
            "cannot import name 'x' from 'peer' (/home/me/lib/peer/__init__.py) in and/or\nmore"
        )

    record = run_case(case_of(Provider("subject", spend(0)), Provider("peer", failing)), rounds=1)
    reason = record["providers"]["peer"]["reason"]
    assert reason == "cannot import name 'x' from 'peer' (__init__.py) in and/or"


def test_nothing_is_compared_when_the_subject_disagrees() -> None:
    record = run_case(case_of(Provider("subject", spend(0, 2.0)), Provider("peer", spend(0.001))), rounds=1)
    assert record["providers"]["subject"]["status"] == "disagrees"
    assert "ratio" not in record["providers"]["peer"]


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    run_case(case_of(*(Provider(n, spend(0.021, calls=calls, name=n)) for n in names)), rounds=3)
    assert calls[-9:] == list(names) * 3


def test_ratios_and_goals_follow_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"subject": [0.04, 0.02, 0.02], "b": [0.06, 0.06, 0.08], "c": [0.06, 0.06, 0.06]}
    scripts = {name: iter(values) for name, values in seconds.items()}

    def scripted(call: Callable[[], Any], repeats: int, device: str) -> tuple[float, float, Any]:
        taken_s = next(scripts[call()])
        return 9.0, taken_s, None

    monkeypatch.setattr(measure, "_time", scripted)
    providers = [Provider(name, spend(0, name)) for name in seconds]
    settings = {"gate": lambda *_: (True, ""), "goals": {"b": 2.0, "c": 9.0}}
    record = run_case(case_of(*providers, **settings), rounds=3)
    rows = record["providers"]
    assert rows["b"]["ratio"] == pytest.approx(3)  # of the minima
    assert rows["b"]["round_ratio"] == pytest.approx(3)  # the median of 1.5, 3 and 4
    assert (rows["b"]["reached"], rows["c"]["reached"]) == (True, False)
    printed = run.table("made-up", record)
    assert "2x reached" in printed
    assert "9x NOT REACHED" in printed


def test_one_thread_is_judged_by_cpu_time() -> None:
    assert case_of(threads=1).clock == "cpu"
    record = run_case(case_of(Provider("subject", spend(0.05)), threads=1), rounds=1)
    row = record["providers"]["subject"]
    assert row["wall_s"]["min"] > 0.05 > row["cpu_s"]["min"]


def test_a_summary_has_minimum_median_and_spread() -> None:
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"min": 1.0, "median": 3.0, "spread": pytest.approx(2 / 3)}


def test_figures_are_medians() -> None:
    values = iter([9.0, 9.0, 1.0, 2.0, 3.0])
    provider = Provider("subject", lambda _: lambda: time.sleep(0.021) or next(values))
    settings = {"gate": lambda *_: (True, ""), "figures": lambda value: {"value": value}}
    record = run_case(case_of(provider, **settings), rounds=3)
    assert record["providers"]["subject"]["figures"] == {"value": 2.0}


def test_peak_memory_counts_the_memory_of_a_call() -> None:
    size = 64 << 20
    small, large = (Provider(str(n), lambda _, n=n: lambda: float(np.ones(n // 8).sum())) for n in (8, size))
    assert peak_memory(case_of(large), large) > 0.9 * size
    assert peak_memory(case_of(small), small) < 0.2 * size


# The command.


def test_unknown_cases_and_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["fbank-11s"], "unknown case fbank-11s"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--against", str(tmp_path / "none.json")], "no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(words)
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "cases": {}, "machine": {}}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"old.json is not a results file"):
        run.main(["decode-s16", "--against", str(path)])


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in CASES)


def test_gpu_cases_say_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = [name for name, case in CASES.items() if getattr(case, "device", "cpu") == "cuda"]
    assert len(names) >= 5
    assert run.main(names) == 0
    assert capsys.readouterr().out.count("no CUDA device: not run") == len(names)


def test_a_run_writes_what_it_printed_and_compares_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.json"
    assert run.main(["decode-s16", "kernel-bounds", "--rounds", "2", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert list(document["cases"]) == ["decode-s16", "kernel-bounds"]
    assert document["cases"]["decode-s16"]["providers"]["clsp_fast"]["agreement"] == "equal"
    assert "equal" in capsys.readouterr().out
    timed = document["cases"]["decode-s16"]["providers"]["clsp_fast"]["cpu_s"]
    timed["min"] /= 100
    path.write_text(json.dumps(document))
    assert run.main(["decode-s16", "--rounds", "2", "--against", str(path)]) == 1
    assert "relative to" in capsys.readouterr().out


def results_of(**seconds: float) -> dict[str, Any]:
    rows = {name: {"cpu_s": {"min": value}} for name, value in seconds.items()}
    return {"case": {"clock": "cpu", "providers": rows}}


def test_a_slower_machine_is_no_regression() -> None:
    old = results_of(subject=1.0, peer=2.0, other=4.0)
    assert run.regressions(old, results_of(subject=2.0, peer=4.0, other=8.0)) == []
    assert run.regressions(old, results_of(subject=1.0, peer=2.0, other=4.0, new=1.0)) == []
    (line,) = run.regressions(old, results_of(subject=1.5, peer=2.0, other=4.0))
    assert line.startswith("case: 1.50x")
    assert run.regressions(old, {"another": old["case"]}) == []


def test_results_of_one_machine_add_up(tmp_path: Path) -> None:
    path, here = tmp_path / "r.json", {"cpu": "a"}
    run.write(path, here, {"x": {"n": 1}, "y": {"n": 1}})
    run.write(path, here, {"y": {"n": 2}})
    assert json.loads(path.read_text())["cases"] == {"x": {"n": 1}, "y": {"n": 2}}
    run.write(path, {"cpu": "b"}, {"z": {"n": 3}})
    assert json.loads(path.read_text())["cases"] == {"z": {"n": 3}}


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "intel-core-i7-8650u"),
    ],
)
def test_files_are_named_after_the_processor(cpu: str, name: str) -> None:
    assert machine.short_name({"gpu": None, "cpu": cpu}) == name


# Cases: each reference against an independent one, on sizes that take no time.


def test_the_exact_loss_is_that_of_autograd() -> None:
    for captions in (1, 2):
        given = loss_cases.batch(37, captions, torch.float64)
        for exact, autograd in zip(loss_cases.exact(given), loss_cases.reference(given)(), strict=True):
            assert torch.allclose(exact, autograd.double(), rtol=1e-6, atol=1e-9)


def test_the_chunked_cross_entropy_is_the_exact_loss() -> None:
    given = loss_cases.batch(37, 1)
    for rows in (8, 64):
        result = loss_cases.chunked_cross_entropy(given, rows=rows)()
        for value, exact in zip(result, loss_cases.exact(given), strict=True):
            assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-7)


def test_the_exact_sigmoid_loss_is_that_of_autograd() -> None:
    given = loss_cases.sigmoid_batch(37, torch.float64)
    for exact, autograd in zip(
        loss_cases.exact_sigmoid(given), loss_cases.reference_sigmoid(given)(), strict=True
    ):
        assert torch.allclose(exact, autograd.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("captions", [1, 2])
def test_every_loss_provider_agrees(captions: int) -> None:
    record = run_case(replace(loss_cases.loss_case(64, captions=captions), threads=1), rounds=1)
    assert {row["status"] for row in record["providers"].values()} <= {"timed", "missing"}


def test_every_sigmoid_provider_agrees() -> None:
    record = run_case(replace(loss_cases.sigmoid_case(64), threads=1), rounds=1)
    assert {row["status"] for row in record["providers"].values()} == {"timed"}


def test_every_similarity_provider_agrees() -> None:
    for case in (similarity_cases.ranks_case(300), similarity_cases.topk_case(500)):
        record = run_case(replace(case, threads=1), rounds=1)
        assert {row["status"] for row in record["providers"].values()} <= {"timed", "missing"}, case.name


@pytest.mark.parametrize("name", ["fbank-3s", "decode-s24", "decode-mp3", "resample-44.1k", "file-48k-s24"])
def test_every_frontend_provider_agrees(name: str) -> None:
    case = CASES[name]
    assert isinstance(case, Case)
    record = run_case(case, rounds=1)
    assert {row["status"] for row in record["providers"].values()} <= {"timed", "missing"}


def test_goals_name_providers() -> None:
    for case in CASES.values():
        if isinstance(case, Case):
            names = {provider.name for provider in case.providers}
            assert {*case.goals, *case.limits} <= names, case.name
            assert len(names) == len(case.providers), case.name


def test_kernel_budgets_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    with pytest.raises(FileNotFoundError):
        kernel_cases.budgets(path)
    budget = {"registers": 171, "spills": 0, "shared_bytes": 147456, "mma": ["HGMMA.64x256x16"]}
    path.write_text(json.dumps({"triton": "3.9.0", "kernels": {"90 bf16": {"lse": budget}}}))
    assert kernel_cases.budgets(path)[1] == ("lse", "sm_90 bf16", "171", "0", "144", "HGMMA.64x256x16")


# What the docs say.


def test_tables_and_plots_follow_from_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    for page in plot.PAGES:
        assert plot.areas((ROOT / page).read_text()) == ["frontend", "loss", "similarity"], page
    assert plot.main(["--check"]) == 0, capsys.readouterr().out


def table_rows(page: str, area: str) -> list[str]:
    """The rows of an area's table on a page, without the header."""
    block = next(m for m in plot.BLOCK.finditer((ROOT / page).read_text()) if m[1] == area)
    return [line for line in block[3].splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("area", ["frontend", "loss", "similarity"])
def test_the_readme_shows_three_rows_of_the_whole_table(area: str) -> None:
    few, all_rows = (table_rows(page, area) for page in plot.PAGES)
    assert len(few) == 3 < len(all_rows)
    assert {*few} <= {*all_rows}
    _, cases = plot.newest(ROOT / "bench/results", area)
    assert len(all_rows) == len(cases)


def test_a_case_without_results_is_refused() -> None:
    with pytest.raises(SystemExit, match="the newest results of 'loss' have no case loss-7"):
        plot.render("<!-- bench:loss loss-1024 loss-7 -->\n<!-- /bench -->", ROOT / "bench/results")


@pytest.mark.parametrize("page", plot.PAGES)
def test_a_figure_that_was_not_recorded_is_found(page: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    (tmp_path / "docs").mkdir()
    for name in plot.PAGES:
        shutil.copy(ROOT / name, tmp_path / name)
    assert plot.main(["--check"], root=tmp_path) == 1  # no plot yet
    assert plot.main([], root=tmp_path) == 0
    assert plot.main(["--check"], root=tmp_path) == 0
    text = (tmp_path / page).read_text()
    at = text.index("**", text.index(f"<!-- bench:{plot.areas(text)[0]}"))
    (tmp_path / page).write_text(text[: at + 2] + "9" + text[at + 2 :])
    assert plot.main(["--check"], root=tmp_path) == 1


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_results_must_name_a_commit_of_this_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a history, or without the commit in it, the check only warns."""
    repository = tmp_path / "repository"
    results = repository / "bench/results/r.json"
    results.parent.mkdir(parents=True)
    (repository / "README.md").write_text("no table\n")

    def checked(folder: Path = repository) -> tuple[int, str]:
        return plot.main(["--check"], root=folder), capsys.readouterr().out

    def name(commit: str) -> None:
        results.write_text(json.dumps({"cases": {"case": {"commit": commit}}}))

    name("unknown")
    code, output = checked()
    assert (code, output[:8]) == (0, "warning:")
    git(repository, "init", "--quiet")
    for message in ("first", "rewritten"):
        git(repository, "commit", "--quiet", "--allow-empty", "-m", message)
    name(git(repository, "rev-parse", "--short=12", "HEAD~"))
    assert checked() == (0, "")
    foreign = git(repository, "rev-parse", "--short=12", "HEAD")
    git(repository, "commit", "--quiet", "--amend", "--allow-empty", "-m", "instead")
    name(foreign)
    code, output = checked()
    assert code == 1
    assert f"commit {foreign} of r.json is not in the history of HEAD" in output
    name("0123456789ab")
    assert checked()[0] == 0
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "results")
    git(tmp_path, "clone", "--quiet", "--depth=1", repository.as_uri(), "shallow")
    shallow = tmp_path / "shallow/bench/results/r.json"
    shallow.write_text(results.read_text().replace("0123456789ab", git(repository, "rev-parse", "HEAD~2")))
    code, output = checked(tmp_path / "shallow")
    assert (code, output[:8]) == (0, "warning:")


def test_memory_that_could_not_be_measured_is_reported() -> None:
    record = run.measure(case_of(Provider("subject", spend(0)), memory=True), rounds=1)  # not a known case
    row = record["providers"]["subject"]
    assert "peak_bytes" not in row
    assert "KeyError: 'made-up'" in row["memory_failed"]
    assert "memory: failed: KeyError: 'made-up'" in run.table("made-up", record)


def test_an_area_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m bench\.run nothing --json"):
        plot.newest(tmp_path, "nothing")
