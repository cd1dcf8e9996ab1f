"""One rank of the test that splits the vocabulary over two processes. Not a test file; started by test_logprobs.py."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing import assert_close

from align_algos import InputError, fused_cross_entropy, fused_logprobs, token_entropy, token_kl, token_logprobs

RANKS = 2
COLUMNS = 6  # on each rank


def compare(rank: int, vocab_size: int | None, temperature: float, dtype: torch.dtype) -> None:
    """Value and gradient of this rank's slice equal those of the whole vocabulary."""
    random = torch.Generator().manual_seed(0)
    whole = (20 * torch.randn(7, RANKS * COLUMNS, generator=random)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size or RANKS * COLUMNS, (7,), generator=random)
    other = whole.detach() + whole.detach().flip(1) / 20
    weights = torch.randn(7, generator=random)
    columns = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    own = whole.detach()[:, columns].clone().requires_grad_()
    shared = {"vocab_size": vocab_size, "temperature": temperature}
    group = dist.group.WORLD
    for expected, result in (
        (token_logprobs(whole, targets, **shared), token_logprobs(own, targets, tp_group=group, **shared)),
        (token_entropy(whole, **shared), token_entropy(own, tp_group=group, **shared)),
        (token_kl(whole, other, **shared), token_kl(own, other[:, columns], tp_group=group, **shared)),
    ):
        assert_close(result, expected, rtol=1e-6, atol=1e-6)
        (expected_gradient,) = torch.autograd.grad(expected @ weights.to(expected.dtype), whole)
        (gradient,) = torch.autograd.grad(result @ weights.to(result.dtype), own)
        assert_close(gradient, expected_gradient[:, columns], rtol=1e-6, atol=1e-6)


def compare_fused(rank: int, vocab_size: int | None, temperature: float, dtype: torch.dtype) -> None:
    """Values, gradients of the hidden states (the same on all ranks) and of this rank's rows of the output matrix."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 4, generator=random).to(dtype).requires_grad_()
    whole = torch.randn(RANKS * COLUMNS, 4, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size or RANKS * COLUMNS, (7,), generator=random)
    weights = torch.randn(7, generator=random)
    rows = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    own = whole.detach()[rows].clone().requires_grad_()
    shared = {"vocab_size": vocab_size, "temperature": temperature}
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}

    def results(weight: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        output = fused_logprobs(hidden, weight, targets, tp_group=group, entropy=True, **shared)
        loss, logprobs = fused_cross_entropy(hidden, weight, targets, weights, tp_group=group, **shared)
        scale = weights.to(logprobs.dtype)
        first = torch.autograd.grad(output.logprobs_N @ scale + output.entropy_N @ scale.square(), (hidden, weight))
        return [
            output.logprobs_N,
            output.entropy_N,
            logprobs,
            loss,
            *first,
            *torch.autograd.grad(loss, (hidden, weight)),
        ]

    for expected, result in zip(results(whole, None), results(own, dist.group.WORLD)):
        assert_close(result, expected[rows] if expected.shape == whole.shape else expected, **tolerance)


def impossible_half(rank: int) -> None:
    """The first rank's columns are all -inf, the second's all equal: log p = -ln 6 and H = ln 6 = 1.791759 on both."""
    logits = torch.full((1, COLUMNS), -torch.inf if rank == 0 else 3.0, requires_grad=True)
    group = dist.group.WORLD
    logprob = token_logprobs(logits, torch.tensor([COLUMNS]), tp_group=group)
    entropy = token_entropy(logits, tp_group=group)
    assert_close(torch.cat([-logprob, entropy]), torch.full((2,), 1.791759))
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    assert torch.isfinite(gradient).all() and (rank == 1 or not gradient.any())


def main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    # Minutes: on a busy machine one process may import torch a minute after the other, which then gave up waiting.
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5)
    )
    compare(rank, None, 1.0, torch.float32)
    compare(rank, 10, 0.7, torch.float32)  # two columns of padding on the last rank
    compare(rank, 5, 1.0, torch.float64)  # the last rank holds only padding
    compare(rank, 10, 1.0, torch.bfloat16)
    compare_fused(rank, None, 1.0, torch.float32)
    compare_fused(rank, 10, 0.7, torch.float32)
    compare_fused(rank, 5, 1.0, torch.float64)
    compare_fused(rank, 10, 1.0, torch.bfloat16)
    impossible_half(rank)
    try:
        token_logprobs(torch.zeros(1, COLUMNS), torch.tensor([12]), tp_group=dist.group.WORLD)
    except InputError as error:
        assert "targets_N holds 12 to 12; expected 0 to 11" in str(error)
    else:
        raise AssertionError("a target outside the whole vocabulary was accepted")
    dist.destroy_process_group()
