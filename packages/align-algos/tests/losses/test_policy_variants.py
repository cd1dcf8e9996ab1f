"""Values of the policy losses beside PPO's and GRPO's, worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from align_algos import (
    InputError,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    entropy_loss,
    group_normalised,
    grpo_loss,
    gspo_loss,
    kl_loss,
    moments,
    per_token,
    ppo_policy_loss,
    reinforce_pp_loss,
    rloo_loss,
    sft_mixing_loss,
    token_kl,
    vocab_kl_loss,
    whiten,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.2}
# Two sequences of 2 and 1 tokens with log-ratios (ln 2, 0) and -ln 2, advantages +1 and -1.
OFFSETS = torch.tensor([0, 2, 3])
OLD = torch.tensor([-3.0, -2.0, -1.0])
POLICY = OLD + torch.tensor([math.log(2.0), 0.0, -math.log(2.0)])
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0])
MASK = torch.ones(3, dtype=torch.bool)
TOKENS = (POLICY, OLD, ADVANTAGES, MASK)
BOTH = {"num_tokens": 3, "num_sequences": 2}


def test_gspo_by_hand() -> None:
    """Ratios sqrt 2 -> clipped 1.2 and 1/2 -> clipped 0.8: (-1.2 + 0.8) / 2 = -0.2; all three tokens are clipped."""
    output = gspo_loss(*TOKENS, OFFSETS, **BOTH, **CLIP)
    assert_close(output.loss, torch.tensor(-0.2))
    assert_close(output.metrics["clip_fraction"], torch.tensor(1.0))


def test_gspo_gradient_is_shared_by_the_sequence() -> None:
    """On policy the ratio is 1: each token of a sequence gets -A / length / sequences."""
    logprobs = OLD.clone().requires_grad_()
    gspo_loss(logprobs, OLD, ADVANTAGES, MASK, OFFSETS, **BOTH).loss.backward()
    assert_close(logprobs.grad, torch.tensor([-0.25, -0.25, 0.5]))


def test_rloo_by_hand() -> None:
    """Ratios of whole sequences 2 -> clipped 1.2, and 1/2 -> 0.8: (-1.2 + 0.8) / 2 = -0.2. Wider: (-2 + 1/2) / 2."""
    assert_close(rloo_loss(*TOKENS, OFFSETS, **BOTH, **CLIP).loss, torch.tensor(-0.2))
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    assert_close(rloo_loss(*TOKENS, OFFSETS, **BOTH, **wide).loss, torch.tensor(-0.75))


def test_rloo_on_policy_is_reinforce() -> None:
    """The gradient is - A grad log pi(y): every token of a sequence gets -A / sequences, however long it is."""
    logprobs = OLD.clone().requires_grad_()
    rloo_loss(logprobs, OLD, ADVANTAGES, MASK, OFFSETS, **BOTH).loss.backward()
    assert_close(logprobs.grad, torch.tensor([-0.5, -0.5, 0.5]))


def test_rloo_of_a_long_sequence_counts_what_the_cap_removed() -> None:
    """2,000 tokens that each drifted by 0.016 nat: the sequence's log-ratio is 32, beyond 30; by 0.014: 28."""
    for drift, counted in ((0.016, 1.0), (0.014, 0.0)):
        logprobs = torch.full((2000,), drift, requires_grad=True)
        columns = (torch.zeros(2000), -torch.ones(2000), torch.ones(2000, dtype=torch.bool), torch.tensor([0, 2000]))
        output = rloo_loss(logprobs, *columns, num_tokens=2000, num_sequences=1)
        output.loss.backward()
        assert logprobs.grad.any() == (counted == 0.0)
        assert output.metrics["clip_fraction"] == counted


def test_cispo_by_hand() -> None:
    """Ratios 2, 1, 1/2 clipped to 1.5, 1, 0.5; minus weight x A x log pi, log pi = -2.306853, -2, -1.693147.

    (1.5 x 2.306853 + 2 - 0.5 x 1.693147) / 3 = 1.537902; gradients -weight A / 3, also beyond the clip.
    """
    logprobs = POLICY.clone().requires_grad_()
    output = cispo_loss(logprobs, OLD, ADVANTAGES, MASK, num_tokens=3, clip_high=0.5)
    assert_close(output.loss, torch.tensor(1.537902))
    assert_close(output.metrics["clip_fraction"], torch.tensor(1.0 / 3.0))
    output.loss.backward()
    assert_close(logprobs.grad, torch.tensor([-0.5, -1.0 / 3.0, 1.0 / 6.0]))


def test_dr_grpo_by_hand() -> None:
    """On policy, lengths 2 and 1, advantages 1 and -1, constant 4: (-2 + 1) / (2 x 4) = -0.125."""
    output = dr_grpo_loss(OLD, OLD, ADVANTAGES, MASK, OFFSETS, **BOTH, length=4, **CLIP)
    assert_close(output.loss, torch.tensor(-0.125))


def test_grpo_of_the_paper_weighs_sequences_alike() -> None:
    """sequence_mean: (-(1 + 1) / 2 + 1 / 1) / 2 = 0; token_mean: (-2 + 1) / 3."""
    numbers = {"num_tokens": 3, **CLIP}
    assert_close(grpo_loss(OLD, OLD, ADVANTAGES, MASK, **numbers).loss, torch.tensor(-1.0 / 3.0))
    sequences = {"reduction": "sequence_mean", "offsets": OFFSETS, "num_sequences": 2}
    assert_close(grpo_loss(OLD, OLD, ADVANTAGES, MASK, **numbers, **sequences).loss, torch.tensor(0.0))


def test_reduction_over_sequences_without_their_count_is_refused() -> None:
    with pytest.raises(InputError, match="num_sequences is None, but reduction 'sequence_mean' needs it"):
        grpo_loss(*TOKENS, num_tokens=3, **CLIP, reduction="sequence_mean", offsets=OFFSETS)


def test_dapo_clips_higher_than_lower() -> None:
    """Ratios 2 and 1/2 with advantage 1 and -1: -1.28 and 0.8; the middle token -1. (-1.28 - 1 + 0.8) / 3."""
    assert_close(dapo_loss(*TOKENS, num_tokens=3).loss, torch.tensor(-1.48 / 3.0))


def test_dual_clip_bounds_a_bad_token() -> None:
    """A = -1 at ratio e^3: PPO's loss is 20.09, dual clip at 3 holds it at 3 without gradient."""
    logprobs, one = torch.tensor([3.0], requires_grad=True), torch.ones(1, dtype=torch.bool)
    columns = (logprobs, torch.zeros(1), -torch.ones(1), one)
    assert_close(ppo_policy_loss(*columns, num_tokens=1, **CLIP).loss, torch.tensor(math.exp(3.0)))
    output = ppo_policy_loss(*columns, num_tokens=1, **CLIP, dual_clip=3.0)
    assert_close(output.loss, torch.tensor(3.0))
    assert output.metrics["clip_fraction"] == 1.0
    assert torch.autograd.grad(output.loss, logprobs)[0] == 0.0


def test_dual_clip_inside_the_clip_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"dual_clip is 1.1; expected more than 1 \+ clip_high = 1.2"):
        ppo_policy_loss(*TOKENS, num_tokens=3, **CLIP, dual_clip=1.1)


def test_correction_weights_multiply_each_token() -> None:
    """On policy: (-1 x 2 - 1 x 0 + 1 x 0.5) / 3 = -0.5; the divisor stays the number of tokens."""
    weights = torch.tensor([2.0, 0.0, 0.5])
    output = ppo_policy_loss(OLD, OLD, ADVANTAGES, MASK, num_tokens=3, **CLIP, weights_N=weights)
    assert_close(output.loss, torch.tensor(-0.5))


def test_reinforce_pp_adds_k2() -> None:
    """On policy: -1/3, plus 0.3 x mean of (1/2)^2 / 2 = 0.3 x 0.125."""
    output = reinforce_pp_loss(OLD, OLD, ADVANTAGES, MASK, num_tokens=3, reference_logprobs_N=OLD - 0.5, kl_coef=0.3)
    assert_close(output.loss, torch.tensor(-1.0 / 3.0 + 0.0375))
    assert_close(output.metrics["kl"], torch.tensor(0.125))


def test_reinforce_pp_with_a_baseline_by_hand() -> None:
    """Rewards 3 and 1 of one prompt, 2 tokens and 1: less their mean 1, 1 | -1; of the batch mean 1/3, variance 8/9.

    (1 - 1/3) / 0.942809 = 0.707107 and (-1 - 1/3) / 0.942809 = -1.414214; on policy minus their mean is 0.
    """
    centred = per_token(group_normalised(torch.tensor([3.0, 1.0]), torch.tensor([4, 4]), std=False), OFFSETS)
    advantages = whiten(centred, MASK, moments(centred, MASK), eps=1e-8)
    assert_close(advantages, torch.tensor([0.707107, 0.707107, -1.414214]))
    logprobs = OLD.clone().requires_grad_()
    output = reinforce_pp_loss(logprobs, OLD, advantages, MASK, num_tokens=3)
    assert_close(output.loss, torch.tensor(0.0))
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    assert_close(gradient, -advantages / 3)


def test_entropy_bonus_by_hand() -> None:
    """Mean of 1 and 2 inside the mask, coefficient 0.1: -0.15."""
    mask = torch.tensor([True, True, False])
    output = entropy_loss(torch.tensor([1.0, 2.0, 9.0]), mask, num_tokens=2, coef=0.1)
    assert_close(output.loss, torch.tensor(-0.15))
    assert_close(output.metrics["entropy"], torch.tensor(1.5))


@pytest.mark.parametrize(("estimator", "expected"), [("k2", 0.5 * math.log(2.0) ** 2), ("k3", 1.0 - math.log(2.0))])
def test_kl_penalty_by_hand(estimator: str, expected: float) -> None:
    """log pi - log ref = -ln 2: k2 is (ln 2)^2 / 2; k3 is 2 - 1 - ln 2."""
    one = torch.ones(1, dtype=torch.bool)
    output = kl_loss(torch.tensor([-math.log(2.0)]), torch.zeros(1), one, num_tokens=1, coef=0.5, estimator=estimator)
    assert_close(output.loss, torch.tensor(0.5 * expected))
    assert_close(output.metrics["kl"], torch.tensor(expected))


def test_the_exact_kl_as_loss_by_hand() -> None:
    """Mean of 1 and 2 nats inside the mask, coefficient 0.1: 0.15. The way from logits: a reference of equal logits."""
    mask = torch.tensor([True, True, False])
    output = vocab_kl_loss(torch.tensor([1.0, 2.0, 9.0]), mask, num_tokens=2, coef=0.1)
    assert_close(output.loss, torch.tensor(0.15))
    assert_close(output.metrics["kl"], torch.tensor(1.5))
    logits = torch.tensor([[0.0, math.log(3.0)]] * 3, requires_grad=True)
    loss = vocab_kl_loss(token_kl(logits, torch.zeros(3, 2)), mask, num_tokens=2, coef=1.0).loss
    assert_close(loss, torch.tensor(0.130812))  # worked in test_vocab_kl.py
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 1] > 0 > gradient[0, 0] and not gradient[2].any()  # towards the uniform reference


def test_k1_is_refused_as_a_loss() -> None:
    with pytest.raises(InputError, match=r"estimator is 'k1'; choose one of \['k2', 'k3'\]"):
        kl_loss(OLD, OLD, MASK, num_tokens=3, coef=0.1, estimator="k1")
    with pytest.raises(InputError, match="kl_estimator is 'k1'"):
        grpo_loss(*TOKENS, num_tokens=3, **CLIP, reference_logprobs_N=OLD, kl_coef=0.1, kl_estimator="k1")


def test_sft_mixing_by_hand() -> None:
    """Mean negative log-prob (1 + 3) / 2 = 2, coefficient 0.25."""
    output = sft_mixing_loss(torch.tensor([-1.0, -3.0]), torch.ones(2, dtype=torch.bool), num_tokens=2, coef=0.25)
    assert_close(output.loss, torch.tensor(0.5))
    assert_close(output.metrics["nll"], torch.tensor(2.0))
