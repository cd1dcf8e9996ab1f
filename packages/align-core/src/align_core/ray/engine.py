"""A rollout engine in a worker process of its own, and the door for new weights there."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import DirectSink, SupportsSleep, WeightSink
from align_core.errors import ConfigError
from align_core.ray.workers import WorkerGroup
from align_core.stages.local import make_engine
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.types import Completion, ParamMeta, Prompt, WeightChunk


class RayEngine:
    """An engine in a process of its own."""

    def __init__(self, model: Path, config: EngineConfig, workers: WorkerGroup) -> None:
        self._workers = workers
        workers.build([partial(_EngineHost, model, config)])

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """See `align_core.contracts.RolloutEngine`."""
        completions: list[Completion] = self._workers.call("generate", list(prompts), sampling)[0]
        return completions

    def weight_sink(self) -> WeightSink:
        """The sink of the engine there; weights travel as names of mapped files, or as handles of GPU memory."""
        return _RemoteDirectSink(self._workers) if self._workers.call("pulls")[0] else _RemoteSink(self._workers)

    def sleep(self, *, keep_weights: bool = True) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._workers.call("sleep", keep_weights)

    def wake(self) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._workers.call("wake")

    def close(self) -> None:
        """Ends the process."""
        self._workers.close()


class _EngineHost:
    """Runs beside the engine, so that its sink can be called from afar."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        self._engine = make_engine(model, config)
        self._sink = self._engine.weight_sink()
        self._layout: Sequence[Sequence[Part]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return self._engine.generate(prompts, sampling)

    def sleep(self, keep_weights: bool) -> None:
        self._sleeper().sleep(keep_weights=keep_weights)

    def wake(self) -> None:
        self._sleeper().wake()

    def pulls(self) -> bool:
        return isinstance(self._sink, DirectSink)

    def devices(self) -> frozenset[str]:
        return self._direct().devices()

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        return self._direct().layouts()

    def pull(
        self, layout: Sequence[Sequence[Part]] | None, memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        self._layout = layout or self._layout  # the same object every time, so that the engine knows it again
        return self._direct().pull(self._layout, memory, rows)

    def _direct(self) -> DirectSink:
        return cast("DirectSink", self._sink)

    def _sleeper(self) -> SupportsSleep:
        if not isinstance(self._engine, SupportsSleep):
            raise ConfigError(f"the engine {type(self._engine).__name__} cannot sleep; set engine.sleep to false")
        return self._engine

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._sink.begin(metadata, version)

    def load(self, chunk: WeightChunk) -> None:
        self._sink.load(chunk)

    def commit(self) -> None:
        self._sink.commit()


class _RemoteSink:
    def __init__(self, workers: WorkerGroup) -> None:
        self._workers = workers

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._workers.call("begin", list(metadata), version)

    def load(self, chunk: WeightChunk) -> None:
        self._workers.call("load", list(chunk))

    def commit(self) -> None:
        self._workers.call("commit")


class _RemoteDirectSink(_RemoteSink):
    """For an engine that fetches weights from the trainer's memory itself."""

    def __init__(self, workers: WorkerGroup) -> None:
        super().__init__(workers)
        self._layouts: Sequence[Sequence[Sequence[Part]]] = workers.call("layouts")[0]
        self._devices: frozenset[str] = workers.call("devices")[0]
        self._told: Sequence[Sequence[Part]] | None = None

    def devices(self) -> frozenset[str]:
        return self._devices

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        return self._layouts

    def pull(
        self, layout: Sequence[Sequence[Part]], memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        news = None if layout is self._told else layout
        found: Sequence[Pulled] = self._workers.call("pull", news, memory, rows)[0]
        self._told = layout
        return found
