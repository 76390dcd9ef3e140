"""The clips that are judged: shared by both manifests, the same for the same seed, nested."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from sample_data import write_rows

from clsp_fast.captioning.sample import choose_clips


def manifest(path: Path, numbers: Iterable[int]) -> Path:
    """Clips with two fine-grained captions and a global one, which name the file and the clip."""
    rows = [
        {
            "id": f"c{i}",
            "audio": f"{i}.wav",
            "finegrained_captions": [f"{path.stem} {i}, first.", f"{path.stem} {i}, second."],
            "global_captions": [f"{path.stem} {i}."],
        }
        for i in numbers
    ]
    path.parent.mkdir(exist_ok=True)
    return write_rows(path, rows)


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    path = manifest(tmp_path / "a.jsonl", range(50))
    small, large, other = (
        [drawn.row for drawn in choose_clips(path, None, kind="fine", count=count, seed=seed)[0]]
        for count, seed in ((5, 3), (20, 3), (20, 4))
    )
    assert set(small) < set(large)
    assert large == sorted(large)
    assert set(large) != set(other)
    assert (len(small), len(large)) == (5, 20)


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    drawn = []
    for numbers in (range(50), reversed(range(50))):
        path = manifest(tmp_path / "a.jsonl", numbers)
        drawn.append(
            {s.clip.id: s.captions for s in choose_clips(path, None, kind="fine", count=9, seed=0)[0]}
        )
    assert drawn[0] == drawn[1]


def test_the_caption_of_a_clip_is_drawn(tmp_path: Path) -> None:
    path = manifest(tmp_path / "a.jsonl", range(50))
    captions = [s.captions[0] for s in choose_clips(path, None, kind="fine", count=50, seed=0)[0]]
    assert 10 < sum(text.endswith("first.") for text in captions) < 40


def test_only_clips_with_captions_in_both_manifests_are_drawn(tmp_path: Path) -> None:
    first = manifest(tmp_path / "a.jsonl", range(12))
    with first.open("a") as file:
        file.write('{"id": "without", "audio": "w.wav"}\nnot JSON\n')
    second = manifest(tmp_path / "b.jsonl", (99, 5, 4, 3, 2, 1))
    samples, left_out = choose_clips(first, second, kind="fine", count=100, seed=0)
    assert [drawn.clip.id for drawn in samples] == ["c1", "c2", "c3", "c4", "c5"]
    assert [drawn.row for drawn in samples] == [1, 2, 3, 4, 5]
    assert left_out == {"not in the other manifest": 7, "without fine captions": 1, "bad lines": 1}
    for drawn in samples:
        assert [text.split(",")[0] for text in drawn.captions] == [f"a {drawn.row}", f"b {drawn.row}"]
    samples, _ = choose_clips(first, second, kind="global", count=1, seed=0)
    assert samples[0].captions == (f"a {samples[0].row}.", f"b {samples[0].row}.")


@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_a_repeated_id_is_drawn_once(tmp_path: Path, count: int) -> None:
    once = manifest(tmp_path / "a.jsonl", range(9))
    expected, left_out = choose_clips(once, None, kind="fine", count=count, seed=0)
    assert left_out == {}
    twice = manifest(tmp_path / "b" / "a.jsonl", (*range(9), *range(9), 4))
    samples, left_out = choose_clips(twice, None, kind="fine", count=count, seed=0)
    assert left_out == {"with the id of an earlier clip": 10}
    assert [(s.row, s.captions) for s in samples] == [(s.row, s.captions) for s in expected]
    assert len(samples) == min(count, 9)


def test_manifests_without_a_common_clip_are_refused(tmp_path: Path) -> None:
    first, second = manifest(tmp_path / "a.jsonl", [1]), manifest(tmp_path / "b.jsonl", [2])
    expected = r"a\.jsonl has no clip with fine captions that .*b\.jsonl also has"
    with pytest.raises(ValueError, match=expected):
        choose_clips(first, second, kind="fine", count=1, seed=0)
