"""The order of the records: every epoch a permutation, epochs without seams, and the same whenever it is asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_core.data.order import indices_of_step
from align_core.errors import DataError


@given(records=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_epochs_are_permutations_that_follow_seamlessly(records: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, records)
    steps = -(-3 * records // batch_size)
    stream = np.concatenate(
        [indices_of_step(step, records=records, batch_size=batch_size, seed=seed) for step in range(steps)]
    )
    for epoch in range(3):
        assert sorted(stream[epoch * records : (epoch + 1) * records]) == list(range(records))


def test_step_is_a_pure_function_of_its_number() -> None:
    """10 records in batches of 4: step 2 takes the last two of the first epoch and the first two of the second."""
    forward = [indices_of_step(step, records=10, batch_size=4, seed=1).tolist() for step in range(5)]
    backward = [indices_of_step(step, records=10, batch_size=4, seed=1).tolist() for step in reversed(range(5))]
    assert forward == backward[::-1]
    assert sorted(forward[0] + forward[1] + forward[2][:2]) == list(range(10))
    assert sorted(forward[2][2:] + forward[3] + forward[4]) == list(range(10))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    first, second = (indices_of_step(step, records=50, batch_size=50, seed=1).tolist() for step in (0, 1))
    other = indices_of_step(0, records=50, batch_size=50, seed=2).tolist()
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


def test_fewer_records_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="3 records are fewer than a batch of 4; lower batch_size or bring more data"):
        indices_of_step(0, records=3, batch_size=4, seed=0)
