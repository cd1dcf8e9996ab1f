"""Weights into all replicas of an engine, and what it takes to give the current ones to a replica that starts anew."""

import dataclasses
import functools
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align_core.contracts import DirectSink, DirectSource, LinkedSink, LinkedSource, WeightSink
from align_core.errors import SyncError
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.transfer.seats import Seat
from align_core.types import ParamMeta, WeightChunk, WeightTensor, chunked, shared_memory

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 64 << 20  # mapped by a new replica at once

Ask = Callable[..., Any]
"""(method, *arguments) -> the answer of one replica."""
AskEach = Callable[[str, Sequence[Sequence[Any]]], list[Any]]
"""(method, the arguments of each replica) -> all answers."""


class ReplicaSink:
    """The sink of all replicas; through the host's memory."""

    def __init__(self, ask_each: AskEach, replicas: int) -> None:
        self._ask_each, self._replicas = ask_each, replicas
        self._begun: tuple[list[ParamMeta], int] | None = None
        self._held: list[WeightTensor] = []
        self._current: _Kept | None = None

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        """See `align_core.contracts.WeightSink`."""
        self._begun, self._held = (list(metadata), version), []
        self._ask_all("begin", list(metadata), version)

    def load(self, chunk: WeightChunk) -> None:
        """See `align_core.contracts.WeightSink`; the bytes stay mapped here until the next version is committed."""
        with _in_a_file(chunk) as reachable:
            self._ask_all("load", reachable)
            # The mapping keeps the pages of a file that is deleted; it costs no copy.
            self._held += [dataclasses.replace(weight, data=weight.bytes(), file=None) for weight in reachable]

    def commit(self) -> None:
        """See `align_core.contracts.WeightSink`."""
        self._ask_all("commit")
        if self._begun is not None:
            metadata, version = self._begun
            self._current = _Kept(metadata=metadata, version=version, weights=self._held)
        self._begun, self._held = None, []

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._ask_each(method, [arguments] * self._replicas)

    def restore(self, ask: Ask) -> int | None:
        """Gives a new replica the current version; returns it, or None while the engine has what it read itself."""
        kept = self._current
        if kept is None:
            return None
        ask("begin", kept.metadata, kept.version)
        kept.send(ask)
        ask("commit")
        return kept.version


class LinkedReplicaSink(ReplicaSink):
    """For replicas whose ranks also receive weights from the trainer's ranks themselves."""

    def __init__(self, ask_each: AskEach, replicas: int) -> None:
        super().__init__(ask_each, replicas)
        self._known: Sequence[Sequence[Sequence[Part]]] | None = None
        self._seat: Seat | None = None
        self._source: DirectSource | LinkedSource | None = None
        self._fetch: Callable[[Ask], None] | None = None
        """How the weights under way are fetched a second time; none when they came through the host's memory."""

    def devices(self) -> frozenset[str]:
        """See `align_core.contracts.LinkedSink`."""
        return self._gpus

    @functools.cached_property
    def _gpus(self) -> frozenset[str]:
        return frozenset().union(*self._ask_all("devices"))

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        """See `align_core.contracts.LinkedSink`."""
        if self._known is None:
            self._known = [ranks for found in self._ask_all("layouts") for ranks in found]
        return self._known

    def remember(self, source: DirectSource | LinkedSource) -> None:
        """Where a replica that starts anew can get the weights again."""
        self._source = source

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        """See `align_core.contracts.WeightSink`."""
        self._fetch = None
        super().begin(metadata, version)

    def expect(self, seat: Seat) -> None:
        """See `align_core.contracts.LinkedSink`; each replica's ranks sit behind those of the one before."""
        seats: list[Seat | None] = [None] * self._replicas
        if seat is not self._seat:
            sizes = [len(ranks) for ranks in self.layouts()]
            firsts = itertools.accumulate(sizes[:-1], initial=seat.rank)
            seats = [dataclasses.replace(seat, rank=first) for first in firsts]
        self._ask_each("expect", [(each,) for each in seats])
        self._seat = seat

    def receive(self, rows: Rows | None) -> Sequence[Pulled]:
        """See `align_core.contracts.LinkedSink`."""
        found: list[Pulled] = [one for answer in self._ask_all("receive", rows) for one in answer]
        self._fetch = self._load_as_sent
        return found

    def commit(self) -> None:
        """See `align_core.contracts.WeightSink`."""
        super().commit()
        if self._fetch is not None and self._current is not None:
            self._current = dataclasses.replace(self._current, fetch=self._fetch)

    def restore(self, ask: Ask) -> int | None:
        """See `ReplicaSink`; whoever sends next meets the new replica as well."""
        self._known = self._seat = None
        return super().restore(ask)

    def _load_as_sent(self, ask: Ask) -> None:
        """Not over links: the trainer's ranks have moved on, or are at work, and the other replicas generate."""
        if not isinstance(self._source, LinkedSource):
            raise SyncError("the trainer that sent the weights of a lost engine is not known")
        logger.warning(
            "the new engine gets its weights through the host's memory; links to it are made at the next update"
        )
        for chunk in chunked(self._source.as_sent(), chunk_bytes=_CHUNK_BYTES):
            with _in_a_file(chunk) as reachable:
                ask("load", reachable)


class DirectReplicaSink(LinkedReplicaSink):
    """For one replica that also fetches weights from the trainer's memory itself."""

    def __init__(self, ask_each: AskEach, replicas: int) -> None:
        super().__init__(ask_each, replicas)
        self._told: Sequence[Sequence[Part]] | None = None
        self._sums: tuple[Rows, Sequence[Pulled]] | None = None

    def pull(
        self, layout: Sequence[Sequence[Part]], memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        """See `align_core.contracts.DirectSink`."""
        news = None if layout is self._told else layout
        found: Sequence[Pulled] = self._ask_all("pull", news, memory, rows)[0]
        self._told = layout
        self._sums = (rows, found) if rows else None
        self._fetch = self._pull_again
        return found

    def _pull_again(self, ask: Ask) -> None:
        if not isinstance(self._source, DirectSource) or self._sums is None:
            raise SyncError("the weights of a lost engine cannot be fetched again without engine.verify")
        rows, before = self._sums
        found: Sequence[Pulled] = ask("pull", self._source.layout(), self._source.memory(), rows)
        self._told = self._source.layout()
        if [pulled.sums for pulled in found] != [pulled.sums for pulled in before]:
            raise SyncError("an engine was lost after the trainer had moved on from the version that it held")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """The current version: its bytes, or how to fetch it again."""

    metadata: list[ParamMeta]
    version: int
    weights: list[WeightTensor]
    fetch: Callable[[Ask], None] | None = None

    def send(self, ask: Ask) -> None:
        if self.fetch is not None:
            self.fetch(ask)
            return
        for weight in self.weights:
            with _in_a_file([weight]) as reachable:
                ask("load", reachable)


@contextmanager
def _in_a_file(chunk: WeightChunk) -> Iterator[list[WeightTensor]]:
    """The weights of `chunk` in a form that another process of this host can map."""
    if all(weight.file is not None for weight in chunk):
        yield list(chunk)
        return
    with tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory()) as file:
        moved = []
        for weight in chunk:
            moved.append(dataclasses.replace(weight, data=None, file=Path(file.name), offset=file.tell()))
            file.write(weight.bytes().data)
        file.flush()
        yield moved


_conforms: type[WeightSink] = ReplicaSink
_receives: type[LinkedSink] = LinkedReplicaSink
_fetches: type[DirectSink] = DirectReplicaSink
