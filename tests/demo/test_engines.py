"""Engines of the demo corpus: their voices, versions and determinism."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from clsp_fast.demo import engines, folder


@pytest.mark.parametrize("name", engines.ENGINES)
def test_voices_of_an_engine_are_split(name: str) -> None:
    if engines.unavailable(name):
        engine: Any = engines.make("synth", 0)
    else:
        engine = engines.make(name, 0)
    for sex in ("female", "male"):
        train, validation, test = (
            {str(v) for v in engine.voices(sex, s)} for s in ("train", "validation", "test")
        )
        assert train
        assert validation
        assert test
        assert not train & validation
        assert not (train | validation) & test


def test_old_content_of_memory_changes_nothing() -> None:
    # Pico reads memory before writing to it. Without MALLOC_PERTURB_, the third call gives another sound.
    if engines.unavailable("pico"):
        pytest.skip("py-nanotts is not installed")
    code = """
import hashlib
from clsp_fast.demo.engines import Pico
pico = Pico()
print(*{hashlib.sha256(pico._say("The same sentence.", "en-US", 1.0, 1.0)).hexdigest() for _ in range(6)})
"""
    environment = folder._child_environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert len(done.stdout.split()) == 1


def test_only_the_pinned_hibari_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "package_version", lambda name: "0.3.0")
    assert "only 0.2.1 is supported" in engines.unavailable("hibari")
    assert not engines.unavailable("pico")
