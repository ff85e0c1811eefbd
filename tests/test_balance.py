"""Groups change hands until processes have about the same to do."""

import random

import pytest
import torch
import torch.multiprocessing
from share_work_process import LENGTHS, group_of, share_as_a_process

from sail_rl.balance import Move, plan_moves


@pytest.mark.parametrize(
    ("costs", "moves"),
    [
        ([[3, 3], [3, 3]], []),
        ([[10], [1]], []),  # one group cannot be shared
        ([[5, 5], []], [Move(0, 0, 1)]),
        ([[100, 100], [95, 101]], []),  # not worth a message
        ([[8, 2, 2], [4]], [Move(0, 1, 1), Move(0, 2, 1)]),
        ([[], [6, 6, 6], []], [Move(1, 0, 0), Move(1, 1, 2)]),
        ([[], []], []),
    ],
)
def test_moves(costs, moves):
    assert plan_moves(costs) == moves


def test_loads_come_close_and_nothing_is_lost():
    rng = random.Random(0)
    for _ in range(50):
        costs = [[rng.randint(1, 1000) for _ in range(rng.randint(0, 16))] for _ in range(4)]
        loads = [sum(own) for own in costs]
        moves = plan_moves(costs)
        assert len({(move.source, move.number) for move in moves}) == len(moves)
        for move in moves:
            loads[move.source] -= costs[move.source][move.number]
            loads[move.target] += costs[move.source][move.number]
        total, largest = sum(map(sum, costs)), max(max(own, default=0) for own in costs)
        assert sum(loads) == total
        assert max(loads) - min(loads) <= max(largest, 0.05 * total / 4)
        assert max(loads) <= max(map(sum, costs))


@pytest.mark.dist
def test_a_group_travels_with_its_picture(tmp_path):
    torch.multiprocessing.spawn(share_as_a_process, (tmp_path,), nprocs=2)
    held = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [[group.prompt.id for group in groups] for groups in held] == [["0-1", "0-2", "1-0"], ["0-0"]]
    for group in held[0] + held[1]:
        rank, number = map(int, group.prompt.id.split("-"))
        expected = group_of(rank, number)
        assert torch.equal(group.prompt.model_inputs["pixel_values"], expected.prompt.model_inputs["pixel_values"])
        assert (group.completions, group.advantages) == (expected.completions, expected.advantages)
        assert len(group.completions[0]) == LENGTHS[rank][number]
