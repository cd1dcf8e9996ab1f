"""A batch for every rank of a node: written once into shared memory, mapped by each.

Ray's own object store asks its daemon once a worker, which for eight workers takes longer than all else that a call
costs. Ranks on other nodes get their batch through it all the same.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray

from align_core.types import Batch

_ALIGNMENT = 64
_SHARED_MEMORY = Path("/dev/shm")

Kind = Literal["tokens", "offsets", "token_columns", "sequence_columns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    kind: Kind
    name: str
    dtype: str
    count: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBatch:
    """Names a file; the batch may be opened as long as the file is there, and used as long as one likes."""

    file: str
    columns: tuple[_Column, ...]

    def open(self) -> Batch:
        """The batch, in arrays that cannot be written to."""
        with Path(self.file).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {
            (c.kind, c.name): np.frombuffer(memory, dtype=c.dtype, count=c.count, offset=c.offset) for c in self.columns
        }

        def named(kind: Kind) -> dict[str, NDArray[Any]]:
            return {name: array for (each, name), array in arrays.items() if each == kind}

        return Batch(
            tokens=arrays["tokens", ""],
            offsets=arrays["offsets", ""],
            token_columns=named("token_columns"),
            sequence_columns=named("sequence_columns"),
        )


@contextmanager
def reachable(batch: Batch, *, everyone_here: bool) -> Iterator[Any]:
    """Something that workers can open while the block lasts: a file of this node, or a reference of Ray's store.

    Where shared memory is too small it is the batch itself, which then goes over each worker's line.
    """
    if not everyone_here:
        yield ray.put(batch)
        return
    written = _write(batch)
    if written is None:
        yield batch
        return
    try:
        yield written
    finally:
        Path(written.file).unlink(missing_ok=True)


def opened(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a call with shared batches opened."""
    return [argument.open() if isinstance(argument, SharedBatch) else argument for argument in arguments]


def _write(batch: Batch) -> SharedBatch | None:
    """None where shared memory is too small."""
    parts: list[tuple[Kind, str, NDArray[Any]]] = [("tokens", "", batch.tokens), ("offsets", "", batch.offsets)]
    parts += [("token_columns", name, array) for name, array in batch.token_columns.items()]
    parts += [("sequence_columns", name, array) for name, array in batch.sequence_columns.items()]
    columns = []
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    descriptor, path = tempfile.mkstemp(prefix="align-batch-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for kind, name, array in parts:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                columns.append(
                    _Column(kind=kind, name=name, dtype=array.dtype.str, count=len(array), offset=file.tell())
                )
                file.write(np.ascontiguousarray(array).data)
    except OSError:
        Path(path).unlink(missing_ok=True)
        return None
    return SharedBatch(file=path, columns=tuple(columns))
