"""Log-probability of given tokens, and entropy, from logits; whole or split over a tensor-parallel group.

Beyond the logits themselves (and, backward, their gradient in their own dtype) nothing of their size is ever held. The
input is never modified. Whoever calls has shifted: row i of the logits is the prediction *of* targets_N[i], made from
the tokens before it. Where hidden states and output matrix are at hand, `fused` does without the logits too.

Source: the vocabulary-parallel softmax of Shoeybi et al. 2019, arXiv:1909.08053, section 3.

Legend: N flat tokens, V columns of the logits on this rank (the whole vocabulary without a group).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.softmax_blocks import RowGradient, Softmax, empty_statistics, merge, take_block, to_gradient
from align_algos.vocabulary import VocabularySlice, check_matrix, check_targets, vocabulary_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_logprobs(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(logits / temperature) at the target, per row.

    Under a group every rank gets the same result, and its gradient holds this rank's columns only. Each rank must be
    given the same upstream gradient, as it is when the loss is computed alike on all ranks.

    Args:
        logits_NV: floating [N, V]; with `tp_group` this rank's slice, equal slices in rank order.
        targets_N: integer [N], token ids of the whole vocabulary.
        vocab_size: ids from here on are padding of the vocabulary and take no part in the softmax; None: no padding.
        tp_group: process group over which the vocabulary is split; None: `logits_NV` is whole.
        temperature: divides the logits, as in sampling.
    Returns:
        float32 [N] (float64 for float64 logits), nats.
    Raises:
        InputError: a wrong shape, a target outside the vocabulary, or a row without a finite maximum.
    """
    part = _slice(logits_NV, vocab_size, tp_group, temperature)
    check_targets(targets_N, logits_NV.shape[0], part.vocab_size)
    apply: Callable[..., Tensor] = _TokenLogprobs.apply  # torch leaves it untyped
    return apply(logits_NV, targets_N.long() - part.first, part)


def token_entropy(
    logits_NV: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropy of softmax(logits / temperature), per row, in nats; differentiable.

    Args and Raises as in `token_logprobs`.
    Returns:
        float32 [N] (float64 for float64 logits).
    """
    part = _slice(logits_NV, vocab_size, tp_group, temperature)
    apply: Callable[..., Tensor] = _TokenEntropy.apply
    return apply(logits_NV, part)


class _TokenLogprobs(torch.autograd.Function):
    """d logp / d logit_j = (1[j = target] - p_j) / temperature; backward needs no communication."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, column_N: Tensor, part: VocabularySlice) -> Tensor:
        softmax = _softmax(logits_NV, column_N, part, entropy=False)
        ctx.save_for_backward(logits_NV, column_N, softmax.top_N, softmax.log_mass_N)
        ctx.part = part
        return softmax.logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, column_N, top_N, log_mass_N = ctx.saved_tensors
        return _gradient(logits_NV, column_N, RowGradient(top_N, log_mass_N, grad_N), ctx.part), None, None


class _TokenEntropy(torch.autograd.Function):
    """H = - sum p log p;  d H / d logit_j = - p_j (log p_j + H) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, part: VocabularySlice) -> Tensor:
        softmax = _softmax(logits_NV, _no_target(logits_NV), part, entropy=True)
        assert softmax.entropy_N is not None
        ctx.save_for_backward(logits_NV, softmax.top_N, softmax.log_mass_N, softmax.entropy_N)
        ctx.part = part
        return softmax.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, top_N, log_mass_N, entropy_N = ctx.saved_tensors
        rows = RowGradient(top_N, log_mass_N, torch.zeros_like(top_N), entropy_N, grad_N)
        return _gradient(logits_NV, _no_target(logits_NV), rows, ctx.part), None


def _softmax(logits_NV: Tensor, column_N: Tensor, part: VocabularySlice, *, entropy: bool) -> Softmax:
    statistics = empty_statistics(len(logits_NV), like=logits_NV, entropy=entropy)
    take_block(logits_NV[:, : part.columns], column_N, statistics, temperature=part.temperature)
    return merge(statistics, part.group, name="logits_NV")


def _gradient(logits_NV: Tensor, column_N: Tensor, rows: RowGradient, part: VocabularySlice) -> Tensor:
    grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    grad_NV[:, part.columns :] = 0.0
    real_NC, grad_NC = logits_NV[:, : part.columns], grad_NV[:, : part.columns]
    to_gradient(real_NC, column_N, rows, temperature=part.temperature, out_NC=grad_NC)
    return grad_NV


def _no_target(logits_NV: Tensor) -> Tensor:
    return torch.full((len(logits_NV),), -1, device=logits_NV.device)


def _slice(
    logits_NV: Tensor, vocab_size: int | None, group: "ProcessGroup | None", temperature: float
) -> VocabularySlice:
    check_matrix("logits_NV", logits_NV)
    return vocabulary_slice(logits_NV.shape[1], vocab_size=vocab_size, group=group, temperature=temperature)
