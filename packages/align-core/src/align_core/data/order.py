"""Which records a step sees: a pure function of seed and step, so that resuming needs no saved position."""

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
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, records)
    result = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        shuffled = np.random.default_rng([seed, int(epoch)]).permutation(records)
        result[epochs == epoch] = shuffled[places[epochs == epoch]]
    return result
