"""The weights of a model whose ranks and engines do not share one node's memory: through Ray's object store.

Ranks of a node write into one file there; the driver fetches a weight from each node that holds a part of it and hands
the whole on. The bytes cross the network twice, so this is for where nothing faster is open.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.ray.workers import WorkerGroup
from align_core.types import ParamMeta, WeightTensor

_CHUNK_BYTES = 64 << 20  # fetched at once

Span = tuple[int, int]
"""Where a weight begins in the file, and its size, bytes."""


class CrossingSource:
    """A `WeightSource` for any number of nodes; its weights carry their bytes."""

    def __init__(self, workers: WorkerGroup, write: str = "write_weights") -> None:
        """`write` is the method with which each rank writes its part into a file."""
        self._workers, self._write = workers, write
        self._layout: Sequence[ParamMeta] = workers.call("weights_layout")[0]
        self._node_of = [place.node_id for place in workers.processes.places]
        self._speaker = {node: self._node_of.index(node) for node in self._node_of}
        """The first rank of each node."""

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._layout

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`; the files are gone when it ends."""
        total = sum(meta.nbytes for meta in self._layout)
        files = {node: self._workers.run(rank, make_file, total) for node, rank in self._speaker.items()}
        try:
            sums = self._workers.call_each(self._write, [(Path(files[node]),) for node in self._node_of])
            for chunk in self._chunks():
                yield from self._fetch(chunk, files, sums)
        finally:
            for node, rank in self._speaker.items():
                self._workers.run(rank, remove_file, files[node])

    def _chunks(self) -> Iterator[list[tuple[ParamMeta, int]]]:
        """The weights with their offsets, so many that they have about _CHUNK_BYTES."""
        chunk: list[tuple[ParamMeta, int]] = []
        offsets = accumulate((meta.nbytes for meta in self._layout), initial=0)
        for meta, offset in zip(self._layout, offsets):
            chunk.append((meta, offset))
            if sum(each.nbytes for each, _ in chunk) >= _CHUNK_BYTES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _fetch(
        self, chunk: Sequence[tuple[ParamMeta, int]], files: dict[str, str], sums: Sequence[dict[str, int]]
    ) -> Iterator[WeightTensor]:
        found: dict[str, NDArray[np.uint8]] = {}
        for node, rank in self._speaker.items():
            names = {name for part, where in zip(sums, self._node_of) if where == node for name in part}
            held = [(meta, offset) for meta, offset in chunk if meta.name in names]
            if not held:
                continue
            spans = [(offset, meta.nbytes) for meta, offset in held]
            for (meta, _), data in zip(held, self._workers.run(rank, read_file, files[node], spans)):
                # Parts of one weight on several nodes do not overlap, and the rest of a file is zeros.
                found[meta.name] = found[meta.name] | data if meta.name in found else data
        for meta, _ in chunk:
            total = sum(part.get(meta.name, 0) for part in sums) % 2**64
            yield WeightTensor(meta=meta, checksum=total, data=found[meta.name])


# What runs in a rank's process.


def make_file(size: int) -> str:
    """A file of zeros in this node's shared memory."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.NamedTemporaryFile(prefix="align-weights-", dir=folder, delete=False) as file:
        file.truncate(size)
        return file.name


def read_file(file: str, spans: Sequence[Span]) -> list[NDArray[np.uint8]]:
    """The bytes of each span."""
    return [np.fromfile(file, dtype=np.uint8, count=size, offset=offset) for offset, size in spans]


def remove_file(file: str) -> None:
    """Nothing is left."""
    Path(file).unlink(missing_ok=True)
