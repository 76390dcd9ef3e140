"""The candidates of a clip: the texts that a language model wrote for it, with fixed numbers.

The verifier names a candidate by its number, and `filter` finds its verdicts by it. A number depends only on
the request and on the place of the text in the answer. A request that fails, or that is answered later, does
not change the numbers of the other candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from clsp_fast.captioning.answers import Answer, row_and_part
from clsp_fast.captioning.rules import Rules, answer_fault, clean_answer


class Candidate(NamedTuple):
    """A text of an answer.

    Attributes:
        number: from 0 to the number of candidates that were asked for.
        caption: the cleaned text; None where the answer has a fault.
        fault: "truncated", "refused" or "empty" (see `rules.answer_fault`); None: none.
    """

    number: int
    caption: str | None
    fault: str | None

    def usable(self, rules: Rules) -> bool:
        """Whether the candidate is a caption that breaks no rule."""
        return self.caption is not None and not rules.broken(self.caption)


def texts_a_request(record: Mapping[str, Any]) -> int:
    """How many texts a job asks for in each request, from its record (see `answers.read_record`)."""
    return int(record["settings"].get("candidates_per_request", 1))


def candidates_of(answers: Iterable[Answer], texts: int) -> Iterator[Candidate]:
    """The candidates of a clip, in the order of their numbers.

    Args:
        answers: the clip's answers, in the order of their parts.
        texts: `texts_a_request` of the job. Further texts of an answer are left out.
    """
    for answer in answers:
        first = row_and_part(answer.custom_id)[1] * texts
        pairs = zip(answer.texts[:texts], answer.finish_reasons[:texts], strict=True)
        for number, (text, reason) in enumerate(pairs, first):
            yield Candidate(number, clean_answer(text, reason), answer_fault(text, reason))
