"""Conciseness: right answers against their group, TRL's cosine, DAPO's slope; never enough to beat being right."""

import pytest
from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from rewards import conciseness_reward


def values_of(lengths, right, group_size=4, **arguments):
    columns = {"completions": ["x"] * len(lengths), "completion_ids": [[7] * length for length in lengths]}
    return conciseness_reward(score_accuracy=right, group_size=group_size, **columns, **arguments)


@pytest.mark.parametrize(
    ("lengths", "right", "arguments", "expected"),
    [
        ([100, 200, 300, 400], [1, 1, 1, 1], {"least_unit": 1}, [0.6, 0.2, -0.2, -0.6]),
        ([100, 200, 300, 400], [1, 1, 1, 1], {"least_unit": 1000}, [0.15, 0.05, -0.05, -0.15]),
        ([100, 200, 300, 400], [1, 1, 1, 1], {}, [150 / 256, 50 / 256, -50 / 256, -150 / 256]),
        # Wrong ones neither count nor earn, however short.
        ([10, 200, 400, 5000], [0, 1, 1, 0], {"least_unit": 1}, [0, 1 / 3, -1 / 3, 0]),
        # Clamped: one right answer is many times as long as the others.
        ([100, 100, 100, 5000], [1, 1, 1, 1], {"least_unit": 1}, [0, 0, 0, -1]),
        # Too few are right, or all are about as long.
        ([100, 200, 300, 400], [1, 0, 0, 0], {"least_unit": 1}, [0] * 4),
        ([100, 104, 108, 102], [1, 1, 1, 1], {"least_unit": 1}, [0] * 4),
        ([100, 200, 300, 400], [None] * 4, {"least_unit": 1}, [0] * 4),
        # Cut off: not right, whatever is in its box.
        ([100, 300, 400, 400], [1, 1, 1, 1], {"least_unit": 1, "finish_reason": ["stop"] * 3 + ["length"]}, None),
    ],
)
def test_right_answers_against_their_group(lengths, right, arguments, expected):
    expected = expected or [2 / 3, 0, -1 / 3, 0]
    assert values_of(lengths, right, **arguments) == pytest.approx(expected)


def test_groups_are_told_apart():
    one, two = [100, 200, 300, 400], [1000, 2000, 3000, 4000]
    both = values_of(one + two, [1] * 8, least_unit=1)
    assert both[:4] == pytest.approx(both[4:]) == values_of(one, [1] * 4, least_unit=1)
    assert values_of(one, [1] * 4, group_size=2, least_unit=1) == pytest.approx([1 / 3, -1 / 3, 1 / 7, -1 / 7])


def test_cosine_and_overlong_are_those_of_trl():
    lengths = [0, 1, 30, 50, 75, 99, 100, 150, 200]
    ids = [[7] * length for length in lengths]
    for right in (1.0, 0.0):
        ours = values_of(lengths, [right] * 9, shape="cosine", max_length=100)
        completions = [[{"content": rf"\boxed{{{'1' if right else '2'}}}"}] for _ in lengths]
        trls = get_cosine_scaled_reward(max_len=100)(completions, ["$1$"] * 9, ids)
        assert ours == pytest.approx(trls)
    ours = values_of(lengths, [1.0] * 9, shape="overlong", max_length=100, cache_length=40)
    assert ours == pytest.approx(get_soft_overlong_punishment(100, 40)(ids))
    assert ours[-2:] == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"shape": "kimi"}, "shape is 'kimi'"), ({"shape": "cosine"}, "needs max_length")]
)
def test_what_cannot_be_computed_is_named(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        values_of([1, 2, 3, 4], [1] * 4, **({"max_length": 10} if "kimi" in arguments.values() else {}), **arguments)
