"""What every loss returns."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """A loss and its metrics, all of them partial sums over a *global* count.

    Adding the outputs of all micro-batches and data-parallel ranks, key by key, gives the value of the whole batch.
    """

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Scalars without gradient."""
