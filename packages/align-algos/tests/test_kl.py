"""KL estimators against an exact KL, and the controllers of the coefficient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import AdaptiveKl, FixedKl, InputError, KlController, NonFiniteError, k1, k2, k3


def test_values_by_hand() -> None:
    """log-ratio ln 2: k1 = 0.693147, k2 = 0.480453 / 2 = 0.240227, k3 = 1/2 - 1 + ln 2 = 0.193147."""
    logprobs, reference = torch.tensor([-1.0]), torch.tensor([-1.0 - math.log(2.0)])
    assert_close(k1(logprobs, reference), torch.tensor([0.693147]))
    assert_close(k2(logprobs, reference), torch.tensor([0.240227]))
    assert_close(k3(logprobs, reference), torch.tensor([0.193147]))


def test_k1_and_k3_are_unbiased() -> None:
    """Their expectation under the policy, summed over a whole vocabulary of 5, is the exact KL; k2's is not."""
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=random, dtype=torch.float64).log_softmax(1)
    exact = (policy.exp() * (policy - reference)).sum()
    assert_close((policy.exp() * k1(policy, reference)).sum(), exact)
    assert_close((policy.exp() * k3(policy, reference)).sum(), exact)
    assert abs((policy.exp() * k2(policy, reference)).sum() - exact) > 1e-3


def test_k2_and_k3_are_never_negative() -> None:
    log_ratio = torch.cat([torch.linspace(-100, 100, 401), torch.linspace(-1e-3, 1e-3, 401)])
    zero = torch.zeros_like(log_ratio)
    for estimate in (k2(log_ratio, zero), k3(log_ratio, zero)):
        assert (estimate >= 0).all() and torch.isfinite(estimate).all()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradient_equals_finite_differences(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    logprobs = torch.tensor([-3.0, -0.5, -0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, -0.7, -4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: estimator(x, reference), (logprobs,))


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("log_ratio", [-31.0, 31.0])
def test_gradient_beyond_the_cap_never_changes_its_sign(
    estimator: Callable[[Tensor, Tensor], Tensor], log_ratio: float
) -> None:
    """On either side of the cap of 30 it pushes the same way, or not at all."""
    logprobs = torch.tensor([log_ratio, log_ratio * 29 / 31], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(estimator(logprobs, torch.zeros_like(logprobs)).sum(), logprobs)
    assert gradient[1] != 0 and gradient[0] * gradient[1] >= 0


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="reference_logprobs_N holds nan at position 0"):
        k3(torch.zeros(1), torch.tensor([torch.nan]))


def test_fixed_never_moves() -> None:
    controller: KlController = FixedKl(coef=0.02)
    controller.update(kl=100.0, num_samples=512)
    assert controller.coef == 0.02


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.02), (6.6, 0.02 * 1.0102), (600.0, 0.02 * 1.0204), (0.0, 0.02 * 0.9796)],
)
def test_adaptive_by_hand(kl: float, expected: float) -> None:
    """Target 6, 1,020 samples of a horizon of 10,000, relative error clipped to +-0.2.

    kl 6: error 0;  6.6: error 0.1, factor 1 + 0.1 x 0.102 = 1.0102;  600: 0.2, 1.0204;  0: -0.2, 0.9796
    """
    controller = AdaptiveKl(initial_coef=0.02, target=6.0, horizon=10_000)
    controller.update(kl=kl, num_samples=1020)
    assert_close(controller.coef, expected)


def test_adaptive_state_survives_a_restart() -> None:
    first = AdaptiveKl(initial_coef=0.02, target=6.0, horizon=100)
    first.update(kl=60.0, num_samples=50)
    second = AdaptiveKl(initial_coef=0.5, target=6.0, horizon=100)
    second.load_state_dict(first.state_dict())
    first.update(kl=1.0, num_samples=50)
    second.update(kl=1.0, num_samples=50)
    assert first.coef == second.coef != 0.02


def test_wrong_settings_and_states_are_refused() -> None:
    with pytest.raises(InputError, match="coef is -1") as caught:
        FixedKl(coef=-1.0)
    assert caught.type is InputError  # finite, but outside what is allowed
    with pytest.raises(InputError, match="target is 0"):
        AdaptiveKl(initial_coef=0.1, target=0.0, horizon=10)
    controller = AdaptiveKl(initial_coef=0.1, target=6.0, horizon=10)
    with pytest.raises(NonFiniteError, match="kl is nan"):
        controller.update(kl=math.nan, num_samples=1)
    with pytest.raises(InputError, match="num_samples 11 exceeds the horizon 10"):
        controller.update(kl=1.0, num_samples=11)
    with pytest.raises(InputError, match=r"has the keys \['beta'\]; expected \['coef'\]"):
        controller.load_state_dict({"beta": 1.0})
