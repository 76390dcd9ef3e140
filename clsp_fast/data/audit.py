"""Looks at the captions of a manifest for mistakes that training would not notice.

Findings are certain: a caption that is empty after normalisation, or a placeholder. They make `data validate`
fail. Warnings rest on statistics: captions that belong to another row, that contradict the tags, that many
clips share, or that nearly repeat each other within a clip. They do not make it fail.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from clsp_fast.data.caption_text import normalise, words
from clsp_fast.data.clips import Clip
from clsp_fast.data.tag_values import sex_of, stated
from clsp_fast.storage.textfile import shown

MOST_SHOWN = 20
"""Most lines for one kind of finding."""
OFFSETS = (1, -1, 2, -2)
"""Distances at which captions are compared with the tags of another row; positive: a later row."""
_LONGEST_SHOWN = 80
_NO_LABELS = {"id", "speaker", "speaker_id", "measured_labels", "text", "transcript", "transcription"}
_MOST_VALUES = 200
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# Normalisation leaves such a caption as it is, except for its full stop and capital letter.
_PLAIN = re.compile(r"(?!.*[Pp]lease [Nn]ote)[A-Za-z][A-Za-z ,.;'-]*")
_NAMES = "insert|your|name|emotion|gender|accent|style|speaker|tag|label|caption|text"
_TEMPLATE = re.compile(
    r"\{\{?\s*[a-z_][\w. ]{0,40}\}?\}|(?<!\w)\$\{?[a-z_]\w{0,40}\}?|(?<!\w)%\([a-z_]+\)s|(?<!\w)%[sd]\b"
    rf"|<(?:{_NAMES})\b[^>]{{0,40}}>|\[(?:{_NAMES})\b[^\]]{{0,40}}\]",
    re.IGNORECASE,
)
_SIGNIFICANT = 1e-4
_FEWEST_ROWS = 20
_FEWEST_IN_PART = 16
_AGREE = 0.65
_CONTRADICT = 0.9
_SIMILAR = 0.9
_SIMILAR_CLIPS = 0.05
_MOST_COMPARED = 32


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        findings: a line for each finding, at most MOST_SHOWN of a kind and then a line with their number.
        count: number of findings.
        warnings: a line for each warning.
    """

    findings: list[str] = field(default_factory=list)
    count: int = 0
    warnings: list[str] = field(default_factory=list)


def audit(clips: Sequence[Clip]) -> Audit:
    """Audits the captions of clips, which are in the order of the manifest."""
    result = Audit()
    shown_of_kind: Counter[str] = Counter()
    for clip in clips:
        for caption in (*clip.captions.global_captions, *clip.captions.fine_captions):
            fault = caption_fault(caption)
            if not fault:
                continue
            result.count += 1
            shown_of_kind[fault] += 1
            if shown_of_kind[fault] <= MOST_SHOWN:
                result.findings.append(f"clip {clip.id}: {fault}: {shown(caption, _LONGEST_SHOWN)}")
    for fault, count in shown_of_kind.items():
        if count > MOST_SHOWN:
            result.findings.append(f"and {count - MOST_SHOWN} more: {fault}")
    mentions = Mentions(clips)
    result.warnings += mentions.warnings()
    result.warnings += _other_ids(clips)
    result.warnings += _repeated(clips)
    result.warnings += _similar(clips)
    return result


def caption_fault(caption: str) -> str:
    """What makes a caption certainly useless; empty if nothing does."""
    text = caption
    if not _PLAIN.fullmatch(caption):
        if template := _TEMPLATE.search(caption):
            return f"a template that was not filled in ({template[0][:40]})"
        text = normalise(caption)
        if not text:
            return "a caption that is empty after normalisation"
    tokens = _WORD.findall(text.casefold())
    if " ".join(tokens) in words("placeholders"):
        return "a placeholder instead of a caption"
    # Normalisation removes brackets, but a placeholder in brackets counts.
    tokens = tokens if text is caption else _WORD.findall(caption.casefold())
    marked = [token for token in tokens if token in _placeholder_words()]
    marked += re.findall(r"(?<!\w)[nN]/[aA](?!\w)", caption) if "/" in caption else []
    for word in words("placeholder_capitals"):
        marked += [word] if word in caption and re.search(rf"\b{word}\b", caption) else []
    return f"a placeholder word ({marked[0]}) in a caption" if marked else ""


@functools.cache
def _placeholder_words() -> frozenset[str]:
    return frozenset(words("placeholder_words"))


class Mentions:
    """For each clip, the labels of its tags, and those that its captions mention, if they mention only one.

    The sex of the speaker is mentioned by words such as "she" or "man"; the other labels by their own words.

    Args:
        clips: in the order of the manifest.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._labels = [_labels(clip.tags) for clip in clips]
        values: dict[str, Counter[str]] = {}
        for labels in self._labels:
            for key, value in labels.items():
                counts = values.setdefault(key, Counter())
                if value in counts or len(counts) <= _MOST_VALUES:
                    counts[value] += 1
        vocabulary = {key: {*counts} for key, counts in values.items() if 2 <= len(counts) <= _MOST_VALUES}
        vocabulary.pop("sex", None)
        self._mentions = [_mentions(clip, vocabulary) for clip in clips]

    def warnings(self) -> list[str]:
        """A warning if captions fit the tags of another row; if not, one for each tag they contradict."""
        shift = self._shift()
        return [shift] if shift else list(self._contradictions())

    def _agreement(self, offset: int) -> NDArray[np.int64]:
        """For each row: of the labels that its captions mention, how many row + offset has minus lacks."""
        agreement = np.zeros(len(self._labels), np.int64)
        for row in range(max(0, -offset), len(self._labels) - max(0, offset)):
            labels = self._labels[row + offset]
            for key, value in self._mentions[row].items():
                if key in labels:
                    agreement[row] += 1 if labels[key] == value else -1
        return agreement

    def _shift(self) -> str:
        """A warning if the captions of all rows, or of many rows in succession, fit another row better.

        Rows that fit both equally well are ignored. If captions and tags did not
        depend on each other, they would fit either row equally often. So the probability of the counts is
        that of a fair coin. In a correct manifest, the captions fit their own row nearly always.
        """
        same = self._agreement(0)
        best, text = 0, ""
        for offset in OFFSETS:
            other = self._agreement(offset)
            (rows,) = np.nonzero(other != same)
            better = np.concatenate([[0], np.cumsum(other[rows] > same[rows])])
            fits = np.concatenate([[0], np.cumsum(other > 0)])
            tells = np.concatenate([[0], np.cumsum((other != 0) | (same != 0))])
            parts = list(_parts(len(rows)))
            for first, last in parts:
                count, heads = last - first, int(better[last] - better[first])
                if 2 * heads - count <= best or _coin(heads, count) > _SIGNIFICANT / len(parts):
                    continue
                start, stop = int(rows[first]), int(rows[last - 1]) + 1
                if fits[stop] - fits[start] < _AGREE * (tells[stop] - tells[start]):
                    continue
                best = 2 * heads - count
                where = "" if count == len(rows) else f" from clip {start + 1} to clip {stop}"
                direction = "below" if offset > 0 else "above"
                text = (
                    f"captions seem to be shifted{where}: of {count} clips that can tell, {heads} "
                    f"have captions that fit the tags of the clip {abs(offset)} {direction} better"
                )
        return text

    def _contradictions(self) -> Iterator[str]:
        wrong: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for labels, mentions in zip(self._labels, self._mentions, strict=True):
            for key, value in mentions.items():
                if key in labels:
                    total[key] += 1
                    wrong[key] += labels[key] != value
        for key, count in total.items():
            if count >= _FEWEST_ROWS and wrong[key] >= _CONTRADICT * count:
                clips = f"{wrong[key]} of {count} clips"
                yield f"captions contradict the tag {shown(key)} in {clips} whose captions mention it"


def _labels(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that captions can mention: labels of letters in lower case, and the sex under one name."""
    labels = {}
    for key, value in tags.items():
        label = " ".join(value.replace("_", " ").casefold().split())
        if key.lower() in ("gender", "sex"):
            if sex := sex_of(label):
                labels["sex"] = sex
            continue
        is_word = 3 <= len(label) <= 40 and bool(_WORD.match(label)) and not re.search(r"\d", label)
        if is_word and stated(label) and key.lower() not in _NO_LABELS:
            labels[key] = label
    return labels


def _mentions(clip: Clip, vocabulary: Mapping[str, set[str]]) -> dict[str, str]:
    """Key -> the one label that the clip's captions mention."""
    text = " ".join((*clip.captions.global_captions, *clip.captions.fine_captions)).casefold()
    tokens = _WORD.findall(text)
    present, spaced = {*tokens}, f" {' '.join(tokens)} "
    mentions = {}
    sexes = [sex for sex in ("female", "male") if not present.isdisjoint(_sex_words(sex))]
    if len(sexes) == 1:
        mentions["sex"] = sexes[0]
    for key, labels in vocabulary.items():
        # A label of several words is searched for in the text; one word in the set of words.
        mentioned = (labels & present) | {
            label for label in labels if " " in label and f" {label} " in spaced
        }
        if len(mentioned) == 1:
            mentions[key] = mentioned.pop()
    return mentions


@functools.cache
def _sex_words(sex: str) -> frozenset[str]:
    return frozenset(words(sex))


def _parts(count: int) -> Iterator[tuple[int, int]]:
    """(first, last) of parts of a list: all of it, halves, quarters and so on, and what follows each of them,
    because a lost line shifts all that follows it."""
    size = count
    yield 0, count
    while size >= 2 * _FEWEST_IN_PART:
        size //= 2
        for first in range(0, count - size + 1, size):
            yield first, first + size
            yield first, count


def _coin(heads: int, flips: int) -> float:
    """Probability of at least `heads` heads in flips of a fair coin (Hoeffding's bound for many flips)."""
    if 2 * heads <= flips:
        return 1.0
    if flips > 1000:
        return math.exp(-2 * flips * (heads / flips - 0.5) ** 2)
    return float(sum(math.comb(flips, k) for k in range(heads, flips + 1)) / 2**flips)


def _other_ids(clips: Sequence[Clip]) -> Iterator[str]:
    """A warning if captions name the ids of other clips more often than those of their own."""
    row_of_id = {
        clip.id: row
        for row, clip in enumerate(clips)
        if len(clip.id) >= 4 and any(character.isdigit() for character in clip.id)
    }
    distances: Counter[int] = Counter()
    for row, clip in enumerate(clips):
        for caption in (*clip.captions.global_captions, *clip.captions.fine_captions):
            for token in re.findall(r"\w[\w.:/-]*\w", caption):
                if token in row_of_id:
                    distances[row_of_id[token] - row] += 1
    same = distances.pop(0, 0)
    others = distances.total()
    if others > same:
        distance, count = distances.most_common(1)[0]
        where = f"; {count} times that of the row {abs(distance)} {'below' if distance > 0 else 'above'}"
        yield f"captions name the id of another clip {others} times, that of their clip {same} times{where}"


def _repeated(clips: Sequence[Clip]) -> Iterator[str]:
    """A warning for each caption that many clips share.

    Global captions of a few words are often the same for many clips, so they may be shared by more.
    """
    for kind, name, fewest, share in ((1, "fine-grained", 10, 0.01), (0, "global", 20, 0.1)):
        counts: Counter[str] = Counter()
        for clip in clips:
            counts.update({" ".join(caption.casefold().split()) for caption in clip.captions[kind]})
        total = sum(bool(clip.captions[kind]) for clip in clips)
        many = [
            (text, count) for text, count in counts.most_common() if count > max(fewest - 1, share * total)
        ]
        for text, count in many[:5]:
            yield f"{count} of {total} clips share a {name} caption: {shown(text, _LONGEST_SHOWN)}"
        if len(many) > 5:
            yield f"{len(many) - 5} more {name} captions are shared by many clips"


def _similar(clips: Sequence[Clip]) -> Iterator[str]:
    """A warning if many clips have captions of nearly the same words."""
    several, similar, example = 0, 0, ""
    for clip in clips:
        for texts in clip.captions:
            if len(texts) < 2:
                continue
            several += 1
            bags = [{*_WORD.findall(text.casefold())} for text in texts[:_MOST_COMPARED]]
            pair = next(
                ((a, b) for a, b in combinations(range(len(bags)), 2) if _are_similar(bags[a], bags[b])), None
            )
            if pair:
                similar += 1
                example = example or f"clip {clip.id}: {' / '.join(shown(texts[i], 60) for i in pair)}"
    if similar and similar >= _SIMILAR_CLIPS * several:
        yield f"{similar} of {several} sets of captions hold two of nearly the same words; {example}"


def _are_similar(a: set[str], b: set[str]) -> bool:
    return len(a & b) >= _SIMILAR * max(1, len(a | b))
