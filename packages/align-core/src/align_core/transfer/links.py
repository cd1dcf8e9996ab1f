"""Weights between processes that share no memory: each trainer rank sends its parts to the engine ranks that hold them.

The way of disaggregated training: NCCL between GPUs, gloo between CPUs, in a process group of its own, so that neither
side's default group is touched. Parts are packed into buckets; each pair of ranks has two, so that one is packed or
unpacked while the other is on its way. No rank ever holds more than its own parts and its buckets.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from align_core.errors import SyncError
from align_core.transfer.rectangles import Copy, Part, copies, slices
from align_core.transfer.rendezvous import join_meeting, own_address
from align_core.transfer.seats import Meeting

_BUCKET_BYTES = 256 << 20  # at 400 GB/s a bucket takes 0.6 ms, long beside the cost of a call
_BUFFER_BYTES = 2 << 30  # of all buckets of a rank together, where it has many peers
_BUFFERS = 2
_COMING = timedelta(seconds=60)  # all ranks are up, idle and called at once; more than that means that one has failed
_LISTED = 4  # names of a bucket in an error


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
        """Meets all others; `rank` counts senders first.

        Raises:
            SyncError: one of them did not come.
        """
        self.meeting, self.rank = meeting, rank
        try:
            self._group: Any = _make_group(meeting, rank)
        except (RuntimeError, ValueError) as error:
            raise SyncError(
                f"rank {rank} of a weight transfer between {meeting.senders} trainer ranks and {meeting.receivers} "
                f"engine ranks did not meet the others: {_first_line(error)}"
            ) from error
        self._buffers: dict[tuple[int, int], Tensor] = {}
        peers = max(meeting.senders, meeting.receivers)
        self._bucket_bytes = min(_BUCKET_BYTES, _BUFFER_BYTES // (_BUFFERS * peers))

    def close(self) -> None:
        """Leaves, without waiting for anyone: others may be dead."""
        group, self._group = self._group, None
        self._buffers.clear()
        if group is not None and self.meeting.backend == "nccl":
            group.abort()  # shutdown would wait for the peers

    def send(self, tensors: Mapping[str, Tensor], plan: Sequence[Route], *, bucket_bytes: int = 0) -> None:
        """Sends this rank's routes of `plan` out of `tensors`; returns when every byte has left.

        Args:
            bucket_bytes: most bytes sent at once, equal on both sides; 0 leaves it to the number of ranks.
        Raises:
            SyncError: names the weights of a bucket that could not be sent.
        """
        bucket_bytes = bucket_bytes or self._bucket_bytes
        mine = [route for route in plan if route.sender == self.rank]
        pending: dict[tuple[int, int], tuple[Any, str]] = {}
        for turn, route, bucket in _in_turn(mine, tensors, bucket_bytes, source=True):
            peer, place = self.meeting.senders + route.receiver, turn % _BUFFERS
            if (peer, place) in pending:
                _wait(*pending.pop((peer, place)))
            values = [tensors[copy.source_tensor].detach()[slices(copy.source)].reshape(-1) for copy in bucket]
            buffer = self._buffer(peer, place, values[0], sum(value.numel() for value in values))
            torch.cat(values, out=buffer)
            what = f"{_names(bucket)} could not be sent to rank {route.receiver} of the engines"
            with _named(what):
                pending[peer, place] = self._group.send([buffer], peer, turn), what
        for work in pending.values():
            _wait(*work)
        _finish(tensors)

    def receive(self, tensors: Mapping[str, Tensor], plan: Sequence[Route], *, bucket_bytes: int = 0) -> None:
        """Fills this rank's parts of `tensors` with what the senders have; returns when all of it is in place.

        Raises:
            SyncError: names the weights of a bucket that did not come.
        """
        bucket_bytes = bucket_bytes or self._bucket_bytes
        mine = [route for route in plan if self.meeting.senders + route.receiver == self.rank]
        arriving: dict[tuple[int, int], tuple[Any, str, Tensor, Sequence[Copy]]] = {}
        for turn, route, bucket in _in_turn(mine, tensors, bucket_bytes, source=False):
            peer, place = route.sender, turn % _BUFFERS
            if (peer, place) in arriving:
                _unpack(*arriving.pop((peer, place)), tensors)
            first = tensors[bucket[0].target_tensor]
            buffer = self._buffer(peer, place, first, sum(copy.elements for copy in bucket))
            what = f"{_names(bucket)} did not come from rank {peer} of the trainer"
            with _named(what):
                arriving[peer, place] = self._group.recv([buffer], peer, turn), what, buffer, bucket
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


def _make_group(meeting: Meeting, rank: int) -> Any:
    world, timeout = meeting.senders + meeting.receivers, timedelta(seconds=meeting.timeout_s)
    coming = min(timeout, _COMING)
    store = PrefixStore("align-weights", join_meeting(meeting.place, ranks=world, timeout=coming))
    if meeting.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting.place))]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world, options)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of torch's with the weights that they are about."""
    try:
        yield
    except RuntimeError as error:
        raise SyncError(f"{what}: {_first_line(error)}; start a new engine") from error


def _wait(work: Any, what: str) -> None:
    with _named(what):
        work.wait()


def _names(bucket: Sequence[Copy]) -> str:
    names = list(dict.fromkeys(copy.name for copy in bucket))
    further = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"a bucket with weights {', '.join(map(repr, names[:_LISTED]))}{further}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _unpack(work: Any, what: str, buffer: Tensor, bucket: Sequence[Copy], tensors: Mapping[str, Tensor]) -> None:
    _wait(work, what)
    start = 0
    for copy in bucket:
        target = tensors[copy.target_tensor].detach()[slices(copy.target)]
        target.copy_(buffer[start : start + copy.elements].view(target.shape))
        start += copy.elements


def _finish(tensors: Mapping[str, Tensor]) -> None:
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
