"""How good a model is on a set of clips: retrieval both ways, captions that are true of a clip, zero-shot
labels.

A file of its own because training and the evaluate command share it, and a command may not be imported.
Shape suffixes: M clips, N captions, D joint dimension.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clsp_fast import contention, metrics, similarity
from clsp_fast.config import DataConfig
from clsp_fast.data import ClipFeatures, DataError, collate
from clsp_fast.data.manifest import Clip
from clsp_fast.model import CLSP
from clsp_fast.storage import textfile

Tasks = Mapping[str, Mapping[str, Sequence[str]]]
"""Zero-shot tasks: tag -> label -> prompts."""
EncodeText = Callable[[Sequence[str]], Tensor]

_KS = (1, 5, 10)
_CLIPS_READ = 256
_FRAMES_AT_ONCE = 12_000


def caption_of(clip: Clip, kind: str) -> int | None:
    """Index of the caption that stands for a clip: the first global, the longest fine-grained (the later of
    two as long, as in the recipe); None: it has none."""
    own = clip.captions.global_captions if kind == "global" else clip.captions.fine_captions
    if not own:
        return None
    return 0 if kind == "global" else max(range(len(own)), key=lambda i: (len(own[i]), i))


def evaluate(
    audio_MD: Tensor, clips: Sequence[Clip], encode_text: EncodeText, tasks: Tasks
) -> dict[str, Any]:
    """All figures of a set of clips.

    Args:
        audio_MD: unit-norm embeddings of the clips, float (M, D).
        clips: the M clips.
        encode_text: captions -> unit-norm embeddings (N, D).
        tasks: zero-shot tasks; a clip takes part in those whose tag it carries with one of the labels.

    Returns:
        {"n": M, "retrieval": {"global" | "fine": `retrieval_figures`}, "zeroshot": {tag:
        `zeroshot_figures`}}.
    """
    results: dict[str, Any] = {"n": len(clips), "retrieval": {}, "zeroshot": {}}
    for kind in ("global", "fine"):
        chosen = [caption_of(clip, kind) for clip in clips]
        own = [i for i, caption in enumerate(chosen) if caption is not None]
        if not own:
            continue
        text_ND = encode_text([_captions(clips[i], kind)[chosen[i] or 0] for i in own])
        results["retrieval"][kind] = retrieval_figures(
            audio_MD[own], text_ND, _truth([clips[i] for i in own], [chosen[i] or 0 for i in own], kind)
        )
    for tag, prompts in tasks.items():
        labelled = [i for i, clip in enumerate(clips) if clip.tags.get(tag) in prompts]
        if labelled:
            labels = [clips[i].tags[tag] for i in labelled]
            results["zeroshot"][tag] = zeroshot_figures(audio_MD[labelled], labels, prompts, encode_text)
    return results


def evaluate_clips(
    model: CLSP, clips: Sequence[Clip], features: ClipFeatures, tasks: Tasks
) -> dict[str, Any]:
    """Figures of a set of clips; those that cannot be read are left out, and counted in `features.bad`."""
    model.eval()
    kept: list[Clip] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(clips), _CLIPS_READ):
            chunk = clips[start : start + _CLIPS_READ]
            read = [(c, f) for c, f in zip(chunk, features.read(chunk), strict=True) if f is not None]
            read.sort(key=lambda pair: len(pair[1]))
            for batch in _batches(read):
                kept += [clip for clip, _ in batch]
                lengths = torch.tensor([len(values) for _, values in batch])
                values = collate([values for _, values in batch]).to(model.device)
                parts.append(model.encode_features(values, lengths).float().cpu())
                contention.adapt_waits()
    if not parts:
        raise DataError(f"not one evaluation clip is readable: {dict(Counter(features.bad.values()))}")
    return evaluate(torch.cat(parts), kept, lambda texts: model.encode_text(texts).float().cpu(), tasks)


def _batches(read: Sequence[tuple[Clip, Tensor]]) -> Iterator[list[tuple[Clip, Tensor]]]:
    """Clips in order of length, so many at a time that their padded frames stay within bounds."""
    batch: list[tuple[Clip, Tensor]] = []
    for pair in read:
        if batch and (len(batch) + 1) * len(pair[1]) > _FRAMES_AT_ONCE:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def features_for(config: DataConfig) -> ClipFeatures:
    """Features as at inference, whatever tail training uses."""
    return ClipFeatures(dataclasses.replace(config, tail="reflect"))


def retrieval_figures(audio_MD: Tensor, text_MD: Tensor, true_MM: Tensor | None) -> dict[str, Any]:
    """Retrieval with one caption a clip, both directions.

    Args:
        audio_MD: unit-norm embeddings of M clips.
        text_MD: unit-norm embeddings of their captions.
        true_MM: bool, entry (i, j): caption j is true of clip i. None: unknown.

    Returns:
        "n" and, for "audio_to_text" and "text_to_audio", the figures of `metrics.retrieval`, "chance" (R@k
        of a random order) and, with `true_MM`, "ceiling" (expected R@k of a model that knows what is true of
        what and guesses among several true answers), "hit@5" (share of queries with a true answer among the
        first five) and its "hit@5_chance".
    """
    count = len(audio_MD)
    found = similarity.ranks(audio_MD, text_MD)
    figures: dict[str, Any] = {"n": count}
    for direction, own in (("audio_to_text", found.audio_to_text), ("text_to_audio", found.text_to_audio)):
        way: dict[str, Any] = metrics.retrieval(own)
        way["chance"] = {f"R@{k}": min(1.0, k / count) for k in _KS}
        if true_MM is not None:
            queries, items, true = audio_MD, text_MD, true_MM
            if direction == "text_to_audio":
                queries, items, true = items, queries, true.T
            answers = true.sum(1)
            way["ceiling"] = {f"R@{k}": float((k / answers).clamp(max=1).mean()) for k in _KS}
            _, best = similarity.topk(queries, items, min(5, count))
            way["hit@5"] = float(true.gather(1, best).any(1).double().mean())
            way["hit@5_chance"] = sum(hit_chance(count, int(n), 5) for n in answers) / count
        figures[direction] = way
    return figures


def zeroshot_figures(
    audio_MD: Tensor, labels: Sequence[str], prompts: Mapping[str, Sequence[str]], encode_text: EncodeText
) -> dict[str, Any]:
    """Zero-shot classification: the label whose prompts' mean embedding is nearest.

    Returns:
        "n", "accuracy" (WA), "uar", "chance" (one over the number of labels) and "majority" (the share of
        the most frequent label).
    """
    names = list(prompts)
    means_LD = torch.stack([F.normalize(encode_text(list(prompts[name])).mean(0), dim=0) for name in names])
    predicted = [names[i] for i in (audio_MD @ means_LD.T).argmax(1).tolist()]
    return {
        "n": len(labels),
        "accuracy": metrics.accuracy(predicted, labels),
        "uar": metrics.unweighted_average_recall(predicted, labels),
        "chance": 1 / len(names),
        "majority": max(Counter(labels).values()) / len(labels),
    }


def read_tasks(path: Path) -> dict[str, dict[str, list[str]]]:
    """Zero-shot tasks of a JSON file, {tag: {label: [prompts]}}.

    Raises:
        ValueError: the file holds something else; FileNotFoundError: there is none.
    """
    text = textfile.read_text(path, "a JSON file of tasks")
    try:
        tasks = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    form = '{tag: {label: ["prompt", ...], ...}, ...}, two labels or more a tag'
    if not isinstance(tasks, dict):
        raise ValueError(f"{path} must hold {form}")
    for tag, labels in tasks.items():
        good = isinstance(labels, dict) and len(labels) >= 2
        if not good or not all(
            isinstance(p, list) and p and all(isinstance(s, str) for s in p) for p in labels.values()
        ):
            raise ValueError(f"{path} must hold {form}; {tag!r} does not")
        for name in (tag, *labels, *(prompt for prompts in labels.values() for prompt in prompts)):
            if not textfile.is_text(name):
                got = f"half a surrogate pair, or bytes that are not UTF-8: {name!r}"
                raise ValueError(f"{path} must hold text, got {got}")
    return tasks


def table(results: Mapping[str, Any], title: str) -> str:
    """The results as text, with the number of items, chance and ceiling beside each figure."""
    lines = [f"{title}: {results['n']} clips", ""]
    lines.append(f"{'retrieval':<24}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MRR@10':>8}{'hit@5':>7}{'n':>6}")
    for kind, figures in results["retrieval"].items():
        for direction in ("audio_to_text", "text_to_audio"):
            way = figures[direction]
            name = f"{kind} {direction.replace('audio', 'speech').replace('_to_', '->')}"
            lines.append(
                _row(name, [way[f"R@{k}"] for k in _KS], way["MRR@10"], way.get("hit@5"), figures["n"])
            )
            for bound in ("ceiling", "chance"):
                if bound in way:
                    hit = 1.0 if bound == "ceiling" else way.get("hit@5_chance")
                    hit = hit if "hit@5" in way else None
                    lines.append(_row(f"  {bound}", [way[bound][f"R@{k}"] for k in _KS], None, hit, None))
    if results["zeroshot"]:
        lines += ["", f"{'zero-shot':<24}{'WA':>7}{'UAR':>7}{'chance':>8}{'majority':>10}{'n':>6}"]
    for tag, figures in results["zeroshot"].items():
        lines.append(
            f"{tag:<24}{figures['accuracy']:>7.3f}{figures['uar']:>7.3f}{figures['chance']:>8.3f}"
            f"{figures['majority']:>10.3f}{figures['n']:>6}"
        )
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """One line: mean of both directions by kind of caption, and the zero-shot accuracies."""
    parts = []
    for kind, figures in results["retrieval"].items():
        ways = [figures[direction] for direction in ("audio_to_text", "text_to_audio")]
        means = {key: sum(way[key] for way in ways) / 2 for key in ("R@1", "R@10", "hit@5") if key in ways[0]}
        parts.append(f"{kind} " + " ".join(f"{key} {value:.3f}" for key, value in means.items()))
    parts += [f"{tag} {figures['accuracy']:.2f}" for tag, figures in results["zeroshot"].items()]
    return " | ".join(parts)


def _row(name: str, recalls: Sequence[float], mrr: float | None, hit: float | None, count: int | None) -> str:
    cells = "".join(f"{value:>7.3f}" for value in recalls)
    return (
        f"{name:<24}{cells}"
        f"{'' if mrr is None else format(mrr, '.3f'):>8}"
        f"{'' if hit is None else format(hit, '.3f'):>7}{'' if count is None else count:>6}"
    )


def _captions(clip: Clip, kind: str) -> tuple[str, ...]:
    return clip.captions.global_captions if kind == "global" else clip.captions.fine_captions


def _truth(clips: Sequence[Clip], chosen: Sequence[int], kind: str) -> Tensor | None:
    """bool (M, M): caption j's claims hold for clip i; None where a caption's claims are unknown."""
    claims = [clip.claims.get(kind, ()) for clip in clips]
    if not all(claims):
        return None
    own = [rows[i] for rows, i in zip(claims, chosen, strict=True)]
    # Many captions claim the same, so each distinct claim is compared with the clips once.
    columns: dict[frozenset[tuple[str, str]], Tensor] = {}
    for row in own:
        key = frozenset(row.items())
        if key not in columns:
            columns[key] = torch.tensor([key <= clip.tags.items() for clip in clips])
    holds_MM = torch.stack([columns[frozenset(row.items())] for row in own], dim=1)
    return holds_MM | torch.eye(len(clips), dtype=torch.bool)


def hit_chance(total: int, good: int, draws: int) -> float:
    """Probability that `draws` items out of `total`, drawn without replacement, hold one of the `good`
    ones."""
    return 1 - math.comb(total - good, min(draws, total)) / math.comb(total, min(draws, total))
