"""Shift and scale advantages by the mean and spread of the *whole* batch. See PAPERS.md#gae.

Two steps, so that the caller can merge the statistics of micro-batches and ranks in between: `statistics.moments`, then
`whiten`.

Legend: N flat tokens.
"""

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_mask, check_number
from align_algos.reductions import masked
from align_algos.statistics import Moments


def whiten(x_N: Tensor, mask_N: Tensor, statistics: Moments, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(population variance + eps) inside the mask, 0 outside, without gradient.

    Equal values become exactly 0, whatever `eps` is.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
        statistics: of the global batch, from `moments` and, of parts, `merge_moments`.
        eps: added to the variance. Where both are 0 (equal values) there is nothing to scale by, and nothing is.
    Returns: [N], float32 (float64 for float64 values).
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    Source: Huang et al. 2022, "The 37 implementation details of proximal policy optimization", ICLR blog track, core
        detail 7; over a minibatch there, over the global batch here.
    """
    check_columns("token", check_mask(mask_N), x_N=x_N)
    check_number("eps", eps, low=0.0)
    variance = statistics.variance + eps
    inside_N = masked(x_N.detach(), mask_N)
    whitened_N = (inside_N.double() - statistics.mean) / torch.where(variance > 0, variance.sqrt(), 1.0)
    return torch.where(mask_N, whitened_N, 0.0).to(inside_N.dtype)
