"""Intervals and tests against worked values, and against counting every case."""

import math
from itertools import combinations

import numpy as np
import pytest

from align_core.errors import ConfigError
from align_eval.statistics import cluster_bootstrap, pass_at_k, sign_flip_p, stratified_mean_bootstrap, wilson


def test_wilson_equals_worked_value() -> None:
    """k = 8, n = 10, z = 1.959964: z^2 = 3.841459, 1 + z^2/n = 1.3841459, centre = (0.8 + 0.1920729) / 1.3841459
    = 0.7167402, half = 1.959964 / 1.3841459 * sqrt(0.016 + 0.00960365) = 0.2265776.
    """
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.4901625, abs_tol=1e-6)
    assert math.isclose(high, 0.9433178, abs_tol=1e-6)


def test_wilson_solves_the_score_equation() -> None:
    """Its bounds are the p with (k/n - p)^2 = z^2 p (1 - p) / n."""
    for successes, trials in ((1, 7), (37, 100), (900, 1319)):
        for bound in wilson(successes, trials):
            left = (successes / trials - bound) ** 2
            assert math.isclose(left, 1.959963984540054**2 * bound * (1 - bound) / trials, rel_tol=1e-9)


def test_wilson_touches_the_ends_exactly_and_never_passes_them() -> None:
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert 0.0 < wilson(20, 20).low < 1.0
    assert wilson(0, 20).high == pytest.approx(1 - wilson(20, 20).low)


def test_wilson_narrows_with_trials_and_widens_with_confidence() -> None:
    few, many, sure = wilson(5, 10), wilson(500, 1000), wilson(5, 10, confidence=0.99)
    assert few.high - few.low > many.high - many.low
    assert sure.high - sure.low > few.high - few.low


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ConfigError, match=f"got {successes} of {trials}"):
        wilson(successes, trials)


def test_wilson_refuses_impossible_confidence() -> None:
    with pytest.raises(ConfigError, match="got 95"):
        wilson(1, 2, confidence=95)


def test_pass_at_k_equals_counting_all_draws() -> None:
    """Of n = 5 answers c are right; among all C(5, k) draws of k, the share that holds a right one."""
    for correct in range(6):
        answers = [index < correct for index in range(5)]
        for k in range(1, 6):
            draws = list(combinations(answers, k))
            assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_by_hand() -> None:
    """n = 4, c = 1, k = 2: 1 - C(3, 2) / C(4, 2) = 1 - 3/6; the naive 1 - (3/4)^2 would be 7/16."""
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(200, 0, 100) == 0.0
    for samples, correct, k in ((4, 5, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ConfigError, match="pass@k needs"):
            pass_at_k(samples, correct, k)


def test_bootstrap_of_single_values_agrees_with_the_normal_interval() -> None:
    """200 clusters of one standard normal value: half the width is close to 1.96 s / sqrt(n)."""
    values = np.random.default_rng(0).normal(size=200)
    low, high = cluster_bootstrap(values.tolist(), [1] * 200)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_sees_that_values_of_a_cluster_hang_together() -> None:
    """Every value twice: the same interval as once, where independent values would give one narrower by sqrt(2)."""
    values = np.random.default_rng(1).normal(size=100)
    once = cluster_bootstrap(values.tolist(), [1] * 100, seed=3)
    twice = cluster_bootstrap((2 * values).tolist(), [2] * 100, seed=3)
    assert twice == pytest.approx(once)


def test_bootstrap_within_strata_leaves_out_what_is_between_them() -> None:
    """Two strata around 0 and 10 with little spread inside: the share of each is fixed, so the interval is narrow."""
    values = [*(0.0, 0.1) * 10, *(10.0, 10.1) * 10]
    strata = ["a"] * 20 + ["b"] * 20
    within = cluster_bootstrap(values, [1] * 40, strata=strata)
    pooled = cluster_bootstrap(values, [1] * 40)
    assert within.high - within.low < 0.05
    assert pooled.high - pooled.low > 2.0
    macro = stratified_mean_bootstrap(values, [1] * 40, strata)
    assert macro == pytest.approx(within)  # strata of equal size: micro and macro are the same
    single = cluster_bootstrap([1.0, 2.0, 3.0], [1] * 3, strata=["a", "a", "b"])
    assert single.low < 2.0 < single.high  # a stratum of one: pooled


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    """300 sets of 40 two-valued clusters around 0: the 95 % interval misses in 5 %, a little more for so few."""
    generator = np.random.default_rng(2)
    missed = 0
    for seed in range(300):
        shared, own = generator.normal(size=40), generator.normal(size=(40, 2))
        low, high = cluster_bootstrap((2 * shared + own.sum(axis=1)).tolist(), [2] * 40, resamples=500, seed=seed)
        missed += not low <= 0.0 <= high
    assert 0.02 <= missed / 300 <= 0.10


def test_sign_flip_equals_counting_all_flips() -> None:
    """Differences 3, 1, 2: of 8 flips, 2 have |sum| = 6 (all or none flipped), so p is 1/4."""
    assert sign_flip_p([3.0, 1.0, 2.0], resamples=40_000) == pytest.approx(0.25, abs=0.01)
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0] * 30) == pytest.approx(1 / 10_001)
    with pytest.raises(ConfigError, match="at least one pair"):
        sign_flip_p([])


def test_bootstrap_refuses_empty_clusters() -> None:
    for counts in ([], [1, 0]):
        with pytest.raises(ConfigError, match="at least one value each"):
            cluster_bootstrap([1.0] * len(counts), counts)
