"""Scoring one step's completions: every reward called, its answers checked, failures told apart from zeros.

Rules come first, in the recipe's order; then the rewards that ask a judge, of whose completions only those are asked
about whose number the verdict can change. Each reward gets the values of those before it as columns `score_<name>`.
mix.py says what becomes of a reward that is None or failed.
"""

import asyncio
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.judge import Judge, Judgement
from rewards.load import Reward, RewardError, describe
from rewards.mix import Mixing, matters, mix

RETRY_SECONDS = 60.0  # after a failure, for trying again in parts; then what is left counts as failed
MOST_FAILED = 0.05  # share of completions that a reward may fail on before the run stops


class WrongShape(RewardError):
    """Not a list with one entry per completion. Smaller calls might seem to work, so these are not tried."""


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions."""

    totals: list[float | None]
    """What the mix makes of them; None where a reward could not tell."""
    parts: dict[str, list[float | None]]
    """Each reward's own values."""
    failed: dict[str, list[bool]]
    """Completions that a reward raised on or gave no number for."""
    errors: list[str]
    """What was raised, in words."""
    checks: dict[str, list[float | None]] = field(default_factory=dict)
    """What a judge's verdicts are made of, as `<reward>/<check>`; None where it was not asked or did not say."""


def score(
    rewards: Sequence[Reward], columns: Mapping[str, Any], group_size: int, mixing: Mixing | None = None
) -> Scores:
    """Call every reward and mix. `columns` holds `completions`, `prompts` and the data's columns."""
    mixing, count = mixing or Mixing(), len(columns["completions"])
    parts: dict[str, list[float | None]] = {}
    failed: dict[str, list[bool]] = {}
    checks: dict[str, list[float | None]] = {}
    given, errors = {**columns, "group_size": group_size}, []
    done: list[Reward] = []
    for reward in in_order(rewards):
        if reward.asks_judge:
            asked = matters(reward, done, parts, failed, group_size, mixing, count)
            values, broken, messages, details = ask_judge(reward, given, asked)
            checks |= details
        else:
            values, broken, messages = call_safely(reward, given, group_size)
        parts[reward.name], failed[reward.name] = values, broken
        given[f"score_{reward.name}"] = values
        errors += messages
        done.append(reward)
    return Scores(mix(rewards, parts, failed, group_size, mixing), parts, failed, errors, checks)


def in_order(rewards: Sequence[Reward]) -> list[Reward]:
    """The recipe's order, judges last."""
    return sorted(rewards, key=lambda reward: reward.asks_judge)


def ask_judge(reward: Reward, columns: Mapping[str, Any], asked: Sequence[bool]):
    """Values, failures, messages and checks of a reward that asks a judge, called on some of the completions.

    It is called once: the judge tries again by itself. None where it was asked is a failure.
    """
    count, chosen = len(asked), [i for i, wanted in enumerate(asked) if wanted]
    judge: Judge = reward.arguments["judge"]
    judge.problems.clear()
    found = Judgement([None] * len(chosen))
    if chosen:
        part = {key: pick(value, chosen, count) for key, value in columns.items()}
        try:
            returned = reward.function(**{**part, **reward.arguments})
            judgement = returned if isinstance(returned, Judgement) else Judgement(returned)
            check_values(judgement.values, len(chosen))
            found = judgement
        except Exception as error:  # whatever the user's code raises must not end the run
            judge.problems.append(describe(error))
    values = spread_out(found.values, chosen, count)
    failed = [wanted and value is None for wanted, value in zip(asked, values, strict=True)]
    checks = {f"{reward.name}/{name}": spread_out(column, chosen, count) for name, column in found.checks.items()}
    return values, failed, [f"reward {reward.name!r}: {problem}" for problem in judge.problems], checks


def pick(value: Any, chosen: Sequence[int], count: int) -> Any:
    """Some entries of a column; what is not a column stays whole."""
    return [value[i] for i in chosen] if isinstance(value, list) and len(value) == count else value


def spread_out(values: Sequence[Any], chosen: Sequence[int], count: int) -> list[Any]:
    """Values of the chosen completions in their places, None elsewhere."""
    column: list[Any] = [None] * count
    for i, value in zip(chosen, values, strict=True):
        column[i] = value
    return column


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
    return check_values(returned, len(columns["completions"]))


def check_values(returned: Any, count: int) -> list[float | None]:
    """A list with a number or None for each of `count` completions; raises RewardError."""
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


def try_rewards(rewards: Sequence[Reward], columns: Mapping[str, Any], group_size: int = 1) -> None:
    """Call each reward once on a sample, so that what is broken stops the run before it starts."""
    given = {**columns, "group_size": group_size}
    for reward in in_order(rewards):
        if reward.asks_judge:
            values, failed, messages, _ = ask_judge(reward, given, [True] * len(columns["completions"]))
            if any(failed):
                raise RewardError(f"{'; '.join(messages) or reward.name} (on a sample of the data)")
        else:
            values = try_reward(reward, given)
        given[f"score_{reward.name}"] = values


def try_reward(reward: Reward, columns: Mapping[str, Any]) -> list[float | None]:
    """Call one reward; raises RewardError with its name."""
    try:
        return call(reward, columns)
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} fails on a sample of the data: {describe(error)}") from error
