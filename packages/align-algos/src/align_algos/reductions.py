"""Sums over tokens and sequences, always divided by a count of the *whole* batch that the caller gives.

A mean over a micro-batch changes with the way the batch was cut; a partial sum over a global count does not: adding
the results of all micro-batches and data-parallel ranks gives the value of the whole batch. Under a framework that
*averages* gradients over data-parallel ranks, multiply the loss by the number of ranks.

Values outside the mask reach neither the result nor the gradient, however large they are.

Legend: B sequences, N flat tokens; sequence b is the tokens offsets[b] to offsets[b+1].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from align_algos import segments
from align_algos.checks import (
    check_choice,
    check_columns,
    check_count,
    check_mask,
    check_number,
    check_offsets,
    check_tokens,
)
from align_algos.errors import InputError

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
REDUCTIONS: tuple[Reduction, ...] = ("token_mean", "sequence_mean", "sequence_sum")


def working_precision(x: Tensor) -> Tensor:
    """float64 stays; everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x_N: Tensor, mask_N: Tensor) -> Tensor:
    """`x_N` with exact zeros outside the mask, for value and gradient alike, in working precision."""
    return torch.where(mask_N, working_precision(x_N), 0.0)


def segment_sum(x_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each sequence; 0 for one without tokens. The order of addition is fixed on every device.

    Args:
        x_N: floating [N]; every token counts, so put what a mask leaves out to 0.
        offsets: int64 [B+1].
    Returns: [B], the dtype of `x_N`, with gradient.
    Raises:
        InputError: offsets that do not fit.
    """
    check_offsets(offsets, x_N.shape[0])
    return segments.sums(x_N, offsets)


def segment_lengths(mask_N: Tensor, offsets: Tensor) -> Tensor:
    """Number of tokens inside the mask of each sequence.

    Args:
        mask_N: bool [N].
        offsets: int64 [B+1].
    Returns: int64 [B].
    Raises:
        InputError: a mask that is not bool, or offsets that do not fit.
    """
    check_offsets(offsets, check_mask(mask_N))
    return segments.lengths(mask_N, offsets)


def per_token(x_B: Tensor, offsets: Tensor) -> Tensor:
    """Give each token the value of its sequence. The way from sequence advantages to token advantages.

    Args:
        x_B: floating [B].
        offsets: int64 [B+1].
    Returns: [N], the dtype of `x_B`, with gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or offsets that do not fit.
    """
    check_columns("sequence", check_offsets(offsets, None), x_B=x_B)
    return segments.spread(x_B, offsets, int(offsets[-1]))


def token_mean(x_N: Tensor, mask_N: Tensor, *, num_tokens: int) -> Tensor:
    """Every token counts the same: sum of x over the mask, divided by `num_tokens`.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
        num_tokens: tokens inside the mask in the global batch.
    Returns: scalar, float32 (float64 for float64 values), with gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    """
    return masked(x_N, mask_N).sum() / check_tokens(mask_N, num_tokens, x_N=x_N)


def sequence_mean(x_N: Tensor, mask_N: Tensor, offsets: Tensor, *, num_sequences: int) -> Tensor:
    """Every sequence counts the same: mean of x over its own mask, summed over sequences, divided by `num_sequences`.

    A sequence with an empty mask adds 0 and still counts in `num_sequences`.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
        offsets: int64 [B+1]; a sequence must not be cut between micro-batches.
        num_sequences: sequences in the global batch.
    Returns and Raises: as in `token_mean`.
    """
    check_columns("token", check_mask(mask_N), x_N=x_N)
    return reducer(mask_N, 1, "sequence_mean", offsets=offsets, num_sequences=num_sequences)(x_N)


def sequence_sum(x_N: Tensor, mask_N: Tensor, offsets: Tensor, *, num_sequences: int, length: float = 1.0) -> Tensor:
    """Sum of x over each sequence's mask divided by the constant `length`, averaged over `num_sequences`.

    With `length` the longest completion allowed, this is the length-unbiased reduction of Dr. GRPO.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
        offsets: int64 [B+1].
        num_sequences: sequences in the global batch.
        length: tokens; a constant of the run, never of the batch.
    Returns and Raises: as in `token_mean`.
    """
    check_columns("token", check_mask(mask_N), x_N=x_N)
    return reducer(mask_N, 1, "sequence_sum", offsets=offsets, num_sequences=num_sequences, length=length)(x_N)


def reduce_tokens(
    x_N: Tensor,
    mask_N: Tensor,
    *,
    reduction: Reduction,
    num_tokens: int,
    offsets: Tensor | None = None,
    num_sequences: int | None = None,
    length: float = 1.0,
) -> Tensor:
    """The reduction of that name, for losses that leave the choice to the caller.

    Args:
        reduction: "token_mean", "sequence_mean" (mean over each sequence's tokens, then over sequences) or
            "sequence_sum" (sum over each sequence's tokens / `length`, then mean over sequences).
        offsets, num_sequences: needed by the two reductions over sequences.
        length: of `sequence_sum`.
        Others, Returns and Raises: as in `token_mean`; refused too is a reduction without what it needs.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "token_mean":
        return token_mean(x_N, mask_N, num_tokens=num_tokens)
    check_columns("token", check_mask(mask_N), x_N=x_N)
    return reducer(mask_N, 1, reduction, offsets=offsets, num_sequences=num_sequences, length=length)(x_N)


def reducer(
    mask_N: Tensor,
    divisor: int,
    reduction: Reduction,
    *,
    offsets: Tensor | None = None,
    num_sequences: int | None = None,
    length: float = 1.0,
) -> Callable[[Tensor], Tensor]:
    """`reduce_tokens` for losses, which have checked mask and columns, and may reduce several columns.

    Args:
        divisor: of the token mean, as `check_tokens` gave it.
        Others and Raises: as in `reduce_tokens`.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "token_mean":
        return lambda x_N: masked(x_N, mask_N).sum() / divisor
    if offsets is None or num_sequences is None:
        missing = "offsets" if offsets is None else "num_sequences"
        raise InputError(f"{missing} is None, but reduction {reduction!r} needs it; only 'token_mean' does without")
    check_number("length", length, low=1.0)
    sequences = check_count("num_sequences", num_sequences, local=check_offsets(offsets, mask_N.shape[0]))
    if reduction == "sequence_sum":
        return lambda x_N: masked(x_N, mask_N).sum() / (sequences * length)
    lengths_B = segments.lengths(mask_N, offsets).clamp_min(1)
    return lambda x_N: (segments.sums(masked(x_N, mask_N), offsets) / lengths_B).sum() / sequences
