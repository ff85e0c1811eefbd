"""A step's policy updates: forward and backward over the micro-batches, clip, step.

Suffixes: _B rows, _C tokens of a completion.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rollouts import Rollout
from sail_rl.advantage import Advantages
from sail_rl.batch import Group, TrainingBatch
from sail_rl.before_update import Counts, Known, MiniBatch, after_their_prompts, before_update, count_tokens
from sail_rl.config import GrpoRecipe
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.losses import PolicyTerms, entropy_bonus, importance_weights, masked_sum, policy_loss
from sail_rl.model.frozen_tower import features_kept
from sail_rl.model.router import find_routers, recorded_routers
from sail_rl.parity import parity_figures
from sail_rl.questions import Question
from sail_rl.routing import balance_term, routing_figures
from sail_rl.sampling import filters_of
from sail_rl.sharding import backward, clip_and_step, sharding_of, sync_gradients
from sail_rl.skipped import reason, skipped_figures


def make_groups(
    questions: Sequence[Question],
    rollouts: Sequence[Rollout],
    advantages: Advantages,
    shard: Shard,
    keep_all: bool,
    mask_truncated: bool = False,
) -> list[Group]:
    """This process's groups for the update, without completions that are masked.

    A group whose rewards are all equal has no gradient and is left out, unless another term needs it (`keep_all`).
    """
    size = len(rollouts) // len(questions)
    values = shard.slice(advantages.values_N.tolist())
    scored = shard.slice(advantages.scored_N.tolist())
    has_signal = shard.slice(advantages.has_signal_P.tolist())
    numbers = shard.slice(advantages.numbers_P.tolist())
    groups = []
    for number, question in enumerate(questions):
        members = [i for i in range(number * size, (number + 1) * size) if scored[i]]
        members = [i for i in members if not (mask_truncated and rollouts[i].finish_reason == "length")]
        if members and (has_signal[number] or keep_all):
            completions = [rollouts[i].token_ids for i in members]
            log_probs = [rollouts[i].log_probs for i in members]
            own = [values[i] for i in members]
            groups.append(Group(question.prompt, completions, own, log_probs, number=numbers[number]))
    return groups


def update_policy(
    run: Run, model, reference, optimizer, mini_batches: Sequence[MiniBatch], suppressed: Sequence[int]
) -> dict[str, Any]:
    """An optimizer step for each mini-batch, `grpo.num_iterations` times; figures for the log."""
    iterations = run.recipe.grpo.num_iterations
    known = before_update(run, model, reference, mini_batches, suppressed)
    counts = [count_tokens(run, *pair) for pair in zip(mini_batches, known, strict=True)]
    sums, grad_norm, skipped = dict[str, float](), 0.0, list[str]()
    for _ in range(iterations):
        for mini_batch, parts, counted in zip(mini_batches, known, counts, strict=True):
            own, grad_norm = update_once(run, model, optimizer, mini_batch, parts, counted, suppressed)
            sums = added(sums, own)
            if not math.isfinite(grad_norm):
                tensors = [known_tensors(*pair) for pair in zip(mini_batch.batches, parts, strict=True)]
                skipped.append(reason(run, tensors, own["loss"], grad_norm))
    sums, updates = run.sum(sums), iterations * len(mini_batches)
    figures = update_figures(sums, iterations, updates, grad_norm) | skipped_figures(skipped)
    batches = [batch for mini_batch in mini_batches for batch in mini_batch.batches]
    old_log_probs = [part.old_BC for parts in known for part in parts if part.old_BC is not None]
    return figures | routing_figures(model, sums, updates) | parity_figures(run, old_log_probs, batches)


def update_once(
    run: Run, model, optimizer, mini_batch: MiniBatch, known: Sequence[Known], counts: Counts, suppressed: Sequence[int]
) -> tuple[dict[str, float], float]:
    """An optimizer step for a mini-batch: its sums for the log, and the gradient's norm."""
    optimizer.zero_grad()
    sums = dict[str, float]()
    for one in passes(run, model, mini_batch, known, counts, suppressed):
        sums = added(sums, one)
    return sums, clip_and_step(run, model, optimizer)


def added(sums: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Sums with those of another part."""
    return {name: sums.get(name, 0.0) + value for name, value in more.items()}


def passes(
    run: Run, model, mini_batch: MiniBatch, known: Sequence[Known], counts: Counts, suppressed: Sequence[int]
) -> Iterator[dict[str, float]]:
    """Forward and backward over the micro-batches; of each the sums for the log."""
    rollout = run.recipe.rollout
    filters, last = filters_of(rollout), len(mini_batch.batches) - 1
    for number, (batch, prompt) in enumerate(after_their_prompts(run, model, mini_batch.batches)):
        part = known[number]
        with sync_gradients(run, model, last=number == last):
            with recorded_routers(model) as router_logits, features_kept(model, part.features):
                terms = model(batch, rollout.temperature, suppressed, prompt, filters)
            if part.old_BC is None:
                # The first pass is on-policy: its own log-probabilities are the old ones, at no extra cost.
                part.old_BC = terms.log_probs_BT.detach()
            loss, sums = batch_loss(run.recipe, terms, batch, part, mini_batch.normaliser, counts)
            balance, routing_sums = balance_term(run, model, router_logits, batch, counts.read)
            backward(run, loss + balance)
        yield sums | routing_sums | {"loss": float(loss.detach()), "tokens": float(batch.mask_BC.sum())}


def known_tensors(batch: TrainingBatch, known: Known) -> dict[str, torch.Tensor | None]:
    """What a micro-batch's loss is made of, by name."""
    return {
        "advantages": batch.advantages_B,
        "log-probabilities by the engine": batch.engine_log_probs_BC,
        "log-probabilities by the starting model": known.reference_BC,
        "log-probabilities by the policy": known.old_BC,
    }


def batch_loss(
    recipe: GrpoRecipe, terms: PolicyTerms, batch: TrainingBatch, known: Known, normaliser: float, counts: Counts
) -> tuple[torch.Tensor, dict[str, float]]:
    """A micro-batch's part of the loss, and its sums for the log."""
    assert known.old_BC is not None
    loss, sums = policy_loss(
        terms.log_probs_BT,
        known.old_BC,
        batch.advantages_B,
        batch.mask_BC,
        recipe.grpo,
        normaliser,
        reference_log_probs_BT=known.reference_BC,
        importance_BT=importance_of(recipe, known.old_BC, batch),
        chosen_BT=known.chosen_BC,
    )
    if recipe.grpo.entropy_coef:
        chosen_BC = batch.mask_BC * known.chosen_BC
        loss = loss - entropy_bonus(terms.entropy_BT, chosen_BC, recipe.grpo.entropy_coef, counts.chosen)
    return loss, sums | {"entropy": masked_sum(terms.entropy_BT, batch.mask_BC)}


def importance_of(recipe: GrpoRecipe, old_BC: torch.Tensor, batch: TrainingBatch) -> torch.Tensor | float:
    """Weights for what the engine's log-probabilities were off; 1 where the recipe corrects nothing."""
    if batch.engine_log_probs_BC is None:
        return 1.0
    grpo, wanted = recipe.grpo, recipe.grpo.vllm_importance_sampling_correction
    if not (recipe.rollout.engine != "hf" if wanted is None else wanted):
        return 1.0
    return importance_weights(
        old_BC,
        batch.engine_log_probs_BC,
        batch.mask_BC,
        mode=grpo.vllm_importance_sampling_mode,
        clip_min=grpo.vllm_importance_sampling_clip_min,
        clip_max=grpo.vllm_importance_sampling_clip_max,
    )


def prompts_apart(run: Run, model) -> bool:
    """Whether the backward pass of a prompt may follow those of several batches that read it.

    Sharded weights are there only within the passes of their wrapper. A balance loss is summed over processes batch by
    batch, and they may have different numbers of prompts.
    """
    return not sharding_of(run.accelerator) and not find_routers(model)


def update_figures(sums: dict[str, float], iterations: int, updates: int, grad_norm: float) -> dict[str, Any]:
    """Means over the tokens that were trained, and of the loss over the updates."""
    tokens = max(sums["tokens"], 1.0)
    return {
        "loss": sums["loss"] / updates,
        "entropy": sums["entropy"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "grad_norm": grad_norm,
        "tokens/trained": sums["tokens"] / iterations,
        "kl": sums["kl"] / tokens if "kl" in sums else None,
    }
