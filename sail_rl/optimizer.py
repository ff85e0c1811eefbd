"""AdamW and the learning rate, a function of the step alone."""

import math

import torch

from sail_rl.config import OptimSection


def make_optimizer(model: torch.nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW over what is trained; matrices decay, vectors (norms, biases) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.adam_beta1, optim.adam_beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer, optim: OptimSection, step: int, max_steps: int) -> float:
    """Set and return the rate of this step (the first is 1)."""
    rate = optim.learning_rate * schedule(optim, step, max_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def schedule(optim: OptimSection, step: int, max_steps: int) -> float:
    """Share of the peak rate: linear warm-up, then constant, linear or cosine decay to `min_lr_ratio`."""
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    if optim.lr_scheduler_type == "constant":
        return 1.0
    done = (step - 1 - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps)
    remaining = 1 - done if optim.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * remaining
