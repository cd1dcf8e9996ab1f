"""Matrices in files: where the bytes of a tensor lie, so that they can be copied without opening a tensor library.

Every tensor here is a matrix; a vector of n is n rows of one column, whose bytes are the same. Knows nothing about
formats, layouts or names.
"""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from align_convert.errors import FormatError
from align_convert.plan import Index, Piece

Span = tuple[int, int]
"""(start, stop)."""

INTEGERS: dict[int, type[np.signedinteger]] = {2: np.int16, 4: np.int32}
"""The numpy type that carries the bits of a weight of so many bytes."""


class Array(NamedTuple):
    """A matrix in a file, row by row."""

    path: Path
    offset: int
    """Of the first element, bytes."""
    rows: int
    columns: int
    stride: int
    """Bytes from one row to the next."""
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's elements."""
        return self.columns * self.dtype.itemsize

    def row_offset(self, row: int) -> int:
        """Where a row begins in the file."""
        return self.offset + row * self.stride

    @property
    def end(self) -> int:
        """The first byte after the last element."""
        return self.offset + max(self.rows - 1, 0) * self.stride + (self.row_bytes if self.rows else 0)


class Held(NamedTuple):
    """A rectangle of a Hugging Face tensor and the place in an array that holds the same values."""

    rows: Span
    columns: Span
    """Of the Hugging Face tensor, as a matrix."""
    array: Array
    row: int
    column: int
    """Where the rectangle begins in the array."""


class Padding(NamedTuple):
    """Rows of an array that all repeat one row of a Hugging Face tensor."""

    name: str
    hf_row: int
    array: Array
    rows: Span


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a vector or a matrix."""
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape[0], shape[1]
    raise FormatError(f"a tensor of shape {tuple(shape)} has {len(shape)} dimensions; weights have 1 or 2")


def dense(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Array:
    """The array of a tensor whose rows follow each other without gaps."""
    rows, columns = matrix(shape)
    return Array(path, offset, rows, columns, columns * dtype.itemsize, dtype)


def spans(index: Index) -> tuple[Span, Span]:
    """An index as (rows, columns) of the matrix."""
    return (index[0], index[1]) if len(index) == 2 else (index[0], (0, 1))


def held_by(piece: Piece, array: Array) -> Held:
    """The piece of a plan, its rank's tensor lying in `array`."""
    rows, columns = spans(piece.hf_index)
    (row, _), (column, _) = spans(piece.shard_index)
    return Held(rows, columns, array, row, column)


def meet(a: Span, b: Span) -> Span | None:
    """What two spans have in common, if anything."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else None


def cut(held: Held, rows: Span, columns: Span | None = None) -> Held | None:
    """The part of `held` within some rows (and columns) of the Hugging Face tensor, if any."""
    both = meet(held.rows, rows)
    across = held.columns if columns is None else meet(held.columns, columns)
    if both is None or across is None:
        return None
    row, column = held.row + both[0] - held.rows[0], held.column + across[0] - held.columns[0]
    return Held(both, across, held.array, row, column)


def covered(held: Iterable[Held]) -> int:
    """Elements in all these rectangles together."""
    return sum((h.rows[1] - h.rows[0]) * (h.columns[1] - h.columns[0]) for h in held)


class Maps:
    """Files mapped into memory on first use; views of their arrays."""

    def __init__(self) -> None:
        """Nothing is opened yet."""
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, array: Array) -> npt.NDArray[np.signedinteger]:
        """The array's bits, read as they are touched.

        Raises:
            FormatError: the file is missing or shorter than the array needs.
        """
        if array.path not in self._maps:
            self._maps[array.path] = _map(array.path)
        mapped = self._maps[array.path]
        if array.end > len(mapped) or array.offset < 0:
            raise FormatError(f"{str(array.path)!r} ends at byte {len(mapped)}; a tensor in it needs {array.end}")
        size = array.dtype.itemsize
        kind = INTEGERS[size]
        return np.ndarray((array.rows, array.columns), kind, mapped, array.offset, (array.stride, size))

    def read(self, held: Held) -> torch.Tensor:
        """A copy of a rectangle's values, [rows, columns]."""
        height, width = held.rows[1] - held.rows[0], held.columns[1] - held.columns[0]
        view = self.view(held.array)[held.row : held.row + height, held.column : held.column + width]
        return torch.from_numpy(np.array(view, order="C")).view(held.array.dtype)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FormatError(f"{str(path)!r} is missing") from None
    except ValueError:
        raise FormatError(f"{str(path)!r} is empty") from None
