"""`align_core.types.checksum` of parts of weights, on the device that holds them.

The checksum adds (e + 1)(STEP p + START) over the elements e, read as signed integers, at flat positions p of the whole
weight, modulo 2^64. For row r of a matrix of C columns, of which a part begins at column c0, that is
h + STEP (C r + c0) s with h = sum_c (e_c + 1)(STEP c + START) and s = sum_c (e_c + 1), c counted from the part's first
column: so one pass that leaves two numbers a row is enough for every layout, and the parts' values add up to the
whole's. On CUDA the pass is a Triton kernel that reads each byte once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_core.errors import LayoutError
from align_core.transfer.rectangles import Part, Rows
from align_core.types import POSITION_START, POSITION_STEP

_INTEGER = {2: torch.int16, 4: torch.int32}
_CHUNK_ELEMENTS = 1 << 22  # rows widened to 64 bits at once where there is no kernel: 32 MiB
_BLOCK = 1024


class PartSums:
    """Sums the checksums of fixed parts of a process's tensors, again and again as the tensors change."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Works out what each row of each tensor is a row of.

        Raises:
            LayoutError: the parts of one tensor do not all cover the same columns of it.
        """
        self.names = sorted({part.name for part in parts})
        slot_of = {name: slot for slot, name in enumerate(self.names)}
        tables: dict[str, list[NDArray[np.int64]]] = {}
        self._columns: dict[str, tuple[int, int]] = {}
        for part in parts:
            window = part.local[1] if len(part.local) > 1 else (0, 1)
            if self._columns.setdefault(part.tensor, window) != window:
                raise LayoutError(f"parts of the tensor {part.tensor!r} cover other columns than each other")
            tables.setdefault(part.tensor, []).append(_row_table(part, slot_of[part.name]))
        self._tables = {name: np.concatenate(table, axis=1) for name, table in tables.items()}
        self._on_device: dict[tuple[torch.device, Rows], Mapping[str, Tensor]] = {}

    def compute(self, tensors: Mapping[str, Tensor], rows: Rows) -> dict[str, int]:
        """The sum over `rows`, modulo 2^64, of this process's parts of each weight.

        Args:
            tensors: by the names that the parts use; all on one device, 2 or 4 bytes an element.
        """
        device = next(iter(tensors.values())).device
        sums = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        for name, table in self._tables_on(device, rows).items():
            if table.shape[1]:
                tensor = tensors[name].detach()
                matrix = (tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)).view(_INTEGER[tensor.element_size()])
                local, weights, slots = table
                hashes, totals = _row_hashes(matrix[:, slice(*self._columns[name])], local)
                sums.index_add_(0, slots, hashes + weights * totals)
        return {name: value % 2**64 for name, value in zip(self.names, sums.tolist())}

    def _tables_on(self, device: torch.device, rows: Rows) -> Mapping[str, Tensor]:
        """The tables' first three rows, of the chosen rows of the weights; moved to the device all in one."""
        if (device, rows) not in self._on_device:
            chosen = [
                table[:3, (table[3] < 0) | (table[3] % rows.step == rows.first)] if rows.step > 1 else table[:3]
                for table in self._tables.values()
            ]
            # A choice of columns comes out in Fortran's order; the kernel reads each row of a table end to end.
            moved = torch.from_numpy(np.ascontiguousarray(np.concatenate(chosen, axis=1))).to(device)
            pieces = torch.split(moved, [table.shape[1] for table in chosen], dim=1)
            self._on_device[device, rows] = dict(zip(self._tables, pieces))
        return self._on_device[device, rows]


def _row_table(part: Part, slot: int) -> NDArray[np.int64]:
    """int64 [4, R]: of each row of the part its place in the local tensor, its weight STEP (C r + c0), the weight's
    slot, and r itself, or -1 where every sample has the row.

    A weight with one dimension counts as a matrix of one column, and is never sampled.
    """
    flat = len(part.shape) == 1
    columns, first_column = (1, 0) if flat else (part.shape[1], part.index[1][0])
    first_row, last_row = part.index[0]
    rows = np.arange(first_row, last_row, dtype=np.int64)
    weights = (rows * columns + first_column).astype(np.uint64) * np.uint64(POSITION_STEP)
    sampled = np.full(len(rows), -1) if flat else rows
    return np.stack([rows - first_row + part.local[0][0], weights.view(np.int64), np.full(len(rows), slot), sampled])


def _row_hashes(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [R] h and s (see the top) of the rows `rows`, int64 [R], of an integer matrix."""
    if matrix.is_cuda:
        return _row_hashes_kernel(matrix, rows)
    width = matrix.shape[1]
    weights = torch.arange(width, device=matrix.device, dtype=torch.int64) * _signed(POSITION_STEP)
    weights += _signed(POSITION_START)
    hashes, totals = torch.empty_like(rows), torch.empty_like(rows)
    count = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(rows), count):
        elements = matrix[rows[start : start + count]].to(torch.int64) + 1
        totals[start : start + count] = elements.sum(1)
        hashes[start : start + count] = (elements * weights).sum(1)
    return hashes, totals


def _row_hashes_kernel(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    hashes, totals = torch.empty_like(rows), torch.empty_like(rows)
    if matrix.stride(1) != 1 or not rows.is_contiguous():
        raise LayoutError("checksums on CUDA need rows, and a list of rows, of consecutive elements")
    from align_core.transfer.kernel import row_hashes  # noqa: PLC0415  (Triton comes with CUDA builds of torch only)

    row_hashes[(len(rows),)](
        *(matrix, rows, hashes, totals, matrix.shape[1], matrix.stride(0)),
        *(_signed(POSITION_STEP), _signed(POSITION_START)),
        BLOCK=_BLOCK,
    )
    return hashes, totals


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - 2**64 if value >= 2**63 else value
