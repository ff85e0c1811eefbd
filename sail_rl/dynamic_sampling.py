"""Dynamic sampling (DAPO): a step asks more questions until as many groups as it has prompts have a signal.

All of them are trained, those beyond the number too, so that no completion with a signal is thrown away.
"""

import math
from collections.abc import Sequence

from rewards.load import Reward
from rewards.score import Scores
from sail_rl.compare import compare
from sail_rl.launch import Run
from sail_rl.overlap import Batch, Writer
from sail_rl.scoring import gather_outcomes, score_rollouts

LEAST_SHARE = 0.125  # of groups with a signal that is reckoned with: a step in which none has one asks no more


def refill(
    run: Run, rewards: Sequence[Reward], writer: Writer, batch: Batch, scores: Scores, step: int
) -> tuple[Batch, Scores, int]:
    """The step's questions and completions with those asked for in addition; and how many times more were asked for."""
    wanted, refills = run.recipe.rollout.prompts_per_step, 0
    while refills < run.recipe.grpo.dynamic_sampling:
        outcomes = gather_outcomes(run.shard, batch.rollouts, scores)
        has_signal_P = compare(run.recipe, rewards, outcomes).has_signal_P
        missing = wanted - int(has_signal_P.sum())
        if missing <= 0:
            break
        more = writer.more(questions_to_ask(missing, float(has_signal_P.float().mean()), wanted, run.shard.world_size))
        with writer.watch.phase("reward"):
            scores = joined(scores, score_rollouts(run, rewards, more.questions, more.rollouts, step))
        batch = Batch(batch.questions + more.questions, batch.rollouts + more.rollouts, more.data_position)
        refills += 1
    return batch, scores, refills


def questions_to_ask(missing: int, share_with_signal: float, most: int, processes: int) -> int:
    """As many as will probably do; the same number for every process."""
    likely = math.ceil(missing / max(share_with_signal, LEAST_SHARE))
    return min(math.ceil(likely / processes) * processes, most)


def joined(first: Scores, second: Scores) -> Scores:
    """Rewards of the completions of both."""
    counts = len(first.totals), len(second.totals)
    names = dict.fromkeys([*first.checks, *second.checks])
    checks = {
        name: [*first.checks.get(name, [None] * counts[0]), *second.checks.get(name, [None] * counts[1])]
        for name in names
    }
    return Scores(
        totals=first.totals + second.totals,
        parts={name: values + second.parts[name] for name, values in first.parts.items()},
        failed={name: flags + second.failed[name] for name, flags in first.failed.items()},
        errors=first.errors + second.errors,
        verdicts={name: given + second.verdicts[name] for name, given in first.verdicts.items()},
        checks=checks,
    )
