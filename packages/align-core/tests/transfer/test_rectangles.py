"""Copies between two layouts: every element once, from one holder, and gaps named."""

import numpy as np
import pytest

from align_core.errors import LayoutError
from align_core.transfer.rectangles import Part, copies, intersection, slices, whole


def rows(name: str, shape: tuple[int, int], start: int, stop: int, *, primary: bool = True) -> Part:
    return Part(
        name=name,
        shape=shape,
        index=((start, stop), (0, shape[1])),
        tensor=name,
        local=((0, stop - start), (0, shape[1])),
        primary=primary,
    )


def test_rectangles_that_do_not_meet_share_nothing() -> None:
    assert intersection(((0, 2), (0, 4)), ((1, 5), (2, 9))) == ((1, 2), (2, 4))
    assert intersection(((0, 2),), ((2, 3),)) is None


def test_rows_of_three_holders_fill_the_columns_of_one() -> None:
    """9 x 6 held as rows by three ranks; wanted: columns 2 .. 6, inside a larger tensor."""
    shape = (9, 6)
    weight = np.arange(54).reshape(shape)
    held = [
        [rows("w", shape, 0, 2)],
        [rows("w", shape, 2, 7)],
        [rows("w", shape, 7, 9), rows("w", shape, 0, 2, primary=False)],
    ]
    wanted = Part(name="w", shape=shape, index=((0, 9), (2, 6)), tensor="mine", local=((3, 12), (0, 4)))
    mine = np.full((15, 4), -1)
    for copy in copies(held, [wanted]):
        (source,) = [part for part in held[copy.rank] if part.primary]
        mine[slices(copy.target)] = weight[slices(source.index)][slices(copy.source)]
    assert np.array_equal(mine[3:12], weight[:, 2:])
    assert np.all(mine[:3] == -1) and np.all(mine[12:] == -1)


def test_an_element_without_a_holder_is_named() -> None:
    shape = (4, 2)
    wanted = Part(name="w", shape=shape, index=whole(shape), tensor="mine", local=whole(shape))
    with pytest.raises(LayoutError, match=r"holds 6 of the 8 elements of weight 'w'"):
        copies([[rows("w", shape, 0, 3)]], [wanted])
