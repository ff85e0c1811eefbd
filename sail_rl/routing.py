"""What a mixture of experts adds to an update: the balance loss, and figures of how its experts are used."""

from collections.abc import Sequence

import torch

from sail_rl.batch import TrainingBatch
from sail_rl.launch import Run
from sail_rl.losses import balance_loss
from sail_rl.model.router import experts_per_token, find_routers


def tokens_read(run: Run, batches: Sequence[TrainingBatch]) -> float:
    """Tokens that the completions read, a prompt once for each of them, on all processes."""
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


def routing_figures(model, sums: dict[str, float], updates: int) -> dict[str, float]:
    """How evenly a mixture uses its experts: the loss is at best the number of experts per token, the largest share
    that an expert has of its layer's work at best one by their number, and the entropy of these shares, in nats and a
    mean over layers, the logarithm of their number."""
    if not find_routers(model):
        return {}
    names = {"balance_loss": "balance", "largest_share": "largest_share", "expert_entropy": "expert_entropy"}
    return {f"router/{name}": sums[key] / updates for name, key in names.items()}
