"""A batch through shared memory is the batch."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

from align_core.ray import shared
from align_core.ray.shared import SharedBatch, opened, reachable
from align_core.types import Batch


def batch() -> Batch:
    return Batch.of(
        [[1, 2, 3], [4, 5]],
        tokens={
            "mask": [np.array([False, True, True]), np.array([False, True])],
            "old_logprobs": [np.array([0.0, -1, -2], np.float32), np.array([0.0, -3], np.float32)],
        },
        columns={"group": np.array([7, 2**40], np.int64), "reward": np.array([0.5, -1], np.float32)},
    )


def test_a_batch_is_the_same_on_the_other_side_and_outlives_the_file() -> None:
    with reachable(batch(), everyone_here=True) as handle:
        assert isinstance(handle, SharedBatch)
        found, number = opened([handle, 3])
    assert number == 3
    assert not Path(handle.file).exists()
    expected = batch()
    for name in ("token_columns", "sequence_columns"):
        assert getattr(found, name).keys() == getattr(expected, name).keys()
        for key, column in getattr(expected, name).items():
            np.testing.assert_array_equal(getattr(found, name)[key], column)
            assert getattr(found, name)[key].dtype == column.dtype
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert not found.tokens.flags.writeable


def test_full_shared_memory_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        @staticmethod
        def fdopen(descriptor: int, mode: str) -> object:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shared, "os", Full)
    assert shared._write(batch()) is None
    assert list(tmp_path.iterdir()) == []
