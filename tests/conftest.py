"""Fixtures of all tests: golden data, a fixed seed, models, clips, a browser, and the device of kernels."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from sample_data import GOLDEN, Golden, MakeClips

from clsp_fast import convert
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

# torch reads this variable when the process first calls cuBLAS. Deterministic algorithms need it on a card.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Without a card, kernels run in Triton's interpreter. Triton and each kernel read the variable when they are
# first imported, so they are imported here, before any test: budgets imports every kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("clsp_fast.kernels.budgets")
    INTERPRETER_PROBLEM = importlib.import_module("interpreter").problem()
    del os.environ["TRITON_INTERPRET"]
else:
    INTERPRETER_PROBLEM = ""


def pytest_report_header() -> list[str]:
    """Says at the start of a run why the tests of kernels will fail."""
    return [INTERPRETER_PROBLEM] if INTERPRETER_PROBLEM else []


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Seeds torch before each test, and restores the number of threads after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Loads tests/golden/<name>.safetensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def recorded(golden: Golden) -> tuple[CLSP, dict[str, torch.Tensor]]:
    """A model of the reference recipe, and its recorded inputs and outputs."""
    config = json.loads((GOLDEN / "golden_a.config.json").read_text())
    return convert.from_reference(golden("golden_a.weights"), config), golden("golden_a.io")


@pytest.fixture(scope="session")
def tiny() -> CLSP:
    """An untrained tiny model. Tests must not change it."""
    torch.manual_seed(1)
    captions = ["A calm, low-pitched male voice.", "A lively woman speaks fast.", "She whispers."]
    return CLSP(MODEL_PRESETS["tiny"], Tokenizer.train(captions * 5, 300)).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained tiny model, which tests of commands load."""
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(["A calm, low-pitched male voice.", "She whispers, fast."] * 5, 300)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    CLSP(MODEL_PRESETS["tiny"], tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def make_clips() -> MakeClips:
    """Writes recordings of a fraction of a second into a folder. Each one holds different noise."""

    def make(folder: Path, count: int) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        paths = [folder / f"{i:05d}.wav" for i in range(count)]
        for path in paths:
            samples = int(rng.integers(2400, 6400))
            soundfile.write(path, rng.uniform(0.01, 0.3) * rng.standard_normal(samples), 16000)
        return paths

    return make


@pytest.fixture
def open_in_browser() -> Callable[[Path], str]:
    """Returns the HTML of a page after a real browser has loaded it.

    Without a browser the test is skipped, or fails if CLSP_REQUIRE_BROWSER=1.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)

    def show(file: Path) -> str:
        if browser is None:
            required = os.environ.get("CLSP_REQUIRE_BROWSER") == "1"
            (pytest.fail if required else pytest.skip)("no browser was found")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=240).stdout

    return show


@pytest.fixture
def cuda() -> torch.device:
    """The card. Without one the test is skipped, or fails if CLSP_REQUIRE_GPU=1."""
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("CLSP_REQUIRE_GPU") == "1" else pytest.skip)("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and then the card: a test that must hold on both. With the card, the test is marked `gpu`."""
    if request.param == "cpu":
        return torch.device("cpu")
    device: torch.device = request.getfixturevalue("cuda")
    return device


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Full float32 on a card. By default, torch's convolutions round their operands to 11 bits there."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The card, or the CPU with Triton's interpreter. During the test, uninitialised memory is NaN."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if INTERPRETER_PROBLEM:
            pytest.fail(INTERPRETER_PROBLEM)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4, device=device).isnan().all()
    yield device
    torch.use_deterministic_algorithms(False)
