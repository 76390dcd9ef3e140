"""What every test shares: golden data, a fixed seed, the number of threads."""

from __future__ import annotations

import importlib
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

from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"

# Without a card, kernels run in Triton's interpreter. It is chosen for good when triton and each kernel are
# first imported, so here, before any test does; budgets imports every kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("clsp_fast.kernels.budgets")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """One seed for each test, and the number of threads as it was before."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loads tests/golden/<name>.safetensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny() -> CLSP:
    """An untrained tiny model, not to be changed."""
    torch.manual_seed(1)
    captions = ["A calm, low-pitched male voice.", "A lively woman speaks fast.", "She whispers."]
    return CLSP(MODEL_PRESETS["tiny"], Tokenizer.train(captions * 5, 300)).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny model, as `save_pretrained` writes it: what the commands are given."""
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(["A calm, low-pitched male voice.", "She whispers, fast."] * 5, 300)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    CLSP(MODEL_PRESETS["tiny"], tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def make_clips() -> Callable[[Path, int], list[Path]]:
    """Writes recordings of a fraction of a second, each with another noise, into a folder."""

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
    """What a real browser makes of a page. Without one the test is skipped, or fails where
    CLSP_REQUIRE_BROWSER=1 promises one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)

    def show(file: Path) -> str:
        if browser is None:
            required = os.environ.get("CLSP_REQUIRE_BROWSER") == "1"
            (pytest.fail if required else pytest.skip)("no browser was found")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=240).stdout

    return show


@pytest.fixture
def cuda() -> torch.device:
    """The card; without one the test is skipped, or fails where CLSP_REQUIRE_GPU=1 promises one."""
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("CLSP_REQUIRE_GPU") == "1" else pytest.skip)("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where kernels run here: the card or, interpreted, the CPU. Uninitialised memory is NaN meanwhile."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4, device=device).isnan().all()
    yield device
    torch.use_deterministic_algorithms(False)
