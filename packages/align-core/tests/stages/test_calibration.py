"""Worked arithmetic of accuracy, Brier score and calibration error."""

import numpy as np
import pytest

from align_core.stages.calibration import calibration, pair_margins


def test_margins_are_those_of_ordered_pairs_within_a_group() -> None:
    """Labels 3 > 2 > 1 scored 9, 4, 4: margins 5, 5, 0. Labels 1 = 1 > 0 scored 1, 5, 3: margins -2, 2."""
    scores = np.array([9, 4, 4, 1, 5, 3], np.float32)
    margins = pair_margins(scores, np.array([3, 2, 1, 1, 1, 0]), np.array([7, 7, 7, 2, 2, 2]))
    assert sorted(margins.tolist()) == [-2.0, 0.0, 2.0, 5.0, 5.0]
    assert calibration(margins)["accuracy"] == pytest.approx(3.5 / 5)  # the tie counts half


def test_no_pairs_measure_nothing() -> None:
    assert calibration(pair_margins(np.ones(2), np.ones(2), np.zeros(2))) == {}


def test_values_by_hand() -> None:
    """Margins ln 3, ln 3, ln 3, -ln 3: probabilities 3/4, 3/4, 3/4, 1/4; confidence 3/4, of which 3/4 are right."""
    measured = calibration(np.log([3, 3, 3, 1 / 3]))
    assert measured["accuracy"] == 0.75
    assert measured["loss"] == pytest.approx((3 * np.log(4 / 3) + np.log(4)) / 4)
    assert measured["brier"] == pytest.approx((3 / 16 + 9 / 16) / 4)
    assert measured["ece"] == pytest.approx(0.0, abs=1e-12)


def test_overconfidence_is_an_error() -> None:
    """Confidence 1 and right half the time: 0.5; chance scores 0.25 by Brier and has confidence 1/2."""
    assert calibration(np.array([800.0, -800.0]))["ece"] == pytest.approx(0.5)
    zero = calibration(np.zeros(3))
    assert (zero["brier"], zero["accuracy"], zero["ece"]) == (0.25, 0.5, 0.0)


def test_true_probabilities_are_calibrated() -> None:
    """Outcomes drawn with the probabilities that the margins state."""
    rng = np.random.default_rng(0)
    size = 200_000
    margins = rng.normal(0, 2, size)
    flips = rng.random(size) > 1 / (1 + np.exp(-margins))
    assert calibration(np.where(flips, -margins, margins))["ece"] < 0.005
