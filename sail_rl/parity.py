"""Whether engine and trainer see the same model and the same prompts: a gate before the first step, figures at each.

Suffixes: _B completions, _C tokens of a completion, _N trained tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rollouts import Prompt, Rollout, RolloutEngine
from sail_rl.batch import Group, TrainingBatch, make_batch
from sail_rl.command_line import BadInput
from sail_rl.data.stream import RowStream
from sail_rl.launch import Run
from sail_rl.policy import token_terms
from sail_rl.questions import Question
from sail_rl.sampling import filters_of, training_sampling
from sail_rl.sharding import Whole, autocast

PROMPTS, COMPLETIONS = 4, 2  # of the gate, per process
LIMITS = {"float32": 1e-3, "bfloat16": 0.05}  # mean gap of log-probabilities


def check_parity(
    run: Run, whole: Whole, engine: RolloutEngine, stream: RowStream[Question], suppressed: Sequence[int]
) -> None:
    """Stop before the first step, naming what differs; nothing to check where the engine is the trainer's model."""
    if run.recipe.rollout.engine == "hf":
        return
    position = stream.position
    prompts = [question.prompt for question in stream.next_items(PROMPTS * run.shard.world_size)]
    stream.position = position
    broken = [text for prompt in prompts for text in broken_inputs(engine, prompt)]
    rollout = run.recipe.rollout
    rollouts = engine.generate(prompts, COMPLETIONS, training_sampling(run.recipe))
    with whole.weights():
        gaps_N = differences(run, whole.model, prompts, rollouts, suppressed).abs()
    limit = rollout.parity_limit or LIMITS[str(engine.dtype).removeprefix("torch.")]  # type: ignore[attr-defined]
    mean, most = float(gaps_N.mean()), float(gaps_N.max())
    if not mean <= limit:
        broken.append(
            f"log-probabilities: engine and trainer are {mean:.2g} apart as a mean over tokens (at most {most:.2g}); "
            f"rollout.parity_limit = {limit:g}"
        )
    broken = run.shard.gather(broken)
    if broken:
        raise BadInput("engine and trainer do not agree:\n" + "\n".join(f"  {text}" for text in broken))
    if run.is_main:
        print(f"parity with the engine: log-probabilities {mean:.1g} apart, at most {most:.1g}", flush=True)


def broken_inputs(engine, prompt: Prompt) -> list[str]:
    """What of a prompt reached the engine's model otherwise than it is given to the trainer's."""
    received, picture = engine.receive(prompt), engine.picture.token_id
    told, given = (ids.count(picture) for ids in (received.token_ids, prompt.token_ids))
    pixels = prompt.model_inputs.get("pixel_values")
    broken = []
    if told != given:
        broken.append(f"image tokens: {told} reached the engine, the trainer has {given}")
    elif received.token_ids != prompt.token_ids:
        broken.append(f"prompt tokens: {first_difference(received.token_ids, prompt.token_ids)}")
    if received.pixels != engine.digest([] if pixels is None else [pixels]):
        broken.append("pictures: the engine's model reads other pixels than the trainer's")
    return [f"prompt {prompt.id}: {text}" for text in broken]


def first_difference(theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Where two rows of tokens part."""
    same = [a == b for a, b in zip(theirs, ours, strict=False)]
    place = same.index(False) if False in same else len(same)
    there, here = (list(ids[place : place + 3]) for ids in (theirs, ours))
    return f"{len(theirs)} reached the engine and the trainer has {len(ours)}; from token {place}: {there}, not {here}"


@torch.no_grad()
def differences(
    run: Run, policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], suppressed: Sequence[int]
) -> torch.Tensor:
    """[N] the trainer's log-probability less the engine's, of every token."""
    was_training = policy.training
    policy.eval()
    found = []
    for number, prompt in enumerate(prompts):
        group = rollouts[number * COMPLETIONS : (number + 1) * COMPLETIONS]
        batch = make_batch([Group(prompt, [r.token_ids for r in group], log_probs=[r.log_probs for r in group])])
        batch = batch.to(run.accelerator.device)
        with autocast(run):
            rollout = run.recipe.rollout
            terms = token_terms(policy, batch, rollout.temperature, suppressed, filters=filters_of(rollout))
        found.append(trained_differences(terms.log_probs_BT, batch))
    policy.train(was_training)
    return torch.cat(found)


def trained_differences(log_probs_BC: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
    """[N] the trainer's log-probability less the engine's, of the trained tokens; empty where no engine wrote them."""
    if batch.engine_log_probs_BC is None:
        return torch.zeros(0)
    difference_BC = log_probs_BC.detach().cpu() - batch.engine_log_probs_BC.cpu()
    return difference_BC[batch.mask_BC.cpu() > 0]


def parity_figures(run: Run, log_probs: Sequence[torch.Tensor], batches: Sequence[TrainingBatch]) -> dict[str, Any]:
    """Gaps of the step's trained tokens, and the spread of the ratios of their probabilities, for the log."""
    mine = torch.cat([trained_differences(own, batch) for own, batch in zip(log_probs, batches, strict=True)])
    difference_N = torch.tensor(run.shard.gather(mine.tolist()))
    names = ("parity/mean", "parity/p99", "parity/max", "parity/ratio_std", "parity/ratio_min", "parity/ratio_max")
    if not len(difference_N):
        return dict.fromkeys(names)
    gap_N, ratio_N = difference_N.abs(), difference_N.exp()
    p99 = gap_N.kthvalue(1 + (99 * (len(gap_N) - 1)) // 100).values  # torch's quantile has a limit of numbers
    values = (gap_N.mean(), p99, gap_N.max(), ratio_N.std(correction=0), ratio_N.min(), ratio_N.max())
    return {name: float(value) for name, value in zip(names, values, strict=True)}
