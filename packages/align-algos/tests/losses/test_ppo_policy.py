"""Values of the clipped surrogate, worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, ppo_policy_loss

ALL = torch.ones(4, dtype=torch.bool)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def test_value_and_gradient_by_hand() -> None:
    """Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1 and clip 0.2.

    max(-A r, -A clip(r)): max(-2, -1.2) = -1.2 clipped; max(2, 1.2) = 2; max(-.5, -.8) = -.5; max(.5, .8) = .8 clipped
    loss (-1.2 + 2 - .5 + .8) / 4 = 0.275; 2 of 4 clipped. Gradient -A r / 4 where not clipped: 0, .5, -.125, 0.
    """
    logprobs = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().requires_grad_()
    output = ppo_policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), ALL, num_tokens=4, **CLIP)
    output.loss.backward()
    assert_close(output.loss.detach(), torch.tensor(0.275))
    assert_close(output.metrics["clip_fraction"], torch.tensor(0.5))
    assert_close(logprobs.grad, torch.tensor([0.0, 0.5, -0.125, 0.0]))


def test_metrics_by_hand() -> None:
    """log pi = ln 2 and old = 0 on 4 tokens: entropy estimate -ln 2 (a density here), k3 = 2 - 1 - ln 2 = 0.306853."""
    output = ppo_policy_loss(torch.full((4,), math.log(2)), torch.zeros(4), torch.ones(4), ALL, num_tokens=4, **CLIP)
    assert_close(output.metrics["entropy"], torch.tensor(-0.693147))
    assert_close(output.metrics["approx_kl"], torch.tensor(0.306853))
    assert_close(output.metrics["policy_loss"], output.loss)


def test_ratio_one_is_the_policy_gradient() -> None:
    """Before the first update r = 1 everywhere: loss -mean(A) = -0.25, gradient -A / 4, nothing clipped, KL 0."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0, 2.0])
    output = ppo_policy_loss(logprobs, logprobs.detach(), advantages, ALL, num_tokens=4, **CLIP)
    output.loss.backward()
    assert_close(output.loss.detach(), torch.tensor(-0.25))
    assert_close(logprobs.grad, -advantages / 4)
    assert output.metrics["clip_fraction"] == 0.0 and output.metrics["approx_kl"] == 0.0


def test_a_token_made_much_less_likely_has_a_small_ratio() -> None:
    """log-ratio -3: r = 0.049787. A second-order Taylor series would give 1 - 3 + 4.5 = 2.5 and look like an increase.

    With A = 1 the loss is -r (the minimum of r and its clip at 0.8): -0.049787.
    """
    one = torch.ones(1, dtype=torch.bool)
    output = ppo_policy_loss(torch.tensor([-3.0]), torch.zeros(1), torch.ones(1), one, num_tokens=1, **CLIP)
    assert_close(output.loss, torch.tensor(-0.049787), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(30.0, 1.0), (30.0, -1.0), (-30.0, 1.0), (-30.0, -1.0)])
def test_log_ratio_of_thirty_is_exact(log_ratio: float, advantage: float) -> None:
    """r = e^30 = 1.0686e13 or e^-30 = 9.3576e-14, no cap yet; the surrogate takes the worse of r and its clip."""
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    output = ppo_policy_loss(logprobs, zero, torch.tensor([advantage]), one, num_tokens=1, **CLIP)
    output.loss.backward()
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 0.8), 1.2)
    assert_close(output.loss.item(), max(-advantage * ratio, -advantage * clipped))
    is_clipped = -advantage * clipped > -advantage * ratio
    assert_close(logprobs.grad.item(), 0.0 if is_clipped else -advantage * ratio)


@pytest.mark.parametrize(("log_ratio", "counted"), [(29.9, 0.0), (30.1, 1.0)])
def test_a_token_beyond_the_cap_of_the_ratio_counts_as_clipped(log_ratio: float, counted: float) -> None:
    """A = -1, so the clip does not bind; the cap of e^30 does, at 30.1. A token that has no advantage lost nothing."""
    logprobs = torch.tensor([log_ratio, 31.0], requires_grad=True)
    columns = (torch.zeros(2), torch.tensor([-1.0, 0.0]), torch.ones(2, dtype=torch.bool))
    output = ppo_policy_loss(logprobs, *columns, num_tokens=2, **CLIP)
    output.loss.backward()
    assert (logprobs.grad[0] == 0.0) == (counted == 1.0)
    assert output.metrics["clip_fraction"] == counted / 2


def test_asymmetric_clip() -> None:
    """clip_low 0.1, clip_high 0.5 with A = +-1: r = 1.4 is inside, r = 0.8 with A = -1 is held at 0.9."""
    logprobs = torch.tensor([1.4, 0.8]).log()
    mask = torch.ones(2, dtype=torch.bool)
    output = ppo_policy_loss(
        logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), mask, num_tokens=2, clip_low=0.1, clip_high=0.5
    )
    assert_close(output.loss, torch.tensor((-1.4 + 0.9) / 2))
    assert_close(output.metrics["clip_fraction"], torch.tensor(0.5))


@pytest.mark.parametrize("clip", [{"clip_low": 1.1, "clip_high": 0.2}, {"clip_low": 0.2, "clip_high": -0.1}])
def test_impossible_clip_is_refused(clip: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"clip_(low|high) is -?\d\.\d; expected"):
        ppo_policy_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4), ALL, num_tokens=4, **clip)


def test_a_float_mask_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"mask_N has dtype torch.float32; expected torch.bool \(use mask != 0\)"):
        ppo_policy_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4), ALL.float(), num_tokens=4, **CLIP)
