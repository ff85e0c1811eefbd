"""What each of two processes does in test_balance.py: a module of its own, so that a spawned process starts quickly."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from rollouts import Prompt
from sail_rl.balance import share_work
from sail_rl.batch import Group
from sail_rl.data.stream import Shard

LENGTHS = [(40, 10, 10), (5,)]  # of the completion of each group of each process


def group_of(rank, number):
    """With a picture of its own."""
    prompt = Prompt(
        f"{rank}-{number}", [1, 2], ("a picture",), {"pixel_values": torch.full((1, 3), rank + number / 10)}
    )
    return Group(prompt, [[7] * LENGTHS[rank][number]], [float(number)])


def share_as_a_process(rank, folder):
    """One of two gloo processes: what it holds at the end."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)

    def gather(items):
        found = [None, None]
        dist.all_gather_object(found, items)
        return [item for own in found for item in own]

    run = SimpleNamespace(shard=Shard(rank, 2, gather), accelerator=SimpleNamespace(device=torch.device("cpu")))
    groups = share_work(run, [group_of(rank, number) for number in range(len(LENGTHS[rank]))], "shared")
    torch.save(groups, folder / f"{rank}.pt")
    dist.destroy_process_group()
