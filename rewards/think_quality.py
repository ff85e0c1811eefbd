"""Thinking quality: three yes-or-no questions to a judge about the reasoning, each with a prompt of its own.

After SAIL-RL (arXiv 2511.02280): is the logic sound, is it grounded in the picture, does the answer follow from it?
"""

from collections.abc import Sequence
from typing import Any

from rewards.answers import Completion, completion_text, split_completion
from rewards.judge import Judge, Judgement
from rewards.judge_prompt import JudgeQuestion

LOGICAL = (
    "Check the logic of the student's reasoning about the picture's question. True only if both hold: the steps are in "
    "a sensible order, each resting on what was seen or said before; and every inference and every calculation is "
    "right. One wrong step makes it false, even if the end is right. Do not check what was read off the picture."
)
GROUNDED = (
    "Check what the student's reasoning says about the picture, the question and the world. True only if it states "
    "something that must be read off the picture or the question, and every such statement agrees with them; where "
    "they say nothing, with common knowledge, which counts for less. One statement that disagrees, or one thing made "
    "up, makes it false. Do not check the logic."
)
CONSISTENT = (
    "Check whether the student's final answer follows from the student's reasoning. True only if the reasoning comes "
    "to a conclusion and the final answer is that conclusion. Whether either is right does not matter here."
)
CHECKS = ("is_logically_sound", "is_grounded", "is_consistent")
LONGEST = 40_000  # characters; nothing that long is concise reasoning, and it would not fit the judge's context
DIRECT_RIGHT = ("score_judging", "score_judging_by_judge")


def think_quality_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    question: Sequence[str],
    judge: Judge,
    images: Sequence[Sequence[str]] | None = None,
    finish_reason: Sequence[str | None] | None = None,
    **columns: Any,
) -> Judgement:
    """The share of the three checks that a completion's reasoning passes; None where the judge failed on one of them.

    Not asked about: a completion that is cut off or without reasoning, which gets 0; and a right answer without
    reasoning where the judging reward found that none was needed, which gets 1.
    """
    count = len(completions)
    pictures, reasons = images or [[]] * count, finish_reason or [None] * count
    parts = [split_completion(completion_text(completion)) for completion in completions]
    asked = [i for i in range(count) if reasons[i] != "length" and has_reasoning(parts[i])]
    verdicts = judge.ask([q for i in asked for q in checks_of(parts[i], question[i], tuple(pictures[i]))])
    found = {i: [verdict.value for verdict in verdicts[3 * n : 3 * n + 3]] for n, i in enumerate(asked)}
    values = [share(found[i]) if i in found else float(rightly_direct(parts[i], i, columns)) for i in range(count)]
    checks = {
        name: [number(found[i][k]) if i in found else None for i in range(count)] for k, name in enumerate(CHECKS)
    }
    return Judgement(values, checks)


def checks_of(part: Completion, question: str, images: tuple[str, ...]) -> list[JudgeQuestion]:
    """The three questions about one completion. Consistency is judged without the picture."""
    reasoning = {"The student's reasoning": part.think or ""}
    answer = {"The student's final answer": part.rest.strip()}
    return [
        JudgeQuestion(CHECKS[0], LOGICAL, question, reasoning, images),
        JudgeQuestion(CHECKS[1], GROUNDED, question, reasoning, images),
        JudgeQuestion(CHECKS[2], CONSISTENT, "", reasoning | answer),
    ]


def has_reasoning(part: Completion) -> bool:
    """Whether there is something to judge."""
    well_formed = part.problem is None and bool((part.think or "").strip())
    return well_formed and len(part.think or "") + len(part.rest) <= LONGEST


def rightly_direct(part: Completion, i: int, columns: dict[str, Any]) -> bool:
    """Whether leaving out the reasoning was right, and so is the answer."""
    judged = [columns[name][i] for name in DIRECT_RIGHT if name in columns]
    right = columns.get("score_accuracy", [None] * (i + 1))[i] in (None, 1.0)
    return part.problem is None and (part.think or "").strip() == "" and bool(judged) and all(judged) and right


def share(values: Sequence[bool | None]) -> float | None:
    """The share of true ones; None where one is missing."""
    return None if None in values else sum(map(bool, values)) / len(values)


def number(value: bool | None) -> float | None:
    """A check's verdict as a number for the log."""
    return None if value is None else float(value)
