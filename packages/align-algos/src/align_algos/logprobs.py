"""Log-probability of given tokens, and entropy, from logits; whole or split over a tensor-parallel group.

The work goes in chunks of rows, so beyond the logits themselves (and, backward, their gradient in their own dtype)
only one chunk is ever held in float32. The input is never modified. Whoever calls has shifted: row i of the logits
is the prediction *of* targets_N[i], made from the tokens before it.

Source: the vocabulary-parallel softmax of Shoeybi et al. 2019, arXiv:1909.08053, section 3; the log-sum-exp is
merged over ranks as in Milakov and Gimelshein 2018, arXiv:1805.02867.

Legend: N flat tokens, V columns of the logits on this rank (the whole vocabulary without a group), C columns of those
that are real tokens.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.vocabulary import (
    VocabularySlice,
    check_matrix,
    check_rows,
    check_targets,
    own_columns,
    summed,
    vocabulary_slice,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# 64 MB a float32 temporary: enough to fill a GPU, little beside the logits of a batch (32k tokens x 32k: 2 GB in bf16).
CHUNK_ELEMENTS = 1 << 24


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
    return apply(logits_NV, targets_N, part)


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
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, part: VocabularySlice) -> Tensor:
        top_N, log_mass_N = _log_normaliser(logits_NV, part)
        own_N, column_N = own_columns(targets_N, part)
        at_target_N = logits_NV.gather(1, column_N[:, None])[:, 0].to(top_N.dtype) / part.temperature
        at_target_N = summed(torch.where(own_N, at_target_N, 0.0), part.group)
        ctx.save_for_backward(logits_NV, targets_N, top_N, log_mass_N)
        ctx.part = part
        return at_target_N - top_N - log_mass_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, top_N, log_mass_N = ctx.saved_tensors
        own_N, column_N = own_columns(targets_N, ctx.part)
        weight_N = grad_N / ctx.part.temperature
        grad_NV = torch.zeros_like(logits_NV)
        for rows, work in _chunks(logits_NV, ctx.part):
            _to_logprobs(work, top_N[rows], log_mass_N[rows]).exp_().mul_(-weight_N[rows, None])
            # One target a row, so indexing adds without collisions, in a fixed order (scatter_add has none on CUDA).
            work[torch.arange(len(work), device=work.device), column_N[rows]] += torch.where(own_N, weight_N, 0.0)[rows]
            grad_NV[rows, : ctx.part.columns] = work
        return grad_NV, None, None


class _TokenEntropy(torch.autograd.Function):
    """H = - sum p log p;  d H / d logit_j = - p_j (log p_j + H) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, part: VocabularySlice) -> Tensor:
        top_N, log_mass_N = _log_normaliser(logits_NV, part)
        entropy_N = torch.zeros_like(top_N)
        for rows, work in _chunks(logits_NV, part):
            logprobs = _to_logprobs(work, top_N[rows], log_mass_N[rows])
            entropy_N[rows] = -_times_probability(logprobs, logprobs.exp()).sum(1)
        entropy_N = summed(entropy_N, part.group)
        ctx.save_for_backward(logits_NV, top_N, log_mass_N, entropy_N)
        ctx.part = part
        return entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, top_N, log_mass_N, entropy_N = ctx.saved_tensors
        weight_N = -grad_N / ctx.part.temperature
        grad_NV = torch.zeros_like(logits_NV)
        for rows, work in _chunks(logits_NV, ctx.part):
            logprobs = _to_logprobs(work, top_N[rows], log_mass_N[rows])
            probabilities = logprobs.exp()
            logprobs += entropy_N[rows, None]
            grad_NV[rows, : ctx.part.columns] = _times_probability(logprobs, probabilities) * weight_N[rows, None]
        return grad_NV, None


def _log_normaliser(logits_NV: Tensor, part: VocabularySlice) -> tuple[Tensor, Tensor]:
    """Per row the highest scaled logit and log sum exp(scaled logit - highest), both over the whole vocabulary.

    Kept apart because their sum would round away the small differences between log-probabilities of large logits.
    """
    dtype = _precision(logits_NV)
    # Lowest finite number rather than -inf: -inf - -inf would be NaN in a row whose columns here are all -inf.
    lowest = torch.finfo(dtype).min
    highest_N = logits_NV.new_full((logits_NV.shape[0],), lowest, dtype=dtype)
    mass_N = torch.zeros_like(highest_N)
    for rows, work in _chunks(logits_NV, part):
        highest_N[rows] = work.amax(1).clamp_min(lowest)
        mass_N[rows] = work.sub_(highest_N[rows, None]).exp_().sum(1)
    top_N = highest_N.clone()
    if part.group is not None:
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=part.group)
    log_mass_N = summed(mass_N * (highest_N - top_N).exp(), part.group).log()
    check_rows(log_mass_N, "logits_NV")
    return top_N, log_mass_N


def _chunks(logits_NV: Tensor, part: VocabularySlice) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges, each with a fresh scaled copy of its real columns; nothing where this rank holds only padding."""
    if part.columns == 0:
        return
    step = max(1, CHUNK_ELEMENTS // part.columns)
    for start in range(0, logits_NV.shape[0], step):
        rows = slice(start, start + step)
        work = logits_NV[rows, : part.columns].to(_precision(logits_NV), copy=True)
        yield rows, work.div_(part.temperature)


def _to_logprobs(work: Tensor, top: Tensor, log_mass: Tensor) -> Tensor:
    """Scaled logits to log-probabilities, in place."""
    return work.sub_(top[:, None]).sub_(log_mass[:, None])


def _times_probability(x: Tensor, probabilities: Tensor) -> Tensor:
    """x p with 0 where p is 0, so that a logit of -inf gives 0 and not NaN; overwrites x."""
    return x.masked_fill_(probabilities == 0, 0.0).mul_(probabilities)


def _precision(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _slice(
    logits_NV: Tensor, vocab_size: int | None, group: "ProcessGroup | None", temperature: float
) -> VocabularySlice:
    check_matrix("logits_NV", logits_NV)
    return vocabulary_slice(logits_NV.shape[1], vocab_size=vocab_size, group=group, temperature=temperature)
