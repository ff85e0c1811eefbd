"""From rewards to advantages: each completion against the others of its group, or of its step.

Suffixes: _N completions of the whole step (all processes), _PG prompts x group, _K rewards.
"""

from dataclasses import dataclass
from typing import Literal

import torch

EPSILON = 1e-4  # TRL's, so that the two agree to the last digit

Baseline = Literal["group", "leave_one_out", "batch"]
Scale = Literal["group", "batch", "batch_centred", "none"]


@dataclass(frozen=True)
class Advantages:
    """What the rewards of one step say about its completions."""

    values_N: torch.Tensor
    """Float; 0 for masked completions."""
    scored_N: torch.Tensor
    """Bool: the completion has a reward. The others are left out of the update and of its normaliser."""
    has_signal_P: torch.Tensor
    """Bool per prompt: some advantage of the group is not 0, so that it has a gradient."""
    not_finite: int = 0
    """Completions that are masked since their advantages are not finite."""

    @property
    def numbers_P(self) -> torch.Tensor:
        """Of each prompt its place among those with a reward; the others have that of the one before."""
        return self.scored_N.view(len(self.has_signal_P), -1).any(1).cumsum(0) - 1


def group_advantages(
    rewards_N: torch.Tensor, group_size: int, scale_rewards: Scale = "group", baseline: Baseline = "group"
) -> Advantages:
    """Reward less a baseline, scaled by a standard deviation. NaN marks a completion without a reward.

    GRPO: `group`, scaled by `group`; RLOO: `leave_one_out`, by `none`; REINFORCE++: `batch`, by `batch`; REINFORCE++
    with a baseline: `group`, by `batch_centred`.
    """
    rewards_PG = rewards_N.view(-1, group_size)
    scored_PG = ~rewards_PG.isnan()
    has_signal_P = differ(rewards_PG, over=baseline)
    centred_PG = centre(rewards_PG, baseline)
    deviation = divisor(rewards_PG, torch.where(has_signal_P[:, None], centred_PG, 0.0), scale_rewards)
    values_PG = torch.where(has_signal_P[:, None] & scored_PG, centred_PG / deviation, 0.0)
    return Advantages(values_PG.flatten(), scored_PG.flatten(), has_signal_P)


def differ(rewards_PG: torch.Tensor, over: Baseline) -> torch.Tensor:
    """Of each group, whether its members' rewards differ from what they are compared with: there is a signal.

    Rewards that are equal differ from their mean by rounding alone; that is not a signal.
    """
    scored_PG = ~rewards_PG.isnan()
    lowest_P = torch.where(scored_PG, rewards_PG, torch.inf).amin(1)
    highest_P = torch.where(scored_PG, rewards_PG, -torch.inf).amax(1)
    if over == "batch":
        return scored_PG.any(1) & (highest_P.amax() > lowest_P.amin())
    return (scored_PG.sum(1) >= 2) & (highest_P > lowest_P)


def centre(rewards_PG: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """Rewards less their baseline: the mean of the group, of its other members, or of the whole step; 0 for none."""
    scored_PG = ~rewards_PG.isnan()
    known_PG = rewards_PG.nan_to_num(0.0)
    count_P1 = scored_PG.sum(1, keepdim=True)
    mean_P1 = known_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    if baseline == "batch":
        mean_P1 = known_PG.sum() / scored_PG.sum().clamp(min=1)
    centred_PG = torch.where(scored_PG, known_PG - mean_P1, 0.0)
    if baseline == "leave_one_out":
        # A reward less the mean of the n - 1 others is n / (n - 1) times that less the mean of all n.
        return centred_PG * count_P1 / (count_P1 - 1).clamp(min=1)
    return centred_PG


def divisor(rewards_PG: torch.Tensor, centred_PG: torch.Tensor, scale: Scale) -> torch.Tensor:
    """A standard deviation, in the shape of groups: of each group's rewards, or over the step, of rewards as they are
    or less their baselines."""
    one = rewards_PG.new_ones(())
    if scale == "none":
        return one
    if scale == "group":
        return torch.stack([deviation(group_G) for group_G in rewards_PG])[:, None] + EPSILON
    values_PG = rewards_PG if scale == "batch" else torch.where(rewards_PG.isnan(), torch.nan, centred_PG)
    return deviation(values_PG) + EPSILON


def deviation(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the values that are known; 0 of fewer than two."""
    known = values[~values.isnan()]
    return known.std() if len(known) > 1 else values.new_zeros(())


def advantages_of_each(rewards_NK: torch.Tensor, weights_K: torch.Tensor, group_size: int) -> Advantages:
    """GDPO: every reward is compared and scaled within its group by itself, then they are summed by weight, and the
    sums are scaled over the step. So a reward that varies little counts as much as one that varies a lot.

    NaN marks where a reward does not apply; a completion that has none is masked. The sums of a group add up to 0.
    """
    scored_N = ~rewards_NK.isnan().all(1)
    parts = [group_advantages(rewards_N, group_size) for rewards_N in rewards_NK.unbind(1)]
    sums_N = torch.stack([part.values_N for part in parts], 1) @ weights_K.to(rewards_NK.dtype)
    counts_P = torch.stack([part.has_signal_P for part in parts], 1)[:, weights_K != 0].any(1)
    deviation_N = deviation(torch.where(scored_N, sums_N, torch.nan))
    return Advantages(sums_N / (deviation_N + EPSILON), scored_N, counts_P)
