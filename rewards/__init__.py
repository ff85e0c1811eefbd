"""What makes a completion good. A reward is one function:

    def my_reward(completions, answer, **columns) -> list[float | None]

with TRL's calling convention: `prompts`, `completions`, `completion_ids` and every data column as keyword arguments,
one entry per completion. `None` means "this reward does not apply or cannot tell", never "wrong", which is 0.0.
This package imports nothing of `sail_rl`.
"""

from collections.abc import Callable
from typing import Any

from rewards.accuracy import accuracy_reward, accuracy_verdicts
from rewards.format import format_reward, format_verdicts

BUILT_IN: dict[str, Callable[..., Any]] = {"accuracy": accuracy_verdicts, "format": format_verdicts}

__all__ = ["BUILT_IN", "accuracy_reward", "format_reward"]
