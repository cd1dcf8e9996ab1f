"""Wilson's interval against worked values."""

import math

import pytest

from align_core.errors import ConfigError
from align_eval.statistics import wilson


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
