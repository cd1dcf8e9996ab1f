"""Values of the SFT loss, worked by hand."""

import torch
from torch.testing import assert_close

from align_algos import sft_loss


def test_value_by_hand() -> None:
    """Tokens with probabilities 1/2, 1/4, 1/8; the first is prompt.

    -(ln 1/4 + ln 1/8) / 2 = (2 + 3) ln 2 / 2 = 2.5 ln 2 = 1.732868
    """
    logprobs = torch.tensor([0.5, 0.25, 0.125]).log()
    output = sft_loss(logprobs, torch.tensor([False, True, True]), num_tokens=2)
    assert_close(output.loss, torch.tensor(1.732868))
    assert_close(output.metrics, {"nll": torch.tensor(1.732868)})


def test_tokens_weigh_the_same_whatever_the_micro_batch() -> None:
    """Micro-batches of 1 and 3 tokens with losses 4 and 0, 0, 0: the mean over tokens is 4/4 = 1.

    A mean of the micro-batches' means would be (4 + 0) / 2 = 2.
    """
    first = sft_loss(torch.tensor([-4.0]), torch.tensor([True]), num_tokens=4)
    second = sft_loss(torch.zeros(3), torch.ones(3, dtype=torch.bool), num_tokens=4)
    assert_close(first.loss + second.loss, torch.tensor(1.0))
