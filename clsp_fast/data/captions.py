"""Which captions a clip is trained with in each of the two stages: pure functions of (seed, step, clip)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_STREAM_TASK, _STREAM_CLIP = 1, 2


class Captions(NamedTuple):
    """All captions of one clip. A clip for training has captions of at least one kind."""

    global_captions: tuple[str, ...]
    fine_captions: tuple[str, ...]


def stage1(clips: Sequence[Captions], ids: Sequence[int], *, seed: int, step: int) -> list[list[str]]:
    """One fine-grained caption per clip, or a global one if the clip has no fine-grained captions.

    Args:
        clips: captions of the B clips of a batch.
        ids: B integers that identify the clips. A clip's draw depends on its id, not on the other clips.
        seed: seed of the run.
        step: step of the run.

    Returns:
        One list of B texts: texts[0][i] describes clip i.
    """
    texts = []
    for captions, clip_id in zip(clips, ids, strict=True):
        pool = captions.fine_captions or captions.global_captions
        texts.append(pool[int(_generator(seed, step, clip_id).integers(len(pool)))])
    return [texts]


def stage2(clips: Sequence[Captions], ids: Sequence[int], *, seed: int, step: int) -> list[list[str]]:
    """Two captions per clip: either two fine-grained ones, or a global and a fine-grained one. One draw
    decides this for the whole batch.

    The probability of two fine-grained captions is min(0.05 + 0.45 step / 10,000, 0.5), where `step` counts
    from the start of the stage (arXiv 2601.03065). A clip with both kinds but only one fine-grained caption
    always gives one of each kind. A clip with captions of one kind gives two of them, or its only one twice.

    Args, Returns: as `stage1`, with two lists of B texts.
    """
    probability = min(0.05 + 0.45 * step / 10_000, 0.5)
    two_fine = np.random.default_rng((seed, _STREAM_TASK, step)).random() < probability
    pairs = []
    for captions, clip_id in zip(clips, ids, strict=True):
        pairs.append(_pair(captions, two_fine, _generator(seed, step, clip_id)))
    return [list(texts) for texts in zip(*pairs, strict=True)]


def _generator(seed: int, step: int, clip_id: int) -> np.random.Generator:
    return np.random.default_rng((seed, _STREAM_CLIP, step, clip_id))


def _pair(captions: Captions, two_fine: bool, generator: np.random.Generator) -> tuple[str, str]:
    coarse, fine = captions
    if coarse and fine and not (two_fine and len(fine) > 1):
        return coarse[int(generator.integers(len(coarse)))], fine[int(generator.integers(len(fine)))]
    pool = fine or coarse
    if len(pool) == 1:
        return pool[0], pool[0]
    first, second = generator.choice(len(pool), size=2, replace=False)
    return pool[int(first)], pool[int(second)]
