"""Sharing a step's groups out among the processes, so that none waits long for the others in the update.

Each process has the groups that it sampled. Some have long completions, some have lost their signal and with it their
part in the update. A group that changes hands is sent whole, pictures and all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from sail_rl.batch import Form, Group, size
from sail_rl.launch import Run

TOLERATED = 0.05  # of the mean load: a difference that is not worth a message


@dataclass(frozen=True)
class Move:
    """A group that another process will train."""

    source: int
    number: int
    """Among the groups of its source."""
    target: int


def share_work(run: Run, groups: list[Group], form: Form) -> list[Group]:
    """This process's groups after some have changed hands."""
    if run.shard.world_size == 1:
        return groups
    rank, costs = run.shard.rank, run.shard.gather([[size([group], form) for group in groups]])
    moves = plan_moves(costs)
    gone = {move.number for move in moves if move.source == rank}
    kept = [group for number, group in enumerate(groups) if number not in gone]
    for move in moves:
        if move.source == rank:
            group = groups[move.number]
            bare = replace(group, prompt=replace(group.prompt, images=()))  # trained from its pixel values
            dist.send_object_list([bare], move.target, device=run.accelerator.device)
        elif move.target == rank:
            received: list = [None]
            dist.recv_object_list(received, move.source, device=run.accelerator.device)
            kept += received
    return kept


def plan_moves(costs: Sequence[Sequence[int]]) -> list[Move]:
    """From the most to the least loaded process, the group that best evens the two; again while a difference is left.

    `costs` are those of each process's groups. All processes come to the same plan.
    """
    held = [{(rank, number): cost for number, cost in enumerate(own)} for rank, own in enumerate(costs)]
    tolerated = TOLERATED * sum(map(sum, costs)) / len(costs)
    while True:
        loads = [sum(own.values()) for own in held]
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        smaller = {group: cost for group, cost in held[most].items() if cost < gap}
        if gap <= tolerated or not smaller:
            break
        group = min(smaller, key=lambda group: abs(gap - 2 * smaller[group]))
        held[least][group] = held[most].pop(group)
    return [Move(*group, rank) for rank, own in enumerate(held) for group in own if group[0] != rank]
