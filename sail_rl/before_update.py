"""What is known of a step's micro-batches before they are trained: which optimizer step each belongs to, how the
starting model and the policy before the updates see its tokens, and which of these have a high entropy.

Suffixes: _B rows, _C tokens of a completion, _N tokens of all micro-batches and processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sail_rl.batch import TrainingBatch
from sail_rl.launch import Run
from sail_rl.losses import PolicyTerms, entropy_threshold
from sail_rl.model.frozen_tower import features_kept, has_frozen_tower
from sail_rl.model.lora import adapters_off
from sail_rl.model.prefix_sharing import ReadPrompt
from sail_rl.policy import compute_prompt
from sail_rl.routing import tokens_read
from sail_rl.sampling import filters_of
from sail_rl.sharding import autocast


@dataclass
class Known:
    """Of one micro-batch."""

    features: list[Any] | None
    """What a frozen tower gives, kept where the same pictures are passed again; None where they are not."""
    reference_BC: torch.Tensor | None = None
    """Log-probabilities of the starting model; None without a KL term."""
    old_BC: torch.Tensor | None = None
    """Of the policy before the step's updates; None until the first pass, if that is one of this policy."""
    chosen_BC: torch.Tensor | float = 1.0
    """1 on the tokens that the policy term trains."""


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step trains on, on this process."""

    batches: Sequence[TrainingBatch]
    normaliser: float
    """Of the loss, over all of them and all processes."""


@dataclass(frozen=True)
class Counts:
    """Of a mini-batch, on all processes."""

    read: float
    """Tokens, for the balance loss of a mixture of experts."""
    chosen: float
    """Tokens that the entropy bonus is a mean over."""


def before_update(
    run: Run, model, reference: nn.Module | None, mini_batches: Sequence[MiniBatch], suppressed: Sequence[int]
) -> list[list[Known]]:
    """For each mini-batch what is known of its micro-batches."""
    grpo, batches = run.recipe.grpo, [batch for mini_batch in mini_batches for batch in mini_batch.batches]
    keep = has_frozen_tower(model) and (grpo.num_iterations > 1 or reference is not None or grpo.looks_ahead)
    known = [Known([] if keep else None) for _ in batches]
    if reference is not None:
        with adapters_off(reference):
            for part, terms in zip(known, terms_now(run, reference, batches, known, suppressed), strict=True):
                part.reference_BC = terms.log_probs_BT
    if grpo.looks_ahead:
        terms_of = terms_now(run, model, batches, known, suppressed)
        for part, terms in zip(known, terms_of, strict=True):
            part.old_BC = terms.log_probs_BT
        if grpo.top_entropy_quantile < 1:
            choose_tokens(run, batches, known, [terms.entropy_BT for terms in terms_of])
    parts = iter(known)
    return [[next(parts) for _ in mini_batch.batches] for mini_batch in mini_batches]


@torch.no_grad()
def terms_now(
    run: Run, model, batches: Sequence[TrainingBatch], known: Sequence[Known], suppressed: Sequence[int]
) -> list[PolicyTerms]:
    """How a model sees each batch's tokens, in the policy's precision."""
    found = []
    temperature, filters = run.recipe.rollout.temperature, filters_of(run.recipe.rollout)
    with autocast(run):
        for part, (batch, prompt) in zip(known, after_their_prompts(run, model, batches), strict=True):
            with features_kept(model, part.features):
                found.append(model(batch, temperature, suppressed, prompt, filters))
    return found


def choose_tokens(
    run: Run, batches: Sequence[TrainingBatch], known: Sequence[Known], entropies: Sequence[torch.Tensor]
) -> None:
    """Pick the step's tokens with the highest entropy, among those of all micro-batches and processes."""
    mine = [e_BC[batch.mask_BC.to(e_BC.device) > 0] for e_BC, batch in zip(entropies, batches, strict=True)]
    everyone_N = torch.cat(run.shard.gather([torch.cat(mine).cpu()]))
    threshold = entropy_threshold(everyone_N, run.recipe.grpo.top_entropy_quantile)
    for part, entropy_BC in zip(known, entropies, strict=True):
        part.chosen_BC = (entropy_BC >= threshold).float()


def count_tokens(run: Run, mini_batch: MiniBatch, known: Sequence[Known]) -> Counts:
    """What is counted before the passes, since every micro-batch is divided by it."""
    chosen = 0.0
    for part, batch in zip(known, mini_batch.batches, strict=True):
        kept_BC = part.chosen_BC if isinstance(part.chosen_BC, float) else part.chosen_BC.cpu()
        chosen += float((batch.mask_BC * kept_BC).sum())
    return Counts(tokens_read(run, mini_batch.batches), run.sum({"chosen": chosen})["chosen"])


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
