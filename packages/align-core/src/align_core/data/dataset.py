"""One or several files of records as one sequence, with the order in which training goes through them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from align_core.data.files import DataFiles, data_files
from align_core.data.lines import LineRecords, Row
from align_core.data.order import MixedOrder, indices_of_step
from align_core.errors import DataError

Record = TypeVar("Record")
Order = Callable[[int], NDArray[np.int64]]
"""step (from 0) to the indices of its records, int64 [batch_size]; a pure function."""


class Dataset(Sequence[Record], Generic[Record]):
    """The records of all files, one file after another."""

    def __init__(self, files: Sequence[LineRecords[Record]], ratios: Sequence[float] | None = None) -> None:
        """Args: `ratios`: share of each file in every batch; None goes through all records alike."""
        self._files = list(files)
        self._ratios = ratios
        self._ends = list(accumulate(len(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, row = self._place(index)
        return file[row]

    def parts(self, size: int = 64) -> Iterator[list[Record]]:
        """All records in turn, `size` at a time: what is held at once bounds memory and changes no result."""
        for indices in self.index_parts(size):
            yield [self[i] for i in indices]

    def index_parts(self, size: int = 64) -> Iterator[range]:
        """The indices of `parts`."""
        for first in range(0, len(self), size):
            yield range(first, min(first + size, len(self)))

    def firsts(self, most: int) -> Iterator[int]:
        """The indices of all records, or of the first ones of each file: `most`, and up to one more a further file."""
        share, first = min(1.0, most / len(self)), 0
        for end in self._ends:
            yield from range(first, first + math.ceil((end - first) * share))
            first = end

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        file, row = self._place(index)
        return file.where(row)

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Which records each step sees.

        Raises:
            DataError: there are fewer records than a batch needs.
        """
        if self._ratios is not None:
            sizes = [len(file) for file in self._files]
            return MixedOrder(sizes, self._ratios, batch_size=batch_size, seed=seed)
        order = partial(indices_of_step, records=len(self), batch_size=batch_size, seed=seed)
        order(0)
        return order

    def fingerprint(self) -> list[Mapping[str, object]]:
        """What a continued run compares: each file's size, records and hash, not its place."""
        return [file.fingerprint() for file in self._files]

    def shares(self) -> list[tuple[int, float]]:
        """Of each file its records and its share of the batches; shares add up to 1."""
        sizes = [len(file) for file in self._files]
        ratios = self._ratios or sizes
        return [(size, ratio / sum(ratios)) for size, ratio in zip(sizes, ratios)]

    def _place(self, index: int) -> tuple[LineRecords[Record], int]:
        row = range(len(self))[index]
        number = bisect_right(self._ends, row)
        return self._files[number], row - (self._ends[number - 1] if number else 0)


def open_dataset(
    data: DataFiles, parse: Callable[[Row], Record], *, expected: str, name_in_directory: str
) -> Dataset[Record]:
    """Index and check the files that `data` names.

    Raises:
        DataError: see `data_files` and `LineRecords`.
    """
    files = data_files(data, name_in_directory=name_in_directory)
    opened = [LineRecords(file.path, parse, expected=expected) for file in files]
    ratios = [file.ratio for file in files if file.ratio is not None]
    return Dataset(opened, ratios or None)


Encoded = TypeVar("Encoded")


def each_encoded(
    records: Dataset[Record], encode: Callable[[Record], Encoded], *, most: int = 10_000
) -> Iterator[Encoded]:
    """The first records of each file through `encode`, before any process starts: what refuses them is found early.

    Args:
        most: about how many records; each file gives as many as is its share of all.

    Raises:
        DataError: with file and line of the record.
    """
    for index in records.firsts(most):
        yield encoded(records, index, encode)


def encoded(records: Dataset[Record], index: int, encode: Callable[[Record], Encoded]) -> Encoded:
    """Record `index` through `encode`; its DataError gets the record's file and line."""
    return record_and_encoded(records, index, encode)[1]


def record_and_encoded(
    records: Dataset[Record], index: int, encode: Callable[[Record], Encoded]
) -> tuple[Record, Encoded]:
    """Record `index`, read once, and what `encoded` gives."""
    record = records[index]
    try:
        return record, encode(record)
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from error
