"""Scoring one step's completions: every reward called, its answers checked, failures told apart from zeros.

A reward that returns None for a whole group does not apply to it, and its term is left out there. A reward that returns
None for some members, or fails, masks those completions: they train nothing, rather than count as wrong.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rewards.call import RewardError, WrongShape, call_function, describe
from rewards.load import Reward
from rewards.remote import TookTooLong
from rewards.verdict import Outcome, Verdict, verdict_of

RETRY_SECONDS = 60.0  # after a failure, for trying again in parts; then what is left counts as failed
MOST_FAILED = 0.05  # share of completions that a reward may fail on before the run stops


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
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    """Each reward's values with their outcomes."""


def score(rewards: Sequence[Reward], columns: Mapping[str, Sequence[Any]], group_size: int) -> Scores:
    """Call every reward on all completions and mix. `columns` holds `completions`, `prompts` and the data's columns."""
    verdicts: dict[str, list[Verdict]] = {}
    errors: list[str] = []
    for reward in rewards:
        verdicts[reward.name], messages = call_safely(reward, columns, group_size)
        errors += messages
    parts = {name: [verdict.value for verdict in given] for name, given in verdicts.items()}
    failed = {name: [one.outcome == Outcome.INFRA_ERROR for one in given] for name, given in verdicts.items()}
    return Scores(mix(rewards, parts, failed, group_size), parts, failed, errors, verdicts)


def call_safely(
    reward: Reward, columns: Mapping[str, Any], group_size: int, deadline: float | None = None
) -> tuple[list[Verdict], list[str]]:
    """Verdicts and messages of one reward. What fails is tried again in parts: groups, then completions."""
    count = len(columns["completions"])
    failures, start = [verdict_of(Outcome.INFRA_ERROR)] * count, time.monotonic()
    if deadline and time.monotonic() > deadline:
        return failures, []
    try:
        return call(reward, columns), []
    except Exception as error:  # whatever the user's code raises must not end the run
        first = f"reward {reward.name!r}: {describe(error)}"
        if count == 1 and isinstance(error, TookTooLong):  # this completion's own doing
            return [verdict_of(Outcome.TIMEOUT, time.monotonic() - start)], [first]
        if count == 1 or isinstance(error, WrongShape):
            return failures, [first]
    deadline = deadline or time.monotonic() + RETRY_SECONDS
    verdicts: list[Verdict] = []
    size = group_size if count > group_size else 1
    for start in range(0, count, size):
        part = {key: cut(value, start, size, count) for key, value in columns.items()}
        verdicts += call_safely(reward, part, group_size, deadline)[0]
    return verdicts, [first]


def cut(value: Any, start: int, size: int, count: int) -> Any:
    """A part of a column; what is not a column (trainer_state) stays whole."""
    return value[start : start + size] if isinstance(value, list) and len(value) == count else value


def call(reward: Reward, columns: Mapping[str, Any]) -> list[Verdict]:
    """Call the function, here or in its own process; raises RewardError on what is not a list of numbers."""
    given = {**columns, **reward.arguments}  # the recipe's keys go before columns of that name
    start = time.perf_counter()
    verdicts = reward.remote.call(given) if reward.remote else call_function(reward.function, given)
    share = (time.perf_counter() - start) / max(len(verdicts), 1)
    return [verdict if verdict.seconds else replace(verdict, seconds=share) for verdict in verdicts]


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
