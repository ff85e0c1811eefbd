"""One policy update: forward and backward over the micro-batches, clip, step.

Suffixes: _B rows, _C tokens of a completion.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from rollouts import Rollout
from sail_rl.advantage import Advantages
from sail_rl.batch import Group, TrainingBatch
from sail_rl.data.stream import Shard
from sail_rl.launch import Run
from sail_rl.losses import PolicyTerms, masked_sum, policy_loss, supervised_loss, token_log_probs
from sail_rl.questions import Question


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
            groups.append(Group(question.prompt, completions, [values[i] for i in members]))
    return groups


def forward(model, batch: TrainingBatch, temperature: float, suppressed: Sequence[int]) -> PolicyTerms:
    """Log-probabilities and entropies of the batch's completions, as the sampler saw them."""
    return token_log_probs(completion_logits(model, batch), batch.completion_ids_BC, temperature, suppressed)


def completion_logits(model, batch: TrainingBatch) -> torch.Tensor:
    """Logits [B, C, V] that predict each token of the completions."""
    output = model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        logits_to_keep=batch.completion_ids_BC.shape[1] + 1,
        use_cache=False,
        **batch.model_inputs,
    )
    return output.logits[:, :-1]  # position t predicts token t + 1


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
    recipe, device = run.recipe, run.accelerator.device
    grpo, temperature = recipe.grpo, recipe.rollout.temperature
    old_log_probs: dict[int, torch.Tensor] = {}
    sums = {"loss": 0.0, "tokens": 0.0, "entropy": 0.0, "clipped": 0.0, "kl": 0.0}
    grad_norm = 0.0
    for _ in range(grpo.num_iterations):
        optimizer.zero_grad()
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            reference_BC = reference_log_probs(reference, batch, temperature, suppressed)
            with sync_gradients(run, model, last=number == len(batches) - 1):
                terms = forward(model, batch, temperature, suppressed)
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
                    reference_log_probs_BT=reference_BC,
                )
                # Distributed wrappers average gradients over processes; the normaliser already counts all of them.
                run.accelerator.backward(loss * run.shard.world_size)
            batch_sums |= {"loss": float(loss.detach()), "tokens": float(batch.mask_BC.sum())}
            batch_sums["entropy"] = masked_sum(terms.entropy_BT, batch.mask_BC)
            sums = {name: total + batch_sums.get(name, 0.0) for name, total in sums.items()}
        grad_norm = float(run.accelerator.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm))
        optimizer.step()
    return update_figures(run.sum(sums), grpo.num_iterations, grad_norm, with_kl=reference is not None)


def update_supervised(run: Run, model, optimizer, batches: Sequence[TrainingBatch]) -> dict[str, Any]:
    """One optimizer step of imitation; figures for the log."""
    tokens = run.sum({"tokens": sum(float(batch.mask_BC.sum()) for batch in batches)})["tokens"]
    sums = {"nll": 0.0, "entropy": 0.0, "right": 0.0}
    optimizer.zero_grad()
    for number, batch in enumerate(batches):
        batch = batch.to(run.accelerator.device)
        with sync_gradients(run, model, last=number == len(batches) - 1):
            logits_BCV = completion_logits(model, batch)
            terms = token_log_probs(logits_BCV, batch.completion_ids_BC)
            loss, batch_sums = supervised_loss(terms.log_probs_BT, batch.mask_BC, normaliser=tokens)
            run.accelerator.backward(loss * run.shard.world_size)
        batch_sums["right"] = masked_sum(logits_BCV.argmax(-1) == batch.completion_ids_BC, batch.mask_BC)
        batch_sums["entropy"] = masked_sum(terms.entropy_BT, batch.mask_BC)
        sums = {name: total + batch_sums[name] for name, total in sums.items()}
    grad_norm = float(run.accelerator.clip_grad_norm_(model.parameters(), run.recipe.optim.max_grad_norm))
    optimizer.step()
    sums = run.sum(sums)
    return {
        "loss": sums["nll"] / tokens,
        "token_accuracy": sums["right"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "grad_norm": grad_norm,
        "tokens/trained": tokens,
    }


def reference_log_probs(reference, batch: TrainingBatch, temperature: float, suppressed) -> torch.Tensor | None:
    """How the starting model sees the same tokens; None without a KL term."""
    if reference is None:
        return None
    with torch.no_grad():
        return forward(reference, batch, temperature, suppressed).log_probs_BT


def sync_gradients(run: Run, model, last: bool):
    """Let processes exchange gradients in the last micro-batch alone."""
    return nullcontext() if last else run.accelerator.no_sync(model)


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
