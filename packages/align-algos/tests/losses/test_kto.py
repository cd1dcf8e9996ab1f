"""Values of KTO, worked by hand."""

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, kto_kl, kto_loss

MASK = torch.tensor([False, True, True, False, True])
OFFSETS = torch.tensor([0, 3, 5])
POLICY = torch.tensor([-9.0, -1.0, -1.0, -9.0, -4.0])
REFERENCE = torch.tensor([-7.0, -2.0, -3.0, -7.0, -3.0])
RESPONSES = (POLICY, REFERENCE, MASK, OFFSETS)
DESIRABLE = torch.tensor([True, False])


def test_value_by_hand() -> None:
    """Log-ratios 3 (desirable) and -1 (not), baseline 1, beta 0.5: both values sigmoid(1) = 0.731059.

    (1 x 0.268941 + 2 x 0.268941) / 2 = 0.403412. Rewards 1.5 and -0.5, each over the 2 sequences.
    """
    output = kto_loss(*RESPONSES, desirable_B=DESIRABLE, beta=0.5, kl=1.0, num_sequences=2, undesirable_weight=2.0)
    assert_close(output.loss, torch.tensor(0.403412))
    expected = {"desirable": 0.5, "desirable_reward": 0.75, "undesirable_reward": -0.25}
    assert_close(output.metrics, {key: torch.tensor(value) for key, value in expected.items()})


def test_a_negative_baseline_counts_as_zero() -> None:
    negative, zero = (
        kto_loss(*RESPONSES, desirable_B=DESIRABLE, beta=0.5, kl=kl, num_sequences=2).loss for kl in (-3.0, 0.0)
    )
    assert torch.equal(negative, zero)


def test_gradient_raises_the_desirable_and_lowers_the_other() -> None:
    """At r = z = 0 the slope of sigmoid is 1/4: -+ beta / 4 / 2 a response token."""
    logprobs = torch.zeros(5, requires_grad=True)
    kto_loss(
        logprobs, torch.zeros(5), MASK, OFFSETS, desirable_B=DESIRABLE, beta=0.8, kl=0.0, num_sequences=2
    ).loss.backward()
    assert_close(logprobs.grad, torch.tensor([0.0, -0.1, -0.1, 0.0, 0.1]))


def test_baseline_is_the_mean_log_ratio_over_the_global_batch() -> None:
    """3 and -1 over 4 sequences of the global batch: 0.5; without gradient."""
    policy = POLICY.clone().requires_grad_()
    kl = kto_kl(policy, REFERENCE, MASK, OFFSETS, num_sequences=4)
    assert_close(kl, torch.tensor(0.5))
    assert not kl.requires_grad


def test_flags_that_are_not_bool_are_refused() -> None:
    with pytest.raises(InputError, match=r"desirable_B has dtype torch.int64; expected torch.bool"):
        kto_loss(*RESPONSES, desirable_B=DESIRABLE.long(), beta=0.5, kl=0.0, num_sequences=2)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_baseline_adds_up_over_micro_batches(cut: int) -> None:
    """3 over 2 sequences and -1 over 2, in either micro-batch: 1.5 - 0.5 = 1. 1e30 outside the mask does not matter."""
    bounds = OFFSETS.tolist()
    policy = torch.where(MASK, POLICY, 1e30)
    kl = torch.tensor(0.0)
    for first, last in ((0, cut), (cut, 2)):
        columns = (column[bounds[first] : bounds[last]] for column in (policy, REFERENCE, MASK))
        kl += kto_kl(*columns, OFFSETS[first : last + 1] - bounds[first], num_sequences=2)
    assert_close(kl, torch.tensor(1.0))


def test_baseline_refuses_nan_by_name_and_small_counts() -> None:
    with pytest.raises(InputError, match="reference_logprobs_N holds nan at position 0"):
        kto_kl(POLICY, REFERENCE * torch.nan, MASK, OFFSETS, num_sequences=2)
    with pytest.raises(InputError, match="num_sequences is 1, but this micro-batch alone has 2"):
        kto_kl(POLICY, REFERENCE, MASK, OFFSETS, num_sequences=1)
