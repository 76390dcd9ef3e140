"""Model folders: exact round trips, missing or damaged files, and models by their name on the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clsp_fast.config import MODEL_PRESETS
from clsp_fast.model import CLSP
from clsp_fast.storage import model_folder as folders

CAPTIONS = ["A calm, low-pitched male voice.", "A lively woman speaks fast."]


def test_folder_round_trip_is_exact(tiny: CLSP, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    tiny.save_pretrained(tmp_path / "m")
    tiny.save_pretrained(tmp_path / "m")
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "notes.txt"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    restored = CLSP.from_pretrained(tmp_path / "m")
    assert restored.config == tiny.config
    assert not restored.training
    assert list(restored.state_dict()) == list(tiny.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(restored.state_dict().values(), tiny.state_dict().values(), strict=True)
    )
    assert all(parameter.requires_grad for parameter in restored.parameters())
    assert torch.equal(restored.encode_text(CAPTIONS), tiny.encode_text(CAPTIONS))
    assert CLSP.from_pretrained(str(tmp_path / "m"), dtype=torch.float64).dtype == torch.float64


def test_fingerprints_stay_and_only_tf32_has_its_own(tiny: CLSP) -> None:
    """With other fingerprints, folders of embeddings that exist already would be refused."""
    weights = torch.arange(6.0).view(2, 3)
    cases = [
        ("8471bf3246177d9675758f7490577f78a691c6e6a4b56191fb815915075bb017", weights, None),
        ("adb4a7b40d7f49f6744819fcde0a7094554f0e73c530908ae80528d5c1877691", weights.bfloat16(), '{"a":1}'),
    ]
    for expected, weights, tokenizer in cases:
        assert folders.fingerprint(MODEL_PRESETS["tiny"], {"w": weights}, tokenizer) == expected
    assert tiny.fingerprint() == tiny.fingerprint("fp32") == tiny.fingerprint("bf16")
    assert tiny.fingerprint("tf32") != tiny.fingerprint()
    with pytest.raises(ValueError, match="precision must be"):
        tiny.fingerprint("TF32")


def test_folder_without_tokenizer_still_encodes_audio(tiny: CLSP, tmp_path: Path) -> None:
    CLSP(tiny.config).save_pretrained(tmp_path)
    model = CLSP.from_pretrained(tmp_path)
    assert model.encode_audio([np.zeros(8000, np.float32)]).shape == (1, tiny.config.joint_dim)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode_text(["A calm voice."])
    assert model.encode_text([]).shape == (0, tiny.config.joint_dim)


def test_damaged_folders_are_named(tiny: CLSP, tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        tiny.save_pretrained(tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match="no such folder"):
        CLSP.from_pretrained(tmp_path / "nothing")
    for file in ("config.json", "model.safetensors"):
        folder = saved(f"without {file}")
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            CLSP.from_pretrained(folder)
    for content in ("{", "[]", "{}", '{"format": "clsp_fast", "format_version": 99}'):
        folder = saved("config")
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            CLSP.from_pretrained(folder)
    folder = saved("unknown key")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"joint_dim"', '"joint_dims"'))
    with pytest.raises(ValueError, match="nearest is 'joint_dim'"):
        CLSP.from_pretrained(folder)
    (folder / "config.json").write_text(text.replace('"joint_dim": 128', '"joint_dim": 64'))
    with pytest.raises(ValueError, match=r"audio_projection.*shape"):
        CLSP.from_pretrained(folder)
    folder = saved("cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="damaged"):
        CLSP.from_pretrained(folder)


def test_failed_write_leaves_the_old_file(
    tiny: CLSP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("clsp_fast.storage.model_folder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_hub_name_without_the_extra_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"clsp_fast\[hub\]"):
        CLSP.from_pretrained("someone/some-model")


def test_hub_name_is_found_in_the_local_cache_without_a_network(tiny: CLSP, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--some-model"
    tiny.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    code = (
        "from clsp_fast import CLSP\n"
        f"print(CLSP.from_pretrained('someone/some-model').encode_text({CAPTIONS!r}).tolist())\n"
        "CLSP.from_pretrained('someone/other')\n"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2]
    )
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), tiny.encode_text(CAPTIONS))
    assert "FileNotFoundError: someone/other: no such folder, and the hub answers" in done.stderr
