"""One step of imitation: the conditional loss, whose target and scale depend on a sample's kind, and its figures.

Suffixes: _B samples, _C tokens of a target.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sail_rl.batch import TrainingBatch
from sail_rl.config import SftSection
from sail_rl.config_data import KINDS
from sail_rl.launch import Run
from sail_rl.losses import PolicyTerms, masked_sum, sample_scales, supervised_loss
from sail_rl.model.router import recorded_routers
from sail_rl.routing import balance_term, routing_figures, tokens_read
from sail_rl.sharding import backward, clip_and_step, sync_gradients
from sail_rl.skipped import reason, skipped_figures


def update_supervised(run: Run, model, optimizer, batches: Sequence[TrainingBatch]) -> dict[str, Any]:
    """One optimizer step of imitation; figures for the log."""
    counts = kind_counts(run, batches)
    scales = step_scales(run.recipe.sft, counts)
    read, sums = tokens_read(run, batches), dict[str, float]()
    optimizer.zero_grad()
    for number, batch in enumerate(batches):
        batch = batch.to(run.accelerator.device)
        scales_B = torch.tensor([scales.get(kind, 0.0) for kind in batch.kinds_B], device=batch.mask_BC.device)
        with sync_gradients(run, model, last=number == len(batches) - 1):
            with recorded_routers(model) as router_logits:
                terms = model(batch)
            loss = supervised_loss(terms.log_probs_BT, batch.mask_BC, scales_B)
            balance, routing_sums = balance_term(run, model, router_logits, batch, read)
            backward(run, loss + balance)
        batch_sums = routing_sums | {"loss": float(loss.detach())} | kind_sums(terms, batch)
        sums = {name: sums.get(name, 0.0) + value for name, value in batch_sums.items()}
    grad_norm = clip_and_step(run, model, optimizer)
    skipped = [] if math.isfinite(grad_norm) else [reason(run, [], sums["loss"], grad_norm)]
    sums = run.sum(sums)
    figures = supervised_figures(run.recipe.data.thinking, sums, counts) | {"grad_norm": grad_norm}
    figures |= skipped_figures(skipped)
    return figures | routing_figures(model, sums, updates=1)


def kind_counts(run: Run, batches: Sequence[TrainingBatch]) -> dict[str, float]:
    """Trained samples and tokens of each kind, on all processes."""
    counts = dict.fromkeys((f"{what}/{kind}" for what in ("samples", "tokens") for kind in KINDS), 0.0)
    for batch in batches:
        for kind, tokens in zip(batch.kinds_B, batch.mask_BC.sum(1).tolist(), strict=True):
            counts[f"samples/{kind}"] += float(tokens > 0)
            counts[f"tokens/{kind}"] += tokens
    return run.sum(counts)


def step_scales(sft: SftSection, counts: Mapping[str, float]) -> dict[str, float]:
    """The scale of a sample's loss by its kind, as `sft.normalise_by` says."""
    samples, tokens = ({kind: counts[f"{what}/{kind}"] for kind in KINDS} for what in ("samples", "tokens"))
    return sample_scales(sft.normalise_by, samples, tokens, sft.kind_weights.model_dump())


def kind_sums(terms: PolicyTerms, batch: TrainingBatch) -> dict[str, float]:
    """Sums over a micro-batch's trained tokens, of each kind apart."""
    sums = {}
    for kind in KINDS:
        is_kind_B = torch.tensor([own == kind for own in batch.kinds_B], device=batch.mask_BC.device)
        mask_BC = batch.mask_BC * is_kind_B[:, None]
        sums[f"nll/{kind}"] = -masked_sum(terms.log_probs_BT, mask_BC)
        sums[f"right/{kind}"] = masked_sum(terms.likeliest_BT, mask_BC)
        sums[f"entropy/{kind}"] = masked_sum(terms.entropy_BT, mask_BC)
    return sums


def supervised_figures(thinking: str, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, Any]:
    """The loss and means over tokens; where a batch may mix kinds also of each apart, None of one that is absent."""

    def mean(what: str, kinds: Sequence[str]) -> float | None:
        tokens = sum(counts[f"tokens/{kind}"] for kind in kinds)
        return sum(sums[f"{what}/{kind}"] for kind in kinds) / tokens if tokens else None

    figures: dict[str, Any] = {
        "loss": sums["loss"],
        "nll": mean("nll", KINDS),
        "token_accuracy": mean("right", KINDS),
        "entropy": mean("entropy", KINDS),
        "tokens/trained": sum(counts[f"tokens/{kind}"] for kind in KINDS),
    }
    for kind in KINDS if thinking == "by_kind" else ():
        figures |= {f"nll/{kind}": mean("nll", [kind]), f"token_accuracy/{kind}": mean("right", [kind])}
        figures |= {f"{what}/{kind}": counts[f"{what}/{kind}"] for what in ("samples", "tokens")}
    return figures
