"""A step's completions compared with each other: their advantages, as the recipe asks.

Suffixes: _N completions of the whole step (all processes), _P prompts, _K rewards.
"""

from collections.abc import Sequence

import torch

from rewards.load import Reward
from sail_rl.advantage import Advantages, advantages_of_each, group_advantages
from sail_rl.config import GrpoRecipe
from sail_rl.scoring import Outcome, reward_tensor


def compare(recipe: GrpoRecipe, rewards: Sequence[Reward], outcomes: Sequence[Outcome]) -> Advantages:
    """The advantages of a step. With dynamic sampling, groups without a signal are as if they had not been sampled."""
    grpo, size = recipe.grpo, recipe.rollout.num_generations
    one_by_one = grpo.multi_objective_aggregation == "normalize_then_sum"
    rewards_NK = part_tensor(rewards, outcomes, size) if one_by_one else reward_tensor(outcomes)[:, None]
    weights_K = torch.tensor([reward.weight for reward in rewards])

    def advantages() -> Advantages:
        if one_by_one:
            return advantages_of_each(rewards_NK, weights_K, size)
        return group_advantages(rewards_NK[:, 0], size, grpo.scale_rewards, grpo.baseline)

    found = advantages()
    if grpo.dynamic_sampling:
        rewards_NK[~found.has_signal_P.repeat_interleave(size)] = torch.nan
        found = advantages()
    return without_not_finite(found)


def without_not_finite(found: Advantages) -> Advantages:
    """Completions whose advantages are not finite are masked."""
    bad_N = ~found.values_N.isfinite()
    if not bad_N.any():
        return found
    values_N, scored_N = found.values_N.masked_fill(bad_N, 0.0), found.scored_N & ~bad_N
    has_signal_P = found.has_signal_P & (values_N.view(len(found.has_signal_P), -1) != 0).any(1)
    return Advantages(values_N, scored_N, has_signal_P, int(bad_N.sum()))


def part_tensor(rewards: Sequence[Reward], outcomes: Sequence[Outcome], size: int) -> torch.Tensor:
    """[N, K] each reward by itself, NaN where it does not count, by the rules of the mix: for a completion without a
    total, and, when a judge has failed on one member, for its whole group."""
    columns = []
    for reward in rewards:
        values_N = torch.tensor([nan_if_none(None if o.reward is None else o.parts[reward.name]) for o in outcomes])
        failed_N = torch.tensor([o.failed[reward.name] for o in outcomes])
        if reward.asks_judge:
            values_N[failed_N.view(-1, size).any(1).repeat_interleave(size)] = torch.nan
        columns.append(values_N)
    return torch.stack(columns, 1)


def nan_if_none(value: float | None) -> float:
    """As tensors have it."""
    return torch.nan if value is None else value
