"""A rollout engine in a worker process of its own, and the door for new weights there."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import WeightSink
from align_core.ray.workers import WorkerGroup
from align_core.stages.local import make_engine
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
        """The sink of the engine there; weights travel as names of mapped files."""
        return _RemoteSink(self._workers)

    def close(self) -> None:
        """Ends the process."""
        self._workers.close()


class _EngineHost:
    """Runs beside the engine, so that its sink can be called from afar."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        self._engine = make_engine(model, config)
        self._sink = self._engine.weight_sink()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return self._engine.generate(prompts, sampling)

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
