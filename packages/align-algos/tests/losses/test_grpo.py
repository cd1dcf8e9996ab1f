"""Values of the GRPO loss, worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, group_normalised, grpo_loss, per_token, ppo_policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def test_value_by_hand() -> None:
    """Two completions of one prompt, rewards 1 and 0: advantages +1 and -1; lengths 1 and 3, ratio 1.

    Policy loss -(1 - 3) / 4 = 0.5. log pi - log ref = -ln 2 on one of four tokens, 0 on the others:
    k3 = 2 - 1 - ln 2 = 0.306853, mean 0.0767132. With kl_coef 0.1: 0.50767132.
    """
    offsets = torch.tensor([0, 1, 4])
    advantages = per_token(group_normalised(torch.tensor([1.0, 0.0]), torch.tensor([5, 5]), eps=0.0), offsets)
    assert_close(advantages, torch.tensor([1.0, -1.0, -1.0, -1.0]))
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    reference = logprobs + torch.tensor([math.log(2.0), 0.0, 0.0, 0.0])
    output = grpo_loss(
        logprobs,
        logprobs,
        advantages,
        torch.ones(4, dtype=torch.bool),
        num_tokens=4,
        reference_logprobs_N=reference,
        kl_coef=0.1,
        **CLIP,
    )
    assert_close(output.loss, torch.tensor(0.50767132))
    assert_close(output.metrics["kl"], torch.tensor(0.0767132))
    assert_close(output.metrics["policy_loss"], torch.tensor(0.5))
    assert_close(output.metrics["entropy"], torch.tensor(2.5))


def test_without_a_reference_it_is_the_ppo_policy_loss_and_reports_no_kl() -> None:
    random = torch.Generator().manual_seed(0)
    columns = [torch.randn(6, generator=random) for _ in range(3)]
    mask = torch.ones(6, dtype=torch.bool)
    output = grpo_loss(*columns, mask, num_tokens=6, **CLIP)
    assert_close(output, ppo_policy_loss(*columns, mask, num_tokens=6, **CLIP))
    assert "kl" not in output.metrics


def test_a_reference_with_coefficient_zero_is_only_watched() -> None:
    one = torch.ones(1, dtype=torch.bool)
    zero, reference = torch.zeros(1), -torch.ones(1)
    output = grpo_loss(zero, zero, torch.ones(1), one, num_tokens=1, reference_logprobs_N=reference, **CLIP)
    assert_close(output.loss, torch.tensor(-1.0))
    assert_close(output.metrics["kl"], torch.tensor(math.exp(-1.0)))  # e^-1 - 1 + 1


def test_kl_pulls_towards_the_reference() -> None:
    """d k3 / d log pi = 1 - ref/pi: at pi = 2 ref it is 1/2, so descent lowers log pi; at pi = ref / 2 it is -1."""
    logprobs = torch.tensor([math.log(2.0), -math.log(2.0)], requires_grad=True)
    both = torch.ones(2, dtype=torch.bool)
    grpo_loss(
        logprobs,
        logprobs.detach(),
        torch.zeros(2),
        both,
        num_tokens=2,
        reference_logprobs_N=torch.zeros(2),
        kl_coef=1.0,
        **CLIP,
    ).loss.backward()
    assert_close(logprobs.grad, torch.tensor([0.25, -0.5]))


def test_all_tied_group_has_no_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = group_normalised(torch.tensor([0.1, 0.1]), torch.tensor([0, 0]), eps=1e-6)
    both = torch.ones(2, dtype=torch.bool)
    grpo_loss(logprobs, logprobs.detach() - 0.1, advantages, both, num_tokens=2, **CLIP).loss.backward()
    assert torch.equal(logprobs.grad, torch.zeros(2))


def test_kl_without_a_reference_is_refused() -> None:
    one = torch.ones(1, dtype=torch.bool)
    with pytest.raises(InputError, match=r"kl_coef is 0.1 but reference_logprobs_N is None"):
        grpo_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), one, num_tokens=1, kl_coef=0.1, **CLIP)
