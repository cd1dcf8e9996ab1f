"""Moments of values in parts."""

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, Moments, merge_moments, moments

NONE = torch.zeros(5, dtype=torch.float64)


def test_values_by_hand() -> None:
    """1, 3 and 8 inside the mask, 1e300 outside: mean 4, distances 3, 1, 4: 9 + 1 + 16 = 26, variance 26 / 3."""
    x, mask = torch.tensor([1.0, 1e300, 3.0, 8.0], dtype=torch.float64), torch.tensor([True, False, True, True])
    found = moments(x, mask)
    assert_close(torch.stack(found), torch.tensor([3.0, 4.0, 26.0, 1.0, 8.0], dtype=torch.float64))
    assert_close(found.variance.item(), 26 / 3)


def test_parts_by_hand() -> None:
    """1 and 3 (mean 2, square 2), nothing, and 8: mean 4, 2 + 2 x 2^2 + 4^2 = 26; in any order."""
    one, other = (moments(torch.tensor(x), torch.ones(len(x), dtype=torch.bool)) for x in ([1.0, 3.0], [8.0]))
    nothing = moments(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    for parts in ([one, nothing, other], [nothing, other, one, nothing]):
        expected = torch.tensor([3.0, 4.0, 26.0, 1.0, 8.0], dtype=torch.float64)
        assert_close(torch.stack(merge_moments(parts)), expected)


def test_of_nothing_all_are_zero() -> None:
    for length in (0, 4):
        nothing = moments(torch.ones(length), torch.zeros(length, dtype=torch.bool))
        assert torch.equal(torch.stack(nothing), NONE) and nothing.variance == 0.0
        assert torch.equal(torch.stack(merge_moments([nothing, nothing])), NONE)
    with pytest.raises(InputError, match="parts is empty"):
        merge_moments([])


def test_a_round_trip_through_one_tensor() -> None:
    """What ranks exchange: five numbers."""
    found = moments(torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool))
    assert_close(Moments(*torch.stack(found)), found)
