"""Returns to go, worked by hand."""

import torch
from torch.testing import assert_close

from align_algos import returns_to_go


def test_value_by_hand() -> None:
    """Rewards 1, -, 2, 4 (the second token was not sampled), gamma 1/2: 1 + (2 + 4 / 2) / 2 = 3, then 4 and 4."""
    mask = torch.tensor([True, False, True, True])
    returns = returns_to_go(torch.tensor([1.0, 0.0, 2.0, 4.0]), mask, torch.tensor([0, 4]), gamma=0.5)
    assert_close(returns, torch.tensor([3.0, 0.0, 4.0, 4.0]))


def test_without_discount_a_final_reward_is_that_of_every_token() -> None:
    """Two sequences; the reward of one does not reach the other."""
    rewards = torch.tensor([0.0, 0.0, 5.0, 0.0, -1.0])
    returns = returns_to_go(rewards, torch.ones(5, dtype=torch.bool), torch.tensor([0, 3, 5]), gamma=1.0)
    assert_close(returns, torch.tensor([5.0, 5.0, 5.0, -1.0, -1.0]))
