"""Rewards in the loop: built from the recipe, tried on the data, called each step, their failures counted."""

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewards import algebra_pool
from rewards.accuracy import gold_text
from rewards.call import RewardError, TrainerState
from rewards.canaries import check_judge, check_text_judge
from rewards.judge import Judge, JudgeSettings
from rewards.load import Reward, load_reward
from rewards.score import MOST_FAILED, Scores, score, try_rewards
from rewards.verdict import Outcome as Ending
from rollouts import Rollout, RolloutEngine
from sail_rl.advantage import Advantages
from sail_rl.checkpoint import Progress
from sail_rl.command_line import BadInput
from sail_rl.config import GrpoRecipe, RewardEntry
from sail_rl.data.stream import RowStream, Shard
from sail_rl.launch import Run, cores_per_process
from sail_rl.metrics import deviation, mean
from sail_rl.questions import Question, reward_columns
from sail_rl.sampling import training_sampling

FEW_SCORED = 200  # completions: of fewer, one failure would be too large a share
MOST_MISSING = 0.2  # share of a step's verdicts that a judge may fail to give
STEPS_OF_PATIENCE = 3  # with more missing, until the run stops: an endpoint may restart

TIMEOUT = str(Ending.TIMEOUT)
LARGEST = torch.finfo(torch.float32).max
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
    checks: dict[str, float | None] = field(default_factory=dict)
    not_finite: str = ""
    """What of it is not, for which it has no reward."""


def load_rewards(recipe: GrpoRecipe) -> list[Reward]:
    """The recipe's reward functions; one that cannot be found is the user's mistake."""
    judge = make_judge(recipe)
    try:
        return [load_entry(entry, recipe, judge) for entry in recipe.rewards]
    except RewardError as error:
        raise BadInput(str(error)) from error


def set_workers(run: Run) -> None:
    """How many processes do algebra for this one; they start when an answer first needs them."""
    cores = cores_per_process(run.accelerator)
    algebra_pool.use_workers(run.recipe.reward_workers or max(1, min(algebra_pool.MOST_WORKERS, cores // 2)))


def load_entry(entry: RewardEntry, recipe: GrpoRecipe, judge: Judge | None) -> Reward:
    """The function of one entry."""
    arguments = arguments_of(entry, recipe)
    return load_reward(entry.function, entry.name, entry.weight, arguments, entry.timeout, entry.in_process, judge)


def arguments_of(entry: RewardEntry, recipe: GrpoRecipe) -> dict[str, Any]:
    """The entry's own keys, and what a built-in takes from the rest of the recipe where its entry does not say."""
    given: dict[str, dict[str, Any]] = {
        "format": {"contract": recipe.data.thinking},
        "conciseness": {"max_length": recipe.rollout.max_completion_length},
    }
    return given.get(entry.function, {}) | entry.arguments


def make_judge(recipe: GrpoRecipe) -> Judge | None:
    """The recipe's judge, with its verdicts so far."""
    section = recipe.judge
    if section is None:
        return None
    key = os.environ.get(section.api_key_env) if section.api_key_env else "none"
    if key is None:
        raise BadInput(f"judge.api_key_env = {section.api_key_env!r}: there is no such environment variable")
    chosen = section.model_dump(exclude={"api_key_env", "cache", "when_failing"})
    cache = Path(section.cache or f"{recipe.output_dir}/judge_cache.sqlite")
    return Judge(JudgeSettings(**chosen, api_key=key, cache=cache))


def try_on_data(run: Run, rewards: Sequence[Reward], engine: RolloutEngine, stream: RowStream[Question]) -> None:
    """Call each reward once on real completions, so that what is broken stops the run before its first step."""
    position = stream.position
    questions = stream.next_items(run.shard.world_size)
    stream.position = position
    rollouts = engine.generate([question.prompt for question in questions], 2, training_sampling(run.recipe))
    columns = all_columns(run, questions, rollouts, step=0)
    try:
        for reward in check_once(rewards):
            judge: Judge = reward.arguments["judge"]
            print(f"asking the judge {judge.settings.model} about texts that must fail", flush=True)
            question, answer = columns["question"][0], gold_text(columns["answer"][0])
            if reward.is_rule:
                check_text_judge(judge, question, answer)
            else:
                check_judge(judge, question, answer, columns["images"][0])
        try_rewards(rewards, columns, group_size=2)
    except RewardError as error:
        raise BadInput(str(error)) from error


def check_once(rewards: Sequence[Reward]) -> list[Reward]:
    """One reward for each way to ask the judge: about texts beside the right ones, and about reasoning."""
    return list({reward.is_rule: reward for reward in rewards if reward.asks_judge}.values())


def score_rollouts(
    run: Run, rewards: Sequence[Reward], questions: Sequence[Question], rollouts: Sequence[Rollout], step: int
) -> Scores:
    """Score this process's completions."""
    columns = all_columns(run, questions, rollouts, step)
    return score(rewards, columns, len(rollouts) // len(questions), run.recipe.mixing)


def all_columns(run: Run, questions: Sequence[Question], rollouts: Sequence[Rollout], step: int) -> dict[str, Any]:
    """The keyword arguments of a reward call."""
    state = TrainerState(step, run.recipe.trainer.max_steps)
    return reward_columns(questions, rollouts, run.folder) | {"trainer_state": state}


def gather_outcomes(shard: Shard, rollouts: Sequence[Rollout], scores: Scores) -> list[Outcome]:
    """The outcomes of all processes' completions, in the order of the questions."""
    not_finite = [what_is_not_finite(*pair) for pair in zip(scores.totals, rollouts, strict=True)]
    mine = [
        Outcome(
            length=len(rollout.token_ids),
            truncated=rollout.finish_reason == "length",
            reward=None if not_finite[i] else scores.totals[i],
            not_finite=not_finite[i],
            parts={name: values[i] for name, values in scores.parts.items()},
            failed={name: flags[i] for name, flags in scores.failed.items()},
            checks={name: values[i] for name, values in scores.checks.items()},
            verdicts={name: (str(given[i].outcome), given[i].seconds) for name, given in scores.verdicts.items()},
        )
        for i, rollout in enumerate(rollouts)
    ]
    return shard.gather(mine)


def what_is_not_finite(reward: float | None, rollout: Rollout) -> str:
    """A reward that float32 does not hold, or a log-probability by the engine: such a completion is masked."""
    if reward is not None and not abs(reward) <= LARGEST:
        return "reward"
    return "" if all(map(math.isfinite, rollout.log_probs)) else "log-probabilities by the engine"


def reward_tensor(outcomes: Sequence[Outcome]) -> torch.Tensor:
    """Total rewards, NaN where there is none."""
    return torch.tensor([torch.nan if o.reward is None else o.reward for o in outcomes], dtype=torch.float32)


def count_failures(
    run: Run, rewards: Sequence[Reward], progress: Progress, outcomes: Sequence[Outcome], errors: Sequence[str]
) -> dict[str, Any]:
    """What `progress` keeps of failures; stops when a rule or the judge has failed more often than it may."""
    judged = tuple(f"reward {reward.name!r}" for reward in rewards if reward.asks_judge)
    for error in errors:
        what = "its term is left out of these groups" if error.startswith(judged) else "what it fails on is masked"
        print(f"warning: {error}; {what}", file=sys.stderr, flush=True)
    for what, count in Counter(outcome.not_finite for outcome in outcomes if outcome.not_finite).items():
        if run.is_main:
            print(f"warning: {count} completions are masked, not finite: {what}", file=sys.stderr, flush=True)
    last = f"; the last error: {errors[-1]}" if errors else ""
    scored = progress.completions_scored + len(outcomes)
    counts = {
        reward.name: progress.reward_failures.get(reward.name, 0) + sum(o.failed[reward.name] for o in outcomes)
        for reward in rewards
    }
    for reward in rewards:
        failed = counts[reward.name]
        if failed > MOST_FAILED * max(scored, FEW_SCORED) and not reward.asks_judge:
            raise BadInput(
                f"reward {reward.name!r} failed on {failed} of {scored} completions, more than {MOST_FAILED:.0%}{last}"
            )
    missing = max((missing_share(reward.name, outcomes) for reward in rewards if reward.asks_judge), default=0.0)
    failing = progress.judge_failing + 1 if missing > MOST_MISSING else 0
    if failing >= STEPS_OF_PATIENCE and run.recipe.judge.when_failing == "stop":
        raise BadInput(
            f"the judge gave no verdict on {missing:.0%} of what it was asked, and on more than {MOST_MISSING:.0%} for "
            f"{failing} steps in a row{last}"
        )
    return {"completions_scored": scored, "reward_failures": counts, "judge_failing": failing}


def missing_share(name: str, outcomes: Sequence[Outcome]) -> float:
    """Of the completions that a judge was asked about, the share without a verdict."""
    failed = sum(outcome.failed[name] for outcome in outcomes)
    return failed / max(1, failed + sum(outcome.parts[name] is not None for outcome in outcomes))


def values_of(reward: str | None, outcomes: Sequence[Outcome]) -> list[float | None]:
    """One reward of every completion; none where the recipe has no such reward."""
    return [outcome.parts[reward] for outcome in outcomes] if reward else []


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
    for name in sorted({name for outcome in outcomes for name in outcome.checks}):
        figures[f"rewards/{name}/mean"] = mean([outcome.checks.get(name) for outcome in outcomes])
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
        "completion/not_finite": sum(map(bool, (o.not_finite for o in outcomes))) + advantages.not_finite,
        "groups/dropped": 0 if keep_all else int((~advantages.has_signal_P).sum()),
        "tokens/generated": tokens,
        "tokens_per_second": tokens / sum(seconds.values()),
        **seconds,
    }
