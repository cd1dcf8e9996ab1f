"""The order of the records: every epoch a permutation, epochs without seams, and the same whenever it is asked."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_core.data.order import MixedOrder, indices_of_step
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


def test_shares_of_a_mixture_are_kept_in_every_batch() -> None:
    """Ratios 0.7 and 0.3 of 8 records a step: 5.6 and 2.4, never more than one record off the sum so far."""
    order = MixedOrder([100, 1000], [7, 3], batch_size=8, seed=0)
    first = 0
    for step in range(50):
        chosen = order(step)
        assert len(chosen) == 8
        first += int(np.sum(chosen < 100))
        assert abs(first - 0.7 * 8 * (step + 1)) < 1


def test_each_file_of_a_mixture_is_gone_through_in_epochs() -> None:
    """Half of each batch: 200 steps of 4 take 400 of 10 records, every one 40 times; of 300, the first 300 once."""
    order = MixedOrder([10, 300], [1, 1], batch_size=4, seed=1)
    drawn = np.concatenate([order(step) for step in range(200)])
    assert np.bincount(drawn[drawn < 10]).tolist() == [40] * 10
    assert len(np.unique(drawn[drawn >= 10][:300])) == 300


def test_mixture_is_a_function_of_the_step() -> None:
    """A continued run asks from the middle, an evaluation backwards."""
    whole = [MixedOrder([5, 7, 9], [1, 2, 4], batch_size=6, seed=3)(step).tolist() for step in range(30)]
    order = MixedOrder([5, 7, 9], [1, 2, 4], batch_size=6, seed=3)
    for step in (29, 3, 17, 17, 0, 28):
        assert order(step).tolist() == whole[step]


@given(
    ratios=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), batch_size=st.integers(1, 40), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_any_mixture_fills_its_batches_and_keeps_its_shares(ratios: list[float], batch_size: int, seed: int) -> None:
    order = MixedOrder([50] * len(ratios), ratios, batch_size=batch_size, seed=seed)
    counts = np.zeros(len(ratios))
    for step in range(12):
        chosen = order(step)
        assert len(chosen) == batch_size
        counts += np.bincount(chosen // 50, minlength=len(ratios))
    assert np.all(np.abs(counts - np.array(ratios) / sum(ratios) * 12 * batch_size) < len(ratios))


def test_mixture_may_be_asked_from_several_threads() -> None:
    """Batches are prepared ahead in a thread while the stage asks for its own step."""
    whole = [MixedOrder([5, 7], [1, 2], batch_size=6, seed=3)(step).tolist() for step in range(40)]
    order = MixedOrder([5, 7], [1, 2], batch_size=6, seed=3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: order(step).tolist(), [*range(40)] * 5))
    assert found == whole * 5
