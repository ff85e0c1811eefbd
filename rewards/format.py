"""Format reward: 1.0 for a completion that keeps its contract to the letter, else 0.0, in one linear scan.

A chat template that opens the think block inside the prompt is not supported: the completion must begin with the tag.
"""

from collections.abc import Sequence
from typing import Any

from rewards.answers import Completion, boxed_answers, completion_text, split_completion
from rewards.verdict import Outcome, Verdict, verdict_of

MIN_THINK_CHARACTERS = 16  # runs of blanks count as one; less is a block opened for the reward alone
MAX_TAIL_CHARACTERS = 200  # after the box; more is reasoning moved out of the think block


def format_reward(completions: Sequence[str | list[dict[str, Any]]], *arguments: Any, **columns: Any) -> list[float]:
    """1.0 where the form is right, else 0.0; the arguments are those of `format_verdicts`."""
    return [verdict.value or 0.0 for verdict in format_verdicts(completions, *arguments, **columns)]


def format_verdicts(
    completions: Sequence[str | list[dict[str, Any]]],
    contract: str = "think",
    thinking: Sequence[str | None] | None = None,
    finish_reason: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[Verdict]:
    """Is the form right? A completion cut off by the length limit is marked as none.

    `contract` is "think" (<think>, box), "direct" (no reasoning block or an empty one, box) or "judge" (<judge>,
    <think>, box; the think block may be empty). A column `thinking` sets it for each row, `None` means `contract`.
    """
    contracts = [row or contract for row in thinking or [None] * len(completions)]
    reasons = finish_reason or [None] * len(completions)
    rows = zip(completions, contracts, reasons, strict=True)
    return [verdict_of(_outcome(completion_text(text), form, reason == "length")) for text, form, reason in rows]


def _outcome(text: str, contract: str, truncated: bool) -> Outcome:
    formed = is_well_formed(text, contract)
    return Outcome.NO_ANSWER if truncated else Outcome.CORRECT if formed else Outcome.WRONG


def is_well_formed(text: str, contract: str = "think") -> bool:
    """Whether one completion keeps a contract."""
    if contract not in CONTRACTS:
        raise ValueError(f"unknown contract {contract!r}: expected one of {', '.join(CONTRACTS)}")
    parts = split_completion(text)
    return parts.problem is None and CONTRACTS[contract](parts) and _one_final_box(parts.rest)


def _think(parts: Completion) -> bool:
    long_enough = parts.think is not None and len(" ".join(parts.think.split())) >= MIN_THINK_CHARACTERS
    return parts.judge is None and parts.before == "" and long_enough


def _direct(parts: Completion) -> bool:
    return parts.judge is None and parts.before.strip() == "" and (parts.think or "").strip() == ""


def _judge(parts: Completion) -> bool:
    blocks = parts.think is not None and (parts.judge or "").strip() != ""
    return blocks and parts.before == "" and parts.between.strip() == ""


CONTRACTS = {"think": _think, "direct": _direct, "judge": _judge}


def _one_final_box(rest: str) -> bool:
    """Exactly one box is opened, it is closed and not empty, and little follows it."""
    boxes = boxed_answers(rest)
    if len(boxes) != 1 or rest.count("\\boxed") != 1:
        return False
    return boxes[0].content.strip() != "" and len(rest) - boxes[0].end <= MAX_TAIL_CHARACTERS
