"""All commands: progress of long jobs, readers that go away, full disks, options under torchrun."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_data import MakeClips, write_rows
from torch.distributed.run import get_args_parser

from clsp_fast import batches, console, embed, score, search, train
from clsp_fast.config import Batching
from clsp_fast.console import Progress
from clsp_fast.data import __main__ as data_command
from clsp_fast.training import corpus

# Every command with its subcommands, as words after `python -m`.
COMMANDS = (
    "clsp_fast.caption filter",
    "clsp_fast.caption generate",
    "clsp_fast.caption judge",
    "clsp_fast.caption offline",
    "clsp_fast.caption report",
    "clsp_fast.caption tags",
    "clsp_fast.caption verify",
    "clsp_fast.convert reference",
    "clsp_fast.data validate",
    "clsp_fast.embed",
    "clsp_fast.evaluate retrieval",
    "clsp_fast.evaluate similarity",
    "clsp_fast.evaluate zeroshot",
    "clsp_fast.export",
    "clsp_fast.score",
    "clsp_fast.search",
    "clsp_fast.train",
)


def main_of(module: str) -> Callable[..., object]:
    """The function that `python -m` calls for a module or package."""
    imported = importlib.import_module(module)
    if hasattr(imported, "__path__"):
        imported = importlib.import_module(f"{module}.__main__")
    return imported.main  # type: ignore[no-any-return]


def test_in_a_file_progress_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, "recordings")
    for _ in range(4):
        progress.add(1)
    progress.add(1, 1)
    progress.add(0)
    text = capsys.readouterr().err
    assert "\r" not in text
    first, last = text.splitlines()
    assert re.fullmatch(r"1 of 5 recordings, \d+ a second, \d+ s left", first)
    assert re.fullmatch(r"5 of 5 recordings, \d+ a second, 1 failed", last)
    for total in (1, None):
        progress = Progress(total, "recordings")
        progress.add(1)
        progress.end()
    assert re.findall(r" (recordings?),", capsys.readouterr().err) == ["recording"] * 3


def test_progress_that_ends_early_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for total in (5, None):
        progress = Progress(total, "requests")
        for _ in range(3):
            progress.add(1)
        progress.end()
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("1 ")
        assert last.startswith("3 of 5 requests, " if total else "3 requests, ")
        assert "left" not in last
    Progress(5, "requests").end()
    assert capsys.readouterr().err == ""


def test_a_long_job_writes_a_line_in_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("clsp_fast.console.time.perf_counter", lambda: now)
    show = corpus._show_progress("making the demo corpus", "clips")
    for made in range(1, 3501):  # five calls a second
        now += 0.2
        show(made, 3500)
        show(made, 3500)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[-1] == "making the demo corpus: 3500 of 3500 clips, 5 a second"
    assert 60 <= len(lines) <= 72


def test_encoding_shows_lines_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    clips = [torch.zeros(3200 + 800 * i) for i in range(40)]
    batches.embed_recordings(
        lambda x, _: torch.ones(len(x), 4),
        clips,
        Batching(batch_seconds=0.5),
        device=torch.device("cpu"),
        progress=True,
    )
    text = capsys.readouterr().err
    assert "\r" not in text
    assert len(text.splitlines()) == 2
    assert text.splitlines()[-1].startswith("encoded 40 of 40 clips, ")


def test_on_a_terminal_progress_stays_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(2, "recordings")
    progress.add(1)
    progress.add(1)
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.endswith("\n")
    assert "\r2 of 2 recordings" in output


def test_progress_without_a_total_and_when_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(None, "lines").add(3)
    assert capsys.readouterr().err.startswith("3 lines, ")
    Progress(3, "lines", active=False).add(3)
    assert capsys.readouterr().err == ""


# Runs each command in a process whose standard output nobody reads. The modules are imported only once.
FORKS = """
import importlib, os, sys
for module, words in {commands}:
    main = importlib.import_module(module).main
    process = os.fork()
    if process == 0:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
        sys.stdout = open(1, "w", closefd=False)
        main(words)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 1), (module, code)  # 0: argparse ignores the error of a write
"""


@pytest.mark.multiproc
def test_a_reader_that_goes_away_ends_every_command_quietly() -> None:
    modules = [command.split()[0] for command in COMMANDS]
    commands = [(main_of(module).__module__, ["--help"]) for module in modules]
    commands += [("bench.plot", ["--help"]), ("bench.run", ["--list"])]
    code = FORKS.format(commands=commands)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.multiproc
def test_the_shell_sees_a_quiet_end() -> None:
    command = f"{sys.executable} -m clsp_fast.train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: python -m clsp_fast.train")


@pytest.mark.multiproc
@pytest.mark.parametrize("ends", ["print('x' * 2**20)", "print('x'); sys.exit(0)", "print('x'); caught()"])
def test_any_write_that_fails_ends_quietly(ends: str) -> None:
    code = f"""
import sys
from clsp_fast import console
def caught():
    try:
        print("y", flush=True)
    except OSError as error:
        sys.exit(f"clsp_fast.train: {{error}}")
@console.command
def main(arguments=None):
    {ends}
main()
"""
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 1


PRINTS = """
import contextlib, os, sys
from clsp_fast import console
@console.command
def main(arguments=None):
    console.Progress(1, "recordings").add(1)
    {code}
    with open("done", "w") as file, contextlib.suppress(OSError):
        file.write("done")
        os.write(2, b"a library's warning, ")
main()
"""
FULL = "disk full: standard output: No space left on device; make room and run the same command again"
PROGRESS = r"1 of 1 recording, \d+ a second\n"
WARNING = "a library's warning, "


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("code", "streams", "returned", "errors"),
    [
        ("print('x')", "> /dev/full", 1, f"{PROGRESS}{WARNING}{FULL}\n"),
        ("print('x' * 2**20)", "> /dev/full", 1, f"{PROGRESS}{FULL}\n"),
        ("print('x', file=sys.stderr)", "2> /dev/full", 0, ""),
        ("print('x' * 2**20, file=sys.stderr)", "2> /dev/full", 0, ""),
        ("print('x')", ">&-", 0, f"{PROGRESS}{WARNING}"),
        ("print('x')", "2>&-", 0, ""),
        ("print('x', file=sys.stderr)", "<&- >&- 2>&-", 0, ""),
    ],
)
def test_full_and_closed_streams(tmp_path: Path, code: str, streams: str, returned: int, errors: str) -> None:
    (tmp_path / "script.py").write_text(PRINTS.format(code=code))
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' script.py {streams}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(errors, done.stderr), done.stderr
    assert done.returncode == returned
    if WARNING in errors or not errors:  # the command ran to its end
        assert (tmp_path / "done").read_text() == "done"


def test_a_full_standard_output_is_named_by_commands(
    tmp_path: Path,
    model_folder: Path,
    make_clips: MakeClips,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        {"audio": str(clip), "captions": ["A voice."], "caption": "A voice."}
        for clip in make_clips(tmp_path / "clips", 8)
    ]
    source, model = tmp_path / "m.jsonl", ["--model", str(model_folder), "--device", "cpu"]
    write_rows(source, [{"id": str(i)} | row for i, row in enumerate(rows)])
    pairs = write_rows(tmp_path / "p.jsonl", [{"audio": row["audio"], "caption": "A voice."} for row in rows])
    words = ["tiny", "--data.manifest", str(source), "--data.min-seconds", "0.1", "--stage1-steps", "1"]
    words += ["--stage2-steps", "0", "--model.text.vocab-size", "300", "--device", "cpu"]
    out = str(tmp_path / "out")
    commands: tuple[tuple[Callable[..., object], list[str]], ...] = (
        (embed.main, [str(source), out, *model]),
        (search.main, [out, "--text", "A voice.", *model]),
        (score.main, [str(pairs), "-", *model]),
        (data_command.main, ["validate", str(source)]),
        (train.main, [*words, "--run", str(tmp_path / "run")]),
        (train.main, ["--help"]),
    )
    for main, arguments in commands:
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as stop:
                main(arguments)
        assert re.fullmatch(rf"clsp_fast\.\w+: {FULL}", str(stop.value.code))
    assert (tmp_path / "out/index.jsonl").exists()


def test_score_refuses_a_stream_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, words in (("stdin", ["-", "s.jsonl"]), ("stdout", ["p.jsonl", "-"])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)
            with pytest.raises(SystemExit, match="that stream is closed"):
                score.main([*words, "--model", "none"])


def test_another_broken_pipe_is_not_hidden() -> None:
    @console.command
    def main(arguments: object = None) -> None:
        raise BrokenPipeError("a worker")

    with pytest.raises(BrokenPipeError, match="a worker"):
        main()


def test_a_command_keeps_its_result_and_its_exit_code() -> None:
    @console.command
    def main(arguments: list[str] | None = None, *, code: int = 0) -> int:
        if code:
            sys.exit(code)
        return len(arguments or ())

    assert main(["a", "b"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(code=3)
    assert stop.value.code == 3


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Every option string of a command, in both spellings."""
    module, *words = command.split()
    with pytest.raises(SystemExit):
        main_of(module)([*words, "--help"])
    text = capsys.readouterr().out.replace("python -m", "python")
    options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", text))
    return options | {"--" + option[2:].replace("-", "_") for option in options if option.startswith("--")}


def torchruns_options() -> set[str]:
    return {name for action in get_args_parser()._actions for name in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_an_abbreviation_of_torchruns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's argparse checks all words of the command line, also those for the script, and refuses a word
    with which several of torchrun's options begin."""
    monkeypatch.setenv("COLUMNS", "200")
    options, torchruns = options_of(command, capsys), torchruns_options()
    assert len(options) > 1
    assert len(torchruns) > 40
    options -= {"-h", "--help"}  # torchrun has the same words, and a complete word is never ambiguous
    assert not {(option, other) for option in options for other in torchruns if other.startswith(option)}


def test_torchrun_would_take_the_old_spelling_for_an_option_of_torchrun() -> None:
    assert {name for name in torchruns_options() if name.startswith("--run")} == {"--run-path", "--run_path"}


@pytest.mark.parametrize("command", COMMANDS)
def test_torchrun_hands_on_every_option_in_any_order(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    all_options = sorted(options_of(command, capsys))
    module, *words = command.split()
    spellings: tuple[Callable[[str], list[str]], ...] = (lambda x: [x, "y"], lambda x: [f"{x}=y"])
    orders = (all_options, all_options[::-1], all_options[1::2] + all_options[::2])
    for options, spell in itertools.product(orders, spellings):
        script = [*words, *(word for option in options for word in spell(option))]
        for launch in (["--nproc-per-node", "2", "-m"], ["--standalone", "--nproc_per_node=2", "--module"]):
            parsed: Any = get_args_parser().parse_args([*launch, module, *script])
            assert (parsed.training_script, parsed.training_script_args) == (module, script)
            assert parsed.run_path is False


def test_the_runs_folder_has_two_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--run-dir", "x"], ["--run-dir=x"], ["--run_dir=x"], ["--run", "x"], ["--run=x"]):
        assert train.parse(["tiny", *words, "--seed", "3"]).run == Path("x")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    assert re.findall(r"--run\S*", capsys.readouterr().out) == ["--run-dir"]
