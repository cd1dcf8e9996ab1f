"""Group advantages, worked by hand and against plain Python."""

import random
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, group_normalised, leave_one_out, mixed_groups


def test_normalised_by_hand() -> None:
    """Rewards 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, population variance 14/4 = 3.5, deviation 1.870829."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    group = torch.zeros(4, dtype=torch.int64)
    expected = torch.tensor([-1.069045, -0.534522, 0.0, 1.603567])
    assert_close(group_normalised(rewards, group, eps=0.0), expected)
    assert_close(group_normalised(rewards, group, eps=0.0, std=False), torch.tensor([-2.0, -1.0, 0.0, 3.0]))
    assert_close(group_normalised(rewards, group, eps=1.870829), expected / 2)


def test_leave_one_out_by_hand() -> None:
    """Rewards 1, 2, 6: 1 - 4 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5."""
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([9, 9, 9]))
    assert_close(advantages, torch.tensor([-3.0, -1.5, 4.5]))


def normalised(rewards: Tensor, group: Tensor) -> Tensor:
    return group_normalised(rewards, group, eps=0.0)


def centred(rewards: Tensor, group: Tensor) -> Tensor:
    return group_normalised(rewards, group, eps=0.0, std=False)


@pytest.mark.parametrize("function", [normalised, centred, leave_one_out])
@pytest.mark.parametrize("reward", [0.1, -1e-3, 1e6 + 0.1, 0.0])
def test_tied_groups_and_groups_of_one_are_exactly_zero(
    function: Callable[[Tensor, Tensor], Tensor], reward: float
) -> None:
    """The mean of seven times 0.1 is not 0.1 in floating point, and dividing that error by itself would give 1."""
    rewards = torch.full((8,), reward, dtype=torch.float64)
    group = torch.tensor([3, 3, 3, 3, 3, 3, 3, -1])
    assert torch.equal(function(rewards, group), torch.zeros(8, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-5, 5, width=16)), max_size=12), st.randoms())
def test_any_order_of_interleaved_groups_equals_plain_python(
    rows: list[tuple[int, float]], shuffler: random.Random
) -> None:
    """A group that comes before, after or between others gets the same advantages (the ancestor's groups slipped)."""
    shuffler.shuffle(rows)
    rewards = torch.tensor([reward for _, reward in rows], dtype=torch.float64)
    group = torch.tensor([number for number, _ in rows], dtype=torch.int64)
    of_group = {number: [r for g, r in rows if g == number] for number, _ in rows}
    expected = [(r - statistics.fmean(of_group[g])) / (statistics.pstdev(of_group[g]) + 0.5) for g, r in rows]
    assert_close(group_normalised(rewards, group, eps=0.5), torch.tensor(expected, dtype=torch.float64))
    others = [r - (sum(of_group[g]) - r) / (len(of_group[g]) - 1) if len(of_group[g]) > 1 else 0.0 for g, r in rows]
    assert_close(leave_one_out(rewards, group), torch.tensor(others, dtype=torch.float64))


def test_result_is_float32_without_gradient() -> None:
    rewards = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    advantages = group_normalised(rewards, torch.tensor([0, 0]), eps=0.0)
    assert advantages.dtype == torch.float32 and not advantages.requires_grad


def test_nan_reward_and_wrong_groups_are_refused() -> None:
    with pytest.raises(InputError, match="rewards_B holds nan at position 1"):
        group_normalised(torch.tensor([0.0, torch.nan]), torch.tensor([0, 0]), eps=1e-6)
    with pytest.raises(InputError, match=r"group_B has shape \[1\]; expected \[2\]"):
        leave_one_out(torch.zeros(2), torch.tensor([0]))
    with pytest.raises(InputError, match="eps is -1"):
        group_normalised(torch.zeros(2), torch.tensor([0, 0]), eps=-1.0)


def test_mixed_groups_keeps_those_that_can_teach() -> None:
    """Groups 7 (0.1 three times: tied), 3 (0 and 1), 5 (alone), in any order."""
    rewards = torch.tensor([0.1, 0.0, 0.1, 0.9, 1.0, 0.1])
    groups = torch.tensor([7, 3, 7, 5, 3, 7])
    assert mixed_groups(rewards, groups).tolist() == [False, True, False, False, True, False]
    assert not mixed_groups(rewards, groups, tolerance=1.0).any()
