"""Cuts a batch into micro-batches by a token budget: which sequences go to which data-parallel rank, in which pass.

Pure functions of lengths, the same on every rank, so no rank has to tell another. Sequences that a loss compares stay
together as one unit. Which cut it is cannot change results: losses divide by the counts of the whole batch. Knows
nothing about torch and models.

Legend: B sequences, U units.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align_core.errors import DataError
from align_core.types import Batch

Unit = Literal["sequence", "pair", "group"]
"""What must stay whole: a sequence, sequences 2i and 2i+1, or adjacent sequences with the same value in `group`."""

Indices = NDArray[np.int64]


def unit_starts(batch: Batch, unit: Unit) -> Indices:
    """int64 [U+1], the first sequence of each unit, and B at the end.

    Raises:
        DataError: an odd number of sequences for pairs, or a group whose sequences are not adjacent.
    """
    if unit == "sequence":
        return np.arange(len(batch) + 1)
    if unit == "pair":
        if len(batch) % 2:
            raise DataError(
                f"a batch of pairs has {len(batch)} sequences; give chosen and rejected of each pair in turn"
            )
        return np.arange(0, len(batch) + 1, 2)
    group_B = batch.sequence_column("group")
    starts = np.flatnonzero(np.concatenate([[True], group_B[1:] != group_B[:-1], [True]]))
    values, counts = np.unique(group_B[starts[:-1]], return_counts=True)
    if np.any(counts > 1):
        raise DataError(
            f"the sequences of group {values[np.argmax(counts)]} are not adjacent in the batch; order it by `group`"
        )
    return starts


def cut(batch: Batch, *, unit: Unit, budget: int, ranks: int, multiple: int = 1) -> list[list[Indices]]:
    """The micro-batches of every data-parallel rank, as ascending sequence indices; the same number for each rank.

    Units go, longest first, to the rank with the fewest tokens, and there into the first micro-batch with room. A unit
    longer than the budget gets a micro-batch of its own. A rank with fewer micro-batches is given empty ones.

    Args:
        budget: most tokens in one micro-batch.
        ranks: data-parallel ranks.
        multiple: every rank gets a multiple of this many micro-batches, as interleaved pipeline stages need.
    """
    starts_U = unit_starts(batch, unit)
    tokens_U = np.diff(batch.offsets[starts_U])
    loads = [0] * ranks
    bins: list[list[list[int]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    for u in np.argsort(-tokens_U, kind="stable").tolist():
        tokens = int(tokens_U[u])
        rank = loads.index(min(loads))
        loads[rank] += tokens
        place = next((i for i, left in enumerate(room[rank]) if left >= tokens), None)
        if place is None:
            place = len(bins[rank])
            bins[rank].append([])
            room[rank].append(budget)
        bins[rank][place].append(u)
        room[rank][place] -= tokens
    passes = -(-max(1, *(len(own) for own in bins)) // multiple) * multiple
    return [[_sequences(own[i] if i < len(own) else [], starts_U) for i in range(passes)] for own in bins]


def _sequences(units: list[int], starts_U: Indices) -> Indices:
    """The sequences of some units, ascending."""
    return np.concatenate([np.arange(0), *(np.arange(starts_U[u], starts_U[u + 1]) for u in sorted(units))])
