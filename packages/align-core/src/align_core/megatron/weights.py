"""A rank's weights as parts of Hugging Face tensors in one flat buffer, and the checksum of each part.

The buffer holds all tensors end to end in Hugging Face's order; ranks that map the same file each put down the pieces
that they own, and nothing is gathered. The sum of all ranks' checksums of a tensor is `align_core.types.checksum` of
the whole. Knows nothing about engines.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_convert.config import ModelConfig
from align_convert.fill import shard_slices, slices
from align_convert.plan import Index, Shard
from align_core.config import Dtype
from align_core.types import ITEM_BYTES, ParamMeta, WeightTensor, checksum

_UINT = {2: np.uint16, 4: np.uint32}
_TORCH_INT = {2: torch.int16, 4: torch.int32}
# The constants of `checksum`, read off its values for a single zero element at positions 0 and 1.
_START = checksum(np.zeros(4, np.uint8), item_bytes=4)
_STEP = (checksum(np.zeros(4, np.uint8), item_bytes=4, start=1) - _START) % 2**64


class HeldWeights:
    """A `WeightSource` over a buffer that was filled once."""

    def __init__(self, metas: Sequence[ParamMeta], buffer: NDArray[np.uint8], checksums: Mapping[str, int]) -> None:
        self._metas = list(metas)
        self._buffer = buffer
        self._checksums = checksums

    def metadata(self) -> Sequence[ParamMeta]:
        """Names, shapes and types, in the order of `iterate`."""
        return self._metas

    def iterate(self) -> Iterator[WeightTensor]:
        """The weights, as views of the buffer."""
        for meta, offset in zip(self._metas, byte_offsets(self._metas)):
            data = self._buffer[offset : offset + meta.nbytes]
            yield WeightTensor(meta=meta, checksum=self._checksums[meta.name], data=data)


def weight_metas(config: ModelConfig, dtype: Dtype) -> list[ParamMeta]:
    """Every weight of the model, in Hugging Face's order."""
    return [ParamMeta(name=name, shape=shape, dtype=dtype) for name, shape in config.tensors().items()]


def byte_offsets(metas: Sequence[ParamMeta]) -> list[int]:
    """Where each weight starts in the flat buffer."""
    return list(accumulate((meta.nbytes for meta in metas), initial=0))[:-1]


def total_bytes(metas: Sequence[ParamMeta]) -> int:
    """Size of the flat buffer."""
    return sum(meta.nbytes for meta in metas)


def write_pieces(
    tensors: Mapping[str, Tensor], shards: Sequence[Shard], metas: Sequence[ParamMeta], buffer: NDArray[np.uint8]
) -> dict[str, int]:
    """Copy this rank's primary pieces into place.

    Args:
        tensors: this rank's tensors by megatron-core name.
        buffer: uint8 [total_bytes(metas)], which other ranks may be filling too.
    Returns:
        This rank's share of each weight's checksum, for the weights of which it owns a piece.
    """
    places = {meta.name: (meta, offset) for meta, offset in zip(metas, byte_offsets(metas))}
    sums: dict[str, int] = {}
    for shard in shards:
        for piece, values in shard_slices(shard, tensors[shard.name]):
            if not piece.primary:
                continue
            meta, offset = places[piece.hf_name]
            item = ITEM_BYTES[meta.dtype]
            whole = buffer[offset : offset + meta.nbytes].view(_UINT[item]).reshape(meta.shape)
            bits = values.detach().contiguous().view(_TORCH_INT[item]).cpu().numpy().view(_UINT[item])
            whole[slices(piece.hf_index)] = bits
            share = piece_checksum(bits, index=piece.hf_index, shape=meta.shape)
            sums[piece.hf_name] = (sums.get(piece.hf_name, 0) + share) % 2**64
    return sums


def piece_checksum(bits: NDArray[np.unsignedinteger], *, index: Index, shape: tuple[int, ...]) -> int:
    """What a rectangle contributes to `align_core.types.checksum` of the tensor that it is part of.

    `checksum` adds (e + 1)(STEP p + START) for the element e at flat position p. In a matrix of C columns p = C r + c,
    so a rectangle needs its row and column sums of (e + 1) only: STEP C sum_r r row_r + sum_c (STEP c + START) col_c.

    Args:
        bits: the rectangle's elements as unsigned integers, with one or two dimensions.
        index: the rectangle, one (start, stop) a dimension.
        shape: of the whole tensor.
    """
    table = bits.reshape(-1, bits.shape[-1])
    (first_row, last_row), (first, last) = ((0, 1), *index)[-2:]
    with np.errstate(over="ignore"):
        row_sums = np.sum(table, axis=1, dtype=np.uint64) + np.uint64(last - first)
        column_sums = np.sum(table, axis=0, dtype=np.uint64) + np.uint64(last_row - first_row)
        rows = np.arange(first_row, last_row, dtype=np.uint64) * np.uint64(_STEP * shape[-1] % 2**64)
        columns = np.arange(first, last, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(_START)
        return (int(np.sum(rows * row_sums)) + int(np.sum(columns * column_sums))) % 2**64
