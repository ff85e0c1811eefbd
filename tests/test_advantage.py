"""Group advantages against the formula written out, and what rewards that are equal or missing do to them."""

import statistics

import pytest
import torch

from sail_rl.advantage import advantages_of_each, group_advantages

NAN = float("nan")
EPSILON = 1e-4  # beside the standard deviation, as in TRL
REWARDS = [1.0, 0.0, 0.5, 0.0, 3.0, 1.0, -1.0, 1.0]  # two groups of four


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_follow_the_formula(scale):
    expected = []
    for group in (REWARDS[:4], REWARDS[4:]):
        deviation = statistics.stdev({"group": group, "batch": REWARDS}.get(scale, group))
        divisor = 1.0 if scale == "none" else deviation + EPSILON
        expected += [(reward - statistics.mean(group)) / divisor for reward in group]
    advantages = group_advantages(tensor(REWARDS), 4, scale)
    assert advantages.values_N.tolist() == pytest.approx(expected, rel=1e-12)
    assert advantages.scored_N.tolist() == [True] * 8
    assert advantages.has_signal_P.tolist() == [True, True]


def test_group_is_the_default_scale():
    default, group = group_advantages(tensor(REWARDS), 4), group_advantages(tensor(REWARDS), 4, "group")
    assert torch.equal(default.values_N, group.values_N)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 + 0.1])
@pytest.mark.fault(
    fault="group: all rewards equal",
    injected="equal values",
    expected="advantage 0, not trained",
)
def test_equal_rewards_have_no_signal(scale, value):
    # 0.1 is not its mean to the last bit in float32: rounding must not be scaled up to an advantage.
    advantages = group_advantages(torch.tensor([value] * 7 + [1.0, 0.0] + [1.0] * 5), 7, scale)
    assert advantages.has_signal_P.tolist() == [False, True]
    assert advantages.values_N[:7].tolist() == [0.0] * 7
    assert advantages.values_N[7:].abs().min() > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.fault(
    fault="group: a reward is missing",
    injected="NaN for a member",
    expected="the others' advantages are those without it",
)
def test_a_completion_without_a_reward_does_not_count(scale):
    masked = group_advantages(tensor([1.0, NAN, 0.0, 0.5, 2.0, 0.0, NAN, 1.0]), 4, scale)
    without = group_advantages(tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0]), 3, scale)
    assert masked.scored_N.tolist() == [True, False, True, True, True, True, False, True]
    assert masked.values_N[~masked.scored_N].tolist() == [0.0, 0.0]
    assert masked.values_N[masked.scored_N].tolist() == pytest.approx(without.values_N.tolist(), rel=1e-12)
    assert masked.has_signal_P.tolist() == [True, True]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("rewards", "scored"),
    [
        ([NAN, 1.0, NAN, NAN], [False, True, False, False]),
        ([NAN] * 4, [False] * 4),
        ([NAN, 1.0, 1.0, NAN], [False, True, True, False]),
    ],
)
@pytest.mark.fault(
    fault="group: nothing to compare",
    injected="one or no reward in the group",
    expected="advantage 0, no NaN, not trained",
)
def test_a_group_with_nothing_to_compare_has_no_signal(scale, rewards, scored):
    advantages = group_advantages(tensor(rewards), 4, scale)
    assert advantages.values_N.tolist() == [0.0] * 4
    assert advantages.scored_N.tolist() == scored
    assert advantages.has_signal_P.tolist() == [False]


def test_advantages_of_a_group_sum_to_zero_and_keep_the_order():
    advantages = group_advantages(torch.tensor(REWARDS), 4).values_N.view(2, 4)
    assert advantages.sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert advantages.argmax(1).tolist() == [0, 0]
    assert advantages[1].argmin() == 2


def test_leave_one_out_compares_with_the_others():
    """RLOO; a completion without a reward is none of the others."""
    advantages = group_advantages(tensor([1.0, 0.0, 0.5, NAN, 2.0, 2.0, 2.0, 2.0]), 4, "none", "leave_one_out")
    assert advantages.values_N.tolist() == pytest.approx([0.75, -0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert advantages.has_signal_P.tolist() == [True, False]


def test_the_step_as_baseline():
    """REINFORCE++: groups of equal rewards have a signal, unless all of the step are equal."""
    rewards = [1.0, 1.0, 0.0, 0.0, NAN, 0.5]
    advantages = group_advantages(tensor(rewards), 2, "batch", "batch")
    known = [reward for reward in rewards if reward == reward]
    expected = [(r - statistics.mean(known)) / (statistics.stdev(known) + EPSILON) if r == r else 0.0 for r in rewards]
    assert advantages.values_N.tolist() == pytest.approx(expected)
    assert advantages.has_signal_P.tolist() == [True, True, True]
    assert group_advantages(torch.full((6,), 0.1), 2, "batch", "batch").values_N.tolist() == [0.0] * 6


def test_scaled_by_what_is_left_after_the_baseline():
    """REINFORCE++ with a baseline: the deviation is that of the centred rewards of the whole step."""
    centred = [reward - statistics.mean(group) for group in (REWARDS[:4], REWARDS[4:]) for reward in group]
    advantages = group_advantages(tensor(REWARDS), 4, "batch_centred")
    assert advantages.values_N.tolist() == pytest.approx([c / (statistics.stdev(centred) + EPSILON) for c in centred])


def test_rewards_one_by_one_count_alike():
    """GDPO: the second reward differs by a hundredth of the first, and decides as much."""
    first, second = [0.0, 1.0, 0.0, 1.0], [0.01, 0.0, 0.0, 0.01]
    rewards = tensor([first, second]).T
    advantages = advantages_of_each(rewards, tensor([1.0, 1.0]), 4)
    both = group_advantages(rewards.sum(1), 4)
    assert both.values_N[0] < 0  # the sum listens to the first alone
    assert advantages.values_N[0].abs() < 0.05  # better in one, worse in the other
    assert advantages.values_N[3] > 1
    assert advantages.values_N.sum().item() == pytest.approx(0, abs=1e-9)
    # A reward without weight gives no group a signal.
    assert advantages_of_each(tensor([[1.0, 0.0], [1.0, 1.0]]), tensor([1.0, 0.0]), 2).has_signal_P.tolist() == [False]
