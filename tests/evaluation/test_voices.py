"""Figures on voices whose style was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation import voices
from clsp_fast.evaluation.tasks import tasks_from_prompts

AXES = {"female": 0, "high": 1, "fast": 2, "whisper": 3, "male": 4, "low": 5, "slow": 6, "normal": 7}
TASKS = tasks_from_prompts(
    {
        "sex": {"female": ["female"], "male": ["male"]},
        "pitch": {"low": ["low"], "high": ["high"]},
        "speed": {"slow": ["slow"], "fast": ["fast"]},
        "quality": {"normal": ["normal"], "whisper": ["whisper"]},
    }
)


def encode(texts: Sequence[str]) -> Tensor:
    return torch.eye(len(AXES))[[AXES[text] for text in texts]]


def clip(number: int, **tags: str) -> Clip:
    return Clip(f"clip-{number}", "a.wav", 0.0, 2.0, None, Captions((), ("x",)), tags)


def test_a_model_that_orders_voices_well_has_high_figures() -> None:
    random = np.random.default_rng(0)
    audio_MD, clips = torch.zeros(40, len(AXES)), []
    for i in range(40):
        female, f0_hz, rate = i % 2 == 0, random.uniform(80, 300), random.uniform(2, 7)
        audio_MD[i, AXES["female" if female else "male"]] = 1.0
        audio_MD[i, AXES["high"]], audio_MD[i, AXES["slow"]] = (
            f0_hz / 300,
            rate / 7,
        )  # slow and fast exchanged
        audio_MD[i, AXES["whisper" if i < 10 else "normal"]] = 1.0
        tags = {"f0_hz": str(f0_hz), "syllables_per_s": str(rate), "voiced": "0.8", "hnr_db": "12"}
        # Three of 20 women are labelled as men, and the last ten clips are not ordinary.
        sex = "male" if i in (0, 2, 4) or not female else "female"
        clips.append(clip(i, sex=sex, **tags | ({"voiced": "0.2"} if i >= 30 else {})))
    clips[39] = clip(39, sex="male")  # nothing was measured
    figures = voices.voice_figures(audio_MD, clips, encode, TASKS)
    assert figures["sex"]["value"] == pytest.approx((1 + 20 / 23) / 2)
    assert figures["f0_rank"]["value"] == pytest.approx(1.0)
    assert figures["rate_rank"]["value"] == pytest.approx(-1.0)
    assert figures["false_whisper"]["value"] == pytest.approx(10 / 30)
    counts = {name: figure["n"] for name, figure in figures.items()}
    assert counts == {"sex": 40, "f0_rank": 39, "rate_rank": 39, "false_whisper": 30}
    low, high = figures["false_whisper"]["interval"]
    assert 0.15 < low < 1 / 3 < high < 0.55
    text = voices.table(figures)
    assert "ordinary voices called whisper" in text
    assert len(text.splitlines()) == 6
    assert text.endswith("measured by clsp_fast itself.")
    assert voices.table(figures, measured_by="Praat").endswith("measured by Praat.")


def test_figures_without_clips_are_nan() -> None:
    figures = voices.voice_figures(torch.zeros(2, len(AXES)), [clip(0), clip(1)], encode, TASKS)
    assert all(figure["n"] == 0 and np.isnan(figure["value"]) for figure in figures.values())
