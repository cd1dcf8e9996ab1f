"""What is no loss, on a device that pretends to be CUDA: nothing of it is made on another one.

The same call on CPU is the truth; its values are checked by hand elsewhere. Losses: `losses/test_registry.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import align_algos as algos
from pretend_cuda import OnCuda, PretendCuda, on_cuda

RANDOM = torch.Generator().manual_seed(0)
LENGTHS = torch.tensor([4, 3, 0, 5, 2, 6])
OFFSETS = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
N, B, V = 20, 6, 600
MASK = torch.rand(N, generator=RANDOM) < 0.8
X, Y = torch.randn(2, N, generator=RANDOM)
INSIDE = torch.where(MASK, X, 0.0)
LOGPROBS, OTHERS = -X.abs(), -Y.abs()
SCORES = torch.where(LENGTHS > 0, torch.randn(B, generator=RANDOM), 0.0)
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
PRESENT = torch.rand(B, 7, generator=RANDOM) < 0.6
PADDED = torch.randn(B, 7, generator=RANDOM)
TARGETS = torch.randint(0, V, (N,), generator=RANDOM)
LOGITS = torch.randn(N, V, generator=RANDOM)
HIDDEN, MATRIX = torch.randn(N, 4, generator=RANDOM), torch.randn(V, 4, generator=RANDOM)


def scaled(rewards_B: Tensor) -> Tensor:
    scale = algos.RunningScale()
    scale.update(rewards_B)
    return scale.scale(rewards_B)


def whitened(x_N: Tensor, mask_N: Tensor) -> Tensor:
    parts = [algos.moments(x_N[rows], mask_N[rows]) for rows in (slice(3), slice(3, None))]
    return algos.whiten(x_N, mask_N, algos.merge_moments(parts), eps=0.0)


def fused(hidden: Tensor, matrix: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Some blocks of logits kept, some made again."""
    leaves = [x.detach().requires_grad_() for x in (hidden, matrix)]
    block = 256 * N * 4
    found = algos.fused_logprobs(*leaves, targets, entropy=True, block_bytes=block, keep_bytes=block)
    assert found.entropy_N is not None
    return torch.autograd.grad(found.logprobs_N.sum() + found.entropy_N.sum(), leaves)


def fused_by_pieces(hidden: Tensor, matrix: Tensor, targets: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    *whole, cuts = columns

    def piece(output: algos.FusedOutput, rows: slice) -> algos.LossOutput:
        return algos.grpo_loss(output.logprobs_N, *(x[rows] for x in whole), num_tokens=N, clip_low=0.2, clip_high=0.2)

    leaves = [x.detach().requires_grad_() for x in (hidden, matrix)]
    loss = algos.fused_loss(*leaves, targets, piece, cuts=cuts, block_bytes=V * 4 * 7).loss
    return torch.autograd.grad(loss, leaves)


PER_SEQUENCE = (LOGPROBS, OTHERS, MASK, OFFSETS)
CALLS: dict[str, tuple[Any, ...]] = {
    "gae": (lambda r, v, m, o: algos.gae(r, v, m, o, gamma=0.9, lam=0.9), INSIDE, Y, MASK, OFFSETS),
    "returns": (lambda r, m, o: algos.returns_to_go(r, m, o, gamma=0.9), INSIDE, MASK, OFFSETS),
    "groups": (algos.group_normalised, SCORES, GROUPS),
    "leave one out": (algos.leave_one_out, SCORES, GROUPS),
    "mixed groups": (algos.mixed_groups, SCORES, GROUPS),
    "whitening": (whitened, X, MASK),
    "running scale": (scaled, SCORES),
    "truncated": (lambda *x: algos.truncated_importance(*x, num_tokens=N, level="sequence", cap=2.0), *PER_SEQUENCE),
    "masked": (
        lambda *x: algos.masked_importance(*x, num_tokens=N, level="geometric", low=0.5, high=2.0),
        *PER_SEQUENCE,
    ),
    "dropped": (
        lambda *x: algos.negative_sequence_mask(*x, num_tokens=N, threshold=0.1),
        *(LOGPROBS, OTHERS, X, MASK, OFFSETS),
    ),
    "kl of wrong pairs": (lambda *x: algos.kto_kl(*x, num_sequences=B), *PER_SEQUENCE),
    "shaped": (lambda *x: algos.shaped_rewards(*x, kl_coef=0.1), SCORES, *PER_SEQUENCE),
    "shaped by length": (
        lambda *x: algos.rewards_with_kl(*x, kl_coef=0.1, length_normalised=True),
        *(SCORES, X, MASK, OFFSETS),
    ),
    "repeats": (algos.ngram_penalty, TARGETS % 5, MASK, OFFSETS),
    "overlong": (lambda x: algos.overlong_penalty(x, max_tokens=6, buffer=3), LENGTHS),
    "per token": (algos.per_token, SCORES, OFFSETS),
    "sequence mean": (lambda *x: algos.sequence_mean(*x, num_sequences=B), X, MASK, OFFSETS),
    "flat": (algos.flatten, PRESENT, PADDED),
    "starts": (algos.padded_offsets, PRESENT),
    "padded": (algos.unflatten, PADDED[PRESENT], PRESENT),
    "fused": (fused, HIDDEN, MATRIX, TARGETS),
    "fused by pieces": (fused_by_pieces, HIDDEN, MATRIX, TARGETS, LOGPROBS, X, MASK, OFFSETS),
    "log-probs": (algos.token_logprobs, LOGITS, TARGETS),
    "entropy": (algos.token_entropy, LOGITS),
    "exact kl": (algos.token_kl, LOGITS, LOGITS.flip(1)),
}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # says torch.autocast, which is asked to do nothing
@pytest.mark.parametrize("name", CALLS)
def test_all_of_it_is_on_the_device(name: str) -> None:
    function: Callable[..., Any] = CALLS[name][0]
    arguments: tuple[Tensor, ...] = CALLS[name][1:]
    with PretendCuda():
        found = tree_leaves(function(*map(on_cuda, arguments)))
    for result, truth in zip(found, tree_leaves(function(*arguments)), strict=True):
        assert isinstance(result, OnCuda)
        assert_close(result.held.detach(), truth.detach())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),
        lambda x: x.new_zeros(3, device="cpu") * x,
        lambda x: x.cpu() * x,
        lambda x: torch.arange(3, device=x.device) - torch.arange(3),
    ],
)
def test_the_pretended_device_refuses_what_cuda_does(mixed: Callable[[Tensor], Tensor]) -> None:
    with PretendCuda(), pytest.raises(RuntimeError, match="on cpu, and others on cuda"):
        mixed(on_cuda(torch.ones(3)))


def test_the_pretended_device_allows_what_cuda_does() -> None:
    """A single number, an index in the host's memory, and whatever is moved."""
    with PretendCuda():
        x = on_cuda(torch.ones(3))
        found = (x + torch.tensor(1.0))[torch.tensor([0, 1])] + torch.ones(2).to(x.device, torch.float64)
        assert found.device == torch.device("cuda", 0)
        assert found.tolist() == [3.0, 3.0]
        with pytest.raises(TypeError, match="numpy"):
            found.numpy()
