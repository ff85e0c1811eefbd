"""Scoring one step's completions: every reward called, its answers checked, failures told apart from zeros.

A reward that returns None for a whole group does not apply to it, and its term is left out there. A reward that returns
None for some members, or fails, masks those completions: they train nothing, rather than count as wrong.
"""

import asyncio
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.load import Reward, RewardError, describe

RETRY_SECONDS = 60.0  # after a failure, for trying again in parts; then what is left counts as failed
MOST_FAILED = 0.05  # share of completions that a reward may fail on before the run stops


class WrongShape(RewardError):
    """Not a list with one entry per completion. Smaller calls might seem to work, so these are not tried."""


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions."""

    totals: list[float | None]
    """Weighted sums; None where a reward could not tell."""
    parts: dict[str, list[float | None]]
    """Each reward's own values."""
    failed: dict[str, list[bool]]
    """Completions that a reward raised on or gave no number for."""
    errors: list[str]
    """What was raised, in words."""


def score(rewards: Sequence[Reward], columns: Mapping[str, Sequence[Any]], group_size: int) -> Scores:
    """Call every reward on all completions and mix. `columns` holds `completions`, `prompts` and the data's columns."""
    parts, failed, errors = {}, {}, []
    for reward in rewards:
        values, broken, messages = call_safely(reward, columns, group_size)
        parts[reward.name], failed[reward.name] = values, broken
        errors += messages
    return Scores(mix(rewards, parts, failed, group_size), parts, failed, errors)


def call_safely(reward: Reward, columns: Mapping[str, Any], group_size: int, deadline: float | None = None):
    """Values, failures and messages of one reward. What fails is tried again in parts: groups, then completions."""
    count = len(columns["completions"])
    if deadline and time.monotonic() > deadline:
        return [None] * count, [True] * count, []
    try:
        return call(reward, columns), [False] * count, []
    except Exception as error:  # whatever the user's code raises must not end the run
        first = f"reward {reward.name!r}: {describe(error)}"
        if count == 1 or isinstance(error, WrongShape):
            return [None] * count, [True] * count, [first]
    deadline = deadline or time.monotonic() + RETRY_SECONDS
    values: list[float | None] = []
    failed: list[bool] = []
    size = group_size if count > group_size else 1
    for start in range(0, count, size):
        part = {key: cut(value, start, size, count) for key, value in columns.items()}
        part_values, part_failed, _ = call_safely(reward, part, group_size, deadline)
        values, failed = values + part_values, failed + part_failed
    return values, failed, [first]


def cut(value: Any, start: int, size: int, count: int) -> Any:
    """A part of a column; what is not a column (trainer_state) stays whole."""
    return value[start : start + size] if isinstance(value, list) and len(value) == count else value


def call(reward: Reward, columns: Mapping[str, Any]) -> list[float | None]:
    """Call the function and check what it returns; raises RewardError on a wrong length or type."""
    returned = reward.function(**{**columns, **reward.arguments})  # the recipe's keys go before columns of that name
    if inspect.iscoroutine(returned):
        returned = asyncio.run(returned)
    count = len(columns["completions"])
    if not isinstance(returned, list | tuple):
        raise WrongShape(f"must return a list of {count} numbers, not {type(returned).__name__}")
    if len(returned) != count:
        raise WrongShape(f"returned {len(returned)} values for {count} completions")
    return [check_value(value, number) for number, value in enumerate(returned)]


def check_value(value: Any, number: int) -> float | None:
    """A finite number, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise RewardError(f"value {number} is {value!r}; a reward is a number or None")
    if not math.isfinite(float(value)):
        raise RewardError(f"value {number} is {float(value)}; a reward is a finite number or None")
    return float(value)


def mix(rewards: Sequence[Reward], parts, failed, group_size: int) -> list[float | None]:
    """The weighted sum of each completion."""
    totals: list[float | None] = []
    count = len(next(iter(parts.values())))
    for start in range(0, count, group_size):
        members = range(start, start + group_size)
        applying = [
            reward
            for reward in rewards
            if any(parts[reward.name][i] is not None or failed[reward.name][i] for i in members)
        ]
        totals += [weighted_sum([(r.weight, parts[r.name][i]) for r in applying]) for i in members]
    return totals


def weighted_sum(terms: list[tuple[float, float | None]]) -> float | None:
    """None when no reward applies or one of those that do could not tell."""
    if not terms:
        return None
    total = 0.0
    for weight, value in terms:
        if value is None:
            return None
        total += weight * value
    return total


def try_rewards(rewards: Sequence[Reward], columns: Mapping[str, Any]) -> None:
    """Call each reward once on a sample, so that what is broken stops the run before it starts."""
    for reward in rewards:
        try:
            call(reward, columns)
        except Exception as error:
            raise RewardError(f"reward {reward.name!r} fails on a sample of the data: {describe(error)}") from error
