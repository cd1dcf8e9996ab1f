"""The ratio is exact and monotonic, and its cap holds."""

import torch
from torch.testing import assert_close

from align_algos import exp_ratio
from align_algos.ratios import MAX_LOG_RATIO


def test_exact_up_to_the_cap() -> None:
    x = torch.tensor([-MAX_LOG_RATIO, -3.0, -1.0, 0.0, 1.0, MAX_LOG_RATIO], dtype=torch.float64)
    assert torch.equal(exp_ratio(x), x.exp())


def test_monotonic_everywhere() -> None:
    """The second-order Taylor series 1 + x + x^2/2 falls below x = -1; this must not."""
    assert (exp_ratio(torch.linspace(-100, 100, 2001, dtype=torch.float64)).diff() >= 0).all()


def test_beyond_the_cap_the_value_stays_and_the_gradient_is_zero() -> None:
    x = torch.tensor([MAX_LOG_RATIO + 1, 1e30], requires_grad=True)
    ratio = exp_ratio(x)
    ratio.sum().backward()
    assert_close(ratio.detach(), torch.full((2,), MAX_LOG_RATIO).exp())
    assert torch.equal(x.grad, torch.zeros(2))
