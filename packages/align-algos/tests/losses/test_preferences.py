"""Values of the losses on pairs beside DPO's, worked by hand: IPO, hinge, robust DPO, SimPO, ORPO.

One pair: chosen has tokens 0 to 2 (the first is prompt), rejected tokens 3 and 4 (the first is prompt).
log pi - log ref of the responses: chosen 1 and 2 (sum 3, mean 1.5), rejected -1.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, dpo_loss, hinge_loss, ipo_loss, orpo_loss, robust_dpo_loss, simpo_loss

MASK = torch.tensor([False, True, True, False, True])
OFFSETS = torch.tensor([0, 3, 5])
POLICY = torch.tensor([-9.0, -1.0, -1.0, -9.0, -4.0])
REFERENCE = torch.tensor([-7.0, -2.0, -3.0, -7.0, -3.0])
PAIR = (POLICY, REFERENCE, MASK, OFFSETS)


def test_length_normalised_dpo_by_hand() -> None:
    """beta 2: 2 (1.5 + 1) = 5; -logsigmoid(5) = ln(1 + e^-5) = 0.006715."""
    output = dpo_loss(*PAIR, beta=2.0, num_pairs=1, length_normalised=True)
    assert_close(output.loss, torch.tensor(0.006715), rtol=1e-4, atol=1e-6)
    assert_close(output.metrics["margin"], torch.tensor(5.0))


def test_ipo_by_hand() -> None:
    """beta 0.5 asks for a difference of 1. Means: (1.5 + 1 - 1)^2 = 2.25; sums: (3 + 1 - 1)^2 = 9."""
    assert_close(ipo_loss(*PAIR, beta=0.5, num_pairs=1).loss, torch.tensor(2.25))
    assert_close(ipo_loss(*PAIR, beta=0.5, num_pairs=1, length_normalised=False).loss, torch.tensor(9.0))


def test_ipo_pulls_back_beyond_its_target() -> None:
    """At difference 2.5, target 1: d/d(chosen token) = 2 x 1.5 x 1/2 = 1.5, so descent lowers the chosen response."""
    policy = POLICY.clone().requires_grad_()
    ipo_loss(policy, REFERENCE, MASK, OFFSETS, beta=0.5, num_pairs=1).loss.backward()
    assert_close(policy.grad, torch.tensor([0.0, 1.5, 1.5, 0.0, -3.0]))


def test_ipo_without_beta_is_refused() -> None:
    with pytest.raises(InputError, match="beta is 0; expected a positive number"):
        ipo_loss(*PAIR, beta=0.0, num_pairs=1)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.6), (0.25, 0.0), (1.0, 0.0)])
def test_hinge_by_hand(beta: float, expected: float) -> None:
    """max(0, 1 - beta (3 + 1)): 0.6 at 0.1; nothing from 0.25 on."""
    assert_close(hinge_loss(*PAIR, beta=beta, num_pairs=1).loss, torch.tensor(expected))


def test_robust_dpo_by_hand() -> None:
    """beta 0.5: x = 2. (0.75 x 0.126928 - 0.25 x 2.126928) / 0.5 = -0.873072."""
    output = robust_dpo_loss(*PAIR, beta=0.5, num_pairs=1, label_smoothing=0.25)
    assert_close(output.loss, torch.tensor(-0.873072))


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """With a quarter of the labels flipped, its mean over the flips is the DPO loss of the clean ones."""
    swapped = (POLICY[[3, 4, 0, 1, 2]], REFERENCE[[3, 4, 0, 1, 2]], MASK[[3, 4, 0, 1, 2]], torch.tensor([0, 2, 5]))
    clean, flipped = (
        robust_dpo_loss(*pair, beta=0.5, num_pairs=1, label_smoothing=0.25).loss for pair in (PAIR, swapped)
    )
    assert_close(0.75 * clean + 0.25 * flipped, dpo_loss(*PAIR, beta=0.5, num_pairs=1).loss)


def test_robust_dpo_without_information_is_refused() -> None:
    with pytest.raises(InputError, match=r"label_smoothing is 0\.5"):
        robust_dpo_loss(*PAIR, beta=0.5, num_pairs=1, label_smoothing=0.5)


def test_simpo_by_hand() -> None:
    """Means of log pi: chosen -1, rejected -4. 2 x 3 - 1 = 5; ln(1 + e^-5) = 0.006715."""
    output = simpo_loss(POLICY, MASK, OFFSETS, beta=2.0, margin=1.0, num_pairs=1)
    assert_close(output.loss, torch.tensor(0.006715), rtol=1e-4, atol=1e-6)
    assert_close(output.metrics["margin"], torch.tensor(6.0))


@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
def test_a_pair_with_an_empty_response_is_nothing_without_a_reference(empty: str) -> None:
    """Beside a whole pair it adds 0 to loss, gradient and metrics; an empty response is not a certain one."""
    keep = torch.tensor([False, empty == "rejected", empty == "rejected", False, empty == "chosen"])
    twice = torch.cat([POLICY, POLICY])
    columns = (torch.cat([MASK, MASK & keep]), torch.tensor([0, 3, 5, 8, 10]))
    alone = (POLICY, MASK, OFFSETS)
    for loss, numbers in ((simpo_loss, {"beta": 2.0, "margin": 1.0}), (orpo_loss, {"beta": 0.1})):
        logprobs = twice.clone().requires_grad_()
        output = loss(logprobs, *columns, num_pairs=2, **numbers)
        assert_close(output, loss(*alone, num_pairs=2, **numbers))
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
        assert gradient[:5].any() and not gradient[5:].any()


def orpo_logprobs(chosen: float, rejected: float) -> Tensor:
    """Token probabilities whose geometric means over the responses are these."""
    return torch.tensor([-9.0, math.log(chosen) - 1, math.log(chosen) + 1, -9.0, math.log(rejected)])


def test_orpo_by_hand() -> None:
    """Odds of 0.8 and 0.5 are 4 and 1. -ln 0.8 + 0.1 ln(1 + 1/4) = 0.223144 + 0.0223144 = 0.245458."""
    output = orpo_loss(orpo_logprobs(0.8, 0.5), MASK, OFFSETS, beta=0.1, num_pairs=1)
    assert_close(output.loss, torch.tensor(0.245458), rtol=1e-5, atol=1e-6)
    assert_close(output.metrics["log_odds"], torch.tensor(math.log(4.0)))
    assert_close(output.metrics["nll"], torch.tensor(-math.log(0.8)))


def test_orpo_of_a_certain_response_is_finite() -> None:
    """Probability 1 has infinite odds; the loss and its gradient stay finite."""
    logprobs = torch.zeros(5, requires_grad=True)
    output = orpo_loss(logprobs, MASK, OFFSETS, beta=0.1, num_pairs=1)
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(logprobs.grad).all()
