"""Accuracy reward: is the boxed answer the gold one?

Everything but real expressions is compared here. What algebra has to say is asked of the worker processes, for all
completions of a call together, and the comparison is begun again with the replies.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewards.algebra_pool import settle
from rewards.answers import boxed_answers, completion_text, final_answer
from rewards.judge import Judge
from rewards.ladder import Options, Row, compare, is_list, type_of
from rewards.structure import MAX_ITEMS
from rewards.symbolic import Algebra
from rewards.text_judge import ask_about_texts
from rewards.verdict import Outcome, Verdict, verdict_of

DEGREES = ("box", "ocr")  # types whose answers are right to a degree
PASSED = 0.5  # from this value on such an answer counts as right where it must be one or the other


@dataclass(frozen=True)
class Completion:
    """One completion with what its row says of the right answer."""

    text: str
    row: Row
    truncated: bool = False


def accuracy_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 for a right answer, 0.0 for a wrong, missing or cut off one, None where nobody can tell.

    The gold is column `answer` or, where that is missing, `solution`; each may be a text that ends in a box. Further
    columns that count: `answer_type`, `options`, `tolerance`, `finish_reason`.
    """
    return [verdict.value for verdict in accuracy_verdicts(completions, answer, solution, **columns)]


def accuracy_verdicts(
    completions: Sequence[str | list[dict[str, Any]]],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    answer_type: Sequence[str | None] | None = None,
    options: Sequence[Any] | None = None,
    tolerance: Sequence[Mapping[str, float | None] | None] | None = None,
    finish_reason: Sequence[str | None] | None = None,
    question: Sequence[str] | None = None,
    judge_texts: bool = False,
    judge: Judge | None = None,
    **columns: Any,
) -> list[Verdict]:
    """The same with the outcome of each completion.

    With `judge_texts` the judge is asked about answers in words that are not the gold's words.
    """
    blank = [None] * len(completions)
    if answer is None and solution is None:
        raise ValueError("accuracy needs the right answers: a column 'answer' or 'solution'")
    answers, solutions = answer or blank, solution or blank
    golds = [gold_text(first if gold_text(first) else second) for first, second in zip(answers, solutions, strict=True)]
    rows = map(Row, golds, answer_type or blank, options or blank, tolerance or blank)
    texts = map(completion_text, completions)
    cut_off = [reason == "length" for reason in finish_reason or blank]
    read = [Completion(*one) for one in zip(texts, rows, cut_off, strict=True)]
    verdicts = settle([partial(judge_one, completion) for completion in read])
    if not judge_texts or judge is None:
        return verdicts
    return ask_about_texts(judge, verdicts, [one.row for one in read], [one.text for one in read], question or blank)


def gold_text(gold: Any) -> str:
    """A gold as text: its last box where it has one; empty for None, NaN and blank ones."""
    if gold is None or gold != gold:
        return ""
    if isinstance(gold, (list, tuple)):
        return ", ".join(str(item) for item in gold)
    boxes = boxed_answers(str(gold))
    return (boxes[-1].content if boxes else str(gold)).strip()


def judge_one(completion: Completion, algebra: Algebra) -> Verdict:
    """The verdict, as far as exact comparison and known replies carry; raises Unanswered."""
    row, start = completion.row, time.perf_counter()

    def finish(outcome: Outcome, text: str | None = None) -> Verdict:
        return verdict_of(outcome, time.perf_counter() - start + algebra.seconds, text)

    if not row.gold:
        return finish(Outcome.GOLD_BAD)
    final = None if completion.truncated else final_answer(completion.text)
    if final is None or not final.text.strip():
        return finish(Outcome.NO_ANSWER)
    if len(final.joined) > MAX_ITEMS:
        return finish(Outcome.WRONG, final.text)
    answers = list(dict.fromkeys(final.joined))
    # Boxes joined to one statement must all be right, or together be the list that the gold is.
    value = min(compare(row, text, algebra) for text in answers)
    if value < 1 and len(answers) > 1 and is_list(row.gold, final.hedged):
        value = max(value, compare(row, ", ".join(answers), algebra))
    if type_of(row.answer_type) in DEGREES and not (row.tolerance or {}).get("iou"):
        return Verdict(value, Outcome.SCORED, time.perf_counter() - start, final.text)
    return finish(Outcome.CORRECT if value else problem_of(algebra), final.text)


def problem_of(algebra: Algebra) -> Outcome:
    """Why an answer was not found right."""
    order = (Outcome.INFRA_ERROR, Outcome.TIMEOUT, Outcome.REFUSED)
    return next((problem for problem in order if problem in algebra.problems), Outcome.WRONG)


def verify(
    gold: str,
    answer: str,
    answer_type: str | None = None,
    options: Options = None,
    tolerance: Mapping[str, float | None] | None = None,
) -> bool:
    r"""Whether an answer (the content of a box) is the gold one. Not symmetric: the gold fixes the type.

    Boxes count as right from an overlap of a half, OCR strings from the same similarity.
    """
    row = Row(gold, answer_type, options, tolerance)

    def step(algebra: Algebra) -> bool:
        right = compare(row, answer, algebra) >= PASSED
        if not right and Outcome.INFRA_ERROR in algebra.problems:
            raise RuntimeError(f"the reward workers could not compare {answer!r} with {gold!r}")
        return right

    return settle([step])[0]
