"""Ranges of flattened matrices as rectangles: by hand, and every range of a matrix put together again."""

import pytest
import torch

from align_core.megatron.shards import rectangles


def test_a_range_is_the_rest_of_a_row_whole_rows_and_the_beginning_of_one() -> None:
    """Elements 2 to 13 of rows of 4: (0, 2..3), rows 1 and 2, (3, 0..1)."""
    found = rectangles(2, torch.arange(2, 14), (5, 4))
    assert [(row, column, part.tolist()) for row, column, part in found] == [
        (0, 2, [[2, 3]]),
        (1, 0, [[4, 5, 6, 7], [8, 9, 10, 11]]),
        (3, 0, [[12, 13]]),
    ]


@pytest.mark.parametrize("shape", [(4, 3), (1, 7), (7,)])
def test_every_range_comes_together_again(shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    for start in range(count):
        for end in range(start + 1, count + 1):
            whole = torch.full(shape, -1)
            for row, column, part in rectangles(start, torch.arange(start, end), shape):
                where = (slice(row, row + len(part)), slice(column, column + part.shape[-1]))
                whole[where[: len(shape)]] = part
            expected = torch.arange(count)
            expected[:start] = -1
            expected[end:] = -1
            assert whole.flatten().tolist() == expected.tolist()
