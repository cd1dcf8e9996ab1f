"""The KL over the whole vocabulary, by hand and against torch's softmax in float64. TP=2 is in test_logprobs.py."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, k1, softmax_blocks, token_kl, token_logprobs


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def expected(policy: Tensor, reference: Tensor, vocab_size: int, temperature: float) -> Tensor:
    logp, logq = ((x[:, :vocab_size].double() / temperature).log_softmax(1) for x in (policy, reference))
    return (logp.exp() * (logp - logq)).sum(1)


def test_value_by_hand() -> None:
    """p = (1/4, 3/4), q = (1/2, 1/2), a third column is padding: 1/4 ln 1/2 + 3/4 ln 3/2 = 0.130812."""
    policy = torch.tensor([[0.0, math.log(3.0), 50.0]])
    assert_close(token_kl(policy, torch.zeros(1, 3), vocab_size=2), torch.tensor([0.130812]))


@pytest.mark.parametrize("chunk_elements", [1, 13, 1 << 24])
@pytest.mark.parametrize(("vocab_size", "temperature"), [(8, 1.0), (6, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_equal_float64(
    vocab_size: int, temperature: float, dtype: torch.dtype, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_blocks, "CHUNK_ELEMENTS", chunk_elements)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    policy, reference = logits(0, dtype).requires_grad_(), logits(1, dtype)
    weights = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)
    found = token_kl(policy, reference, vocab_size=vocab_size, temperature=temperature)
    truth = expected(policy, reference, vocab_size, temperature)
    assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(found.double() @ weights, policy)
    (wanted,) = torch.autograd.grad(truth @ weights, policy)
    assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    assert not gradient[:, vocab_size:].any()


def test_gradient_by_finite_differences() -> None:
    policy, reference = logits(0).requires_grad_(), logits(1)
    assert torch.autograd.gradcheck(lambda x: token_kl(x, reference, temperature=0.7), (policy,))


def test_it_is_what_k1_estimates() -> None:
    """The mean of k1 over the policy's own distribution of the next token."""
    policy, reference = logits(2), logits(3)
    tokens = torch.arange(8)
    rows = (x[:1].expand(8, 8) for x in (policy, reference))
    estimates = k1(*(token_logprobs(row, tokens) for row in rows))
    assert_close(policy[0].softmax(0) @ estimates, token_kl(policy, reference)[0])


def test_the_same_distribution_has_none_and_impossible_tokens_do_no_harm() -> None:
    policy = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    kl = token_kl(policy, torch.tensor([[5.0, 2.0, 6.0]]))
    assert torch.isfinite(kl).all()
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    assert torch.isfinite(gradient).all()
    assert_close(token_kl(logits(0), logits(0) + 7.0), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_token_impossible_under_the_reference_is_refused() -> None:
    with pytest.raises(InputError, match=r"the reference gives probability 0 .* in row 1"):
        token_kl(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"reference_logits_NV has shape \[5, 7\]"):
        token_kl(logits(0), logits(0)[:, :7])
    with pytest.raises(InputError, match="reference_logits_NV has NaN"):
        token_kl(logits(0), logits(0) * torch.nan)
    with pytest.raises(InputError, match="vocab_size is 9; expected 1 to 8"):
        token_kl(logits(0), logits(1), vocab_size=9)


def test_no_rows() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    token_kl(empty, torch.zeros(0, 4)).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4)
