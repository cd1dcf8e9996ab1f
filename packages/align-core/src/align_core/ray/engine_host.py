"""Runs beside an engine in its worker process, so that the engine and its sink can be called from the driver."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from align_core import registry
from align_core.columns import Columns, to_columns
from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import (
    DirectSink,
    LinkedSink,
    RolloutEngine,
    SupportsAsyncGenerate,
    SupportsPartial,
    SupportsPreload,
    SupportsSleep,
)
from align_core.errors import AlignError, ConfigError, SyncError
from align_core.stages.local import make_engine
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.transfer.seats import Seat
from align_core.types import Completion, Prompt

_GIVE_COMPLETIONS = ("generate", "poll", "partial")


def preload(config: EngineConfig) -> None:
    """Runs in an engine's process before the engine's turn to take memory: imports its code, where it says how."""
    engine = registry.load("align.engines", config.name)
    if isinstance(engine, SupportsPreload):
        engine.preload(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An error of ours as an answer: a prompt that is too long must not end the process, as a failure would."""

    error: AlignError


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Completions as an answer."""

    columns: Columns


class EngineHost:
    """The engine named in its configuration, made here."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Starts the engine on the directory `model`."""
        self._engine: RolloutEngine = make_engine(model, config)
        self._sink = self._engine.weight_sink()
        self._layout: Sequence[Sequence[Part]] = []
        self._seat: Seat | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """`method` of the engine, of its sink or of this object, or the Refusal it ended in; completions are Packed."""
        try:
            answer = getattr(self._owner(method), method)(*arguments)
        except AlignError as error:
            return Refusal(error=error)
        return Packed(columns=to_columns(answer)) if method in _GIVE_COMPLETIONS else answer

    def pulls(self) -> bool:
        """Whether the engine fetches weights itself."""
        return isinstance(self._sink, DirectSink)

    def pull(
        self, layout: Sequence[Sequence[Part]] | None, memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        """As the sink's, but `layout` comes only when it is another one than before."""
        self._layout = layout or self._layout  # the same object every time, so that the engine knows it again
        return cast("DirectSink", self._sink).pull(self._layout, memory, rows)

    def links(self) -> bool:
        """Whether the engine's ranks receive weights from the trainer's."""
        return isinstance(self._sink, LinkedSink)

    def expect(self, seat: Seat | None) -> None:
        """As the sink's; without a seat, the one of before."""
        self._seat = seat or self._seat
        if self._seat is None:
            raise SyncError("the engine was given no seat in a weight transfer")
        cast("LinkedSink", self._sink).expect(self._seat)

    def partial(self) -> list[Completion]:
        """As the engine's; nothing of an engine that cannot be saved in the middle of its work."""
        return self._engine.partial() if isinstance(self._engine, SupportsPartial) else []

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        """As the engine's; one that cannot begin in the middle begins anew, and who asked keeps no sample twice."""
        if isinstance(self._engine, SupportsPartial):
            self._engine.submit_begun(prompts, sampling, begun)
        else:
            cast("SupportsAsyncGenerate", self._engine).submit(prompts, sampling)

    def sleep(self, keep_weights: bool) -> None:
        """As the engine's."""
        if not isinstance(self._engine, SupportsSleep):
            raise ConfigError(f"the engine {type(self._engine).__name__} cannot sleep; set engine.sleep to false")
        self._engine.sleep(keep_weights=keep_weights)

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def _owner(self, method: str) -> object:
        if method in ("begin", "load", "commit", "layouts", "devices", "receive"):
            return self._sink
        background = ("submit", "submit_begun", "partial", "poll", "abort", "pause", "resume")
        if method in background and not isinstance(self._engine, SupportsAsyncGenerate):
            raise ConfigError(f"the engine {type(self._engine).__name__} does not sample in the background")
        if method in ("pulls", "pull", "links", "expect", "sleep", "submit_begun", "partial"):
            return self
        return self._engine
