"""The weights of a model over several processes of one host, through one file in shared memory."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from align_core.contracts import WeightSource
from align_core.ray.workers import WorkerGroup
from align_core.transfer.rectangles import Part, Rows
from align_core.types import ParamMeta, WeightTensor, shared_memory


class DirectWorkersSource:
    """The weights where the ranks hold them, for engines on the same GPUs; through the host's memory for others."""

    def __init__(self, workers: WorkerGroup, host: WeightSource) -> None:
        """`host` gives the weights to engines that cannot reach the ranks' GPUs."""
        self._workers = workers
        self._host = host
        self._layout: Sequence[Sequence[Part]] = workers.call("weight_parts")
        self._devices: frozenset[str] = frozenset().union(*workers.call("weight_devices"))

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._host.metadata()

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`."""
        return self._host.iterate()

    def layout(self) -> Sequence[Sequence[Part]]:
        """See `align_core.contracts.DirectSource`."""
        return self._layout

    def devices(self) -> frozenset[str]:
        """See `align_core.contracts.DirectSource`."""
        return self._devices

    def memory(self) -> Sequence[Mapping[str, object]]:
        """See `align_core.contracts.DirectSource`; handles, each good for one engine to open."""
        return self._workers.call("weight_handles")

    def checksums(self, rows: Rows) -> Sequence[Mapping[str, int]]:
        """See `align_core.contracts.DirectSource`."""
        return self._workers.call("weight_checksums", rows)


class SharedMemorySource:
    """Weights laid out in one file in Hugging Face order; ranks write, the engine maps. Same host only."""

    def __init__(self, workers: WorkerGroup) -> None:
        self._workers = workers
        self._layout: Sequence[ParamMeta] = workers.call("weights_layout")[0]

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._layout

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`; the file goes away with this source."""
        offsets = np.concatenate([[0], np.cumsum([meta.nbytes for meta in self._layout])])
        self._file = tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory())  # noqa: SIM115
        self._file.truncate(int(offsets[-1]))
        path = Path(self._file.name)
        partial_sums = self._workers.call("write_weights", path)
        for meta, offset in zip(self._layout, offsets):
            total = sum(sums.get(meta.name, 0) for sums in partial_sums) % 2**64
            yield WeightTensor(meta=meta, checksum=total, file=path, offset=int(offset))
