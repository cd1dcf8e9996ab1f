"""A rank's weights as parts of Hugging Face tensors in one flat buffer, and the checksum of each part.

The buffer holds all tensors end to end in Hugging Face's order; ranks that map the same file each put down the pieces
that they own, and nothing is gathered. The sum of all ranks' checksums of a tensor is `align_core.types.checksum` of
the whole. Knows nothing about engines.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_convert.config import ModelConfig
from align_convert.fill import shard_slices, slices
from align_convert.plan import Index, Shard
from align_core.config import Dtype
from align_core.transfer.checksums import PartSums
from align_core.transfer.ends import LinkEnd
from align_core.transfer.memory import Handle, device_of, export_tensors
from align_core.transfer.rectangles import Part, Rows
from align_core.transfer.seats import Seat
from align_core.types import ITEM_BYTES, POSITION_START, POSITION_STEP, ParamMeta, WeightTensor

_INT = {2: np.int16, 4: np.int32}
_TORCH_INT = {2: torch.int16, 4: torch.int32}


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


class HasParameters(Protocol):
    """A torch module, as far as weights go."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Every parameter by name."""
        ...


class RankWeights:
    """One rank's live weights, where they are: what it holds of which weight, its tensors, their checksums."""

    def __init__(
        self, chunks: Sequence[HasParameters], plans: Sequence[Sequence[Shard]], metas: Sequence[ParamMeta]
    ) -> None:
        """The weights of a rank's chunks with their plans; without plans, of a further copy, which sends nothing."""
        self._chunks = chunks
        self._parts = [part for chunk, shards in enumerate(plans) for part in held_parts(shards, metas, chunk=chunk)]
        self._sums: PartSums | None = None
        self._end = LinkEnd()
        self._room: dict[str, Tensor] = {}
        self._kept = False

    def parts(self) -> list[Part]:
        """Which parts of which weights this rank holds."""
        return self._parts

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by chunk and megatron-core name, for an engine in this process."""
        names = {part.tensor for part in self._parts}
        found = (
            (_tensor_name(chunk, name), parameter)
            for chunk, module in enumerate(self._chunks)
            for name, parameter in module.named_parameters()
        )
        return {name: parameter for name, parameter in found if name in names}

    def devices(self) -> frozenset[str]:
        """UUIDs of the GPUs that hold them."""
        return frozenset(device_of(tensor) for tensor in self.tensors().values() if tensor.is_cuda)

    def handles(self) -> dict[str, Handle | Tensor]:
        """The same for an engine in another process on this GPU."""
        return export_tensors(self.tensors())

    def checksums(self, rows: Rows) -> dict[str, int]:
        """Of this rank's primary parts of each weight, computed where they are."""
        if not self._parts:
            return {}
        if self._sums is None:
            self._sums = PartSums([part for part in self._parts if part.primary])
        return self._sums.compute(self.tensors(), rows)

    def send(self, seat: Seat | None, rows: Rows | None) -> dict[str, int]:
        """Sends to the engines' ranks, from `seat` if it is another one than before; `checksums` over `rows`."""
        self._kept = False
        if not self._parts:
            return {}
        if seat is not None:
            self._end.sit(seat)
        self._end.send(self.tensors())
        return self.checksums(rows) if rows else {}

    def keep(self) -> None:
        """Copies what was last sent into the host's memory, because it is about to change."""
        if self._kept:
            return
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if name not in self._room:  # pinned, without which a copy from a GPU takes ten times as long
                self._room[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._room[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._kept = True

    def as_sent(self, chunk: int) -> dict[str, Tensor]:
        """A chunk's tensors by megatron-core name, where they have changed since they were last sent: as they were."""
        prefix = _tensor_name(chunk, "")
        kept = self._room.items() if self._kept else ()
        return {name.removeprefix(prefix): tensor for name, tensor in kept if name.startswith(prefix)}

    def close(self) -> None:
        """Leaves the engines' ranks."""
        self._end.close()


class LiveWeights:
    """A `WeightSource` and `DirectSource` over the live tensors of a model of one rank."""

    def __init__(self, rank: RankWeights, metas: Sequence[ParamMeta], copy: Callable[[], HeldWeights]) -> None:
        """`copy` makes the copy in the host's memory that `iterate` yields."""
        self._rank, self._metas, self._copy = rank, list(metas), copy
        self._layout = [rank.parts()]

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._metas

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`."""
        self._held = self._copy()  # its bytes stay valid as long as this source lives
        return self._held.iterate()

    def layout(self) -> Sequence[Sequence[Part]]:
        """See `align_core.contracts.DirectSource`."""
        return self._layout

    def devices(self) -> frozenset[str]:
        """See `align_core.contracts.DirectSource`."""
        return self._rank.devices()

    def memory(self) -> Sequence[Mapping[str, object]]:
        """See `align_core.contracts.DirectSource`."""
        return [self._rank.tensors()]

    def checksums(self, rows: Rows) -> Sequence[Mapping[str, int]]:
        """See `align_core.contracts.DirectSource`."""
        return [self._rank.checksums(rows)]


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
            whole = buffer[offset : offset + meta.nbytes].view(_INT[item]).reshape(meta.shape)
            bits = values.detach().contiguous().view(_TORCH_INT[item]).cpu().numpy().view(_INT[item])
            whole[slices(piece.hf_index)] = bits
            share = piece_checksum(bits, index=piece.hf_index, shape=meta.shape)
            sums[piece.hf_name] = (sums.get(piece.hf_name, 0) + share) % 2**64
    return sums


def piece_checksum(bits: NDArray[np.signedinteger], *, index: Index, shape: tuple[int, ...]) -> int:
    """What a rectangle contributes to `align_core.types.checksum` of the tensor that it is part of.

    `checksum` adds (e + 1)(STEP p + START) for the element e at flat position p. In a matrix of C columns p = C r + c,
    so a rectangle needs its row and column sums of (e + 1) only: STEP C sum_r r row_r + sum_c (STEP c + START) col_c.

    Args:
        bits: the rectangle's elements as signed integers, with one or two dimensions.
        index: the rectangle, one (start, stop) a dimension.
        shape: of the whole tensor.
    """
    table = bits.reshape(-1, bits.shape[-1])
    (first_row, last_row), (first, last) = ((0, 1), *index)[-2:]
    row_sums = (np.sum(table, axis=1, dtype=np.int64) + (last - first)).view(np.uint64)
    column_sums = (np.sum(table, axis=0, dtype=np.int64) + (last_row - first_row)).view(np.uint64)
    rows = np.arange(first_row, last_row, dtype=np.uint64) * np.uint64(POSITION_STEP * shape[-1] % 2**64)
    columns = np.arange(first, last, dtype=np.uint64) * np.uint64(POSITION_STEP) + np.uint64(POSITION_START)
    return (int(np.sum(rows * row_sums)) + int(np.sum(columns * column_sums))) % 2**64


def held_parts(shards: Sequence[Shard], metas: Sequence[ParamMeta], *, chunk: int = 0) -> list[Part]:
    """What a rank's chunk with these shards holds, in the terms of `align_core.transfer`."""
    shapes = {meta.name: meta.shape for meta in metas}
    return [
        Part(
            name=piece.hf_name,
            shape=shapes[piece.hf_name],
            index=piece.hf_index,
            tensor=_tensor_name(chunk, shard.name),
            local=piece.shard_index,
            primary=piece.primary,
        )
        for shard in shards
        for piece in shard.pieces
    ]


def _tensor_name(chunk: int, name: str) -> str:
    """Chunks of a virtual pipeline count their layers alike."""
    return f"{chunk}.{name}"
