"""The weights of a model over several processes: from GPU to GPU, from rank to rank, or through shared memory."""

import dataclasses
import functools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import ray

from align_core.contracts import DirectSource, LinkedSource, WeightSource
from align_core.ray.workers import WorkerGroup
from align_core.transfer.rectangles import Part, Rows
from align_core.transfer.seats import Meeting, Seat
from align_core.types import ParamMeta, WeightTensor, shared_memory


class LinkedWorkersSource:
    """The weights of several ranks: sent by each to engines on other devices, or through the host's memory."""

    def __init__(
        self,
        workers: WorkerGroup,
        host: Callable[[str], WeightSource],
        *,
        several_nodes: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        """Asks the ranks nothing yet.

        Args:
            host: makes a source through the host's memory, which the named method of a rank writes.
            several_nodes: ranks or engines may be on different ones.
            timeout_s: longest wait of a rank for another one in a transfer, seconds.
        """
        self._workers = workers
        self._host, self._host_as_sent = host("write_weights"), host("write_sent_weights")
        self._several_nodes, self._timeout_s = several_nodes, timeout_s
        self._seat: Seat | None = None
        self._wanted: Sequence[Sequence[Sequence[Part]]] | None = None
        self._told = True
        self._sent = False

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._host.metadata()

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`."""
        return self._host.iterate()

    @functools.cached_property
    def _parts(self) -> Sequence[Sequence[Part]]:
        found: Sequence[Sequence[Part]] = self._workers.call("weight_parts")
        return found

    @functools.cached_property
    def _gpus(self) -> frozenset[str]:
        return frozenset().union(*self._workers.call("weight_devices"))

    def devices(self) -> frozenset[str]:
        """See `align_core.contracts.LinkedSource`."""
        return self._gpus

    def seat(self, layouts: Sequence[Sequence[Sequence[Part]]]) -> Seat:
        """See `align_core.contracts.LinkedSource`."""
        if layouts is not self._wanted or self._seat is None:
            wanted = [parts for engine in layouts for parts in engine]
            senders = self._senders()
            meeting = Meeting(
                place=self._workers.run(senders[0], _open_meeting, self._several_nodes),
                senders=len(senders),
                receivers=len(wanted),
                backend="nccl" if self._gpus else "gloo",
                timeout_s=self._timeout_s,
            )
            held = [self._parts[rank] for rank in senders]
            self._seat = Seat(meeting=meeting, rank=len(senders), held=held, wanted=wanted)
            self._wanted, self._told = layouts, False
        return self._seat

    def send(self, rows: Rows | None) -> Sequence[Mapping[str, int]]:
        """See `align_core.contracts.LinkedSource`."""
        seats: list[Seat | None] = [None] * len(self._workers)
        if self._seat is not None and not self._told:
            for place, rank in enumerate(self._senders()):
                seats[rank] = dataclasses.replace(self._seat, rank=place)
        sums = self._workers.call_each("send_weights", [(seat, rows) for seat in seats])
        self._told = self._sent = True
        return sums

    def as_sent(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.LinkedSource`."""
        return self._host_as_sent.iterate()

    def before_change(self) -> None:
        """Has the ranks keep what they sent, once, for an engine that may have to start anew."""
        if self._sent:
            self._workers.call("keep_weights")
            self._sent = False

    def _senders(self) -> list[int]:
        """Ranks that are the first copy of what they hold."""
        return [rank for rank, parts in enumerate(self._parts) if parts]


class DirectWorkersSource(LinkedWorkersSource):
    """The same where the ranks' GPUs can be read by engines in other processes."""

    def layout(self) -> Sequence[Sequence[Part]]:
        """See `align_core.contracts.DirectSource`."""
        return self._parts

    def memory(self) -> Sequence[Mapping[str, object]]:
        """See `align_core.contracts.DirectSource`; handles, each good for one engine to open."""
        return self._workers.call("weight_handles")

    def checksums(self, rows: Rows) -> Sequence[Mapping[str, int]]:
        """See `align_core.contracts.DirectSource`."""
        return self._workers.call("weight_checksums", rows)


class SharedMemorySource:
    """Weights laid out in one file in Hugging Face order; ranks write, the engine maps. Same host only."""

    def __init__(self, workers: WorkerGroup, write: str = "write_weights") -> None:
        """`write` is the method with which each rank writes its part into a file."""
        self._workers, self._write = workers, write
        self._remove: Callable[[], object] = lambda: None
        self._layout: Sequence[ParamMeta] = workers.call("weights_layout")[0]

    def metadata(self) -> Sequence[ParamMeta]:
        """See `align_core.contracts.WeightSource`."""
        return self._layout

    def iterate(self) -> Iterator[WeightTensor]:
        """See `align_core.contracts.WeightSource`; the file goes away with this source."""
        offsets = np.concatenate([[0], np.cumsum([meta.nbytes for meta in self._layout])])
        self._remove()  # of the version before
        file = tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory())  # noqa: SIM115
        self._remove = weakref.finalize(self, file.close)
        file.truncate(int(offsets[-1]))
        path = Path(file.name)
        partial_sums = self._workers.call(self._write, path)
        for meta, offset in zip(self._layout, offsets):
            total = sum(sums.get(meta.name, 0) for sums in partial_sums) % 2**64
            yield WeightTensor(meta=meta, checksum=total, file=path, offset=int(offset))


def _open_meeting(several_nodes: bool) -> str:
    """Runs on the first rank that sends."""
    from align_core.transfer.rendezvous import open_meeting  # noqa: PLC0415  (torch belongs to the workers)

    return open_meeting(ray.util.get_node_ip_address() if several_nodes else "")


_sends: type[LinkedSource] = LinkedWorkersSource
_read: type[DirectSource] = DirectWorkersSource
