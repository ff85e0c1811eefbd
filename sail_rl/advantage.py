"""From rewards to advantages: each completion against the others of its group.

Suffixes: _N completions of the whole step (all processes), _PG prompts x group.
"""

from dataclasses import dataclass
from typing import Literal

import torch

EPSILON = 1e-4  # TRL's, so that the two agree to the last digit


@dataclass(frozen=True)
class Advantages:
    """What the rewards of one step say about its completions."""

    values_N: torch.Tensor
    """Float; 0 for masked completions."""
    scored_N: torch.Tensor
    """Bool: the completion has a reward. The others are left out of the update and of its normaliser."""
    has_signal_P: torch.Tensor
    """Bool per prompt: the group's rewards differ, so that it has a gradient."""


def group_advantages(
    rewards_N: torch.Tensor, group_size: int, scale_rewards: Literal["group", "batch", "none"] = "group"
) -> Advantages:
    """Reward minus the group's mean, scaled by a standard deviation. NaN marks a completion without a reward."""
    rewards_PG = rewards_N.view(-1, group_size)
    scored_PG = ~rewards_PG.isnan()
    count_P1 = scored_PG.sum(1, keepdim=True).clamp(min=1)
    known_PG = rewards_PG.nan_to_num(0.0)
    mean_P1 = known_PG.sum(1, keepdim=True) / count_P1
    centred_PG = torch.where(scored_PG, known_PG - mean_P1, 0.0)
    # Rewards that are equal differ from their mean by rounding alone; that is not a signal.
    lowest_P = torch.where(scored_PG, rewards_PG, torch.inf).amin(1)
    highest_P = torch.where(scored_PG, rewards_PG, -torch.inf).amax(1)
    has_signal_P = (scored_PG.sum(1) >= 2) & (highest_P > lowest_P)
    if scale_rewards == "group":
        variance_P1 = centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centred_PG = centred_PG / (variance_P1.sqrt() + EPSILON)
    elif scale_rewards == "batch":
        known_N = rewards_N[~rewards_N.isnan()]
        deviation = known_N.std() if len(known_N) > 1 else known_N.new_zeros(())
        centred_PG = centred_PG / (deviation + EPSILON)
    values_PG = torch.where(has_signal_P[:, None], centred_PG, 0.0)
    return Advantages(values_PG.flatten(), scored_PG.flatten(), has_signal_P)
