"""Reductions, worked by hand."""

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, per_token, segment_lengths, segment_sum, sequence_mean, sequence_sum, token_mean

# Sequences: tokens 0 to 2, none, tokens 3 and 4. Inside the mask: 1, 2 | | 6.
X = torch.tensor([1.0, 2.0, 100.0, 6.0, 100.0])
MASK = torch.tensor([True, True, False, True, False])
OFFSETS = torch.tensor([0, 3, 3, 5])


def test_token_mean_by_hand() -> None:
    """(1 + 2 + 6) / 3 = 3; with a global count of 9 the partial sum is 1."""
    assert_close(token_mean(X, MASK, num_tokens=3), torch.tensor(3.0))
    assert_close(token_mean(X, MASK, num_tokens=9), torch.tensor(1.0))


def test_sequence_mean_by_hand() -> None:
    """Means 1.5, nothing, 6: 7.5 / 3 = 2.5."""
    assert_close(sequence_mean(X, MASK, OFFSETS, num_sequences=3), torch.tensor(2.5))


def test_sequence_sum_by_hand() -> None:
    """Sums 3, 0, 6 over the constant length 2, 3 sequences: 9 / 2 / 3 = 1.5."""
    assert_close(sequence_sum(X, MASK, OFFSETS, num_sequences=3, length=2.0), torch.tensor(1.5))


def test_segments_by_hand() -> None:
    assert_close(segment_sum(X, OFFSETS), torch.tensor([103.0, 0.0, 106.0]))
    assert torch.equal(segment_lengths(MASK, OFFSETS), torch.tensor([2, 0, 1]))
    assert_close(per_token(torch.tensor([7.0, 8.0, 9.0]), OFFSETS), torch.tensor([7.0, 7.0, 7.0, 9.0, 9.0]))


def test_segment_sum_gradient_equals_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, OFFSETS), (X.double().requires_grad_(),))


def test_int32_offsets_are_accepted() -> None:
    assert_close(segment_sum(X, OFFSETS.int()), segment_sum(X, OFFSETS))


def test_the_empty_batch_is_zero() -> None:
    nothing, no_offsets = torch.zeros(0), torch.tensor([0])
    assert token_mean(nothing, nothing.bool(), num_tokens=0) == 0.0
    assert sequence_mean(nothing, nothing.bool(), no_offsets, num_sequences=0) == 0.0
    assert segment_sum(nothing, no_offsets).shape == (0,)
    assert per_token(nothing, no_offsets).shape == (0,)


@pytest.mark.parametrize("count", [2, -1])
def test_a_count_below_the_local_one_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"num_tokens is {count}, but this micro-batch alone has 3"):
        token_mean(X, MASK, num_tokens=count)


def test_a_count_that_is_no_integer_is_refused() -> None:
    with pytest.raises(InputError, match=r"num_tokens is 3.5; expected an integer"):
        token_mean(X, MASK, num_tokens=3.5)


def test_a_count_as_integer_tensor_is_accepted() -> None:
    assert_close(token_mean(X, MASK, num_tokens=torch.tensor(3)), torch.tensor(3.0))


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="length is 0"):
        sequence_sum(X, MASK, OFFSETS, num_sequences=3, length=0.0)
