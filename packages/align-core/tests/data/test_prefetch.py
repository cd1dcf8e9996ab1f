"""Batches are made ahead, in order, and their errors reach who asks."""

import threading

import pytest

from align_core.data.prefetch import prefetched


def test_next_step_is_prepared_while_this_one_is_used() -> None:
    made, next_began = [], threading.Event()

    def prepare(step: int) -> int:
        made.append(step)
        if step == 4:
            next_began.set()
        return step * step

    with prefetched(prepare, steps=6) as batches:
        assert batches(3) == 9
        assert next_began.wait(10)
        assert [batches(4), batches(5)] == [16, 25]
    assert made == [3, 4, 5]


def test_error_comes_with_its_own_step() -> None:
    def prepare(step: int) -> int:
        return 1 // (2 - step)

    with prefetched(prepare, steps=9) as batches:
        assert [batches(0), batches(1)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            batches(2)
