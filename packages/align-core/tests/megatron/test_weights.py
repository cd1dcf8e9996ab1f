"""Checksums of pieces add up to the checksum of the whole tensor."""

import numpy as np
import pytest

from align_core.megatron.weights import byte_offsets, piece_checksum, total_bytes
from align_core.types import ParamMeta, checksum


@pytest.mark.parametrize("item", [2, 4])
def test_piece_checksums_add_up_to_the_whole(item: int) -> None:
    """A 7 x 10 matrix in six rectangles, none of them whole rows."""
    data = np.random.default_rng(0).integers(0, 256, 7 * 10 * item, dtype=np.uint8)
    bits = data.view({2: np.int16, 4: np.int32}[item]).reshape(7, 10)
    total = 0
    for rows in ((0, 2), (2, 3), (3, 7)):
        for columns in ((0, 4), (4, 10)):
            part = bits[slice(*rows), slice(*columns)]
            total += piece_checksum(part, index=(rows, columns), shape=(7, 10))
    assert total % 2**64 == checksum(data, item_bytes=item)


def test_piece_checksum_of_a_vector_is_that_of_its_run() -> None:
    data = np.random.default_rng(1).integers(0, 256, 40, dtype=np.uint8)
    part = piece_checksum(data.view(np.int32)[3:8], index=((3, 8),), shape=(10,))
    assert part == checksum(data[12:32], item_bytes=4, start=3)


def test_weights_lie_end_to_end() -> None:
    metas = [ParamMeta(name="a", shape=(2, 3), dtype="float32"), ParamMeta(name="b", shape=(5,), dtype="bfloat16")]
    assert byte_offsets(metas) == [0, 24]
    assert total_bytes(metas) == 34
