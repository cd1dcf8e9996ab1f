"""How well scores order the responses of a prompt, and whether their differences are the probabilities they stand for.

A reward model says that response i beats j with probability sigmoid(score_i - score_j). Pure numpy.

Legend: B sequences, P ordered pairs.
"""

import numpy as np
from numpy.typing import NDArray

_BINS = 10


def pair_margins(
    scores_B: NDArray[np.floating], label_B: NDArray[np.generic], group_B: NDArray[np.generic]
) -> NDArray[np.float64]:
    """float64 [P], score_i - score_j of all (i, j) of a group with label_i > label_j."""
    label_B = label_B.astype(np.float64)
    better, worse = np.nonzero(np.equal.outer(group_B, group_B) & np.greater.outer(label_B, label_B))
    scores_B = scores_B.astype(np.float64)
    return scores_B[better] - scores_B[worse]


def calibration(margins_P: NDArray[np.float64]) -> dict[str, float]:
    """What a reward model's margins on held-out pairs say about it.

    Returns:
        `accuracy`: share of pairs ordered rightly, equal scores counting half; `loss`: mean -log p of what people
        chose, nats; `brier`: mean squared distance of p to what people chose (0.25 is chance); `ece`: expected
        calibration error, the mean distance between confidence and accuracy over ten equal intervals of confidence.
        Nothing for no pairs.
    Source: Brier 1950; Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    if not len(margins_P):
        return {}
    p_P = _sigmoid(margins_P)
    right_P = 0.5 * (1.0 + np.sign(margins_P))
    return {
        "accuracy": float(np.mean(right_P)),
        "loss": float(np.mean(np.logaddexp(0.0, -margins_P))),
        "brier": float(np.mean((1.0 - p_P) ** 2)),
        "ece": _calibration_error(np.maximum(p_P, 1.0 - p_P), right_P),
    }


def _calibration_error(confidence_P: NDArray[np.float64], right_P: NDArray[np.float64]) -> float:
    """Confidence lies between 1/2 and 1, as the more likely of two outcomes."""
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * _BINS).astype(np.int64), _BINS - 1)
    gaps = [
        abs(float(np.sum(confidence_P[bin_P == number]) - np.sum(right_P[bin_P == number]))) for number in range(_BINS)
    ]
    return sum(gaps) / len(confidence_P)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -x))
    return result
