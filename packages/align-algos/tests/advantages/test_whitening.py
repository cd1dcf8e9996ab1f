"""Whitening with the statistics of the whole batch."""

import torch
from torch.testing import assert_close

from align_algos import Moments, moments, whiten


def test_value_by_hand() -> None:
    """1 and 3 inside the mask (mean 2, population variance 1), 1e6 outside: -1, 1 and 0."""
    x, mask = torch.tensor([1.0, 1e6, 3.0]), torch.tensor([True, False, True])
    assert_close(whiten(x, mask, moments(x, mask), eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))


def test_micro_batches_with_added_moments_equal_the_whole() -> None:
    """Whitening by each half's own mean would lose the difference between the halves."""
    x = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(10)
    mask = torch.arange(10) % 3 != 0
    whole = whiten(x, mask, moments(x, mask), eps=1e-8)
    both = Moments(*(a + b for a, b in zip(moments(x[:4], mask[:4]), moments(x[4:], mask[4:]))))
    parts = [whiten(x[part], mask[part], both, eps=1e-8) for part in (slice(0, 4), slice(4, 10))]
    assert_close(torch.cat(parts), whole)
    assert_close(whole[mask].mean().item(), 0.0)
    assert_close(whole[mask].var(correction=0).item(), 1.0, rtol=1e-7, atol=0)


def test_equal_values_become_zero() -> None:
    """Variance 0: with and without eps there is no 0/0."""
    x, mask = torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)
    for eps in (1e-8, 0.0):
        assert torch.equal(whiten(x, mask, moments(x, mask), eps=eps), torch.zeros(3))
