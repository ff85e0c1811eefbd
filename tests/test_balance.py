"""Groups change hands until processes have about the same to do."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from share_work_process import LENGTHS, group_of, share_as_a_process

from sail_rl.balance import Move, plan_moves, work_figures
from sail_rl.data.stream import Shard


@pytest.mark.parametrize(
    ("costs", "moves"),
    [
        ([[3, 3], [3, 3]], []),
        ([[10], [1]], []),  # one group cannot be shared
        ([[5, 5], []], [Move(0, 0, 1)]),
        ([[100, 100], [95, 101]], []),  # not worth a message
        ([[8, 2, 2], [4]], [Move(1, 0, 0), Move(0, 0, 1)]),  # they change places
        ([[], [6, 6, 6], []], [Move(1, 0, 0), Move(1, 1, 2)]),
        ([[], []], []),
    ],
)
def test_moves(costs, moves):
    assert plan_moves([[(cost, 0) for cost in own] for own in costs]) == moves


def loads_after(costs, moves):
    """[processes, (tokens, tiles)]."""
    loads = np.array([np.array(own).reshape(-1, 2).sum(0) for own in costs])
    for move in moves:
        loads[move.source] -= costs[move.source][move.number]
        loads[move.target] += costs[move.source][move.number]
    return loads


def test_loads_come_close_and_nothing_is_lost():
    rng = random.Random(0)
    for _ in range(50):
        costs = [[(rng.randint(1, 1000), 0) for _ in range(rng.randint(0, 16))] for _ in range(4)]
        moves = plan_moves(costs)
        assert len({(move.source, move.number) for move in moves}) == len(moves)
        loads, before = loads_after(costs, moves)[:, 0], loads_after(costs, [])[:, 0]
        largest = max(tokens for own in costs for tokens, _ in own)
        assert loads.sum() == before.sum()
        assert loads.max() - loads.min() <= max(largest, 0.05 * before.mean())
        assert loads.max() <= before.max()


@pytest.mark.parametrize("processes", [2, 8])
def test_tokens_and_tiles_are_both_evened_out(processes):
    """Ragged samples: text alone, a picture of few tiles, of many; some processes have only one sort."""
    rng = random.Random(processes)
    for trial in range(5):
        costs = []
        for process in range(processes):
            tiles = [0] if process == trial % processes else [0, 1, 3, 7, 13]
            counts = [rng.choice(tiles) for _ in range(32)]
            costs.append([(256 * count + int(rng.lognormvariate(5, 1)), count) for count in counts])
        loads, before = loads_after(costs, plan_moves(costs)), loads_after(costs, [])
        assert (loads.sum(0) == before.sum(0)).all()
        assert (loads.max(0) <= 1.05 * before.mean(0)).all(), loads
        assert before[:, 1].max() > 1.15 * before[:, 1].mean()  # there was something to even out


def test_figures_of_the_work_done():
    tokens = torch.zeros(1, 30)
    batches = [SimpleNamespace(input_ids_RT=tokens, model_inputs={"pixel_values": torch.zeros(3, 1)})]
    batches.append(SimpleNamespace(input_ids_RT=tokens, model_inputs={}))
    shard = Shard(0, 2, lambda items: [*items, [20, 1]])
    figures = work_figures(SimpleNamespace(shard=shard), batches, 40)
    expected = {"work/batches": 2, "work/filled": 80 / 160}
    assert figures == expected | {"work/tokens_most_by_mean": 1.5, "work/tiles_most_by_mean": 1.5}


@pytest.mark.dist
def test_a_group_travels_with_its_picture(tmp_path):
    torch.multiprocessing.spawn(share_as_a_process, (tmp_path,), nprocs=2)
    held = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    # Two pictures each, at the price of tokens that are not quite even.
    assert [[group.prompt.id for group in groups] for groups in held] == [["0-1", "0-2"], ["1-0", "0-0"]]
    for group in held[0] + held[1]:
        rank, number = map(int, group.prompt.id.split("-"))
        expected = group_of(rank, number)
        assert torch.equal(group.prompt.model_inputs["pixel_values"], expected.prompt.model_inputs["pixel_values"])
        assert (group.completions, group.advantages) == (expected.completions, expected.advantages)
        assert len(group.completions[0]) == LENGTHS[rank][number]
