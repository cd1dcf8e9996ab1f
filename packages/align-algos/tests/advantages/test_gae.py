"""Generalised advantage estimation, worked by hand and against a direct sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align_algos import InputError, gae


def test_value_by_hand() -> None:
    """One completion of three tokens, gamma 0.5, lam 0.5; values 1, 2, 4, rewards 0, 0, 8.

    delta_3 = 8 - 4 = 4;  delta_2 = 0 + 0.5 x 4 - 2 = 0;  delta_1 = 0 + 0.5 x 2 - 1 = 0
    A_3 = 4;  A_2 = 0 + 0.25 x 4 = 1;  A_1 = 0 + 0.25 x 1 = 0.25;  returns 1.25, 3, 8
    """
    output = gae(
        torch.tensor([0.0, 0.0, 8.0]),
        torch.tensor([1.0, 2.0, 4.0]),
        torch.ones(3, dtype=torch.bool),
        torch.tensor([0, 3]),
        gamma=0.5,
        lam=0.5,
    )
    assert_close(output.advantages_N, torch.tensor([0.25, 1.0, 4.0]))
    assert_close(output.returns_N, torch.tensor([1.25, 3.0, 8.0]))


def test_tokens_outside_the_mask_are_stepped_over() -> None:
    """The same completion with a prompt before it and a tool's answer in its middle: same numbers, 0 elsewhere.

    The values outside the mask are wild and must not matter; the second sequence is empty, the third has one token.
    """
    mask = torch.tensor([False, False, True, False, True, True, True])
    output = gae(
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 1.0]),
        torch.tensor([99.0, -99.0, 1.0, 1e6, 2.0, 4.0, 3.0]),
        mask,
        torch.tensor([0, 6, 6, 7]),
        gamma=0.5,
        lam=0.5,
    )
    assert_close(output.advantages_N, torch.tensor([0.0, 0.0, 0.25, 0.0, 1.0, 4.0, -2.0]))
    assert_close(output.returns_N, torch.tensor([0.0, 0.0, 1.25, 0.0, 3.0, 8.0, 1.0]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_equals_the_direct_sum_of_discounted_errors(lengths: list[int], seed: int) -> None:
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, written as a double loop."""
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, int(offsets[-1]), generator=random, dtype=torch.float64)
    mask = torch.ones(len(rewards), dtype=torch.bool)
    output = gae(rewards, values, mask, offsets, gamma=0.9, lam=0.8)
    expected = torch.zeros_like(rewards)
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:]):
        for t in range(start, stop):
            for k in range(t, stop):
                following = values[k + 1] if k + 1 < stop else 0.0
                expected[t] += (0.9 * 0.8) ** (k - t) * (rewards[k] + 0.9 * following - values[k])
    assert_close(output.advantages_N, expected)


def test_gamma_and_lam_one_give_the_return_less_the_value() -> None:
    """With both 1 the return of each token is the sum of rewards from it on: 6, 5, 3."""
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, -1.0, 2.0])
    output = gae(rewards, values, torch.ones(3, dtype=torch.bool), torch.tensor([0, 3]), gamma=1.0, lam=1.0)
    assert_close(output.returns_N, torch.tensor([6.0, 5.0, 3.0]))
    assert_close(output.advantages_N, torch.tensor([1.0, 6.0, 1.0]))


def test_a_reward_outside_the_mask_is_refused() -> None:
    """It would be dropped without a word: the classic case is a score on an end-of-sequence token nobody sampled."""
    mask = torch.tensor([True, False])
    with pytest.raises(InputError, match="rewards_N is not 0 outside mask_N at position 1"):
        gae(torch.tensor([0.0, 1.0]), torch.zeros(2), mask, torch.tensor([0, 2]), gamma=1.0, lam=0.95)


def test_empty_batch() -> None:
    nothing = torch.zeros(0)
    output = gae(nothing, nothing, nothing.bool(), torch.tensor([0]), gamma=1.0, lam=0.95)
    assert output.advantages_N.shape == (0,)
