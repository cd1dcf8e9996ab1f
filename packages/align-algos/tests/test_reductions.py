"""Reductions, worked by hand."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from align_algos import (
    InputError,
    NonFiniteError,
    per_token,
    reduce_tokens,
    segment_lengths,
    segment_sum,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from align_algos.reductions import REDUCTIONS

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


def reduced(x: torch.Tensor, reduction: str, sequences: list[int]) -> torch.Tensor:
    """These sequences of the batch above, over its global counts."""
    bounds = OFFSETS.tolist()
    tokens = [t for b in sequences for t in range(bounds[b], bounds[b + 1])]
    offsets = torch.tensor([0, *(bounds[b + 1] - bounds[b] for b in sequences)]).cumsum(0)
    numbers = {"num_tokens": 3, "num_sequences": 3, "length": 2.0}
    return reduce_tokens(x[tokens], MASK[tokens], offsets=offsets, reduction=reduction, **numbers)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_adds_up_in_any_order_and_ignores_what_is_outside(reduction: str) -> None:
    """All six orders, cut anywhere; gradients by finite differences; 1e30 outside the mask."""
    x = X.double().requires_grad_()
    whole = reduced(x, reduction, [0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: reduced(x, reduction, [0, 1, 2]), (x,))
    (gradient,) = torch.autograd.grad(whole, x)
    for order in itertools.permutations(range(3)):
        for cut in range(4):
            parts = reduced(x, reduction, [*order[:cut]]) + reduced(x, reduction, [*order[cut:]])
            assert_close(parts, whole)
            assert_close(torch.autograd.grad(parts, x)[0], gradient)
    spoiled = torch.where(MASK, x.detach(), 1e30).requires_grad_()
    assert torch.equal(reduced(spoiled, reduction, [0, 1, 2]), whole)
    assert torch.equal(torch.autograd.grad(reduced(spoiled, reduction, [0, 1, 2]), spoiled)[0], gradient)
    with pytest.raises(NonFiniteError, match="x_N holds nan at position 2"):
        reduced(torch.where(MASK, X, torch.nan), reduction, [0, 1, 2])


def test_per_token_gradient_equals_finite_differences() -> None:
    x = torch.tensor([7.0, 8.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: per_token(x, OFFSETS), (x,))


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
    with pytest.raises(InputError, match=f"num_tokens is {count}, but this micro-batch alone has 3") as caught:
        token_mean(X, MASK, num_tokens=count)
    assert caught.type is InputError


def test_a_count_that_is_no_integer_is_refused() -> None:
    with pytest.raises(InputError, match=r"num_tokens is 3.5; expected an integer"):
        token_mean(X, MASK, num_tokens=3.5)


def test_a_count_as_integer_tensor_is_accepted() -> None:
    assert_close(token_mean(X, MASK, num_tokens=torch.tensor(3)), torch.tensor(3.0))


@pytest.mark.parametrize("offsets", [torch.tensor(3), torch.tensor([[0, 1]]), torch.zeros(0, dtype=torch.int64)])
def test_offsets_of_a_wrong_shape_are_refused(offsets: torch.Tensor) -> None:
    for function in (segment_sum, per_token):
        with pytest.raises(InputError, match=r"offsets has shape \[.*\]; expected \[B\+1\]"):
            function(torch.ones(1), offsets)


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="length is 0"):
        sequence_sum(X, MASK, OFFSETS, num_sequences=3, length=0.0)
