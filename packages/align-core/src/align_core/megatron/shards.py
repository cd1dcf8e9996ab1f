"""AdamW's state as parts of whole tensors, so that a checkpoint fits any parallel layout.

With megatron-core's distributed optimizer a data-parallel rank owns a range of each flattened parameter. A range of a
matrix is at most three rectangles: the rest of a row, whole rows, the beginning of a row. Each becomes one chunk of a
tensor under the parameter's own checkpoint key, at its place in the whole (layers stacked, gate and up apart, as
megatron-core lays the parameter itself). Nothing is gathered, and every rank reads only what it owns. Rows that pad the
vocabulary are left out: their number depends on the layout.

Megatron-core's own ways of saving this state depend on the layout, or do not work with torch's AdamW.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

PREFIX = "adamw."


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedRange:
    """Elements from `start` on of a flattened parameter, and what the optimizer keeps of them."""

    parameter: Tensor
    start: int
    values: Mapping[str, Tensor]
    """By name, float32 [elements]; views into which a checkpoint is loaded."""


class Rectangles(Tensor):
    """Some rectangles of a tensor; has the methods by which torch.distributed.checkpoint saves and fills its own.

    A tensor, because torch looks into nothing else; it has no elements of its own.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], *, written: bool) -> "Rectangles":
        """`written` False: another rank holds the same values and writes them."""
        made: Rectangles = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        return made

    def __init__(self, shape: tuple[int, ...], *, written: bool) -> None:
        self._whole = torch.Size(shape)
        self._written = written
        self._parts: dict[torch.Size, Tensor] = {}

    def hold(self, offset: Sequence[int], values: Tensor) -> None:
        """The values at this offset of the whole."""
        self._parts[torch.Size(offset)] = values

    def copied_to_host(self) -> "Rectangles":
        """The same with values that training does not change."""
        copy = Rectangles(tuple(self._whole), written=self._written)
        for offset, values in self._parts.items():
            copy.hold(offset, values.to("cpu", copy=True))
        return copy

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"{operation} on {cls.__name__}, which has no elements of its own")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=values.shape),
                    properties=TensorProperties(dtype=values.dtype),
                    size=self._whole,
                ),
            )
            for offset, values in self._parts.items()
            if self._written
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=at, sizes=values.shape) for at, values in self._parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[index.offset]


def sharded_state(owned: Sequence[OwnedRange], weights: Mapping[str, Any], *, vocab_size: int) -> dict[str, Rectangles]:
    """What this rank owns of each of the optimizer's tensors.

    Args:
        weights: megatron-core's `sharded_state_dict` of all chunks together.
    """
    blocks_of = {id(sharded.data): sharded for sharded in weights.values() if isinstance(sharded.data, Tensor)}
    found: dict[str, Rectangles] = {}
    for item in owned:
        first = 0
        for block in _blocks(blocks_of[id(item.parameter)]):
            shape = _real_shape(block, vocab_size)
            count = block.data.numel()
            for name, values in item.values.items():
                low, high = max(item.start, first), min(item.start + len(values), first + count)
                key = f"{PREFIX}{name}.{block.key}"
                rectangles_of_key = found.setdefault(key, Rectangles(shape, written=_is_written(block)))
                if low < high:
                    for at, part in _placed(block, low - first, values[low - item.start : high - item.start], shape):
                        rectangles_of_key.hold(at, part)
            first += count
    return found


def rectangles(start: int, flat: Tensor, shape: Sequence[int]) -> list[tuple[int, int, Tensor]]:
    """Cut a range of a flattened vector or matrix: (row, column, view of `flat` with as many dimensions as `shape`).

    Of a vector `row` is the element, and there are no columns.
    """
    if len(shape) == 1:
        return [(start, 0, flat)]
    width = shape[1]
    found = []
    position, end = start, start + len(flat)
    while position < end:
        row, column = divmod(position, width)
        left = end - position
        count = min(width - column, left) if column or left < width else left // width * width
        part = flat[position - start : position - start + count]
        found.append((row, column, part.view(-1, min(count, width))))
        position += count
    return found


def _blocks(sharded: ShardedTensor | ShardedTensorFactory) -> list[Any]:
    """The parameter as one block, or gate and up as two; consecutive parts of it when flattened."""
    return list(sharded.build()) if isinstance(sharded, ShardedTensorFactory) else [sharded]


def _real_shape(block: Any, vocab_size: int) -> tuple[int, ...]:
    """Of the whole tensor, without rows that pad a vocabulary; a score head has one row in its place."""
    shape = tuple(block.global_shape)
    return (min(vocab_size, shape[0]), *shape[1:]) if block.allow_shape_mismatch else shape


def _is_written(block: Any) -> bool:
    """All of a replica's positions but the data-parallel one, whose ranks own different ranges, must be 0."""
    return all(position == 0 for position in block.replica_id[:-1])


def _placed(block: Any, start: int, flat: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offset in the whole tensor, values) of each rectangle of a range that begins at element `start` of the block."""
    leading = block.prepend_axis_num
    offset = tuple(block.global_offset)
    for row, column, values in rectangles(start, flat, block.data.shape):
        at = (*offset[:leading], offset[leading] + row, *(offset[leading + 1 :] and (offset[-1] + column,)))
        inside = min(values.shape[0], shape[leading] - at[leading])  # rows of the real vocabulary
        if inside > 0:
            yield at, values[:inside][(None,) * leading]
