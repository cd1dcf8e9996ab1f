"""Values of the value loss, worked by hand."""

import torch
from torch.testing import assert_close

from align_algos import value_loss

BOTH = torch.ones(2, dtype=torch.bool)


def test_plain_value_by_hand() -> None:
    """Values 1 and 4, returns 2 and 2: half of (1 + 4) / 2 = 1.25; gradient (v - R) / 2 = -0.5, 1."""
    values = torch.tensor([1.0, 4.0], requires_grad=True)
    output = value_loss(values, torch.zeros(2), torch.tensor([2.0, 2.0]), BOTH, num_tokens=2, clip=None)
    output.loss.backward()
    assert_close(output.loss.detach(), torch.tensor(1.25))
    assert_close(values.grad, torch.tensor([-0.5, 1.0]))
    assert output.metrics["clip_fraction"] == 0.0


def test_clipped_value_takes_the_larger_error() -> None:
    """Old value 0, clip 0.5, so both values are held at 0.5.

    Value 1, return 2: errors 1 and 2.25, the held one is larger and has no gradient. Value 4, return 2: errors 4 and
    2.25, the plain one is larger and pulls the value back. Half of (2.25 + 4) / 2 = 1.5625; one of two clipped.
    """
    values = torch.tensor([1.0, 4.0], requires_grad=True)
    output = value_loss(values, torch.zeros(2), torch.tensor([2.0, 2.0]), BOTH, num_tokens=2, clip=0.5)
    output.loss.backward()
    assert_close(output.loss.detach(), torch.tensor(1.5625))
    assert_close(output.metrics["clip_fraction"], torch.tensor(0.5))
    assert_close(values.grad, torch.tensor([0.0, 1.0]))


def test_metrics_give_the_explained_variance() -> None:
    """Returns 1 and 3 (variance 1), values 1.5 and 3.5: the error is constant, all variance is explained."""
    values, returns = torch.tensor([1.5, 3.5]), torch.tensor([1.0, 3.0])
    m = value_loss(values, torch.zeros(2), returns, BOTH, num_tokens=2, clip=None).metrics
    explained = 1 - (m["squared_error"] - (m["return"] - m["value"]) ** 2) / (m["squared_return"] - m["return"] ** 2)
    assert_close(explained, torch.tensor(1.0))
    assert_close(m["value_loss"], torch.tensor(0.125))


def test_perfect_values_have_no_loss() -> None:
    values = torch.tensor([1.0, 2.0])
    assert value_loss(values, values, values, BOTH, num_tokens=2, clip=0.1).loss == 0.0
