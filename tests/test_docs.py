"""Every command and block of code of the README and the pages behind it is executed, on a model of the demo's
preset and on recordings of a fraction of a second.

Some are not executed in full: `make test` and `make bench` run with `make -n`, which shows that they would
run the right commands, `pip install` with `--dry-run`, and `make train` with few steps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from sample_data import GOLDEN, MakeClips, write_rows
from stub_server import MODEL, StubServer
from test_console import COMMANDS, options_of, torchruns_options

from bench import plot
from bench.run import regressions, table
from clsp_fast import train
from clsp_fast.config import TRAIN_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.storage import log
from clsp_fast.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


class Document:
    """The commands and the code of a Markdown text."""

    def __init__(self, text: str) -> None:
        self.blocks: list[tuple[str, str]] = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        self.spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        self.lists = [self.commands(block) for block in self.code("sh")]
        # A text between backticks with a module or a target is a command. Others are names and options.
        self.inline = [s for s in self.spans if re.match(r"(python|torchrun)\b.*-m |make \w+$", s)]

    def code(self, language: str) -> list[str]:
        return [text for name, text in self.blocks if name == language]

    @staticmethod
    def commands(block: str) -> list[str]:
        """The commands of a block."""
        lines = [line.split("  #")[0].strip() for line in block.splitlines()]
        return [line for line in lines if line]

    def strays(self) -> list[str]:
        """Texts that look like a command or code but are not executed.

        Executed are `lists`, `inline`, and blocks of python and JSON. Blocks without a language are output.
        """
        others = [span for span in self.spans if span not in self.inline]
        words = r"-m (clsp_fast|bench)|^(clsp-\w+|pip|make|python|sh|bash|git|\$) "
        strange = [text for name, text in self.blocks if name not in ("", "sh", "python", "json")]
        typed = [
            text for text in self.code("") if re.search(r"^\s*\$ |python -m|torchrun", text, re.MULTILINE)
        ]
        return [span for span in others if re.search(words, span)] + strange + typed


README_TEXT = (ROOT / "README.md").read_text()
README = Document(README_TEXT)
ARCHITECTURE = Document((ROOT / "docs/architecture.md").read_text())
PAGES = {
    name: Document((ROOT / "docs" / name).read_text()) for name in ("guide.md", "demo.md", "benchmarks.md")
}
CAPTIONS = Document((ROOT / "docs/captions.md").read_text())
INLINE = list(dict.fromkeys(chain(README.inline, *(page.inline for page in PAGES.values()))))


def lay_out(make_clips: MakeClips) -> None:
    """Creates the files that the commands read, in the current folder."""
    clips = make_clips(Path("clips"), 16)
    for name in ("a.wav", "b.flac", "c.mp3"):
        wave, rate = soundfile.read(clips[0])
        soundfile.write(name, wave, rate)
    shutil.copy(clips[1], "clips/1.wav")
    write_rows(
        Path("m.jsonl"),
        [
            {
                "audio": str(path),
                "global_captions": [f"A voice, number {i}."],
                "finegrained_captions": [f"It starts as {i} and whispers."],
            }
            for i, path in enumerate(clips)
        ],
    )
    with Path("m.jsonl").open("a") as file:  # the line of a manifest that the README shows
        file.write("".join(README.code("json")))
    shutil.copy("m.jsonl", "v.jsonl")
    shutil.copy("m.jsonl", "test.jsonl")
    write_rows(Path("pairs.jsonl"), [{"audio": str(path), "caption": "A voice."} for path in clips[:5]])
    for i, path in enumerate(clips):
        target = Path(f"RAVDESS/Actor_{i // 8 + 1:02d}/03-01-{i % 8 + 1:02d}-01-01-01-{i // 8 + 1:02d}.wav")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    ratings = [f"{path},Voice.,r{i % 2},{i % 6},intrinsic" for i, path in enumerate(clips[:8])]
    Path("ratings.csv").write_text("\n".join(["clip,caption,rater,rating,category", *ratings, ""]))
    # A checkpoint of the reference recipe, its two towers apart, and a tokenizer like RoBERTa's.
    shutil.copy(GOLDEN / "golden_a.config.json", "config.json")
    weights = load_file(GOLDEN / "golden_a.weights.safetensors")
    torch.save({"model": weights}, "epoch.pt")
    torch.save({k: v for k, v in weights.items() if k.startswith("encoder")}, "spear.pt")
    Path("roberta").mkdir()
    text = {k.removeprefix("text_encoder."): v for k, v in weights.items() if k.startswith("text_encoder.")}
    torch.save(text, "roberta/pytorch_model.pt")
    Tokenizer.train(["a calm voice", "it whispers"] * 3, 280).save("roberta/tokenizer.json")
    write_recipe(Path("recipe.json"))
    results = [
        path for path in sorted((ROOT / "bench/results").glob("*.json")) if "fbank-10s" in path.read_text()
    ]
    shutil.copy(results[-1], "old.json")
    write_python(Path())


def write_recipe(path: Path) -> None:
    """Writes settings of a run of three steps."""
    tiny = TRAIN_PRESETS["tiny"].to_dict()
    recipe = {
        "model": tiny["model"],
        "data": {"manifest": "m.jsonl", "batch_clips": 4, "buckets": 1},
        "stage1_steps": 2,
        "stage2_steps": 1,
    }
    path.write_text(json.dumps(recipe))


def write_python(folder: Path) -> None:
    """Writes `python` and `torchrun` as scripts that call this Python, into the folder's bin."""
    (folder / "bin").mkdir()
    for name, words in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)


def only_slower(output: str) -> bool:
    """Whether bench.run ended with 1 only because clsp_fast is slower than in the older results.

    That may happen on another machine. It must not end with 1 because a result disagrees or a case fails.
    """
    return "x the time of before" in output and not re.search(r"DISAGREES|\bfailed\b", output)


class Shell:
    """Runs commands in a folder, with this Python as `python`, on the CPU.

    Args:
        folder: the folder.
        replaced: text of the commands -> what replaces it, such as the address of a server.
    """

    def __init__(self, folder: Path, replaced: Mapping[str, str] | None = None) -> None:
        self.folder, self.ran, self.replaced = folder, list[str](), dict(replaced or {})
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PET_STANDALONE": "1",  # any free port for torchrun
        }

    def run_all(self, commands: list[str]) -> None:
        """Several commands, one after the other."""
        for command in commands:
            self.run(command)

    def run(self, command: str) -> None:
        """One command, to its end; an AssertionError with its output if it fails."""
        special = {
            "make": self._make,
            "pip install": self._install,
            "python -m clsp_fast.train small": self._interrupted,
        }
        run = next((run for start, run in special.items() if command.startswith(start)), self._whole)
        run(command)
        self.ran.append(command)

    def _whole(self, command: str, *, codes: tuple[int, ...] = (0,)) -> str:
        against = command.startswith("python -m bench.run") and "--against" in command
        done = subprocess.run(
            ["bash", "-c", self.adapted(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        allowed = (*codes, 1) if against and only_slower(done.stdout) else codes
        assert done.returncode in allowed, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-4000:]}"
        return done.stdout

    def adapted(self, text: str) -> str:
        """A command or program with the texts that `replaced` names."""
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text

    def _make(self, command: str) -> None:
        """A target as far as it can be run here: without the installation, which tests/test_packaging.py
        looks at, and the training with a small corpus and few steps."""
        target = command.split()[1]
        installed = "train" if target == "human" else target
        make = ["make", "-f", str(ROOT / "Makefile"), "-o", f".venv/.{installed}"]
        make.append(f"BIN={self.folder / 'bin'}")
        dry = self._whole(" ".join([*make, "-n", "-o", ".venv/.test", target]))
        start = {
            "train": "python -m clsp_fast.train",
            "human": "python -m clsp_fast.train human",
            "test": "ruff check .",
            "bench": "python -m bench.run",
        }[target]
        assert f"{self.folder / 'bin'}/{start}" in dry
        if target == "train":
            arguments = "--data.manifest m.jsonl --data.validation v.jsonl --stage1-steps 2 --stage2-steps 1"
            self._whole(
                " ".join([*make, target, f"ARGS='{arguments} --data.batch-clips 8 --data.buckets 1'"])
            )

    def _install(self, command: str) -> None:
        """Runs pip with --dry-run, which warns of an extra that does not exist."""
        target = re.fullmatch(r"pip install '?\.((?:\[[\w,-]+\])?)'?", command)
        assert target, command
        dry = "-m pip install --dry-run --no-deps --no-build-isolation --disable-pip-version-check"
        output = self._whole(f"python {dry} '{ROOT}{target[1]}' 2>&1")
        assert "Would install clsp_fast" in output
        assert "does not provide the extra" not in output, output

    def _interrupted(self, command: str) -> None:
        """Starts a run of many hours, and interrupts it as soon as it trains. It must save a checkpoint."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not _catches(process.pid, signal.SIGTERM):
            assert time.monotonic() < deadline, command
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=240)
        assert process.returncode == 128 + signal.SIGINT, error
        assert "the same command resumes" in error
        assert list((self.folder / "runs/a/checkpoints").glob("step-*"))


def _catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal, which the trainer sets when its first step begins."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


PYTHON = "\n".join(
    [
        *README.code("python"),
        "assert speech.shape == (3, 128)",
        # A norm of 128 terms: half a rounding for each of them and a few for the division.
        "assert (speech.norm(dim=1) - 1).abs().max() < (128 / 2 + 8) * 2.0**-23",
        "assert features.values.shape[2] == 128",
        "assert loss.isfinite()",
        "assert len(ranks) == 2",
        "from lhotse.dataset import OnTheFlyFeatures",
        "from clsp_fast.lhotse import ClspFbank",
        "OnTheFlyFeatures(ClspFbank())",
        "from clsp_fast.embed import EmbedConfig",
        "from pathlib import Path",
        'assert clsp_fast.embed.embed(EmbedConfig(source="clips/", out=Path("embeddings"))).complete',
    ]
)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(900)
def test_every_command_runs_as_it_stands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_clips: MakeClips,
    open_in_browser: Callable[[Path], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(make_clips)
    shell = Shell(tmp_path)
    setup, training, captions, use = README.lists
    assert set(captions) <= set(chain(*CAPTIONS.lists))  # which the next test runs
    behind = list(chain(*chain(*(page.lists for page in PAGES.values()))))
    # The two lists do not depend on each other, so they run at the same time, on two cores.
    first = [*setup, "python readme.py", *use]
    second = [*training, *behind, *(command for command in INLINE if command not in setup)]
    Path("readme.py").write_text(PYTHON)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(shell.run_all, commands) for commands in (first, second)]
        for done in running:
            done.result()
    assert set(shell.ran) >= {*setup, *training, *use, *behind, *INLINE}
    assert len(shell.ran) > 20

    steps = [record["step"] for record in log.read_log(Path("runs/b/log.jsonl")) if record["kind"] == "train"]
    assert steps == [2]
    for model in ("runs/demo/model", "runs/b/model", "model", "start"):
        assert CLSP.from_pretrained(model).tokenizer is not None
    assert len(Path("scores.jsonl").read_text().splitlines()) == 5
    assert {path.name for path in Path("onnx").iterdir()} == {"audio.onnx", "text.onnx", "tokenizer.json"}
    assert Path("evaluation").is_dir()
    assert "<audio controls" in open_in_browser(Path("answers.html").absolute())


def speak(path: Path, f0_hz: float) -> None:
    """Writes 1.5 s of sound that is measured as speech: a voice with five syllables a second."""
    time_s = np.arange(24000) / 16000
    pitch_hz = f0_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / 16000
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    wave = 0.1 * voice * np.sin(np.pi * 5 * time_s) ** 2
    soundfile.write(path, wave + 1e-4 * np.random.default_rng(0).standard_normal(len(wave)), 16000)


def model_answer(body: dict[str, Any]) -> str | None:
    """What the verifier and the judge answer; None: the captioner's turn."""
    form = body.get("response_format")
    if form is None:
        return None

    def value_of(schema: dict[str, Any]) -> object:
        if "properties" in schema:
            return {key: value_of(value) for key, value in schema["properties"].items()}
        return schema["enum"][-1] if "enum" in schema else False

    return json.dumps(value_of(form["json_schema"]["schema"]))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_the_page_on_captions_runs_against_a_server(tmp_path: Path) -> None:
    """All commands of the page and its program for Ray, in their order. One server answers for all models."""
    (tmp_path / "clips").mkdir()
    write_python(tmp_path)
    rows = [{"id": f"clip{i}", "audio": f"clips/{i}.wav", "tags": {"accent": "Scottish"}} for i in range(8)]
    for i in range(8):
        speak(tmp_path / f"clips/{i}.wav", 100.0 + 20 * i)
    write_rows(tmp_path / "clips.jsonl", rows)
    write_rows(
        tmp_path / "v.jsonl", [row | {"captions": [f"A voice, number {i}."]} for i, row in enumerate(rows)]
    )
    write_recipe(tmp_path / "recipe.json")
    # Ray's sockets need a short path.
    with (
        StubServer(content=model_answer) as server,
        TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder,
    ):
        addresses = dict.fromkeys((f"http://localhost:{port}/v1" for port in (8000, 8001, 8002)), server.url)
        names = {f"model {name}": f"model {MODEL}" for name in ("captioner", "verifier", "judge")}
        shell = Shell(tmp_path, addresses | names | {'model="captioner"': f'model="{MODEL}"'})
        shell.environment |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray_folder}
        shell.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        for language, text in CAPTIONS.blocks:
            if language == "sh":
                shell.run_all(Document.commands(text))
            elif language == "python":
                (tmp_path / "recipe.py").write_text(shell.adapted(text))
                shell.run("python recipe.py")
    assert len(shell.ran) == len(list(chain(*CAPTIONS.lists))) + 1
    assert len((tmp_path / "work/captions.jsonl").read_text().splitlines()) == 8
    assert len((tmp_path / "batch/captions.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "work/judge/judge.json").read_text())["scores"]["clips"] == 8
    assert json.loads((tmp_path / "work/against-offline/judge.json").read_text())["pairs"]["clips"] == 8
    assert CLSP.from_pretrained(tmp_path / "runs/captions/model").tokenizer is not None


def test_a_slower_benchmark_is_distinguished_from_a_failed_one() -> None:
    subject: dict[str, object] = {"status": "timed", "wall_s": {"min": 1.0, "median": 1.0, "spread": 0.0}}
    subject["agreement"] = ""
    slower = f"\n{regressions(*(_results(subject, seconds) for seconds in (1.0, 2.0)))[0]}\n"
    assert only_slower(table("c", _results(subject, 2.0)["c"]) + slower)
    assert not only_slower(table("c", _results(subject, 1.0)["c"]))
    assert not only_slower("old.json is not a results file of bench.run: KeyError('cases')")
    for bad in ({"status": "disagrees", "agreement": "by 1"}, {"status": "failed", "reason": "no memory"}):
        assert not only_slower(table("c", _results(bad, None)["c"]) + slower)


def _results(subject: dict[str, object], seconds: float | None) -> dict[str, Any]:
    """Records of a benchmark case with one provider."""
    time_s = {} if seconds is None else {"wall_s": {"min": seconds, "median": seconds, "spread": 0.0}}
    case = {"what": "a case", "clock": "wall", "threads": 1, "rounds": 1}
    return {"c": case | {"providers": {"subject": subject | time_s}}}


def test_all_commands_and_code_of_the_docs_are_executed() -> None:
    for page in (README, CAPTIONS, *PAGES.values()):
        assert page.strays() == []
        assert page in (README, CAPTIONS) or page.code("python") == []
        assert page is README or page.code("json") == []
    assert CAPTIONS.inline == []


@pytest.mark.parametrize(
    "text",
    [
        "Run `clsp-embed clips/ out/`.",
        "Run `pip install clsp_fast`.",
        "Run `OMP_NUM_THREADS=2 python -m clsp_fast.embed clips/ out/`.",
        "Run `make train ARGS=--help`.",
        "```bash\npython -m clsp_fast.embed\n```",
        "```\n$ python -m clsp_fast.embed\n```",
        "```cpp\nint main();\n```",
    ],
)
def test_what_would_not_be_executed_is_found(text: str) -> None:
    assert Document(text).strays()


def test_a_new_command_is_executed() -> None:
    """A new command is among those that the test above runs. A fifth list of the README makes it fail."""
    new = Document("As `python -m clsp_fast.embed x y` does.\n```sh\nls  # files\n\nmake x\n```\n")
    assert (new.lists, new.inline) == ([["ls", "make x"]], ["python -m clsp_fast.embed x y"])


def test_every_option_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known = torchruns_options().union(*(options_of(command, capsys) for command in COMMANDS))
    known |= {"--check-parity", "--list", "--against", "--json", "--plot"}  # of commands that are run above
    known |= {"--served-model-name", "--max-model-len", "--limit-mm-per-prompt"}  # of vLLM
    known |= {"--allowed-local-media-path", "--tensor-parallel-size"}
    pages = (README, CAPTIONS, ARCHITECTURE, *PAGES.values())
    spans = chain(*(page.spans for page in pages))
    named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", span)}
    assert len(named) > 15
    assert named <= known


def test_train_without_arguments_runs_the_demo() -> None:
    assert train.parse([]) == TRAIN_PRESETS["tiny"]
    assert TRAIN_PRESETS["tiny"].data.manifest is None


def test_the_presets_are_those_of_the_docs() -> None:
    guide = (ROOT / "docs/guide.md").read_text()
    assert "724,244,405" in guide
    assert "724,244,405" in README_TEXT
    for text in (guide, README_TEXT):
        assert set(re.findall(r"\b(tiny|human|small|base|xlarge)\b", text)) == set(TRAIN_PRESETS)


def test_the_first_screen_states_recorded_numbers() -> None:
    """The measured numbers of the README, and the machine that measured them."""
    screen = README_TEXT[: README_TEXT.index("## Install")]
    results = ROOT / "bench/results"
    frontend, features = plot.newest(results, "frontend")
    loss, losses = plot.newest(results, "loss")
    assert all("Xeon" in document["machine"]["cpu"] for document in (frontend, loss))
    rows = features["file-16k-s16"]["providers"]
    assert f"{rows['soundfile + lhotse']['ratio']:.3g} times as fast**" in screen
    assert f"takes {rows['clsp_fast']['cpu_s']['min'] * 1e3:.3g} ms" in screen
    rows = losses["loss-8192-16mb"]["providers"]
    peer = rows["the recipe's and open_clip's form"]
    memory = [round(row["peak_bytes"] / 2**20) for row in (rows["clsp_fast"], peer)]
    assert f"{peer['ratio']:.3g} times as fast, and {memory[0]} MiB instead of {memory[1]}**" in screen
    assert f"take {rows['clsp_fast']['wall_s']['min'] * 1e3:.3g} ms" in screen
    rounds = {features["file-16k-s16"]["rounds"], losses["loss-8192-16mb"]["rounds"]}
    assert f"n = {rounds.pop()}" in screen
    assert not rounds


def test_the_readme_takes_its_results_from_the_page_of_the_demo() -> None:
    results = README_TEXT[README_TEXT.index("## Results") : README_TEXT.index("## What is guaranteed")]
    numbers = re.findall(r"\b0\.\d{3}\b", results)
    assert len(numbers) >= 6
    page = (ROOT / "docs/demo.md").read_text()
    assert [number for number in numbers if number not in page] == []


def test_the_readme_is_short_and_names_every_extra() -> None:
    assert len(README_TEXT.splitlines()) <= 145
    project = (ROOT / "pyproject.toml").read_text()
    tables = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[project\.", project, re.M | re.S)
    assert tables is not None
    extras = re.findall(r"^([a-z][a-z-]*) = \[", tables[1], re.M)
    assert len(extras) >= 10
    install = README_TEXT[README_TEXT.index("Extras:") : README_TEXT.index("```python")]
    assert set(re.findall(r"`([a-z-]+)`", install)) == set(extras)


def test_links_lead_to_files() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"
