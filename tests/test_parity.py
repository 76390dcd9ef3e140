"""The parity command: a verdict on every library, and a reliable exit code."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from clsp_fast import features, parity

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lhotse and its imports


@pytest.fixture
def torchaudio(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package named torchaudio whose filterbank is the float64 reference of clsp_fast."""

    def fbank(waveform: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.from_numpy(features.reference(waveform[0].numpy())).float()

    importlib.import_module("lhotse")  # it looks for the real torchaudio when it is imported
    compliance = types.ModuleType("torchaudio.compliance")
    compliance.kaldi = types.SimpleNamespace(fbank=fbank)  # type: ignore[attr-defined]
    package = types.ModuleType("torchaudio")
    package.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio", package)
    monkeypatch.setitem(sys.modules, "torchaudio.compliance", compliance)
    return compliance


@pytest.mark.usefixtures("torchaudio")
def test_all_agree_for_both_tails(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.check() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "clsp_fast agrees; lhotse agrees; torchaudio agrees"
    named = [tuple(line.split()[:2]) for line in lines[1:-1]]
    assert named == [(n, t) for n in ("clsp_fast", "lhotse", "torchaudio") for t in ("reflect", "zero")]


@pytest.mark.usefixtures("torchaudio")
@pytest.mark.parametrize("name", ["_clsp_fast", "_lhotse"])
@pytest.mark.parametrize("tail", ["reflect", "zero"])
def test_a_library_that_differs_fails(
    name: str, tail: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = getattr(parity, name)

    def differing(clips: Any, which: Any) -> Any:
        features_of_clips = [np.array(values) for values in compute(clips, which)]
        if which == tail:
            features_of_clips[1][-1] += 0.1  # the last frame of a clip, as with a wrong tail
        return features_of_clips

    monkeypatch.setattr(parity, name, differing)
    assert parity.check() == 1
    label = {"_clsp_fast": "clsp_fast", "_lhotse": "lhotse"}[name]
    assert f"{label} DIFFERS" in capsys.readouterr().out


def test_a_library_with_other_frames_fails(
    torchaudio: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchaudio.kaldi, "fbank", lambda *_, **__: torch.zeros(3, 128))
    assert parity.check() == 1
    assert "(3, 128)" in capsys.readouterr().out


def test_a_broken_library_is_reported(
    torchaudio: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("libtorch.so: undefined symbol")

    monkeypatch.setattr(torchaudio.kaldi, "fbank", broken)
    assert parity.check() == 0
    assert "torchaudio is broken here (OSError('libtorch.so" in capsys.readouterr().out


def test_a_failure_of_clsp_fast_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(parity, "_clsp_fast", broken)
    with pytest.raises(RuntimeError):
        parity.check()


def test_the_command_works_without_other_libraries() -> None:
    code = (
        "import sys, runpy; sys.modules['lhotse'] = sys.modules['torchaudio'] = None;"
        "sys.argv = ['features', '--check-parity'];"
        "runpy.run_module('clsp_fast.features', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "lhotse is not installed" in run.stdout
