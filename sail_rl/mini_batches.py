"""A step's groups cut into mini-batches, each an optimizer step, and these into micro-batches."""

from collections.abc import Sequence

from sail_rl.advantage import Advantages
from sail_rl.balance import share_work
from sail_rl.batch import Form, Group
from sail_rl.before_update import MiniBatch
from sail_rl.data.packing import make_batches
from sail_rl.launch import Run
from sail_rl.losses import loss_normaliser
from sail_rl.scoring import Outcome


def make_mini_batches(
    run: Run,
    groups: Sequence[Group],
    outcomes: Sequence[Outcome],
    advantages: Advantages,
    idle: Group,
    form: Form,
    prompts_apart: bool,
    token_budget: int,
) -> list[MiniBatch]:
    """This process's part of each mini-batch. Groups take turns, so that the number of processes changes nothing."""
    grpo, length = run.recipe.grpo, run.recipe.rollout.max_completion_length
    size = run.recipe.rollout.num_generations
    made = []
    for turn in range(grpo.mini_batches):
        mine = share_work(run, [group for group in groups if group.number % grpo.mini_batches == turn], form)
        batches = make_batches(mine, token_budget, idle, run.highest, form, prompts_apart)
        turns_N = (advantages.numbers_P % grpo.mini_batches == turn).repeat_interleave(size)
        lengths = counted_lengths(outcomes, (advantages.scored_N & turns_N).tolist(), grpo.mask_truncated_completions)
        made.append(MiniBatch(batches, loss_normaliser(grpo.loss_type, lengths, length)))
    return made


def counted_lengths(outcomes: Sequence[Outcome], scored: Sequence[bool], mask_truncated: bool) -> list[int]:
    """Of the completions with a reward; 0 for those that are left out of the loss, which still count as completions."""
    counted = [outcome for outcome, has_reward in zip(outcomes, scored, strict=True) if has_reward]
    return [0 if mask_truncated and outcome.truncated else outcome.length for outcome in counted]
