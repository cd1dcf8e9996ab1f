"""A loss bound to one batch, and what every binding counts first. Knows nothing about particular losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from align_algos.losses import LossOutput
from align_core.errors import DataError
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.packing import Unit
from align_core.types import Batch

Output = Literal["logprobs", "scores", "values"]
"""What a loss reads off the model: log-prob of each token, score of each sequence, value before each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedLoss:
    """A loss for one particular batch."""

    batch: Batch
    """The batch with the columns that were computed over all of it."""
    unit: Unit
    """What must stay in one micro-batch."""
    compute: Callable[[Tensor, MicroBatch], LossOutput]
    """(what `reads` names, of a micro-batch; the micro-batch) to its share of loss and metrics."""
    reads: Output = "logprobs"


def count_targets(batch: Batch) -> int:
    """Tokens inside the mask.

    Raises:
        DataError: none, or a sequence's first token, which nothing predicts.
    """
    mask_N = batch.mask
    first = np.flatnonzero(mask_N[batch.offsets[:-1]])
    if len(first):
        raise DataError(
            f"the mask of sequence {first[0]} covers its first token, which no token predicts; "
            "begin each sequence with a token that is not a target, such as the beginning-of-sequence token"
        )
    count = int(mask_N.sum())
    if count == 0:
        raise DataError(f"the mask covers none of the batch's {len(mask_N)} tokens; there is nothing to learn from")
    return count
