"""`align_core.types.checksum` of parts of weights, on the device that holds them.

The checksum adds (e + 1)(STEP p + START) over the elements e, read as signed integers, at flat positions p of the whole
weight, modulo 2^64. For row r of a matrix of C columns, of which a part begins at column c0, that is
h + STEP (C r + c0) s with h = sum_c (e_c + 1)(STEP c + START) and s = sum_c (e_c + 1), c counted from the part's first
column. The parts' values add up to the whole's, whatever the cut; a weight with one dimension counts as one row.

On CUDA one launch of a Triton kernel reads every byte once, whatever the number of parts, and its tables do not depend
on which sample of the rows is asked for: making and moving a table a sample took longer than reading all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_core.errors import LayoutError
from align_core.transfer.rectangles import Index, Part, Rows
from align_core.types import POSITION_START, POSITION_STEP

_INTEGER = {2: torch.int16, 4: torch.int32}
_CHUNK_ELEMENTS = 1 << 22  # widened to 64 bits at once where there is no kernel: 32 MiB
_BLOCK = 1024


class PartSums:
    """Sums the checksums of fixed parts of a process's tensors, again and again as the tensors change."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.names = sorted({part.name for part in parts})
        self._tensors = sorted({part.tensor for part in parts})
        slot_of = {name: slot for slot, name in enumerate(self.names)}
        place_of = {name: place for place, name in enumerate(self._tensors)}
        self._runs = [_run(part, tensor=place_of[part.tensor], slot=slot_of[part.name]) for part in parts]
        self._tables: dict[tuple[torch.device, int], _Tables] = {}

    def compute(self, tensors: Mapping[str, Tensor], rows: Rows) -> dict[str, int]:
        """The sum over `rows`, modulo 2^64, of this process's parts of each weight.

        Args:
            tensors: by the names that the parts use; all on one device, 2 or 4 bytes an element.
        """
        if not self._runs:
            return {}
        matrices = [_as_integers(tensors[name].detach()) for name in self._tensors]
        sums = torch.zeros(len(self.names), dtype=torch.int64, device=matrices[0].device)
        if matrices[0].is_cuda:
            self._launch(matrices, rows, sums)
        else:
            for run in self._runs:
                sums[run.slot] += _run_sum(matrices[run.tensor], run, rows)
        return {name: value % 2**64 for name, value in zip(self.names, sums.tolist())}

    def _launch(self, matrices: Sequence[Tensor], rows: Rows, sums: Tensor) -> None:
        from align_core.transfer.kernel import add_rows  # noqa: PLC0415  (Triton comes with CUDA builds of torch only)

        if len({matrix.dtype for matrix in matrices}) > 1 or any(matrix.stride(1) != 1 for matrix in matrices):
            raise LayoutError("checksums on CUDA need tensors of one dtype whose rows are consecutive elements")
        key = sums.device, rows.step
        if key not in self._tables:
            self._tables[key] = _Tables(self._runs, step=rows.step, device=sums.device)
        tables = self._tables[key]
        add_rows[(len(tables.run_of_program),)](
            *(tables.run_of_program, tables.turn_of_program, tables.runs, tables.addresses_of(matrices)),
            *(sums, rows.first, rows.step, _signed(POSITION_STEP), _signed(POSITION_START)),
            NARROW=matrices[0].element_size() == 2,
            BLOCK=_BLOCK,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Consecutive rows of a weight that are consecutive rows of a local matrix."""

    tensor: int
    slot: int
    """Place of the weight's sum."""
    local: tuple[int, int]
    """First row and column in the local matrix."""
    start: tuple[int, int]
    """The same in the weight."""
    rows: int
    width: int
    columns: int
    """Of the whole weight."""
    sampled: bool
    """False: every sample has all of it."""

    def first(self, rows: Rows) -> int:
        """Which of its rows is the first of the sample."""
        return (rows.first - self.start[0]) % rows.step if self.sampled else 0


def _run(part: Part, *, tensor: int, slot: int) -> _Run:
    flat = len(part.shape) == 1
    index, local = _matrix(part.index), _matrix(part.local)
    return _Run(
        tensor=tensor,
        slot=slot,
        local=(local[0][0], local[1][0]),
        start=(index[0][0], index[1][0]),
        rows=index[0][1] - index[0][0],
        width=index[1][1] - index[1][0],
        columns=part.shape[-1],
        sampled=not flat,
    )


def _matrix(index: Index) -> Index:
    """A range of a vector as one of a matrix of one row."""
    return ((0, 1), *index) if len(index) == 1 else index


def _as_integers(tensor: Tensor) -> Tensor:
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(1, -1)
    return matrix.view(_INTEGER[tensor.element_size()])


def _run_sum(matrix: Tensor, run: _Run, rows: Rows) -> int:
    """A run's share of its weight's checksum, without the kernel; a signed integer of 64 bits."""
    step = rows.step if run.sampled else 1
    (top, left), first = run.local, run.first(rows)
    chosen = matrix[top + first : top + run.rows : step, left : left + run.width]
    columns = torch.arange(run.width, device=matrix.device) * _signed(POSITION_STEP) + _signed(POSITION_START)
    places = (run.start[0] + torch.arange(first, run.rows, step, device=matrix.device)) * run.columns + run.start[1]
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    count = max(1, _CHUNK_ELEMENTS // run.width)
    for turn in range(0, len(chosen), count):
        elements = chosen[turn : turn + count].to(torch.int64) + 1
        total += (elements.sum(0) * columns).sum()
        total += (elements.sum(1) * places[turn : turn + count]).sum() * _signed(POSITION_STEP)
    return int(total)


class _Tables:
    """What the kernel reads: the runs, and for each of its programs which row of which run it adds."""

    def __init__(self, runs: Sequence[_Run], *, step: int, device: torch.device) -> None:
        turns = [-(-run.rows // step) if run.sampled else run.rows for run in runs]  # some samples have one row fewer
        run_of_program = np.repeat(np.arange(len(runs), dtype=np.int32), turns)
        starts = np.concatenate([[0], np.cumsum(turns)])[:-1]
        turn_of_program = np.arange(len(run_of_program), dtype=np.int64) - np.repeat(starts, turns)
        self.run_of_program = torch.from_numpy(run_of_program).to(device)
        self.turn_of_program = torch.from_numpy(turn_of_program.astype(np.int32)).to(device)
        self.runs = torch.from_numpy(np.stack([_row(run) for run in runs])).to(device)
        self._addresses: tuple[tuple[int, int], ...] = ()
        self._on_device = torch.empty(0)

    def addresses_of(self, matrices: Sequence[Tensor]) -> Tensor:
        """int64 [T, 2], address and elements a row of each tensor; moved to the device when one has changed."""
        found = tuple((matrix.data_ptr(), matrix.stride(0)) for matrix in matrices)
        if found != self._addresses:
            self._addresses, self._on_device = found, torch.tensor(found, dtype=torch.int64).to(self.runs.device)
        return self._on_device


def _row(run: _Run) -> NDArray[np.int64]:
    """The nine numbers of a run in the order in which the kernel reads them."""
    numbers = (run.tensor, run.slot, *run.local, *run.start, run.rows, run.width, run.columns)
    return np.array([*numbers, run.sampled], dtype=np.int64)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - 2**64 if value >= 2**63 else value
