"""Dynamic sampling (DAPO): a step asks more questions until as many groups as it has prompts have a signal.

All of them are trained, those beyond the number too, so that no completion with a signal is thrown away.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rewards.load import Reward
from rewards.score import Scores, joined
from sail_rl.compare import compare
from sail_rl.launch import Run
from sail_rl.overlap import Batch, Writer
from sail_rl.scoring import gather_outcomes

LEAST_SHARE = 0.125  # of groups with a signal that is reckoned with: a step in which none has one asks no more


def refill(run: Run, rewards: Sequence[Reward], writer: Writer, batch: Batch, step: int) -> tuple[Batch, Scores, int]:
    """The step's questions, completions and scores with those asked for in addition; and how many times more were."""
    wanted, refills = run.recipe.rollout.prompts_per_step, 0
    with writer.watch.phase("reward"):
        scores = batch.scoring.result()  # begun as groups became whole
    while refills < run.recipe.grpo.dynamic_sampling:
        outcomes = gather_outcomes(run.shard, batch.rollouts, scores)
        has_signal_P = compare(run.recipe, rewards, outcomes).has_signal_P
        missing = wanted - int(has_signal_P.sum())
        if missing <= 0:
            break
        share = float(has_signal_P.float().mean())
        more = writer.more(questions_to_ask(missing, share, wanted, run.shard.world_size), step)
        with writer.watch.phase("reward"):
            count, scores_of_more = len(batch.rollouts), more.scoring.result()
        scores = joined([(range(count), scores), (range(count, count + len(more.rollouts)), scores_of_more)])
        batch.scoring.seconds += more.scoring.seconds
        batch = replace(
            batch,
            questions=batch.questions + more.questions,
            rollouts=batch.rollouts + more.rollouts,
            data_position=more.data_position,
        )
        refills += 1
    return batch, scores, refills


def questions_to_ask(missing: int, share_with_signal: float, most: int, processes: int) -> int:
    """As many as will probably do; the same number for every process."""
    likely = math.ceil(missing / max(share_with_signal, LEAST_SHARE))
    return min(math.ceil(likely / processes) * processes, most)
