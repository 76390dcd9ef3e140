"""Candidates keep their numbers whatever other requests did."""

from __future__ import annotations

from clsp_fast.captioning.answers import Answer
from clsp_fast.captioning.candidates import Candidate, candidates_of, texts_a_request
from clsp_fast.captioning.rules import default_rules


def answer(part: int, *texts: str, reason: str = "stop") -> Answer:
    return Answer(f"7.{part}/generate/clip", texts, (reason,) * len(texts), {}, "m", None)


def test_a_candidate_has_the_same_number_if_another_request_failed() -> None:
    answers = [answer(0, "a", "b"), answer(1, "c", "d"), answer(2, "e")]
    numbered = [(c.number, c.caption) for c in candidates_of(answers, 2)]
    assert numbered == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "e")]
    without = [(c.number, c.caption) for c in candidates_of(answers[1:], 2)]
    assert without == numbered[2:]


def test_faults_take_the_place_of_captions() -> None:
    answers = [answer(0, "cut", reason="length"), answer(1, "<think>a</think>"), answer(2, " b ")]
    assert list(candidates_of(answers, 1)) == [
        Candidate(0, None, "truncated"),
        Candidate(1, None, "empty"),
        Candidate(2, "b", None),
    ]


def test_surplus_texts_do_not_take_the_numbers_of_others() -> None:
    assert [c.number for c in candidates_of([answer(0, "a", "b", "c"), answer(1, "d")], 2)] == [0, 1, 2]


def test_a_usable_candidate_breaks_no_rule() -> None:
    rules = default_rules()
    assert Candidate(0, "a" * 128, None).usable(rules)
    assert not Candidate(0, "a" * 127, None).usable(rules)
    assert not Candidate(0, None, "empty").usable(rules)


def test_the_record_says_how_many_texts_a_request_has() -> None:
    for parts, texts in ((1, 20), (20, 1), (2, 15)):
        settings = {"candidates": 20, "candidates_per_request": texts}
        assert texts_a_request({"settings": settings, "parts": parts}) == texts
    assert texts_a_request({"settings": {}, "parts": 1}) == 1
