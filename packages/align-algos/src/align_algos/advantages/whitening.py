"""Shift and scale advantages by the mean and spread of the *whole* batch. See PAPERS.md#gae.

Two steps, so that the caller can add the sums over micro-batches and ranks in between: `moments`, then `whiten`.

Legend: N flat tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_mask, check_number
from align_algos.reductions import masked


class Moments(NamedTuple):
    """Sums over tokens inside the mask, float64 scalars; add those of all micro-batches and ranks before `whiten`."""

    weight: Tensor
    total: Tensor
    total_square: Tensor


def moments(x_N: Tensor, mask_N: Tensor) -> Moments:
    """Number, sum and sum of squares of the values inside the mask."""
    check_columns("token", check_mask(mask_N), x_N=x_N)
    inside_N = masked(x_N.detach(), mask_N).double()
    return Moments(mask_N.sum().double(), inside_N.sum(), inside_N.square().sum())


def whiten(x_N: Tensor, mask_N: Tensor, statistics: Moments, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(population variance + eps) inside the mask, 0 outside, without gradient.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
        statistics: of the global batch.
        eps: added to the variance. Where both are 0 (equal values) there is nothing to scale by, and nothing is.
    """
    check_columns("token", check_mask(mask_N), x_N=x_N)
    check_number("eps", eps, low=0.0)
    weight = statistics.weight.clamp_min(1.0)
    mean = statistics.total / weight
    variance = (statistics.total_square / weight - mean.square()).clamp_min(0.0) + eps
    inside_N = masked(x_N.detach(), mask_N)
    whitened_N = (inside_N.double() - mean) / torch.where(variance > 0, variance.sqrt(), 1.0)
    return torch.where(mask_N, whitened_N, 0.0).to(inside_N.dtype)
