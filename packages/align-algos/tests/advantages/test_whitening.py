"""Whitening with the statistics of the whole batch."""

import pytest
import torch
from torch.testing import assert_close

from align_algos import merge_moments, moments, whiten


def test_value_by_hand() -> None:
    """1 and 3 inside the mask (mean 2, population variance 1), 1e6 outside: -1, 1 and 0."""
    x, mask = torch.tensor([1.0, 1e6, 3.0]), torch.tensor([True, False, True])
    assert_close(whiten(x, mask, moments(x, mask), eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))


def test_micro_batches_with_merged_moments_equal_the_whole() -> None:
    """Whitening by each half's own mean would lose the difference between the halves."""
    x = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(10)
    mask = torch.arange(10) % 3 != 0
    whole = whiten(x, mask, moments(x, mask), eps=1e-8)
    both = merge_moments([moments(x[:4], mask[:4]), moments(x[4:], mask[4:])])
    parts = [whiten(x[part], mask[part], both, eps=1e-8) for part in (slice(0, 4), slice(4, 10))]
    assert_close(torch.cat(parts), whole)
    assert_close(whole[mask].mean().item(), 0.0)
    assert_close(whole[mask].var(correction=0).item(), 1.0, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [2.0, 0.1, 1 / 3, -7.7])
def test_equal_values_become_exactly_zero(value: float, dtype: torch.dtype) -> None:
    """Variance 0: with and without eps there is no 0/0, and no rounding of the mean that a small eps would blow up."""
    x, mask = torch.full((7,), value, dtype=dtype), torch.arange(7) != 2
    for statistics in (moments(x, mask), merge_moments([moments(x[:3], mask[:3]), moments(x[3:], mask[3:])])):
        for eps in (1e-8, 0.0):
            assert torch.equal(whiten(x, mask, statistics, eps=eps), torch.zeros_like(x))


@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1e-3), (1e5, 1e-4), (-1e8, 1.0)])
def test_a_small_spread_around_a_large_mean_is_not_lost(offset: float, spread: float) -> None:
    """The difference of the mean square and the squared mean has no digit left here: std 1e-4 instead of 1."""
    x = offset + spread * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(1000, dtype=torch.bool)
    parts = [moments(part, mask[: len(part)]) for part in x.split([1, 0, 400, 599])]
    for statistics in (moments(x, mask), merge_moments(parts)):
        whitened = whiten(x, mask, statistics, eps=0.0)
        assert_close(whitened.std(correction=0).item(), 1.0, rtol=1e-6, atol=0)
        assert abs(whitened.mean().item()) < 1e-6
