"""Intervals for measured shares: how sure an accuracy is. Numbers in, numbers out; knows nothing of models or files."""

import math
from statistics import NormalDist
from typing import NamedTuple

from align_core.errors import ConfigError


class Interval(NamedTuple):
    """Bounds of a confidence interval."""

    low: float
    high: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial share; stays within [0, 1] and is sound near both ends and for few trials.

        centre = (p + z^2 / 2n) / (1 + z^2 / n)
        half   = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

    Args:
        successes: k of the n = `trials`, 0 <= k <= n.
        confidence: coverage; z is the normal quantile of (1 + confidence) / 2.

    Raises:
        ConfigError: no trials, successes out of range, or a confidence outside (0, 1).
    Source: Wilson 1927, J. Am. Stat. Assoc. 22(158), 209-212.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ConfigError(f"an interval needs 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    shrink = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At k = 0 and k = n one bound is exactly 0 or 1; rounding must not move it past.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(low, high)
