"""From a completion's rewards to one number: SAIL-VL2's weighted sum, or SAIL-RL's gated product.

A reward that is None for a whole group does not apply to it: its term is left out there. A rule that is None for some
members masks those. A judge's verdict that is missing for one member leaves the judge's term out for the whole group:
its failure must neither punish a completion nor favour the members that were not asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.call import RewardError
from rewards.conciseness import LEAD_OF_RIGHT
from rewards.load import Reward

Values = Mapping[str, Sequence[float | None]]
Flags = Mapping[str, Sequence[bool]]


@dataclass(frozen=True)
class Mixing:
    """How rewards are put together."""

    mode: str = "sum"
    """`sum`: of weight * reward; `product`: alpha * (product of the factors) + (1 - alpha) * (sum of the others)."""
    alpha: float = 0.9
    factors: tuple[str, ...] = ("accuracy", "judging", "think_quality")
    """Names of the rewards that are multiplied."""

    def multiplies(self, name: str) -> bool:
        """Whether this reward is a factor."""
        return self.mode == "product" and name in self.factors


def mix(rewards: Sequence[Reward], parts: Values, failed: Flags, group_size: int, mixing: Mixing) -> list[float | None]:
    """The one number of each completion; None where a reward that applies could not tell."""
    count = len(next(iter(parts.values())))
    totals: list[float | None] = []
    for start in range(0, count, group_size):
        members = range(start, min(start + group_size, count))
        applying = [reward for reward in rewards if applies(reward, members, parts, failed)]
        totals += [total({r: parts[r.name][i] for r in applying}, mixing) for i in members]
    return totals


def applies(reward: Reward, members: Sequence[int], parts: Values, failed: Flags) -> bool:
    """Whether a reward has a term in this group."""
    values, broken = ([column[reward.name][i] for i in members] for column in (parts, failed))
    if reward.asks_judge and any(broken):
        return False
    return any(broken) or any(value is not None for value in values)


def total(values: Mapping[Reward, float | None], mixing: Mixing) -> float | None:
    """One completion's number; None without any term, or where one that counts is missing."""
    factors = [value for reward, value in values.items() if mixing.multiplies(reward.name)]
    terms = [(reward.weight, value) for reward, value in values.items() if not mixing.multiplies(reward.name)]
    if mixing.mode == "sum" or not factors:
        added = weighted_sum(terms)
        return added if mixing.mode == "sum" or added is None else (1 - mixing.alpha) * added
    product = product_of(factors)
    added = weighted_sum(terms) if terms else 0.0
    return None if product is None or added is None else mixing.alpha * product + (1 - mixing.alpha) * added


def product_of(factors: Sequence[float | None]) -> float | None:
    """0 as soon as one factor is: then the others were not asked and do not matter."""
    product = 1.0
    for value in factors:
        if value == 0:
            return 0.0
        product *= value if value is not None else float("nan")
    return None if product != product else product


def weighted_sum(terms: Sequence[tuple[float, float | None]]) -> float | None:
    """None without a term, or where one is missing."""
    if not terms or any(value is None for _, value in terms):
        return None
    return sum(weight * value for weight, value in terms if value is not None)


def matters(
    reward: Reward, earlier: Sequence[Reward], parts: Values, failed: Flags, group_size: int, mixing: Mixing, count: int
) -> list[bool]:
    """Where the verdict of this reward can change a number, given the values of the earlier ones."""
    multiplied = mixing.multiplies(reward.name)
    if not multiplied and reward.weight == 0:
        return [False] * count
    asked = []
    for start in range(0, count, group_size):
        members = range(start, min(start + group_size, count))
        known = [other for other in earlier if applies(other, members, parts, failed)]
        for i in members:
            masked = any(parts[o.name][i] is None for o in known if not mixing.multiplies(o.name))
            product = product_of([parts[o.name][i] for o in known if mixing.multiplies(o.name)])
            asked.append(not masked and product is not None and not (multiplied and product == 0))
    return asked


def check_mix(entries: Sequence[tuple[str, float, Mapping[str, Any]]], mixing: Mixing) -> None:
    """Whether these rewards (name, weight, arguments) can be put together so; raises RewardError."""
    weights = {name: weight for name, weight, _ in entries}
    if mixing.mode == "product":
        check_factors(weights, mixing)
    shape = next((arguments.get("shape", "group") for name, _, arguments in entries if name == "conciseness"), None)
    if shape is not None:
        check_conciseness(weights, shape, mixing)


def check_factors(weights: Mapping[str, float], mixing: Mixing) -> None:
    """Factors are rewards of the recipe, and have no weight."""
    for name in mixing.factors:
        if name not in weights:
            raise RewardError(f"reward_mix.factors names {name!r}, which is not in rewards ({', '.join(weights)})")
        if weights[name] != 1:
            raise RewardError(
                f"rewards: {name} has weight {weights[name]:g}, but reward_mix.factors multiplies it; "
                "leave the weight out, or set reward_mix.mode: sum"
            )


def check_conciseness(weights: Mapping[str, float], shape: str, mixing: Mixing) -> None:
    """A right answer must earn more than any wrong one, however long it is (rewards lie between 0 and 1)."""
    if "accuracy" not in weights:
        raise RewardError("rewards: conciseness is for right answers; list accuracy too")
    if mixing.mode == "product":
        raise RewardError(
            "rewards: conciseness beside reward_mix.mode: product could put a right answer whose product is 0 below a "
            "wrong one; leave it out, or set mode: sum"
        )
    if shape not in LEAD_OF_RIGHT:
        raise RewardError(f"rewards: conciseness has shape {shape!r}; allowed are {', '.join(LEAD_OF_RIGHT)}")
    accuracy, conciseness = weights["accuracy"], weights["conciseness"]
    others = sum(abs(weight) for name, weight in weights.items() if name not in ("accuracy", "conciseness"))
    lead = accuracy + conciseness * LEAD_OF_RIGHT[shape] - others
    if conciseness < 0 or lead <= 0:
        raise RewardError(
            f"rewards: with weights accuracy {accuracy:g}, conciseness {conciseness:g} and others {others:g} a wrong "
            "answer could earn as much as a right one; accuracy must weigh more than all the others together"
        )
