"""Softmax over a vocabulary that is seen a block of columns at a time: statistics that merge, and gradients in place.

Plain torch here; on CUDA, for bf16, fp16 and float32, one kernel each in `softmax_triton`, where torch would pass over
the block several times in float32.

Source: merging of partial sums: Milakov and Gimelshein 2018, arXiv:1805.02867.

Legend: N rows, C columns of the block. Logits here are not yet divided by the temperature.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

# exp() of it is 0 also in float64. A lower one could make shift * mass infinite, and 0 times that is NaN.
LOWEST_SHIFT = -1e4
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Statistics(NamedTuple):
    """Per row, of the columns seen so far: float32 (float64 for float64 logits), updated in place."""

    top_N: Tensor
    """Highest scaled logit."""
    mass_N: Tensor
    """Sum of exp(scaled logit - top)."""
    moment_N: Tensor | None
    """Sum of exp(scaled logit - top) (scaled logit - top), for the entropy; None where none is wanted."""
    at_target_N: Tensor
    """Scaled logit of the target, 0 where it was not among the columns."""


class RowGradient(NamedTuple):
    """Per row, what the gradient of a logit needs: float32 (float64 for float64 logits)."""

    top_N: Tensor
    log_mass_N: Tensor
    weight_N: Tensor
    """Gradient of the loss by the log-probability."""
    entropy_N: Tensor | None
    entropy_weight_N: Tensor | None
    """Entropy, and gradient of the loss by it; the latter is None where none was wanted."""


def empty_statistics(rows: int, *, like: Tensor, entropy: bool) -> Statistics:
    """Of no columns at all."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    zeros = like.new_zeros((3, rows), dtype=dtype)
    # Lowest finite number rather than -inf: -inf - -inf would be NaN in a row whose columns here are all -inf.
    top_N = torch.full_like(zeros[0], torch.finfo(dtype).min)
    return Statistics(top_N, zeros[0], zeros[1] if entropy else None, zeros[2])


def take_block(logits_NC: Tensor, columns_N: Tensor, statistics: Statistics, *, temperature: float) -> None:
    """Add a block of columns to the statistics.

    Args:
        logits_NC: floating [N, C], contiguous rows.
        columns_N: int64 [N], column of the target in this block; outside 0 to C - 1 where it is elsewhere.
    """
    if logits_NC.numel() == 0:  # a rank that holds only padding of the vocabulary
        return
    if use_triton(logits_NC):
        from align_algos import softmax_triton  # noqa: PLC0415 (torch for CPU comes without Triton)

        softmax_triton.take_block(logits_NC, columns_N, statistics, temperature=temperature)
        return
    top_N, mass_N, moment_N, at_target_N = statistics
    x_NC = logits_NC.to(top_N.dtype) / temperature
    here_N, column_N = _inside(columns_N, logits_NC.shape[1])
    at_target_N += torch.where(here_N, x_NC.gather(1, column_N[:, None])[:, 0], 0.0)
    new_top_N = torch.maximum(top_N, x_NC.amax(1))
    x_NC -= new_top_N[:, None]
    exp_NC = x_NC.exp()
    if moment_N is not None:
        rebase_moment(moment_N, mass_N, top_N, new_top_N)
        moment_N += x_NC.masked_fill_(exp_NC == 0, 0.0).mul_(exp_NC).sum(1)
    mass_N *= (top_N - new_top_N).exp()
    mass_N += exp_NC.sum(1)
    top_N.copy_(new_top_N)


def rebase_moment(moment_N: Tensor, mass_N: Tensor, top_N: Tensor, new_top_N: Tensor) -> None:
    """The moment about a higher top, in place; `mass_N` is still about the old one."""
    shift_N = (top_N - new_top_N).clamp_min(LOWEST_SHIFT)
    moment_N += shift_N * mass_N
    moment_N *= shift_N.exp()


def to_gradient(logits_NC: Tensor, columns_N: Tensor, rows: RowGradient, *, temperature: float) -> None:
    """Overwrite a block of logits with the gradient of the loss by them.

    d/dlogit_j = (weight (1[j = target] - p_j) - entropy_weight p_j (log p_j + entropy)) / temperature
    """
    if logits_NC.numel() == 0:  # a rank that holds only padding of the vocabulary
        return
    if use_triton(logits_NC):
        from align_algos import softmax_triton  # noqa: PLC0415

        softmax_triton.to_gradient(logits_NC, columns_N, rows, temperature=temperature)
        return
    logprobs_NC = (logits_NC.to(rows.top_N.dtype) / temperature).sub_(rows.top_N[:, None])
    logprobs_NC.sub_(rows.log_mass_N[:, None])
    p_NC = logprobs_NC.exp()
    factor_NC: Tensor = -rows.weight_N[:, None]
    if rows.entropy_N is not None and rows.entropy_weight_N is not None:
        logprobs_NC.masked_fill_(p_NC == 0, 0.0).add_(rows.entropy_N[:, None])
        factor_NC = factor_NC - logprobs_NC.mul_(rows.entropy_weight_N[:, None])
    p_NC.mul_(factor_NC)
    here_N, column_N = _inside(columns_N, logits_NC.shape[1])
    # One target a row, so adding by index has no collisions and a fixed order.
    p_NC[torch.arange(len(p_NC), device=p_NC.device), column_N] += torch.where(here_N, rows.weight_N, 0.0)
    logits_NC.copy_(p_NC.div_(temperature))


def use_triton(logits_NC: Tensor) -> bool:
    """Whether the Triton kernels run for this block."""
    return _HAS_TRITON and logits_NC.is_cuda and logits_NC.dtype != torch.float64


def _inside(columns_N: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    here_N = (columns_N >= 0) & (columns_N < columns)
    return here_N, torch.where(here_N, columns_N, 0)
