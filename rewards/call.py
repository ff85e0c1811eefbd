"""One call of a reward function: what it is given, and what it may return."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.verdict import Verdict


class RewardError(Exception):
    """A reward that cannot be used; the text names it and says what to change."""


class WrongShape(RewardError):
    """Not a list with one entry per completion. Smaller calls might seem to work, so these are not tried."""


@dataclass(frozen=True)
class TrainerState:
    """What rewards see of the run, under TRL's names."""

    global_step: int
    max_steps: int


def call_function(function: Callable[..., Any], columns: Mapping[str, Any]) -> list[Verdict]:
    """Call a function and check what it returns."""
    return as_verdicts(returned_by(function, columns), len(columns["completions"]))


def returned_by(function: Callable[..., Any], columns: Mapping[str, Any]) -> Any:
    """What a function returns, waiting for it where it is async."""
    returned = function(**columns)
    return asyncio.run(returned) if inspect.iscoroutine(returned) else returned


def as_verdicts(returned: Any, count: int) -> list[Verdict]:
    """A verdict for each of `count` completions; raises RewardError on a wrong length or type."""
    if not isinstance(returned, list | tuple):
        raise WrongShape(f"must return a list of {count} numbers, not {type(returned).__name__}")
    if len(returned) != count:
        raise WrongShape(f"returned {len(returned)} values for {count} completions")
    return [as_verdict(value, number) for number, value in enumerate(returned)]


def as_verdict(value: Any, number: int) -> Verdict:
    """A number or None as a verdict, which a reward may also return itself."""
    if isinstance(value, Verdict):
        check_value(value.value, number)
        return value
    return Verdict(check_value(value, number))


def check_value(value: Any, number: int) -> float | None:
    """A finite number, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise RewardError(f"value {number} is {value!r}; a reward is a number or None")
    if not math.isfinite(float(value)):
        raise RewardError(f"value {number} is {float(value)}; a reward is a finite number or None")
    return float(value)


def describe(error: BaseException) -> str:
    """One line: what was raised, and where in the user's code."""
    if isinstance(error, RewardError):
        return str(error)
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
