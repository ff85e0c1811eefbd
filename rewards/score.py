"""Scoring one step's completions: every reward called, its answers checked, failures told apart from zeros.

Rules come first, in the recipe's order (accuracy too where it asks a judge about texts); then the rewards that ask a
judge, of whose completions only those are asked about whose number the verdict can change. Each reward gets the values
of those before it as columns `score_<name>`.
mix.py says what becomes of a reward that is None or failed.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rewards.call import RewardError, WrongShape, as_verdicts, call_function, describe, returned_by
from rewards.judge import Judge, Judgement
from rewards.load import Reward
from rewards.mix import Mixing, matters, mix
from rewards.remote import TookTooLong
from rewards.verdict import Outcome, Verdict, verdict_of

RETRY_SECONDS = 60.0  # after a failure, for trying again in parts; then what is left counts as failed
MOST_FAILED = 0.05  # share of completions that a reward may fail on before the run stops


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
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    """Each reward's values with their outcomes."""
    checks: dict[str, list[float | None]] = field(default_factory=dict)
    """What a judge's verdicts are made of, as `<reward>/<check>`; None where it was not asked or did not say."""


def score(
    rewards: Sequence[Reward], columns: Mapping[str, Any], group_size: int, mixing: Mixing | None = None
) -> Scores:
    """Call every reward and mix. `columns` holds `completions`, `prompts` and the data's columns."""
    mixing, count = mixing or Mixing(), len(columns["completions"])
    parts: dict[str, list[float | None]] = {}
    failed: dict[str, list[bool]] = {}
    verdicts: dict[str, list[Verdict]] = {}
    checks: dict[str, list[float | None]] = {}
    given, errors = {**columns, "group_size": group_size}, []
    done: list[Reward] = []
    for reward in in_order(rewards):
        name = reward.name
        if reward.asks_judge:
            everywhere = [True] * count
            asked = everywhere if reward.is_rule else matters(reward, done, parts, failed, group_size, mixing, count)
            verdicts[name], messages, details = ask_judge(reward, given, asked)
            checks |= details
        else:
            verdicts[name], messages = call_safely(reward, given, group_size)
        parts[name] = given[f"score_{name}"] = [verdict.value for verdict in verdicts[name]]
        failed[name] = [verdict.outcome == Outcome.INFRA_ERROR for verdict in verdicts[name]]
        errors += messages
        done.append(reward)
    return Scores(mix(rewards, parts, failed, group_size, mixing), parts, failed, errors, verdicts, checks)


def joined(parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """The scores of completions that were scored apart, each with its place among all of them."""
    count = sum(len(places) for places, _ in parts)

    def in_place(columns: Iterable[Sequence[Any] | None]) -> list[Any]:
        whole: list[Any] = [None] * count
        for (places, _), column in zip(parts, columns, strict=True):
            for place, value in zip(places, column or [None] * len(places), strict=True):
                whole[place] = value
        return whole

    def by_name(field: str) -> dict[str, list[Any]]:
        found = [getattr(scores, field) for _, scores in parts]
        return {
            name: in_place(one.get(name) for one in found) for name in dict.fromkeys(n for one in found for n in one)
        }

    errors = list(dict.fromkeys(error for _, scores in parts for error in scores.errors))
    named = {field: by_name(field) for field in ("parts", "failed", "verdicts", "checks")}
    return Scores(totals=in_place(scores.totals for _, scores in parts), errors=errors, **named)


def in_order(rewards: Sequence[Reward]) -> list[Reward]:
    """The recipe's order, judges last."""
    return sorted(rewards, key=lambda reward: not reward.is_rule)


def ask_judge(
    reward: Reward, columns: Mapping[str, Any], asked: Sequence[bool]
) -> tuple[list[Verdict], list[str], dict[str, list[float | None]]]:
    """Verdicts, messages and checks of a reward that asks a judge, called on some of the completions.

    It is called once: the judge tries again by itself. None where it was asked is a failure.
    """
    count, chosen, start = len(asked), [i for i, wanted in enumerate(asked) if wanted], time.perf_counter()
    judge: Judge = reward.arguments["judge"]
    judge.problems.clear()
    values, checks = [Verdict(None)] * len(chosen), dict[str, list[float | None]]()
    if chosen:
        part = {key: pick(value, chosen, count) for key, value in columns.items()}
        try:
            returned = returned_by(reward.function, {**part, **reward.arguments})
            judgement = returned if isinstance(returned, Judgement) else Judgement(returned)
            values, checks = as_verdicts(judgement.values, len(chosen)), judgement.checks
        except Exception as error:  # whatever the user's code raises must not end the run
            judge.problems.append(describe(error))
    share = (time.perf_counter() - start) / max(len(chosen), 1)
    given = [as_judged(verdict, share) for verdict in values]
    verdicts = [one or Verdict(None) for one in spread_out(given, chosen, count)]
    details = {f"{reward.name}/{name}": spread_out(column, chosen, count) for name, column in checks.items()}
    return verdicts, [f"reward {reward.name!r}: {problem}" for problem in judge.problems], details


def as_judged(verdict: Verdict, seconds: float) -> Verdict:
    """A verdict of a reward that asks a judge: a number that is missing without a reason is the judge's failure."""
    missing = verdict.value is None and verdict.outcome == Outcome.SCORED
    return replace(verdict, outcome=Outcome.INFRA_ERROR if missing else verdict.outcome, seconds=seconds)


def pick(value: Any, chosen: Sequence[int], count: int) -> Any:
    """Some entries of a column; what is not a column stays whole."""
    return [value[i] for i in chosen] if isinstance(value, list) and len(value) == count else value


def spread_out(values: Sequence[Any], chosen: Sequence[int], count: int) -> list[Any]:
    """Values of the chosen completions in their places, None elsewhere."""
    column: list[Any] = [None] * count
    for i, value in zip(chosen, values, strict=True):
        column[i] = value
    return column


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


def try_rewards(rewards: Sequence[Reward], columns: Mapping[str, Any], group_size: int = 1) -> None:
    """Call each reward once on a sample, so that what is broken stops the run before it starts."""
    given = {**columns, "group_size": group_size}
    for reward in in_order(rewards):
        if reward.asks_judge:
            verdicts, messages, _ = ask_judge(reward, given, [True] * len(columns["completions"]))
            if any(verdict.outcome == Outcome.INFRA_ERROR for verdict in verdicts):
                raise RewardError(f"{'; '.join(messages) or reward.name} (on a sample of the data)")
        else:
            verdicts = try_reward(reward, given)
        given[f"score_{reward.name}"] = [verdict.value for verdict in verdicts]


def try_reward(reward: Reward, columns: Mapping[str, Any]) -> list[Verdict]:
    """Call one reward; raises RewardError with its name."""
    try:
        return call(reward, columns)
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} fails on a sample of the data: {describe(error)}") from error
