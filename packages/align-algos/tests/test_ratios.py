"""The ratio is exact and monotonic, and its cap holds."""

import math

import torch
from torch.testing import assert_close

from align_algos import exp_ratio
from align_algos.ratios import MAX_LOG_RATIO, exp_excess


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


def test_excess_by_hand_and_never_negative() -> None:
    """x = ln 2: 2 - 1 - 0.693147 = 0.306853; small x: x^2 / 2, which exp(x) - 1 - x in float32 rounds below 0."""
    assert_close(exp_excess(torch.tensor([math.log(2.0), -1e-4])), torch.tensor([0.306853, 5e-9]), rtol=1e-3, atol=0)
    x = torch.logspace(-12, 2, 10_001)
    assert (exp_excess(torch.cat([x, -x])) >= 0).all()


def test_the_excess_beyond_the_cap_stays_and_its_gradient_is_zero() -> None:
    x = torch.tensor([MAX_LOG_RATIO + 1, 1e30], requires_grad=True)
    excess = exp_excess(x)
    excess.sum().backward()
    assert_close(excess.detach(), exp_excess(torch.full((2,), MAX_LOG_RATIO)))
    assert torch.equal(x.grad, torch.zeros(2))
