"""KL(policy || reference) of each next-token distribution over the whole vocabulary, from logits. See PAPERS.md#kl.

Exact where `kl` estimates from the sampled token; needs the logits of both models. Works on a few rows at a time in
float32, whole or split over a tensor-parallel group.

Legend: N flat tokens, V columns of the logits on this rank, C columns of those that are real tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.errors import InputError
from align_algos.softmax_blocks import Softmax, empty_statistics, merge, row_chunks, take_block
from align_algos.vocabulary import VocabularySlice, check_matrix, summed, vocabulary_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_kl(
    logits_NV: Tensor,
    reference_logits_NV: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over the vocabulary of p (log p - log q), per row; as a loss put it through `reductions.token_mean`.

    Args:
        logits_NV: floating [N, V] of the policy p; with `tp_group` this rank's slice, as in `logprobs.token_logprobs`.
        reference_logits_NV: floating [N, V] of the frozen reference q; a constant.
        vocab_size, tp_group, temperature: as in `token_logprobs`; the temperature divides both.
    Returns:
        float32 [N] (float64 for float64 logits), nats, with gradient to `logits_NV`.
    Raises:
        InputError: a wrong shape, a row without a finite maximum, or a token that only the policy can produce.
    """
    check_matrix("logits_NV", logits_NV)
    if reference_logits_NV.shape != logits_NV.shape or not reference_logits_NV.is_floating_point():
        raise InputError(
            f"reference_logits_NV has shape {list(reference_logits_NV.shape)} and dtype {reference_logits_NV.dtype}; "
            f"expected a floating point matrix {list(logits_NV.shape)} as logits_NV"
        )
    part = vocabulary_slice(logits_NV.shape[1], vocab_size=vocab_size, group=tp_group, temperature=temperature)
    apply: Callable[..., Tensor] = _TokenKl.apply  # torch leaves it untyped
    return apply(logits_NV, reference_logits_NV, part)


class _TokenKl(torch.autograd.Function):
    """d KL / d logit_j = p_j (log p_j - log q_j - KL) / temperature; backward needs no communication."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, reference_NV: Tensor, part: VocabularySlice) -> Tensor:
        policy = _softmax(logits_NV, part, "logits_NV")
        reference = _softmax(reference_NV, part, "reference_logits_NV")
        kl_N = torch.zeros_like(policy.top_N)
        for rows in row_chunks(logits_NV):
            p_RC, difference_RC = _terms(logits_NV, reference_NV, policy, reference, part, rows=rows)
            kl_N[rows] = difference_RC.mul_(p_RC).sum(1)
        kl_N = summed(kl_N, part.group)
        if not bool(torch.isfinite(kl_N).all()):
            row = int((~torch.isfinite(kl_N)).nonzero()[0])
            raise InputError(f"the reference gives probability 0 to a token that the policy can produce, in row {row}")
        ctx.save_for_backward(logits_NV, reference_NV, *policy[:2], *reference[:2], kl_N)
        ctx.part = part
        return kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, reference_NV, *columns, kl_N = ctx.saved_tensors
        policy, reference = (Softmax(top_N, log_mass_N, kl_N, None) for top_N, log_mass_N in (columns[:2], columns[2:]))
        part: VocabularySlice = ctx.part
        grad_NV = torch.zeros_like(logits_NV)
        for rows in row_chunks(logits_NV):
            p_RC, difference_RC = _terms(logits_NV, reference_NV, policy, reference, part, rows=rows)
            difference_RC.sub_(kl_N[rows, None]).mul_(p_RC).mul_(grad_N[rows, None] / part.temperature)
            grad_NV[rows, : part.columns] = difference_RC
        return grad_NV, None, None


def _softmax(logits_NV: Tensor, part: VocabularySlice, name: str) -> Softmax:
    statistics = empty_statistics(len(logits_NV), like=logits_NV, entropy=False)
    nothing_N = torch.full((len(logits_NV),), -1, device=logits_NV.device)
    take_block(logits_NV[:, : part.columns], nothing_N, statistics, temperature=part.temperature)
    return merge(statistics, part.group, name=name)


def _terms(
    logits_NV: Tensor,
    reference_NV: Tensor,
    policy: Softmax,
    reference: Softmax,
    part: VocabularySlice,
    *,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """p and log p - log q of some rows, the latter 0 where p is 0."""
    logp_RC = _logprobs(logits_NV, policy, part, rows)
    p_RC = logp_RC.exp()
    logp_RC.sub_(_logprobs(reference_NV, reference, part, rows))
    return p_RC, logp_RC.masked_fill_(p_RC == 0, 0.0)


def _logprobs(logits_NV: Tensor, softmax: Softmax, part: VocabularySlice, rows: slice) -> Tensor:
    x_RC = logits_NV[rows, : part.columns].to(softmax.top_N.dtype, copy=True).div_(part.temperature)
    return x_RC.sub_(softmax.top_N[rows, None]).sub_(softmax.log_mass_N[rows, None])
