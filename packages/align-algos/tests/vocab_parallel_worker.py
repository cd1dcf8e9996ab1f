"""One rank of the test that splits the vocabulary over two processes. Not a test file; started by test_logprobs.py.

On CPU over gloo, with the kernels in plain torch, or on a GPU each over NCCL, with those in Triton.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing import assert_close

from align_algos import (
    FusedOutput,
    InputError,
    LossOutput,
    entropy_loss,
    fused_cross_entropy,
    fused_logprobs,
    fused_loss,
    grpo_loss,
    token_entropy,
    token_kl,
    token_logprobs,
)
from test_fused import assert_near

RANKS = 2
COLUMNS = 6  # on each rank
MANY_COLUMNS = 640


def tolerance(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """On CUDA the matrix products of a half and of the whole add up in another order."""
    if dtype == torch.bfloat16 and device.type == "cuda":
        return {"rtol": 2e-2, "atol": 2e-2}
    return {"rtol": 1e-5, "atol": 1e-5} if device.type == "cuda" else {"rtol": 1e-6, "atol": 1e-6}


def compare(rank: int, device: torch.device, vocab_size: int | None, temperature: float, dtype: torch.dtype) -> None:
    """Value and gradient of this rank's slice equal those of the whole vocabulary."""
    random = torch.Generator().manual_seed(0)
    whole = (20 * torch.randn(7, RANKS * COLUMNS, generator=random)).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab_size or RANKS * COLUMNS, (7,), generator=random).to(device)
    other = whole.detach() + whole.detach().flip(1) / 20
    weights = torch.randn(7, generator=random).to(device)
    columns = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    own = whole.detach()[:, columns].clone().requires_grad_()
    shared = {"vocab_size": vocab_size, "temperature": temperature}
    group = dist.group.WORLD
    for expected, result in (
        (token_logprobs(whole, targets, **shared), token_logprobs(own, targets, tp_group=group, **shared)),
        (token_entropy(whole, **shared), token_entropy(own, tp_group=group, **shared)),
        (token_kl(whole, other, **shared), token_kl(own, other[:, columns], tp_group=group, **shared)),
    ):
        assert_close(result, expected, **tolerance(dtype, device))
        (expected_gradient,) = torch.autograd.grad(expected @ weights.to(expected.dtype), whole)
        (gradient,) = torch.autograd.grad(result @ weights.to(result.dtype), own)
        assert_close(gradient, expected_gradient[:, columns], **tolerance(dtype, device))


class Policy:
    """A small policy over a whole vocabulary, and this rank's rows of its output matrix."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        *,
        columns: int,
        vocab_size: int,
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        random = torch.Generator().manual_seed(1)
        shapes = ((37, 4), (RANKS * columns, 4))
        self.hidden, self.whole = (
            torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes
        )
        self.rows = slice(rank * columns, (rank + 1) * columns)
        self.own = self.whole.detach()[self.rows].clone().requires_grad_()
        self.targets = torch.randint(0, vocab_size, (37,), generator=random).to(device)
        self.mask = (torch.rand(37, generator=random) < 0.8).to(device)
        self.advantages, self.weights = torch.randn(2, 37, generator=random).to(device)
        # Ratios of 0.6, 0.95, 1.05 and 1.6: the clip of 0.2 binds for some, and none is near it.
        noise = torch.tensor([0.5, 0.05, -0.05, -0.5]).repeat(10)[:37].to(device)
        self.shared = {"vocab_size": vocab_size, "temperature": temperature}
        with torch.no_grad():
            self.old = noise + fused_logprobs(self.hidden, self.whole, self.targets, **self.shared).logprobs_N
        # Of the 640 columns of a rank, three blocks of columns, or of 14 rows.
        self.block_bytes = 256 * 37 * self.hidden.element_size()

    def gradients(self, loss: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, (self.hidden, weight)))

    def piece(self, output: FusedOutput, rows: slice) -> LossOutput:
        columns = (self.old[rows], self.advantages[rows], self.mask[rows])
        numbers = {"num_tokens": 37, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1}
        loss, metrics = grpo_loss(output.logprobs_N, *columns, **numbers, reference_logprobs_N=self.old[rows] - 0.2)
        assert output.entropy_N is not None
        bonus = entropy_loss(output.entropy_N, self.mask[rows], num_tokens=37, coef=0.01)
        return LossOutput(loss + bonus.loss, {**metrics, "whole_entropy": bonus.metrics["entropy"]})

    def logprobs(self, weight: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        """Log-probs first, loss later: some blocks are kept, others made again."""
        output = fused_logprobs(
            self.hidden,
            weight,
            self.targets,
            entropy=True,
            tp_group=group,
            block_bytes=self.block_bytes,
            keep_bytes=self.block_bytes,
            **self.shared,
        )
        assert output.entropy_N is not None
        scale = self.weights.to(output.logprobs_N.dtype)
        loss = output.logprobs_N @ scale + output.entropy_N @ scale.square()
        return [output.logprobs_N, output.entropy_N, *self.gradients(loss, weight)]

    def cross_entropy(self, weight: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        options = {**self.shared, "block_bytes": self.block_bytes, "tp_group": group}
        loss, logprobs = fused_cross_entropy(self.hidden, weight, self.targets, self.weights, **options)
        return [loss, logprobs, *self.gradients(loss, weight)]

    def grpo(self, weight: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        """The policy loss with entropy, in several pieces."""
        options = {**self.shared, "block_bytes": self.block_bytes, "tp_group": group}
        output = fused_loss(self.hidden, weight, self.targets, self.piece, entropy=True, **options)
        metrics = torch.stack([output.metrics[key].double() for key in sorted(output.metrics)])
        return [output.loss, metrics, output.logprobs_N, *self.gradients(output.loss, weight)]


def compare_fused(policy: Policy) -> None:
    """Values, gradients of the hidden states (the same on all ranks) and of this rank's rows of the output matrix."""
    for way in (policy.logprobs, policy.cross_entropy, policy.grpo):
        expected, found = way(policy.whole, None), way(policy.own, dist.group.WORLD)
        for result, truth in zip(found, [*expected[:-1], expected[-1][policy.rows]], strict=True):
            assert_near(result, truth, policy.hidden.dtype)


def impossible_half(rank: int, device: torch.device) -> None:
    """The first rank's columns are all -inf, the second's all equal: log p = -ln 6 and H = ln 6 = 1.791759 on both."""
    logits = torch.full((1, COLUMNS), -torch.inf if rank == 0 else 3.0, device=device, requires_grad=True)
    group = dist.group.WORLD
    logprob = token_logprobs(logits, torch.tensor([COLUMNS], device=device), tp_group=group)
    entropy = token_entropy(logits, tp_group=group)
    assert_close(torch.cat([-logprob, entropy]), torch.full((2,), 1.791759, device=device))
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    assert torch.isfinite(gradient).all() and (rank == 1 or not gradient.any())


def main(rank: int, rendezvous: str, device_type: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    # Minutes: on a busy machine one process may import torch a minute after the other, which then gave up waiting.
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=5),
    )
    compare(rank, device, None, 1.0, torch.float32)
    compare(rank, device, 10, 0.7, torch.float32)  # two columns of padding on the last rank
    compare(rank, device, 5, 1.0, torch.float64)  # the last rank holds only padding
    compare(rank, device, 10, 1.0, torch.bfloat16)
    for columns, vocab_size, temperature, dtype in (
        (COLUMNS, 10, 0.7, torch.float32),
        (COLUMNS, 5, 1.0, torch.float64),
        (MANY_COLUMNS, RANKS * MANY_COLUMNS, 1.0, torch.float32),
        (MANY_COLUMNS, 1200, 0.7, torch.float64),
        (MANY_COLUMNS, 1200, 1.0, torch.bfloat16),
    ):
        numbers = {"columns": columns, "vocab_size": vocab_size, "temperature": temperature}
        compare_fused(Policy(rank, device, **numbers, dtype=dtype))
    impossible_half(rank, device)
    try:
        logits = torch.zeros(1, COLUMNS, device=device)
        token_logprobs(logits, torch.tensor([12], device=device), tp_group=dist.group.WORLD)
    except InputError as error:
        assert "targets_N holds 12 to 12; expected 0 to 11" in str(error)
    else:
        raise AssertionError("a target outside the whole vocabulary was accepted")
    dist.destroy_process_group()
