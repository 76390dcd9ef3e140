"""Figures on human voices whose style was measured: does a score rise with what it is named after?

Zero-shot classes hide how a model orders voices that lie between them. Here the score of the prompts for
"high" minus that for "low" is compared with the measured F0, and "fast" minus "slow" with the measured rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast import metrics
from clsp_fast.data import ClipFeatures
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation.figures import Bootstrap, EncodeText, embed_features
from clsp_fast.evaluation.tasks import Task, Tasks
from clsp_fast.model import CLSP

_ORDINARY_VOICED, _ORDINARY_HNR_DB = 0.5, 5.0
_BOOTSTRAP = Bootstrap(resamples=1000, seed=0)
# figure -> (task, label with a positive sign, label with a negative sign, tag with the measured value)
_RANKED = {
    "f0_rank": ("pitch", "high", "low", "f0_hz"),
    "rate_rank": ("speed", "fast", "slow", "syllables_per_s"),
}
_TITLES = {
    "sex": "sex, balanced accuracy",
    "f0_rank": "F0, rank correlation",
    "rate_rank": "speaking rate, rank correlation",
    "false_whisper": "ordinary voices called whisper",
}


def evaluate_voices(
    model: CLSP, clips: Sequence[Clip], features: ClipFeatures, tasks: Tasks
) -> dict[str, Any]:
    """Embeds clips, and returns {"voices": `voice_figures` of the embeddings}."""
    audio_MD, kept = embed_features(model, clips, features)
    encode = functools.partial(_encode, model)
    return {"voices": voice_figures(audio_MD, kept, encode, tasks)}


def _encode(model: CLSP, texts: Sequence[str]) -> Tensor:
    return model.encode_text(texts).float().cpu()


def voice_figures(
    audio_MD: Tensor, clips: Sequence[Clip], encode_text: EncodeText, tasks: Tasks
) -> dict[str, dict[str, Any]]:
    """Figures of clips whose tags hold a sex and what was measured.

    Args:
        audio_MD: unit-norm embeddings of the clips, float (M, D).
        clips: the M clips. Of their tags, these are used: "sex", "f0_hz", "syllables_per_s", "voiced" (share)
            and "hnr_db"; a clip without a tag is left out where the tag is needed.
        encode_text: captions -> unit-norm embeddings (N, D).
        tasks: must hold "sex", "pitch", "speed" and "quality".

    Returns:
        For "sex" (balanced accuracy), "f0_rank", "rate_rank" (Spearman's correlation) and "false_whisper"
        (share of the clips with at least half of their frames voiced and an HNR of at least 5 dB that are
        called whispers): {"n": clips, "value", "interval": 95 % bootstrap interval}.
    """
    figures = {"sex": _sex(audio_MD, clips, encode_text, tasks["sex"])}
    for name, (task, high, low, tag) in _RANKED.items():
        rows = [i for i, clip in enumerate(clips) if tag in clip.tags]
        scores = _scores(audio_MD[rows], encode_text, tasks[task])
        score = scores[list(tasks[task].prompts).index(high)] - scores[list(tasks[task].prompts).index(low)]
        measured = np.array([float(clips[i].tags[tag]) for i in rows])
        figures[name] = _figure(len(rows), functools.partial(_spearman, score, measured))
    ordinary = [
        i
        for i, clip in enumerate(clips)
        if float(clip.tags.get("voiced", 0)) >= _ORDINARY_VOICED
        and float(clip.tags.get("hnr_db", -99)) >= _ORDINARY_HNR_DB
    ]
    labels = list(tasks["quality"].prompts)
    best = _scores(audio_MD[ordinary], encode_text, tasks["quality"]).argmax(0)
    called = (best == labels.index("whisper")).astype(np.float64)
    figures["false_whisper"] = _figure(len(ordinary), functools.partial(_share, called))
    return figures


def _sex(audio_MD: Tensor, clips: Sequence[Clip], encode_text: EncodeText, task: Task) -> dict[str, Any]:
    rows = [i for i, clip in enumerate(clips) if clip.tags.get("sex") in task.prompts]
    best = _scores(audio_MD[rows], encode_text, task).argmax(0)
    predicted = [list(task.prompts)[i] for i in best.tolist()]
    truth = [clips[i].tags["sex"] for i in rows]

    def balanced(counts_RN: metrics.Array) -> metrics.Array:
        return metrics.resampled_classification(predicted, truth, counts_RN)["uar"]

    return _figure(len(rows), balanced)


def _scores(audio_MD: Tensor, encode_text: EncodeText, task: Task) -> metrics.Array:
    """Cosines (L, M) of the clips with the mean prompt of each label."""
    means = [F.normalize(encode_text(list(texts)).mean(0), dim=0) for texts in task.prompts.values()]
    scores: metrics.Array = (torch.stack(means).cpu() @ audio_MD.T).double().numpy()
    return scores


def _spearman(score: metrics.Array, measured: metrics.Array, counts_RN: metrics.Array) -> metrics.Array:
    return metrics.spearman(score, measured, counts_RN)


def _share(flags: metrics.Array, counts_RN: metrics.Array) -> metrics.Array:
    share: metrics.Array = counts_RN @ flags / counts_RN.sum(1)
    return share


def _figure(count: int, figure: Callable[[metrics.Array], metrics.Array]) -> dict[str, Any]:
    """A figure of `count` clips, from a function of resampling counts."""
    if count < 2:
        return {"n": count, "value": float("nan"), "interval": (float("nan"), float("nan"))}

    def resampled(counts_RN: metrics.Array) -> dict[str, metrics.Array]:
        return {"value": figure(counts_RN)}

    interval = _BOOTSTRAP.intervals(resampled, np.arange(count))["value"]
    return {"n": count, "value": float(figure(np.ones((1, count)))[0]), "interval": interval}


def table(figures: dict[str, dict[str, Any]], *, measured_by: str = "clsp_fast itself") -> str:
    """The figures as a table with n and intervals, and a line that says who measured F0, rate and HNR."""
    lines = [f"{'held-out human voices':34s} {'value':>6s}  95 % interval      n"]
    for name, figure in figures.items():
        low, high = figure["interval"]
        lines.append(f"{_TITLES[name]:34s} {figure['value']:6.3f}  {low:.3f} to {high:.3f} {figure['n']:6d}")
    lines.append(f"F0, rate and HNR of the clips were measured by {measured_by}.")
    return "\n".join(lines)
