"""Weights into all replicas of an engine, and what it takes to give the current ones to a replica that starts anew."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align_core.contracts import DirectSink, DirectSource, WeightSink
from align_core.errors import SyncError
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.types import ParamMeta, WeightChunk, WeightTensor, shared_memory

Ask = Callable[..., Any]
"""(method, *arguments) -> the answer of one replica."""
AskAll = Callable[..., list[Any]]


class ReplicaSink:
    """The sink of all replicas; through the host's memory."""

    def __init__(self, ask_all: AskAll) -> None:
        self._ask_all = ask_all
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

    def restore(self, ask: Ask) -> int | None:
        """Gives a new replica the current version; returns it, or None while the engine has what it read itself."""
        kept = self._current
        if kept is None:
            return None
        ask("begin", kept.metadata, kept.version)
        kept.send(ask)
        ask("commit")
        return kept.version


class DirectReplicaSink(ReplicaSink):
    """For one replica that fetches weights from the trainer's memory itself."""

    def __init__(self, ask_all: AskAll) -> None:
        super().__init__(ask_all)
        self._layouts: Sequence[Sequence[Sequence[Part]]] = ask_all("layouts")[0]
        self._devices: frozenset[str] = ask_all("devices")[0]
        self._told: Sequence[Sequence[Part]] | None = None
        self._source: DirectSource | None = None
        self._sums: tuple[Rows, Sequence[Pulled]] | None = None

    def devices(self) -> frozenset[str]:
        """See `align_core.contracts.DirectSink`."""
        return self._devices

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        """See `align_core.contracts.DirectSink`."""
        return self._layouts

    def remember(self, source: DirectSource) -> None:
        """Where a replica that starts anew can fetch the weights again, as long as the trainer has not moved on."""
        self._source = source

    def pull(
        self, layout: Sequence[Sequence[Part]], memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        """See `align_core.contracts.DirectSink`."""
        news = None if layout is self._told else layout
        found: Sequence[Pulled] = self._ask_all("pull", news, memory, rows)[0]
        self._told = layout
        self._sums = (rows, found) if rows else None
        return found

    def commit(self) -> None:
        """See `align_core.contracts.WeightSink`."""
        fetched = not self._held
        super().commit()
        if fetched and self._current is not None:
            self._current = dataclasses.replace(self._current, fetch=self._fetch_again)

    def _fetch_again(self, ask: Ask) -> None:
        if self._source is None or self._sums is None:
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
_fetches: type[DirectSink] = DirectReplicaSink
