"""Values of the DPO loss, worked by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, dpo_loss, get_loss, token_logprobs

# One pair: chosen has tokens 0 to 2 (the first is prompt), rejected tokens 3 and 4 (the first is prompt).
MASK = torch.tensor([False, True, True, False, True])
OFFSETS = torch.tensor([0, 3, 5])


def test_value_by_hand() -> None:
    """log pi - log ref: chosen (-1 + 2) + (-1 + 3) = 3, rejected -4 + 3 = -1; beta 0.5.

    Rewards 1.5 and -0.5, margin 2; -logsigmoid(2) = ln(1 + e^-2) = 0.126928.
    """
    policy = torch.tensor([-9.0, -1.0, -1.0, -9.0, -4.0])
    reference = torch.tensor([-7.0, -2.0, -3.0, -7.0, -3.0])
    output = dpo_loss(policy, reference, MASK, OFFSETS, beta=0.5, num_pairs=1)
    assert_close(output.loss, torch.tensor(0.126928))
    expected = {"accuracy": 1.0, "margin": 2.0, "chosen_reward": 1.5, "rejected_reward": -0.5}
    assert_close(output.metrics, {key: torch.tensor(value) for key, value in expected.items()})


def test_label_smoothing_by_hand() -> None:
    """Margin 2 with smoothing 0.25: 0.75 x 0.126928 + 0.25 x 2.126928 = 0.626928."""
    policy = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])
    output = dpo_loss(policy, torch.zeros(5), MASK, OFFSETS, beta=1.0, num_pairs=1, label_smoothing=0.25)
    assert_close(output.loss, torch.tensor(0.626928))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_first_loss_is_ln_2(label_smoothing: float) -> None:
    """Where the policy is still the reference every margin is 0 and -logsigmoid(0) = ln 2, whatever the smoothing."""
    logprobs = -torch.rand(5, generator=torch.Generator().manual_seed(0))
    output = dpo_loss(logprobs, logprobs, MASK, OFFSETS, beta=0.1, num_pairs=1, label_smoothing=label_smoothing)
    assert_close(output.loss, torch.tensor(math.log(2.0)))
    assert output.metrics["margin"] == 0.0 and output.metrics["accuracy"] == 0.0


def test_gradient_raises_chosen_and_lowers_rejected() -> None:
    """At margin 0 the slope is beta sigmoid(0) = 0.05 a response token, with opposite signs, 0 on the prompt."""
    logprobs = torch.zeros(5, requires_grad=True)
    dpo_loss(logprobs, torch.zeros(5), MASK, OFFSETS, beta=0.1, num_pairs=1).loss.backward()
    assert_close(logprobs.grad, torch.tensor([0.0, -0.05, -0.05, 0.0, 0.05]))


@pytest.mark.parametrize("log_ratio", [-30.0, 30.0])
def test_large_log_ratios_stay_exact(log_ratio: float) -> None:
    """Margin of two chosen tokens at +-30: -logsigmoid(60) = e^-60, about 0; -logsigmoid(-60) = 60."""
    policy = torch.tensor([0.0, log_ratio, log_ratio, 0.0, 0.0])
    output = dpo_loss(policy, torch.zeros(5), MASK, OFFSETS, beta=1.0, num_pairs=1)
    assert_close(output.loss, torch.tensor(0.0 if log_ratio > 0 else 60.0))


def test_shifted_logprobs_learn_to_prefer_the_chosen_token() -> None:
    """The whole way from logits: after "a", token 1 is chosen and token 2 rejected.

    Row i of the logits predicts the token after i, so it is paired with the *next* token. Training on the token
    already read (the ancestor's error) would leave the probability of token 1 after "a" where it was.
    """
    tokens, offsets = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 2, 4])
    next_tokens = torch.tensor([1, 0, 2, 0])  # the last row of a sequence predicts nothing: any id, mask False
    mask = torch.tensor([True, False, True, False])
    table = torch.zeros(3, 3, requires_grad=True)  # a bigram model: row = token read

    def logprobs(weights: Tensor) -> Tensor:
        return token_logprobs(weights[tokens], next_tokens)

    reference = logprobs(table).detach()
    for _ in range(50):
        loss = dpo_loss(logprobs(table), reference, mask, offsets, beta=0.5, num_pairs=1).loss
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table - gradient).detach().requires_grad_()
    probabilities = table[0].softmax(0)
    assert probabilities[1] > 0.7 and probabilities[2] < 0.1


def test_an_odd_number_of_sequences_is_refused() -> None:
    with pytest.raises(InputError, match="offsets hold 3 sequences; expected an even number"):
        dpo_loss(torch.zeros(5), torch.zeros(5), MASK, torch.tensor([0, 2, 3, 5]), beta=0.1, num_pairs=2)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 4], "offsets go from 0 to 4; expected 0 to 5"),
        ([1, 3, 5], "offsets go from 1 to 5; expected 0 to 5"),
        ([0, 4, 3, 5, 5], "offsets must not fall"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dpo_loss(torch.zeros(5), torch.zeros(5), MASK, torch.tensor(offsets), beta=0.1, num_pairs=2)


def test_label_smoothing_above_half_is_refused() -> None:
    """Above 0.5 the loss would prefer the rejected answer."""
    with pytest.raises(InputError, match=r"label_smoothing is 0.6; expected a finite number in \[0, 0.5\]"):
        dpo_loss(torch.zeros(5), torch.zeros(5), MASK, OFFSETS, beta=0.1, num_pairs=1, label_smoothing=0.6)


def test_registry_says_pairs_stay_together() -> None:
    assert get_loss("dpo").unit == "pair"
