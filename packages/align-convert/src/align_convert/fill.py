"""Tensors through the plan: Hugging Face slices into a Megatron tensor, and a Megatron tensor into HF slices.

Knows nothing about files or layouts, only about the rectangles of a `Shard`.
"""

from collections.abc import Callable, Iterator

import torch

from align_convert.errors import PlanError
from align_convert.plan import Index, Piece, Shard

Read = Callable[[str, Index], torch.Tensor]
"""(HF name, index) -> the values in that rectangle."""


def fill_shard(shard: Shard, read: Read, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Build a rank's tensor from Hugging Face slices, vocabulary padding included.

    Args:
        read: called once a piece, in order; what it returns is cast to `dtype`.
    Raises:
        PlanError: `read` gave another shape than asked for.
    """
    tensor = torch.empty(shard.shape, dtype=dtype, device=device)
    for piece in shard.pieces:
        tensor[slices(piece.shard_index)].copy_(_read_exactly(read, piece.hf_name, piece.hf_index))
    if shard.padding is not None:
        row = shard.padding.hf_row
        rest = tuple((0, size) for size in shard.shape[1:])
        start, stop = shard.padding.rows
        tensor[start:stop].copy_(_read_exactly(read, shard.padding.hf_name, ((row, row + 1), *rest)))
    return tensor


def shard_slices(shard: Shard, tensor: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """The reverse: each piece of a rank's tensor with a view of its values; padding is left out.

    Raises:
        PlanError: the tensor does not have the shard's shape.
    """
    if tuple(tensor.shape) != shard.shape:
        raise PlanError(f"tensor {shard.name!r} has shape {tuple(tensor.shape)}; the plan says {shard.shape}")
    for piece in shard.pieces:
        yield piece, tensor[slices(piece.shard_index)]


def slices(index: Index) -> tuple[slice, ...]:
    """An index as torch and safetensors take it."""
    return tuple(slice(start, stop) for start, stop in index)


def _read_exactly(read: Read, hf_name: str, index: Index) -> torch.Tensor:
    value = read(hf_name, index)
    wanted = tuple(stop - start for start, stop in index)
    if tuple(value.shape) != wanted:
        raise PlanError(f"reading {hf_name!r} gave shape {tuple(value.shape)}; asked for {wanted}")
    return value
