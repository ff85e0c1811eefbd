"""A judge for answers in words: the ladder knows the right answer's own words, a judge also other words for the same.

It is asked only where the right answer is a text and the ladder found another one in the box.
"""

from collections.abc import Sequence
from dataclasses import replace

from rewards.answers import final_answer
from rewards.gold import gold_type
from rewards.judge import Judge
from rewards.judge_prompt import GRADER, JudgeQuestion
from rewards.ladder import Row
from rewards.notation import MAX_LENGTH
from rewards.verdict import Outcome, Verdict, verdict_of

CRITERION = "is_the_same_answer"
SAME = (
    "Compare the student's answer with the right answer. True only if it answers the question with the same: another "
    "spelling, word order or language, a synonym, or words around it that change nothing. False if it is another "
    "thing, names several things of which one may be meant, or is more general or more special in a way that matters "
    "to the question."
)


def ask_about_texts(
    judge: Judge,
    verdicts: Sequence[Verdict],
    rows: Sequence[Row],
    texts: Sequence[str],
    questions: Sequence[str | None],
) -> list[Verdict]:
    """The verdicts, with the judge's in the place of the ladder's where it had to be asked; None where it failed."""
    open_ones = [i for i, verdict in enumerate(verdicts) if is_open(verdict, rows[i], texts[i])]
    asked = [same_answer(questions[i] or "", rows[i].gold, verdicts[i].answer or "") for i in open_ones]
    settled = dict(zip(open_ones, (found.value for found in judge.ask(asked)), strict=True))
    return [replace_outcome(verdict, settled[i]) if i in settled else verdict for i, verdict in enumerate(verdicts)]


def is_open(verdict: Verdict, row: Row, text: str) -> bool:
    """Whether other words might be right: one answer of reasonable length, where the right one is a text."""
    if verdict.outcome != Outcome.WRONG or gold_type(row) != "text":
        return False
    final = final_answer(text)
    return final is not None and len(set(final.joined)) == 1 and len(final.text) <= MAX_LENGTH


def same_answer(question: str, gold: str, answer: str) -> JudgeQuestion:
    """The question whether an answer says what the right one says."""
    written = {"The right answer": gold, "The student's answer": answer}
    return JudgeQuestion(CRITERION, SAME, question, written, office=GRADER)


def replace_outcome(verdict: Verdict, same: bool | None) -> Verdict:
    """A verdict of the ladder with what the judge said of the answer."""
    outcome = Outcome.INFRA_ERROR if same is None else Outcome.CORRECT if same else Outcome.WRONG
    return replace(verdict_of(outcome), seconds=verdict.seconds, answer=verdict.answer)
