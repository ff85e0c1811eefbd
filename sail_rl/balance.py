"""Sharing a step's groups out among the processes, so that none waits long for the others in the update.

Each process has the groups that it sampled or read. Some are long, some have many pictures, some have lost their signal
and with it their part in the update. What is evened out are the tokens for the language model and, as another amount of
work, the tiles (for Qwen-VL and native sizes the patches) for the tower. A group that changes hands is sent whole,
pictures and all.
Suffixes: _P processes, _A amounts (tokens, tiles), _I and _J groups of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from sail_rl.batch import Form, Group, TrainingBatch
from sail_rl.data.packing import size
from sail_rl.launch import Run

TOLERATED = 0.05  # of the mean load: a difference that is not worth a message
WORTHWHILE = 1e-4  # of the squared mean load: what an exchange must gain, so that each brings the end nearer


@dataclass(frozen=True)
class Move:
    """A group that another process will train."""

    source: int
    number: int
    """Among the groups of its source."""
    target: int


class Work(NamedTuple):
    """What a group costs; a tuple of whole numbers, which processes exchange."""

    tokens: int
    tiles: int


def work_of(group: Group, form: Form) -> Work:
    """A shared prompt's pictures are read once, others once for each completion."""
    copies = 1 if form == "shared" else len(group.completions)
    return Work(size([group], form), tiles_of(group.prompt.model_inputs) * copies)


def tiles_of(model_inputs) -> int:
    """Tiles, or patches where the model takes pictures as these."""
    return len(model_inputs.get("pixel_values", ()))


def share_work(run: Run, groups: list[Group], form: Form) -> list[Group]:
    """This process's groups after some have changed hands."""
    if run.shard.world_size == 1:
        return groups
    rank, costs = run.shard.rank, run.shard.gather([[work_of(group, form) for group in groups]])
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


def plan_moves(costs: Sequence[Sequence[tuple[int, int]]]) -> list[Move]:
    """Groups change hands, or places, between the two processes that are furthest apart, until nothing is gained.

    `costs` are those of each process's groups. All processes come to the same plan.
    """
    total_A = np.array([cost for own in costs for cost in own]).reshape(-1, 2).sum(0)
    mean_A = (total_A / len(costs)).clip(min=1)
    held = [
        {(rank, number): np.array(cost) / mean_A for number, cost in enumerate(own)} for rank, own in enumerate(costs)
    ]
    while True:
        loads_PA = np.array([sum(own.values(), np.zeros(2)) for own in held])
        gaps_A = np.ptp(loads_PA, axis=0)
        for amount in np.argsort(-gaps_A, kind="stable"):
            most, least = int(loads_PA[:, amount].argmax()), int(loads_PA[:, amount].argmin())
            exchange = best_exchange(held[most], held[least], loads_PA[most] - loads_PA[least])
            if gaps_A[amount] > TOLERATED and exchange:
                break
        else:
            break
        for group, source, target in zip(exchange, (most, least), (least, most), strict=True):
            if group is not None:
                held[target][group] = held[source].pop(group)
    return [Move(*group, rank) for rank, own in enumerate(held) for group in own if group[0] != rank]


Place = tuple[int, int]  # a group by its first process and its number there


def best_exchange(
    more: dict[Place, np.ndarray], less: dict[Place, np.ndarray], gap_A: np.ndarray
) -> tuple[Place, Place | None] | None:
    """The group to give, and the one to take for it if any, that bring two processes closest; None if none does."""
    if not more:
        return None
    given_IA = np.array(list(more.values()))
    taken_JA = np.array([np.zeros(2), *less.values()])
    # Moving d from one to the other changes the sum of their squared loads by 2 d (d - gap).
    moved_IJA = given_IA[:, None] - taken_JA
    gains_IJ = -(moved_IJA * (moved_IJA - gap_A)).sum(-1)
    given, taken = np.unravel_index(gains_IJ.argmax(), gains_IJ.shape)
    if gains_IJ[given, taken] < WORTHWHILE:
        return None
    return list(more)[given], [None, *less][taken]


def work_figures(run: Run, batches: Sequence[TrainingBatch], token_budget: int) -> dict[str, float]:
    """How full the micro-batches are, and how much more than the mean the most loaded process has to do."""
    own = [Work(batch.input_ids_RT.numel(), tiles_of(batch.model_inputs)) for batch in batches]
    loads_PA = np.array(run.shard.gather([[sum(work.tokens for work in own), sum(work.tiles for work in own)]]))
    most_A = loads_PA.max(0) / loads_PA.mean(0).clip(min=1)
    filled = float(loads_PA[:, 0].sum()) / (token_budget * len(batches) * run.shard.world_size)
    return {"work/batches": len(batches), "work/filled": filled} | {
        f"work/{name}_most_by_mean": float(most) for name, most in zip(Work._fields, most_A, strict=True)
    }
