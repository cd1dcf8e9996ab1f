"""What `align score` does with the numbers of its model."""

import numpy as np
import pytest

from align_core.errors import AlignError
from align_core.stages.score import _scores
from align_core.types import Batch


class Scorer:
    """Gives what it was made with."""

    def __init__(self, *scores: float) -> None:
        self._scores = np.asarray(scores, np.float32)

    def scores(self, batch: Batch) -> np.ndarray:
        assert len(batch) == len(self._scores)
        return self._scores


BATCH = Batch.of([[1, 2], [3, 4, 5], [6]])


def test_scores_become_numbers_of_json() -> None:
    assert _scores(Scorer(1.5, -2.0, 0.0), BATCH) == [{"score": 1.5}, {"score": -2.0}, {"score": 0.0}]


def test_a_score_that_is_not_finite_is_refused() -> None:
    """JSON has no NaN."""
    with pytest.raises(AlignError, match=r"score is nan for 2 of 3 responses .* the first has 3 tokens"):
        _scores(Scorer(1.5, np.nan, np.inf), BATCH)
