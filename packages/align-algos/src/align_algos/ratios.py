"""Probability ratios from differences of log-probabilities, safe against overflow. Knows nothing about clipping."""

import torch
from torch import Tensor

# exp(30) = 1e13: even squared and summed into a gradient norm it stays below float32's 3e38. Ratios beyond it (a token
# 1e13 times likelier than before) are reported as 1e13 and pass no gradient; below it the ratio is exact.
MAX_LOG_RATIO = 30.0


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), with log_ratio capped at MAX_LOG_RATIO. Exact and monotonic below the cap; no Taylor series.

    Args:
        log_ratio: floating, any shape: difference of two log-probabilities, nats.
    Returns: the same shape and dtype; where the cap holds, without gradient.
    """
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


def exp_excess(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x of x = log_ratio capped at MAX_LOG_RATIO: never negative, 0 at 0; what the k3 estimate is made of.

    The cap holds x in both terms. Held in the exponential alone, the gradient of what is left, -x, would point the
    other way beyond it.
    """
    held = log_ratio.clamp(max=MAX_LOG_RATIO)
    # exp(x) - 1 rounds to less than x where x is small.
    return torch.expm1(held) - held
