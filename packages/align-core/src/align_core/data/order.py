"""Which records a step sees: a pure function of seed and step, so that resuming needs no saved position."""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from align_core.errors import DataError


def indices_of_step(step: int, *, records: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """int64 [batch_size], the records of update `step` (from 0): each epoch is one shuffle, epochs follow seamlessly.

    Raises:
        DataError: there are fewer records than a batch needs.
    """
    if records < batch_size:
        raise DataError(
            f"{records} records are fewer than a batch of {batch_size}; lower batch_size or bring more data"
        )
    return _shuffled(np.arange(step * batch_size, (step + 1) * batch_size), records, (seed,))


class MixedOrder:
    """The order over several files of which each has a fixed share of every batch; files repeat at their own pace."""

    def __init__(self, records: Sequence[int], ratios: Sequence[float], *, batch_size: int, seed: int) -> None:
        """Args: `records`: of each file; `ratios`: shares, relative to their sum."""
        self._records, self._batch_size, self._seed = list(records), batch_size, seed
        self._shares = [ratio / sum(ratios) for ratio in ratios]
        self._step, self._taken = 0, [0] * len(self._records)
        self._lock = Lock()  # batches are prepared in a thread of their own

    def __call__(self, step: int) -> NDArray[np.int64]:
        """int64 [batch_size], as if the files were laid end to end."""
        with self._lock:
            return self._at(step)

    def _at(self, step: int) -> NDArray[np.int64]:
        if step < self._step:
            self._step, self._taken = 0, [0] * len(self._records)
        while self._step < step:
            self._taken = [taken + new for taken, new in zip(self._taken, self._counts())]
            self._step += 1
        parts, first = [], 0
        for source, (taken, new, records) in enumerate(zip(self._taken, self._counts(), self._records)):
            positions = np.arange(taken, taken + new)
            parts.append(first + _shuffled(positions, records, (self._seed, source)))
            first += records
        return np.concatenate(parts)

    def _counts(self) -> list[int]:
        """Records of each file in the step at hand: its share of all so far, rounded by largest remainders."""
        end = (self._step + 1) * self._batch_size
        due = [share * end - taken for share, taken in zip(self._shares, self._taken)]
        counts = [max(0, int(np.floor(amount))) for amount in due]
        while (missing := self._batch_size - sum(counts)) != 0:
            # One at a time; a source that is ahead of its share may leave one too many to the others.
            behind = [amount - count for amount, count in zip(due, counts)]
            source = behind.index(max(behind)) if missing > 0 else behind.index(min(behind))
            counts[source] += 1 if missing > 0 else -1
        return counts


def _shuffled(positions: NDArray[np.int64], records: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """The records at some positions of the endless stream of shuffled epochs."""
    epochs, places = np.divmod(positions, records)
    result = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        result[epochs == epoch] = _permutation(records, (*seed, int(epoch)))[places[epochs == epoch]]
    return result


@lru_cache(maxsize=4)  # a batch may span two epochs; a large file's shuffle is too slow to repeat every step
def _permutation(records: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(records)
