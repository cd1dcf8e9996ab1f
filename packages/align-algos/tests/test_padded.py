"""From padded to flat and back."""

import pytest
import torch
from torch.testing import assert_close

from align_algos import InputError, flatten, padded_offsets, sft_loss, unflatten

PRESENT = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
PADDED = torch.tensor([[1.0, 2.0, torch.nan], [torch.nan] * 3, [torch.nan, 3.0, 4.0]])


def test_flatten_by_hand() -> None:
    """Left and right padding, a sequence of padding alone, two columns of different types."""
    values, mask = flatten(PRESENT, PADDED, torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool())
    assert torch.equal(values, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(mask, torch.tensor([True, False, True, True]))
    assert torch.equal(padded_offsets(PRESENT), torch.tensor([0, 2, 2, 4]))


def test_unflatten_is_the_inverse() -> None:
    (values,) = flatten(PRESENT, PADDED)
    assert_close(unflatten(values, PRESENT, fill=torch.nan), PADDED, equal_nan=True)
    assert torch.equal(unflatten(values, PRESENT)[1], torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.bfloat16])
def test_unflatten_takes_every_dtype_that_flatten_takes(dtype: torch.dtype) -> None:
    """Token ids and masks come back as log-probs do."""
    padded = torch.tensor([[1, 2, 0], [0, 0, 0], [0, 3, 0]]).to(dtype)
    (values,) = flatten(PRESENT, padded)
    assert torch.equal(unflatten(values, PRESENT), padded)


def test_gradient_comes_back_to_the_padded_tensor() -> None:
    """A loss over three of the four tokens: -1/3 each; the padding gets exactly 0 although it holds NaN."""
    padded = PADDED.clone().requires_grad_()
    (logprobs,) = flatten(PRESENT, padded)
    sft_loss(logprobs, torch.tensor([True, False, True, True]), num_tokens=3).loss.backward()
    third = -1.0 / 3.0
    assert_close(padded.grad, torch.tensor([[third, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, third, third]]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"column 1 has shape \[3, 2\]; expected \[3, 3\]"):
        flatten(PRESENT, PADDED, PADDED[:, :2])
    with pytest.raises(InputError, match=r"present_BL has shape .* dtype torch.int64"):
        padded_offsets(PRESENT.long())
    with pytest.raises(InputError, match=r"x_N has shape \[3\]; expected \[4\]"):
        unflatten(torch.zeros(3), PRESENT)
    with pytest.raises(InputError, match=r"x_N has shape \[4, 1\]; expected \[4\]"):
        unflatten(torch.zeros(4, 1), PRESENT)
