"""Micro-batches from lengths: worked by hand, and properties over random batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_core.errors import DataError
from align_core.megatron.packing import cut, unit_starts
from align_core.types import Batch


def _batch(lengths: list[int], group: list[int] | None = None) -> Batch:
    columns = {} if group is None else {"group": np.asarray(group)}
    return Batch.of([np.zeros(length, np.int32) for length in lengths], columns=columns)


def _lists(plan: list[list[np.ndarray]]) -> list[list[list[int]]]:
    return [[indices.tolist() for indices in own] for own in plan]


def test_cut_fills_the_first_micro_batch_with_room() -> None:
    """Budget 10. Longest first: 7 opens A (3 left), 6 opens B (4 left), 4 goes to B (0), 3 to A (0), 2 opens C."""
    plan = cut(_batch([3, 7, 2, 6, 4]), unit="sequence", budget=10, ranks=1)
    assert _lists(plan) == [[[0, 1], [3, 4], [2]]]


def test_cut_balances_tokens_over_ranks() -> None:
    """8 to rank 0, 5 to rank 1, 4 to rank 1 (9), 3 to rank 0 (11): all within one budget of 20."""
    plan = cut(_batch([3, 8, 5, 4]), unit="sequence", budget=20, ranks=2)
    assert _lists(plan) == [[[0, 1]], [[2, 3]]]


def test_cut_gives_every_rank_as_many_micro_batches() -> None:
    """Three sequences of 5 at a budget of 5: rank 0 gets two of them, so rank 1 gets an empty micro-batch."""
    plan = cut(_batch([5, 5, 5]), unit="sequence", budget=5, ranks=2)
    assert _lists(plan) == [[[0], [2]], [[1], []]]


def test_cut_gives_a_sequence_beyond_the_budget_its_own_micro_batch() -> None:
    plan = cut(_batch([2, 30, 3]), unit="sequence", budget=10, ranks=1)
    assert _lists(plan) == [[[1], [0, 2]]]


def test_cut_rounds_the_number_of_micro_batches_up() -> None:
    """Three of 5 tokens at a budget of 5 would be three passes; interleaved stages of a pipeline of 2 need four."""
    plan = cut(_batch([5, 5, 5]), unit="sequence", budget=5, ranks=1, multiple=2)
    assert _lists(plan) == [[[0], [1], [2], []]]


def test_cut_keeps_groups_together() -> None:
    """Groups of 6, 4 and 5 tokens; a budget of 9 does not join any two of them except 5 + 4."""
    plan = cut(_batch([2, 4, 4, 1, 4], group=[7, 7, 3, 9, 9]), unit="group", budget=9, ranks=1)
    assert _lists(plan) == [[[0, 1], [2, 3, 4]]]


def test_cut_keeps_pairs_together() -> None:
    plan = cut(_batch([2, 4, 4, 1]), unit="pair", budget=6, ranks=1)
    assert _lists(plan) == [[[0, 1], [2, 3]]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 60),
    ranks=st.integers(1, 4),
    group_size=st.integers(1, 3),
)
def test_cut_places_every_sequence_once_within_the_budget(
    lengths: list[int], budget: int, ranks: int, group_size: int
) -> None:
    batch = _batch(lengths, group=[i // group_size for i in range(len(lengths))])
    plan = cut(batch, unit="group", budget=budget, ranks=ranks)
    placed = np.concatenate([indices for own in plan for indices in own])
    assert sorted(placed.tolist()) == list(range(len(lengths)))
    assert len({len(own) for own in plan}) == 1
    for indices in (indices for own in plan for indices in own if len(indices)):
        groups = {i // group_size for i in indices.tolist()}
        assert batch.lengths[indices].sum() <= budget or len(groups) == 1
        members = [i for i in range(len(lengths)) if i // group_size in groups]
        assert indices.tolist() == members


def test_unit_starts_refuses_a_group_in_two_places() -> None:
    with pytest.raises(DataError, match="group 5 are not adjacent"):
        unit_starts(_batch([1, 1, 1], group=[5, 6, 5]), "group")


def test_unit_starts_refuses_an_odd_number_of_sequences_for_pairs() -> None:
    with pytest.raises(DataError, match="3 sequences"):
        unit_starts(_batch([1, 1, 1]), "pair")
