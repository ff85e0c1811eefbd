"""What each of two processes does in test_router.py: a module of its own, so that a spawned process starts quickly."""

import torch
import torch.distributed as dist

from sail_rl.losses import balance_loss

LAYERS, TOKENS, EXPERTS, PER_TOKEN = 3, 40, 8, 2


def random_logits(seed=0, tokens=TOKENS):
    """Router logits with preferences of each layer's own."""
    generator = torch.Generator().manual_seed(seed)
    preferences_LE = torch.randn(LAYERS, EXPERTS, generator=generator)
    logits_LNE = 2 * torch.randn(LAYERS, tokens, EXPERTS, generator=generator) + preferences_LE[:, None]
    return [logits_NE.requires_grad_() for logits_NE in logits_LNE]


def half_mask(tokens=TOKENS):
    return torch.arange(tokens) % 3 > 0


def part_of_a_process(rank, folder):
    """One of two gloo processes: the loss and the gradient of its tokens, 15 of them or 25."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)

    def sum_over_processes(tensor):
        dist.all_reduce(tensor)
        return tensor

    mine = slice(0, 15) if rank == 0 else slice(15, TOKENS)
    logits = [logits_NE[mine].detach().requires_grad_() for logits_NE in random_logits()]
    normaliser = float(half_mask().sum())
    loss, sums = balance_loss(logits, half_mask()[mine], PER_TOKEN, normaliser, sum_over_processes)
    torch.save((loss.detach(), sums, torch.autograd.grad(loss, logits)), folder / f"{rank}.pt")
    dist.destroy_process_group()
