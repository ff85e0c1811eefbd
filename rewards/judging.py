"""Judging reward: did the completion think when thinking was needed, and answer at once when it was not?

Whether it was needed is a property of the question. It is known from the data, from how often direct answers were
right, or asked of a judge; never taken from the completion that is being rewarded.
"""

from collections.abc import Sequence
from typing import Any

from rewards.answers import completion_text, split_completion
from rewards.judge import Judge, Judgement
from rewards.judge_prompt import JudgeQuestion
from rewards.think_quality import number

REQUIRES = (
    "Decide whether this question about the picture calls for step-by-step reasoning. False if one look is enough: "
    "something is to be recognised, counted or read. True if what is seen must be put together: something is to be "
    "inferred, calculated or compared. There is no student's text to examine."
)


def judging_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    needs_thinking: Sequence[bool | None] | None = None,
    direct_pass_rate: Sequence[float | None] | None = None,
    decided_by: str = "label",
    least_pass_rate: float = 0.75,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's choice to think or not is the right one, else 0.0; None where the row does not say.

    `decided_by` is "label" (column `needs_thinking`) or "pass_rate" (column `direct_pass_rate`, the share of right
    answers without reasoning: from `least_pass_rate` on, none is needed).
    """
    if decided_by not in ("label", "pass_rate"):
        raise ValueError(f"judging: decided_by is {decided_by!r}; allowed are label and pass_rate")
    column, given = (
        ("needs_thinking", needs_thinking) if decided_by == "label" else ("direct_pass_rate", direct_pass_rate)
    )
    if given is None:
        raise ValueError(f"judging: the data has no column {column!r}; map one with data.columns")
    needed = given if decided_by == "label" else [None if rate is None else rate < least_pass_rate for rate in given]
    return [
        None if need is None else float(bool(need) == thought(completion))
        for completion, need in zip(completions, needed, strict=True)
    ]


def judging_by_judge_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    question: Sequence[str],
    judge: Judge,
    images: Sequence[Sequence[str]] | None = None,
    **columns: Any,
) -> Judgement:
    """The same where a judge decides; it sees the question alone, so a group has one verdict. None where it failed."""
    pictures = images or [[]] * len(completions)
    asked = [
        JudgeQuestion("requires_reasoning", REQUIRES, text, {}, tuple(paths))
        for text, paths in zip(question, pictures, strict=True)
    ]
    verdicts = judge.ask(asked)
    values = [
        None if verdict.value is None else float(verdict.value == thought(completion))
        for completion, verdict in zip(completions, verdicts, strict=True)
    ]
    return Judgement(values, {"requires_reasoning": [number(verdict.value) for verdict in verdicts]})


def thought(completion: str | list[dict[str, Any]]) -> bool:
    """Whether there is reasoning in the think block."""
    return bool((split_completion(completion_text(completion)).think or "").strip())
