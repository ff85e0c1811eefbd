"""What makes a completion good. A reward is one function:

    def my_reward(completions, answer, **columns) -> list[float | None]

with TRL's calling convention: `prompts`, `completions`, `completion_ids` and every data column as keyword arguments,
one entry per completion. `None` means "this reward does not apply or cannot tell", never "wrong", which is 0.0.
This package imports nothing of `sail_rl`.
"""

from collections.abc import Callable
from typing import Any

from rewards.accuracy import accuracy_reward, accuracy_verdicts
from rewards.conciseness import conciseness_reward
from rewards.format import format_reward, format_verdicts
from rewards.judging import judging_by_judge_reward, judging_reward
from rewards.think_quality import think_quality_reward

BUILT_IN: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy_verdicts,
    "format": format_verdicts,
    "conciseness": conciseness_reward,
    "think_quality": think_quality_reward,
    "judging": judging_reward,
    "judging_by_judge": judging_by_judge_reward,
}

__all__ = [
    "BUILT_IN",
    "accuracy_reward",
    "conciseness_reward",
    "format_reward",
    "judging_by_judge_reward",
    "judging_reward",
    "think_quality_reward",
]
