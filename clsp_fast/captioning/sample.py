"""Draws the clips that are judged, with one caption of each system."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clsp_fast.captioning.ids import Digests, digest
from clsp_fast.data.clips import Clip
from clsp_fast.data.manifest import Problem, iterate_manifest

Kind = Literal["fine", "global"]
"""Which captions of a clip."""
_STREAM_CAPTION = 1


class Sample(NamedTuple):
    """A clip to be judged, with one caption of each system."""

    row: int
    clip: Clip
    captions: tuple[str, ...]


def choose_clips(
    manifest: Path, against: Path | None, *, kind: Kind, count: int, seed: int
) -> tuple[list[Sample], Counter[str]]:
    """Draws clips that have captions in the manifest, and in the other one if there is one.

    Each clip has a number, a digest of the seed and its id. The clips with the smallest numbers are taken, so
    a larger sample contains the smaller one, and the order of the lines does not matter. Memory holds the
    sample, and eight bytes for each clip of both manifests. Of clips that share an id, only the first is
    taken, because answers and captions of the other manifest are found by the id.

    Args:
        manifest: the first system's captions, and the audio.
        against: the second system's captions for clips with the same ids; None: there is no second system.
        kind: which captions are judged.
        count: number of clips.
        seed: seed of the sample and of the choice among a clip's captions.

    Returns:
        The sample in the order of the rows, and reason -> clips that were left out.

    Raises:
        FileNotFoundError: there is no such manifest. ValueError: no clip can be judged.
    """
    shared = None if against is None else _ids_with_captions(against, kind)
    left_out: Counter[str] = Counter()
    heap: list[tuple[int, int, Clip]] = []
    ids, drawn = Digests(), set[int]()
    for number, clip in iterate_manifest(manifest, need_captions=False):
        if isinstance(clip, Problem):
            left_out["bad lines"] += 1
        elif not _captions(clip, kind):
            left_out[f"without {kind} captions"] += 1
        elif shared is not None and not _contains(shared, digest(clip.id)):
            left_out["not in the other manifest"] += 1
        else:
            ids.add(clip.id)
            value = digest(f"{seed}/{clip.id}")
            if value in drawn:
                continue
            # A repeated id that is not in the heap has a larger number than all in it, and is not taken.
            drawn.add(value)
            if len(heap) < count:
                heapq.heappush(heap, (-value, -number, clip))
            else:
                drawn.remove(-heapq.heappushpop(heap, (-value, -number, clip))[0])
    if not heap:
        also = "" if against is None else f" that {against} also has"
        raise ValueError(f"{manifest} has no clip with {kind} captions{also}")
    if repeated := ids.repeated():
        left_out["with the id of an earlier clip"] += repeated
    chosen = {clip.id: (-negative - 1, clip) for _, negative, clip in heap}
    other = {} if against is None else _captions_of(against, kind, chosen, seed)
    samples = []
    for row, clip in sorted(chosen.values(), key=lambda item: item[0]):
        captions = (
            _draw_caption(_captions(clip, kind), clip.id, seed),
            *((other[clip.id],) if against else ()),
        )
        samples.append(Sample(row, clip, captions))
    return samples, left_out


def _captions(clip: Clip, kind: Kind) -> tuple[str, ...]:
    return clip.captions.fine_captions if kind == "fine" else clip.captions.global_captions


def _draw_caption(captions: Sequence[str], clip_id: str, seed: int) -> str:
    """One of a clip's captions, drawn from the seed and the clip's id."""
    random = np.random.default_rng((seed, _STREAM_CAPTION, digest(clip_id)))
    return captions[int(random.integers(len(captions)))]


def _ids_with_captions(manifest: Path, kind: Kind) -> NDArray[np.int64]:
    """The sorted digests of the ids of the clips that have captions."""
    digests = Digests()
    for _, clip in iterate_manifest(manifest, need_captions=False):
        if isinstance(clip, Clip) and _captions(clip, kind):
            digests.add(clip.id)
    return digests.sorted_values()


def _contains(sorted_N: NDArray[np.int64], value: int) -> bool:
    place = int(np.searchsorted(sorted_N, np.int64(value)))
    return place < len(sorted_N) and int(sorted_N[place]) == value


def _captions_of(manifest: Path, kind: Kind, ids: Mapping[str, object], seed: int) -> dict[str, str]:
    """Id -> one caption, for the given ids."""
    captions: dict[str, str] = {}
    for _, clip in iterate_manifest(manifest, need_captions=False):
        if isinstance(clip, Clip) and clip.id in ids and clip.id not in captions and _captions(clip, kind):
            captions[clip.id] = _draw_caption(_captions(clip, kind), clip.id, seed)
    return captions
