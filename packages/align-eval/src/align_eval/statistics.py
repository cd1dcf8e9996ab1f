"""How sure a measured number is: intervals and tests. Numbers in, numbers out; knows nothing of models or files.

Shape letters: C clusters (questions, each with one or more values that hang together), R resamples.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align_core.errors import ConfigError

_RESAMPLES = 10_000  # the bounds then move by about 1 % of the interval's width from seed to seed


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


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` answers, drawn from `samples` of which `correct` are right, is right.

        1 - C(n - c, k) / C(n, k)

    Unbiased for the pass@k of the model, unlike 1 - (1 - c / n)^k.

    Raises:
        ConfigError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ConfigError(f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def cluster_bootstrap(
    sums_C: Sequence[float],
    counts_C: Sequence[int],
    *,
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean over all values, when values of one cluster hang together.

    Whole clusters are drawn with replacement, and the mean is that of all drawn values, sum(sums) / sum(counts).

    Args:
        sums_C: float [C], sum of the values of each cluster.
        counts_C: int [C], how many values each cluster has, at least 1.
        strata: the stratum of each cluster; clusters are drawn within strata, whose sizes are part of the design. A
            stratum of one cluster would contribute no variance, so then strata are ignored.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13.
    """
    sums, counts = np.asarray(sums_C, np.float64), np.asarray(counts_C, np.float64)
    if len(sums) != len(counts) or not len(sums) or counts.min() < 1:
        raise ConfigError(f"a bootstrap needs clusters with at least one value each, got counts {list(counts_C)[:8]}")
    draws_RC = _draws(len(sums), strata, resamples=resamples, seed=seed)
    means_R = sums[draws_RC].sum(axis=1) / counts[draws_RC].sum(axis=1)
    return _percentiles(means_R, confidence)


def stratified_mean_bootstrap(
    sums_C: Sequence[float],
    counts_C: Sequence[int],
    strata: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """As `cluster_bootstrap`, for the mean of the strata's means (the macro mean)."""
    sums, counts = np.asarray(sums_C, np.float64), np.asarray(counts_C, np.float64)
    names = list(dict.fromkeys(strata))
    draws_RC = _draws(len(sums), strata, resamples=resamples, seed=seed, keep_strata=True)
    members_C = np.asarray([names.index(stratum) for stratum in strata])
    means = []
    for index in range(len(names)):
        inside_RC = members_C[draws_RC] == index
        means.append((sums[draws_RC] * inside_RC).sum(axis=1) / (counts[draws_RC] * inside_RC).sum(axis=1))
    return _percentiles(np.mean(means, axis=0), confidence)


def sign_flip_p(differences_C: Sequence[float], *, resamples: int = _RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of "the differences are symmetric about 0", by flipping the signs of clusters at random.

        p = (1 + #{|sum of flipped| >= |sum|}) / (1 + R)

    Args:
        differences_C: float [C], sum of the paired differences of each cluster.

    Source: Fisher's randomisation test; the +1 after Phipson and Smyth 2010, doi:10.2202/1544-6115.1585.
    """
    differences = np.asarray(differences_C, np.float64)
    if not len(differences):
        raise ConfigError("a paired test needs at least one pair")
    generator = np.random.default_rng(seed)
    signs_RC = generator.integers(0, 2, (resamples, len(differences)), dtype=np.int8) * 2.0 - 1.0
    observed = abs(differences.sum())
    # Sums in another order differ in the last bits; equal ones must count as equal.
    extreme = np.abs(signs_RC @ differences) >= observed - 1e-9 * max(1.0, observed)
    return float((1 + extreme.sum()) / (1 + resamples))


def _draws(
    clusters: int, strata: Sequence[Hashable] | None, *, resamples: int, seed: int, keep_strata: bool = False
) -> NDArray[np.int64]:
    """int64 [R, C], indices of the clusters of each resample."""
    generator = np.random.default_rng(seed)
    groups: dict[Hashable, list[int]] = {}
    for index in range(clusters):
        groups.setdefault(strata[index] if strata is not None else None, []).append(index)
    if not keep_strata and min(map(len, groups.values())) < 2:
        groups = {None: list(range(clusters))}
    parts = [np.asarray(group)[generator.integers(0, len(group), (resamples, len(group)))] for group in groups.values()]
    return np.concatenate(parts, axis=1)


def _percentiles(values_R: NDArray[np.float64], confidence: float) -> Interval:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(values_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
