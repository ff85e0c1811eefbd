"""Rewards in the loop: built from the recipe, tried on the data, called each step, their failures counted."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewards import algebra_pool
from rewards.call import TrainerState
from rewards.load import Reward, RewardError, load_reward
from rewards.score import MOST_FAILED, Scores, score, try_rewards
from rewards.verdict import Outcome as Ending
from rollouts import Rollout, RolloutEngine, Sampling
from sail_rl.advantage import Advantages
from sail_rl.checkpoint import Progress
from sail_rl.command_line import BadInput
from sail_rl.config import RewardEntry
from sail_rl.data.stream import RowStream, Shard
from sail_rl.launch import Run, cores_per_process
from sail_rl.metrics import deviation, mean
from sail_rl.questions import Question, reward_columns

TIMEOUT = str(Ending.TIMEOUT)
NOTEWORTHY = 0.01  # share of completions


@dataclass(frozen=True)
class Outcome:
    """What the whole run needs to know of one completion; small, since all processes exchange these."""

    length: int
    truncated: bool
    reward: float | None
    parts: dict[str, float | None]
    failed: dict[str, bool]
    verdicts: dict[str, tuple[str, float]]
    """For each reward how scoring ended, and the seconds that it took."""


def load_rewards(entries: Sequence[RewardEntry], thinking: str) -> list[Reward]:
    """The recipe's reward functions; one that cannot be found is the user's mistake."""
    try:
        return [load_entry(entry, thinking) for entry in entries]
    except RewardError as error:
        raise BadInput(str(error)) from error


def set_workers(run: Run) -> None:
    """How many processes do algebra for this one; they start when an answer first needs them."""
    cores = cores_per_process(run.accelerator)
    algebra_pool.use_workers(run.recipe.reward_workers or max(1, min(algebra_pool.MOST_WORKERS, cores // 2)))


def load_entry(entry: RewardEntry, thinking: str) -> Reward:
    """The function of one entry."""
    arguments = arguments_of(entry, thinking)
    return load_reward(entry.function, entry.name, entry.weight, arguments, entry.timeout, entry.in_process)


def arguments_of(entry: RewardEntry, thinking: str) -> dict[str, Any]:
    """The entry's own keys; the format reward checks the form that data.thinking asks for unless it names another."""
    return ({"contract": thinking} if entry.function == "format" else {}) | entry.arguments


def try_on_data(run: Run, rewards: Sequence[Reward], engine: RolloutEngine, stream: RowStream[Question]) -> None:
    """Call each reward once on real completions, so that what is broken stops the run before its first step."""
    position = stream.position
    questions = stream.next_items(run.shard.world_size)
    stream.position = position
    sampling = Sampling(run.recipe.rollout.max_completion_length, seed=run.recipe.seed)
    rollouts = engine.generate([question.prompt for question in questions], 2, sampling)
    try:
        try_rewards(rewards, all_columns(run, questions, rollouts, step=0))
    except RewardError as error:
        raise BadInput(str(error)) from error


def score_rollouts(
    run: Run, rewards: Sequence[Reward], questions: Sequence[Question], rollouts: Sequence[Rollout], step: int
) -> Scores:
    """Score this process's completions."""
    return score(rewards, all_columns(run, questions, rollouts, step), len(rollouts) // len(questions))


def all_columns(run: Run, questions: Sequence[Question], rollouts: Sequence[Rollout], step: int) -> dict[str, Any]:
    """The keyword arguments of a reward call."""
    state = TrainerState(step, run.recipe.trainer.max_steps)
    return reward_columns(questions, rollouts, run.folder) | {"trainer_state": state}


def gather_outcomes(shard: Shard, rollouts: Sequence[Rollout], scores: Scores) -> list[Outcome]:
    """The outcomes of all processes' completions, in the order of the questions."""
    mine = [
        Outcome(
            length=len(rollout.token_ids),
            truncated=rollout.finish_reason == "length",
            reward=scores.totals[i],
            parts={name: values[i] for name, values in scores.parts.items()},
            failed={name: flags[i] for name, flags in scores.failed.items()},
            verdicts={name: (str(given[i].outcome), given[i].seconds) for name, given in scores.verdicts.items()},
        )
        for i, rollout in enumerate(rollouts)
    ]
    return shard.gather(mine)


def reward_tensor(outcomes: Sequence[Outcome]) -> torch.Tensor:
    """Total rewards, NaN where there is none."""
    return torch.tensor([torch.nan if o.reward is None else o.reward for o in outcomes], dtype=torch.float32)


def count_failures(progress: Progress, outcomes: Sequence[Outcome], errors: Sequence[str]) -> dict[str, int]:
    """Failures of each reward since the run began; stops when one has failed more often than it may."""
    scored = progress.completions_scored + len(outcomes)
    counts = {
        name: progress.reward_failures.get(name, 0) + sum(outcome.failed[name] for outcome in outcomes)
        for name in outcomes[0].failed
    }
    for error in errors:
        print(f"warning: {error}; what it fails on is masked", file=sys.stderr, flush=True)
    for name, failed in counts.items():
        if failed > MOST_FAILED * scored:
            raise BadInput(
                f"reward {name!r} failed on {failed} of {scored} completions, more than {MOST_FAILED:.0%}"
                + (f"; the last error: {errors[-1]}" if errors else "")
            )
    return counts


def reward_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Rewards and completions of a step, for the log."""
    rewards = [outcome.reward for outcome in outcomes]
    lengths = [outcome.length for outcome in outcomes]
    figures: dict[str, Any] = {"reward": mean(rewards), "reward_std": deviation(rewards)}
    for name in outcomes[0].parts:
        values = [outcome.parts[name] for outcome in outcomes]
        figures[f"rewards/{name}/mean"] = mean(values)
        figures[f"rewards/{name}/std"] = deviation(values)
        figures[f"rewards/{name}/failed"] = sum(outcome.failed[name] for outcome in outcomes)
        figures |= verdict_figures(name, [outcome.verdicts[name] for outcome in outcomes])
    return figures | {
        "completion/length": mean(lengths),
        "completion/longest": max(lengths),
        "completion/truncated": sum(outcome.truncated for outcome in outcomes) / len(outcomes),
        "completion/masked": sum(reward is None for reward in rewards),
    }


def verdict_figures(name: str, verdicts: Sequence[tuple[str, float]]) -> dict[str, float]:
    """How scoring ended, as counts and shares of those that occurred, and how long it took for one completion."""
    seconds = sorted(took for _, took in verdicts)
    figures: dict[str, float] = {
        f"rewards/{name}/seconds_{mark}": seconds[min(int(share * len(seconds)), len(seconds) - 1)]
        for mark, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }
    for ending, count in Counter(ending for ending, _ in verdicts).items():
        figures |= {f"rewards/{name}/count/{ending}": count, f"rewards/{name}/share/{ending}": count / len(verdicts)}
    if figures.get(f"rewards/{name}/share/{TIMEOUT}", 0) > NOTEWORTHY:
        print(f"warning: reward {name!r} ran out of CPU time on more than {NOTEWORTHY:.0%} of a step", file=sys.stderr)
    return figures


def close_rewards(rewards: Sequence[Reward]) -> None:
    """End all processes that belong to rewards."""
    algebra_pool.close()
    for reward in rewards:
        reward.close()


def group_figures(
    advantages: Advantages, outcomes: Sequence[Outcome], seconds: dict[str, float], keep_all: bool
) -> dict[str, Any]:
    """Groups without signal, phase times and speed, for the log."""
    tokens = sum(outcome.length for outcome in outcomes)
    return {
        "groups/total": len(advantages.has_signal_P),
        "groups/dropped": 0 if keep_all else int((~advantages.has_signal_P).sum()),
        "tokens/generated": tokens,
        "tokens_per_second": tokens / sum(seconds.values()),
        **seconds,
    }
