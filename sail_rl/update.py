"""One policy update: forward and backward over the micro-batches, clip, step.

Suffixes: _B rows, _C tokens of a completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from rollouts import Rollout
from sail_rl.advantage import Advantages
from sail_rl.batch import Group, TrainingBatch
from sail_rl.config import GrpoRecipe
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.losses import balance_loss, importance_weights, masked_sum, policy_loss
from sail_rl.model.frozen_tower import features_kept, has_frozen_tower
from sail_rl.model.lora import adapters_off
from sail_rl.model.prefix_sharing import ReadPrompt
from sail_rl.model.router import experts_per_token, find_routers, recorded_routers
from sail_rl.parity import parity_figures
from sail_rl.policy import compute_prompt
from sail_rl.questions import Question
from sail_rl.sampling import filters_of
from sail_rl.sharding import autocast, clip_and_step, sharding_of, sync_gradients


def make_groups(
    questions: Sequence[Question],
    rollouts: Sequence[Rollout],
    advantages: Advantages,
    shard: Shard,
    keep_all: bool,
) -> list[Group]:
    """This process's groups for the update.

    A group whose rewards are all equal has no gradient and is left out, unless a KL term makes it count (`keep_all`).
    """
    size = len(rollouts) // len(questions)
    values = shard.slice(advantages.values_N.tolist())
    scored = shard.slice(advantages.scored_N.tolist())
    has_signal = shard.slice(advantages.has_signal_P.tolist())
    groups = []
    for number, question in enumerate(questions):
        members = [i for i in range(number * size, (number + 1) * size) if scored[i]]
        if members and (has_signal[number] or keep_all):
            completions = [rollouts[i].token_ids for i in members]
            log_probs = [rollouts[i].log_probs for i in members]
            groups.append(Group(question.prompt, completions, [values[i] for i in members], log_probs))
    return groups


def update_policy(
    run: Run,
    model,
    reference,
    optimizer,
    batches: Sequence[TrainingBatch],
    normaliser: float,
    suppressed: Sequence[int],
) -> dict[str, Any]:
    """`grpo.num_iterations` optimizer steps on one step's rollouts; figures for the log."""
    recipe = run.recipe
    grpo, temperature, filters = recipe.grpo, recipe.rollout.temperature, filters_of(recipe.rollout)
    old_log_probs: dict[int, torch.Tensor] = {}
    sums = {"loss": 0.0, "tokens": 0.0, "entropy": 0.0, "clipped": 0.0, "kl": 0.0, "balance": 0.0, "largest_share": 0.0}
    grad_norm, read = 0.0, tokens_read(run, batches)
    # What a frozen tower gives does not change: it is kept where the same pictures are passed again.
    keep = has_frozen_tower(model) and (grpo.num_iterations > 1 or reference is not None)
    features: list[Any] = [[] if keep else None for _ in batches]
    references = reference_log_probs(run, reference, batches, suppressed, features)
    for _ in range(grpo.num_iterations):
        optimizer.zero_grad()
        for number, (batch, prompt) in enumerate(after_their_prompts(run, model, batches)):
            with sync_gradients(run, model, last=number == len(batches) - 1):
                with recorded_routers(model) as router_logits, features_kept(model, features[number]):
                    terms = model(batch, temperature, suppressed, prompt, filters)
                # The first pass is on-policy: its own log-probabilities are the old ones, at no extra cost.
                old_BC = old_log_probs.setdefault(number, terms.log_probs_BT.detach())
                loss, batch_sums = policy_loss(
                    terms.log_probs_BT,
                    old_BC,
                    batch.advantages_B,
                    batch.mask_BC,
                    loss_type=grpo.loss_type,
                    epsilon=grpo.epsilon,
                    epsilon_high=grpo.epsilon_high or grpo.epsilon,
                    normaliser=normaliser,
                    beta=grpo.beta,
                    reference_log_probs_BT=references[number],
                    importance_BT=importance_of(run.recipe, old_BC, batch),
                )
                balance, routing_sums = balance_term(run, model, router_logits, batch, read)
                # Distributed wrappers average gradients over processes; the normaliser already counts all of them.
                run.accelerator.backward((loss + balance) * run.shard.world_size)
            batch_sums |= routing_sums | {"loss": float(loss.detach()), "tokens": float(batch.mask_BC.sum())}
            batch_sums["entropy"] = masked_sum(terms.entropy_BT, batch.mask_BC)
            sums = {name: total + batch_sums.get(name, 0.0) for name, total in sums.items()}
        grad_norm = clip_and_step(run, model, optimizer)
    sums = run.sum(sums)
    figures = update_figures(sums, grpo.num_iterations, grad_norm, with_kl=reference is not None)
    return figures | routing_figures(model, sums, grpo.num_iterations) | parity_figures(run, old_log_probs, batches)


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


def after_their_prompts(
    run: Run, model, batches: Sequence[TrainingBatch]
) -> Iterator[tuple[TrainingBatch, ReadPrompt | None]]:
    """Each batch, and the prompt that was computed before it if there is one: once for all batches that share it.

    When these have had their backward passes, which is when the next batch is asked for, the prompt has its own.
    """
    device = run.accelerator.device
    for _, sharing in groupby(batches, key=lambda batch: id(batch.prompt)):
        first, *others = sharing
        row = first.prompt and first.prompt.to(device)
        with autocast(run):
            prompt = compute_prompt(run.accelerator.unwrap_model(model).model, row) if row else None
        for batch in (first, *others):
            yield replace(replace(batch, prompt=None).to(device), prompt=row), prompt
        if prompt and torch.is_grad_enabled():
            prompt.backward()


def tokens_read(run: Run, batches: Sequence[TrainingBatch]) -> float:
    """Tokens that the step's completions read, a prompt once for each of them, on all processes."""
    return run.sum({"read": sum(float(batch.readers_RT.sum()) for batch in batches)})["read"]


def balance_term(
    run: Run, model, router_logits: Sequence[torch.Tensor], batch: TrainingBatch, read: float
) -> tuple[torch.Tensor | float, dict[str, float]]:
    """What a mixture of experts adds to the loss, and its sums for the log; nothing for a dense model."""
    if not router_logits:
        return 0.0, {}
    experts = experts_per_token(run.accelerator.unwrap_model(model).model)
    readers_N, everyone = batch.readers_RT.flatten(), run.accelerator.reduce
    loss, sums = balance_loss(router_logits, readers_N, experts, max(read, 1.0), everyone)
    return run.recipe.model.router_aux_loss_coef * loss, sums


def routing_figures(model, sums: dict[str, float], iterations: int) -> dict[str, float]:
    """How evenly a mixture uses its experts: the loss is at best the number of experts per token, and the largest share
    that an expert has of its layer's work at best one by their number."""
    if not find_routers(model):
        return {}
    names = {"router/balance_loss": "balance", "router/largest_share": "largest_share"}
    return {name: sums[key] / iterations for name, key in names.items()}


@torch.no_grad()
def reference_log_probs(
    run: Run, reference: nn.Module | None, batches: Sequence[TrainingBatch], suppressed: Sequence[int], features
) -> list[torch.Tensor | None]:
    """How the starting model sees each batch's tokens, in the policy's precision; None without a KL term."""
    if reference is None:
        return [None] * len(batches)
    found: list[torch.Tensor | None] = []
    temperature, filters = run.recipe.rollout.temperature, filters_of(run.recipe.rollout)
    with adapters_off(reference), autocast(run):
        for number, (batch, prompt) in enumerate(after_their_prompts(run, reference, batches)):
            with features_kept(reference, features[number]):
                terms = reference(batch, temperature, suppressed, prompt, filters)
            found.append(terms.log_probs_BT)
    return found


def update_figures(sums: dict[str, float], iterations: int, grad_norm: float, with_kl: bool) -> dict[str, Any]:
    """Means over the tokens that were trained."""
    tokens = max(sums["tokens"], 1.0)
    figures = {
        "loss": sums["loss"] / iterations,
        "entropy": sums["entropy"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "grad_norm": grad_norm,
        "tokens/trained": sums["tokens"] / iterations,
    }
    return figures | {"kl": sums["kl"] / tokens if with_kl else None}
