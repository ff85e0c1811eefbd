"""A control: the true rewards, dealt out to the wrong completions. Learning from these must not raise accuracy."""

import random

from rewards import accuracy_reward, format_reward


def shuffled(completions, trainer_state, **columns):
    """The quickstart's mixed reward in a random order over the whole batch."""
    right = accuracy_reward(completions=completions, **columns)
    formed = format_reward(completions=completions, **columns)
    rewards = [0.9 * (r or 0.0) + 0.1 * f for r, f in zip(right, formed, strict=True)]
    random.Random(trainer_state.global_step).shuffle(rewards)
    return rewards
