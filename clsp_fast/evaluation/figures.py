"""How good a model is on a set of clips: retrieval, zero-shot labels, agreement with people.

Training embeds the clips with `embed_features`, which reads features like the training loader. The evaluate
command embeds them with `embed_audio`, which calls `CLSP.encode_audio`.
Shape suffixes: M clips, N captions or items, L labels, D joint dimension.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clsp_fast import contention, copies, metrics, similarity
from clsp_fast.audio import AudioError
from clsp_fast.config import DataConfig, EncodeConfig
from clsp_fast.data import ClipFeatures, DataError, collate, segment
from clsp_fast.data.clips import Clip
from clsp_fast.evaluation.tasks import Task, Tasks
from clsp_fast.model import CLSP

Figures = dict[str, Any]
EncodeText = Callable[[Sequence[str]], Tensor]
"""Captions -> unit-norm embeddings, float32 (N, D), on any device."""

DIRECTIONS = ("audio_to_text", "text_to_audio")
KINDS = ("global", "fine")
KS = (1, 5, 10)
_LONGEST_CURVE = 100
_CLIPS_READ = 256
_FRAMES_AT_ONCE = 12_000


@dataclass(frozen=True)
class Bootstrap:
    """How 95 % intervals are drawn."""

    resamples: int
    seed: int

    def intervals(
        self,
        figures: Callable[[metrics.Array], dict[str, metrics.Array]],
        groups: NDArray[np.int64],
    ) -> dict[str, metrics.Interval]:
        """Intervals of figures; arguments as in `metrics.bootstrap`."""
        return metrics.bootstrap(figures, groups, resamples=self.resamples, seed=self.seed)


def captions_of_kind(clip: Clip, kind: str) -> tuple[str, ...]:
    """A clip's "global" or "fine" captions."""
    return clip.captions.global_captions if kind == "global" else clip.captions.fine_captions


def main_caption(clip: Clip, kind: str) -> int:
    """Index of the caption that represents a clip: the first global one, or the longest fine-grained one (the
    last of equally long ones, as in the recipe). The clip must have a caption of this kind."""
    captions = captions_of_kind(clip, kind)
    return 0 if kind == "global" else max(range(len(captions)), key=lambda i: (len(captions[i]), i))


def embed_features(model: CLSP, clips: Sequence[Clip], features: ClipFeatures) -> tuple[Tensor, list[Clip]]:
    """Embeds clips from features, which are read as in training.

    Returns:
        Unit-norm embeddings, float32 (M, D) on the CPU, and the M clips, in another order than `clips`.
        Unreadable clips are left out and counted in `features.bad`.

    Raises:
        DataError: no clip is readable.
    """
    model.eval()
    kept: list[Clip] = []
    parts: list[Callable[[], Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(clips), _CLIPS_READ):
            chunk = clips[start : start + _CLIPS_READ]
            read = [(c, f) for c, f in zip(chunk, features.read(chunk), strict=True) if f is not None]
            read.sort(key=lambda pair: len(pair[1]))
            for batch in _batches(read):
                kept += [clip for clip, _ in batch]
                lengths = torch.tensor([len(values) for _, values in batch])
                values = collate([values for _, values in batch])
                embedded = model.encode_features(copies.to_device(values, model.device), lengths)
                parts.append(copies.read_later(embedded.float()))
                contention.adapt_waits()
    if not parts:
        raise DataError(f"no evaluation clip is readable: {dict(Counter(features.bad.values()))}")
    return torch.cat([read() for read in parts]), kept


def _batches(read: Sequence[tuple[Clip, Tensor]]) -> Iterator[list[tuple[Clip, Tensor]]]:
    """Groups clips, given in order of length, into batches of at most _FRAMES_AT_ONCE padded frames."""
    batch: list[tuple[Clip, Tensor]] = []
    for pair in read:
        if batch and (len(batch) + 1) * len(pair[1]) > _FRAMES_AT_ONCE:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def features_for(config: DataConfig) -> ClipFeatures:
    """The reader for `embed_features`. Its features have the tail of inference."""
    return ClipFeatures(dataclasses.replace(config, tail="reflect"))


def embed_audio(
    model: CLSP, clips: Sequence[Clip], config: EncodeConfig
) -> tuple[Tensor, list[Clip], dict[str, str]]:
    """Embeds clips with `CLSP.encode_audio`, which also accepts long recordings.

    Returns:
        Unit-norm embeddings, float32 (M, D) on the CPU; the M clips; and why each of the other clips could
        not be used: id -> reason.

    Raises:
        ValueError: no clip is readable.
    """
    errors: dict[int, AudioError] = {}
    audio_MD = model.encode_audio([segment(clip) for clip in clips], errors=errors, **config.batching)
    good = [i for i in range(len(clips)) if i not in errors]
    bad = {clips[i].id: str(errors[i]) for i in sorted(errors)}
    if not good:
        raise ValueError(f"no recording is readable: {next(iter(bad.values()))}")
    return audio_MD[good].float().cpu(), [clips[i] for i in good], bad


def evaluate_clips(model: CLSP, clips: Sequence[Clip], features: ClipFeatures, tasks: Tasks) -> Figures:
    """Embeds clips, and returns `evaluate_embeddings` of the embeddings. Unreadable clips are left out and
    counted in `features.bad`."""
    audio_MD, kept = embed_features(model, clips, features)
    return evaluate_embeddings(audio_MD, kept, lambda texts: model.encode_text(texts).float().cpu(), tasks)


def evaluate_embeddings(
    audio_MD: Tensor, clips: Sequence[Clip], encode_text: EncodeText, tasks: Tasks
) -> Figures:
    """The figures that training reports for a set of clips.

    Args:
        audio_MD: unit-norm embeddings of the clips, float (M, D).
        clips: the M clips.
        encode_text: captions -> unit-norm embeddings (N, D).
        tasks: zero-shot tasks. Each task uses the clips that have a label for it.

    Returns:
        {"n": M, "retrieval": {"global" | "fine": {"n": clips with such a caption} | `retrieval_figures`},
        "zeroshot": {task: `zeroshot_figures`}}.
    """
    results: Figures = {"n": len(clips), "retrieval": {}, "zeroshot": {}}
    for kind in KINDS:
        rows = [i for i, clip in enumerate(clips) if captions_of_kind(clip, kind)]
        if rows:
            described = [clips[i] for i in rows]
            chosen = [main_caption(clip, kind) for clip in described]
            texts = [captions_of_kind(clip, kind)[i] for clip, i in zip(described, chosen, strict=True)]
            figures = retrieval_figures(
                audio_MD[rows], encode_text(texts).cpu(), true_MM=_true_captions(described, chosen, kind)
            )
            results["retrieval"][kind] = {"n": len(rows)} | figures
    for name, task in tasks.items():
        labels = {i: label for i, clip in enumerate(clips) if (label := task.label_of(clip)) is not None}
        if labels:
            results["zeroshot"][name] = zeroshot_figures(
                audio_MD[list(labels)], list(labels.values()), task, encode_text
            )
    return results


def _true_captions(clips: Sequence[Clip], chosen: Sequence[int], kind: str) -> Tensor | None:
    """bool (M, M): entry (i, j) says whether all claims of caption j are true of clip i. None: the claims of
    a caption are unknown."""
    claims_of_clips = [clip.claims.get(kind, ()) for clip in clips]
    if not all(claims_of_clips):
        return None
    claims = [frozenset(rows[i].items()) for rows, i in zip(claims_of_clips, chosen, strict=True)]
    # Many captions have the same claims, so each distinct set is compared with the clips only once.
    columns = {
        claim: torch.tensor([claim <= clip.tags.items() for clip in clips]) for claim in dict.fromkeys(claims)
    }
    true_MM = torch.stack([columns[claim] for claim in claims], dim=1)
    return true_MM | torch.eye(len(clips), dtype=torch.bool)


def retrieval_figures(
    audio_MD: Tensor,
    text_ND: Tensor,
    *,
    owner_N: Tensor | None = None,
    true_MM: Tensor | None = None,
    bootstrap: Bootstrap | None = None,
) -> Figures:
    """Retrieval in both directions.

    Args:
        audio_MD: unit-norm embeddings of M clips.
        text_ND: unit-norm embeddings of their captions.
        owner_N: int64, the clip that each caption describes. None: caption i describes clip i.
        true_MM: bool, entry (i, j): caption j is true of clip i; for one caption per clip. None: unknown.
        bootstrap: how intervals are drawn. None: no intervals.

    Returns:
        For "audio_to_text" and "text_to_audio": the figures of `metrics.retrieval` and "chance" (R@k of a
        random order).
        With `bootstrap` also "interval", "n" (queries) and "curve" (R@k for k = 1, 2, ...).
        With `true_MM` also "ceiling" (expected R@k of a model that ranks all true answers first, in random
        order), "hit@5" (share of queries with a true answer among the first five) and "hit@5_chance".
    """
    ranks = similarity.ranks(audio_MD, text_ND, text_owner=owner_N)
    one_caption_each = owner_N is None
    owner_N = torch.arange(len(text_ND)) if owner_N is None else owner_N
    captions_M = torch.bincount(owner_N, minlength=len(audio_MD)).tolist()
    figures: Figures = {}
    for direction, rank in zip(DIRECTIONS, ranks, strict=True):
        if direction == "audio_to_text":
            queries, items, true, answers = audio_MD, text_ND, true_MM, captions_M
            groups = torch.arange(len(audio_MD))
        else:
            queries, items, true, answers = text_ND, audio_MD, None if true_MM is None else true_MM.T, [1]
            # Captions of one clip are not independent queries: a resample draws them together.
            groups = owner_N
        result: Figures = dict(metrics.retrieval(rank))
        if bootstrap is not None:
            resampled = functools.partial(metrics.resampled_retrieval, rank)
            result["interval"] = bootstrap.intervals(resampled, groups.numpy())
        result["chance"] = _recall_chance(len(items), None if one_caption_each else answers)
        if bootstrap is not None:
            last = min(len(items), _LONGEST_CURVE)
            result["n"] = len(rank)
            result["curve"] = [float((rank < k).double().mean()) for k in range(1, last + 1)]
        if true is not None:
            result |= _true_answers(queries, items, true)
        figures[direction] = result
    return figures


def _recall_chance(items: int, answers: Sequence[int] | None) -> dict[str, float]:
    """R@k of a random order of `items`, given the number of right answers of each query (None: one)."""
    if answers is None:
        return {f"R@{k}": min(1.0, k / items) for k in KS}
    return {f"R@{k}": float(np.mean([hit_chance(items, n, k) for n in answers])) for k in KS}


def _true_answers(queries_MD: Tensor, items_MD: Tensor, true_MM: Tensor) -> Figures:
    """Figures that count every true item as a right answer, not only the query's own."""
    count, answers_M = len(queries_MD), true_MM.sum(1)
    _, best = similarity.topk(queries_MD, items_MD, min(5, count))
    return {
        "ceiling": {f"R@{k}": float((k / answers_M).clamp(max=1).mean()) for k in KS},
        "hit@5": float(true_MM.gather(1, best).any(1).double().mean()),
        "hit@5_chance": sum(hit_chance(count, int(n), 5) for n in answers_M) / count,
    }


def hit_chance(total: int, good: int, draws: int) -> float:
    """Probability that at least one of `good` items is among `draws` items that are drawn from `total`
    items without replacement."""
    return 1 - math.comb(total - good, min(draws, total)) / math.comb(total, min(draws, total))


def zeroshot_figures(
    audio_MD: Tensor,
    labels: Sequence[str],
    task: Task,
    encode_text: EncodeText,
    *,
    bootstrap: Bootstrap | None = None,
) -> Figures:
    """Zero-shot classification: predicts the label whose mean prompt embedding is nearest.

    Args:
        audio_MD: unit-norm embeddings of M clips.
        labels: the M clips' labels, after merging.
        task: labels with their prompts, and the labels to merge.
        encode_text: captions -> unit-norm embeddings (N, D).
        bootstrap: how intervals are drawn. None: no intervals.

    Returns:
        "n", "accuracy" (WA), "uar", "chance" (accuracy of random guesses) and "majority" (share of the most
        frequent label). With `bootstrap` also "interval", "labels" and "confusion" (rows: labels, columns:
        predictions).
    """
    means_LD = torch.stack(
        [F.normalize(encode_text(list(prompts)).mean(0), dim=0) for prompts in task.prompts.values()]
    )
    prompt_labels = list(task.prompts)
    nearest = [prompt_labels[i] for i in (audio_MD @ means_LD.cpu().T).argmax(1).tolist()]
    predicted = [task.merge.get(label, label) for label in nearest]
    figures: Figures = {
        "n": len(labels),
        "accuracy": metrics.accuracy(predicted, labels),
        "uar": metrics.unweighted_average_recall(predicted, labels),
    }
    if bootstrap is not None:
        resampled = functools.partial(metrics.resampled_classification, predicted, labels)
        figures["interval"] = bootstrap.intervals(resampled, np.arange(len(labels)))
    figures["chance"] = 1 / len(task.names)
    figures["majority"] = max(Counter(labels).values()) / len(labels)
    if bootstrap is not None:
        figures["labels"] = task.names
        figures["confusion"] = metrics.confusion(predicted, labels, task.names).tolist()
    return figures


def correlation_figures(x_N: metrics.Array, y_N: metrics.Array, bootstrap: Bootstrap) -> Figures:
    """ "n", "pearson", "spearman" and "kendall" of N pairs of numbers, and their "interval"."""

    def resampled(counts_RN: metrics.Array) -> dict[str, metrics.Array]:
        return {name: figure(x_N, y_N, counts_RN) for name, figure in metrics.CORRELATIONS.items()}

    figures = {name: float(figure(x_N, y_N)[0]) for name, figure in metrics.CORRELATIONS.items()}
    return {"n": len(x_N)} | figures | {"interval": bootstrap.intervals(resampled, np.arange(len(x_N)))}
