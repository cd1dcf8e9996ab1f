"""Weights between processes that share no memory: each trainer rank sends its parts to the engine ranks that hold them.

The way of disaggregated training: NCCL between GPUs, gloo between CPUs, in a process group of its own, so that neither
side's default group is touched. Parts are packed into buckets; each pair of ranks has two, so that one is packed or
unpacked while the other is on its way. No rank ever holds more than its own parts and its buckets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from align_core.errors import SyncError
from align_core.transfer.rectangles import Copy, Part, copies, slices

Backend = Literal["nccl", "gloo"]
_BUCKET_BYTES = 256 << 20  # at 400 GB/s a bucket takes 0.6 ms, long beside the cost of a call
_BUFFERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks of a transfer meet: senders are ranks 0 .. senders-1, receivers the ones after them."""

    host: str
    port: int
    senders: int
    receivers: int
    backend: Backend
    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What one sender gives to one receiver, in this order."""

    sender: int
    receiver: int
    copies: tuple[Copy, ...]


def routes(held: Sequence[Sequence[Part]], wanted: Sequence[Sequence[Part]]) -> list[Route]:
    """Every pair of ranks with something to move; both sides work it out alike.

    Raises:
        LayoutError: names a weight of which an element has no sender.
    """
    found = []
    for receiver, parts in enumerate(wanted):
        all_copies = copies(held, parts)
        for sender in range(len(held)):
            mine = tuple(copy for copy in all_copies if copy.rank == sender)
            if mine:
                found.append(Route(sender=sender, receiver=receiver, copies=mine))
    return found


class Link:
    """One rank's end of a transfer."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        """Meets all others; `rank` counts senders first."""
        self.meeting, self.rank = meeting, rank
        world = meeting.senders + meeting.receivers
        timeout = timedelta(seconds=meeting.timeout_s)
        store = TCPStore(meeting.host, meeting.port, world, is_master=rank == 0, timeout=timeout)
        prefixed = PrefixStore("align-weights", store)
        self._group: Any = (
            dist.ProcessGroupGloo(prefixed, rank, world, timeout)
            if meeting.backend == "gloo"
            else dist.ProcessGroupNCCL(prefixed, rank, world, dist.ProcessGroupNCCL.Options())
        )
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def send(self, tensors: Mapping[str, Tensor], plan: Sequence[Route], *, bucket_bytes: int = _BUCKET_BYTES) -> None:
        """Sends this rank's routes of `plan` out of `tensors`; returns when every byte has left."""
        mine = [route for route in plan if route.sender == self.rank]
        pending: dict[tuple[int, int], Any] = {}
        for turn, route, bucket in _in_turn(mine, tensors, bucket_bytes, source=True):
            peer, place = self.meeting.senders + route.receiver, turn % _BUFFERS
            if (peer, place) in pending:
                pending.pop((peer, place)).wait()
            values = [tensors[copy.source_tensor].detach()[slices(copy.source)].reshape(-1) for copy in bucket]
            buffer = self._buffer(peer, place, values[0], sum(value.numel() for value in values))
            torch.cat(values, out=buffer)
            pending[peer, place] = self._group.send([buffer], peer, turn)
        for work in pending.values():
            work.wait()
        _finish(tensors)

    def receive(
        self, tensors: Mapping[str, Tensor], plan: Sequence[Route], *, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        """Fills this rank's parts of `tensors` with what the senders have; returns when all of it is in place."""
        mine = [route for route in plan if self.meeting.senders + route.receiver == self.rank]
        arriving: dict[tuple[int, int], tuple[Any, Tensor, Sequence[Copy]]] = {}
        for turn, route, bucket in _in_turn(mine, tensors, bucket_bytes, source=False):
            peer, place = route.sender, turn % _BUFFERS
            if (peer, place) in arriving:
                _unpack(*arriving.pop((peer, place)), tensors)
            first = tensors[bucket[0].target_tensor]
            buffer = self._buffer(peer, place, first, sum(copy.elements for copy in bucket))
            arriving[peer, place] = self._group.recv([buffer], peer, turn), buffer, bucket
        for each in arriving.values():
            _unpack(*each, tensors)
        _finish(tensors)

    def _buffer(self, peer: int, place: int, like: Tensor, elements: int) -> Tensor:
        held = self._buffers.get((peer, place))
        if held is None or held.numel() < elements or held.dtype != like.dtype:
            held = torch.empty(elements, dtype=like.dtype, device=like.device)
            self._buffers[peer, place] = held
        return held[:elements]


def _in_turn(
    mine: Sequence[Route], tensors: Mapping[str, Tensor], bucket_bytes: int, *, source: bool
) -> Iterator[tuple[int, Route, Sequence[Copy]]]:
    """All first buckets, then all second ones, and so on: an order in which no two ranks wait for each other."""
    cut = []
    for route in mine:
        names = (route.copies[0].source_tensor, route.copies[0].target_tensor)
        item = tensors[names[0] if source else names[1]].element_size()
        cut.append(list(_buckets(route.copies, max(1, bucket_bytes // item))))
    for turn in range(max(map(len, cut), default=0)):
        for route, parts in zip(mine, cut):
            if turn < len(parts):
                yield turn, route, parts[turn]


def _buckets(all_copies: Sequence[Copy], elements: int) -> Iterator[list[Copy]]:
    """At most `elements` a bucket, one part at least."""
    bucket: list[Copy] = []
    size = 0
    for copy in all_copies:
        if bucket and size + copy.elements > elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(copy)
        size += copy.elements
    if bucket:
        yield bucket


def _unpack(work: Any, buffer: Tensor, bucket: Sequence[Copy], tensors: Mapping[str, Tensor]) -> None:
    work.wait()
    start = 0
    for copy in bucket:
        target = tensors[copy.target_tensor].detach()[slices(copy.target)]
        if target.dtype != buffer.dtype:
            raise SyncError(f"weight {copy.name!r} came as {buffer.dtype}; the engine holds {target.dtype}")
        target.copy_(buffer[start : start + copy.elements].view(target.shape))
        start += copy.elements


def _finish(tensors: Mapping[str, Tensor]) -> None:
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
