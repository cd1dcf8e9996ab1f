"""Online DPO: which pairs the rewards make, and the loss on them, worked by hand.

One token a sequence, mask True, beta 1: the difference of log-ratios is the margin.
"""

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, count_preferences, online_dpo_loss

REWARDS = torch.tensor([3.0, 1.0, 1.0, 2.0, 2.0, 0.0, 5.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 2])  # group 1 is all tied
POLICY = torch.tensor([1.0, 0.0, -1.0, 7.0, -7.0, 0.5, -0.5])
COLUMNS = (torch.zeros(7), torch.ones(7, dtype=torch.bool), torch.arange(8))


def test_value_by_hand() -> None:
    """Pairs (0, 1), (0, 2), (6, 5) with margins 1, 2, -1: (0.313262 + 0.126928 + 1.313262) / 3 = 0.584484."""
    assert count_preferences(REWARDS, GROUPS) == 3
    output = online_dpo_loss(POLICY, *COLUMNS, rewards_B=REWARDS, group_B=GROUPS, beta=1.0, num_pairs=3)
    assert_close(output.loss, torch.tensor(0.584484))
    assert_close(output.metrics["accuracy"], torch.tensor(2.0 / 3.0))


def test_a_tied_group_trains_nothing_and_shifts_no_other() -> None:
    """The ancestor left the index where it was at a tied group, so that the next group's rewards were misassigned."""
    policy = POLICY.clone().requires_grad_()
    online_dpo_loss(policy, *COLUMNS, rewards_B=REWARDS, group_B=GROUPS, beta=1.0, num_pairs=3).loss.backward()
    assert torch.equal(policy.grad[3:5], torch.zeros(2))
    assert policy.grad[5] > 0 > policy.grad[6]


@pytest.mark.parametrize(
    ("rewards", "pairs", "expected"),
    [
        ([3.0, 2.0, 1.0], "all", 3),
        ([3.0, 2.0, 1.0], "best_vs_rest", 2),
        ([3.0, 2.0, 1.0], "best_vs_worst", 1),
        ([3.0, 3.0, 1.0], "all", 2),
        ([3.0, 3.0, 1.0], "best_vs_rest", 2),
        ([3.0, 1.0, 1.0], "best_vs_worst", 2),
        ([1.0, 1.0, 1.0], "all", 0),
        ([1.0, 1.0, 1.0], "best_vs_rest", 0),
        ([1.0], "best_vs_worst", 0),
    ],
)
def test_number_of_pairs(rewards: list[float], pairs: str, expected: int) -> None:
    assert (
        count_preferences(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64), pairs=pairs) == expected
    )


def test_length_normalised_takes_means() -> None:
    """Chosen log-ratios 2 and 4 (mean 3), rejected 1: margin 2 instead of 5."""
    policy, offsets = torch.tensor([2.0, 4.0, 1.0]), torch.tensor([0, 2, 3])
    columns = (torch.zeros(3), torch.ones(3, dtype=torch.bool), offsets)
    numbers = {"rewards_B": torch.tensor([1.0, 0.0]), "group_B": torch.tensor([4, 4]), "beta": 1.0, "num_pairs": 1}
    assert_close(online_dpo_loss(policy, *columns, **numbers).metrics["margin"], torch.tensor(5.0))
    output = online_dpo_loss(policy, *columns, **numbers, length_normalised=True)
    assert_close(output.loss, torch.tensor(0.126928))


def test_an_unknown_choice_of_pairs_lists_the_choices() -> None:
    with pytest.raises(InputError, match=r"pairs is 'best'; choose one of \['all', 'best_vs_rest', 'best_vs_worst'\]"):
        count_preferences(REWARDS, GROUPS, pairs="best")
