"""A `World` over Ray: trainers as groups of Megatron ranks, engines in processes of their own, on shared devices."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.placement_group import placement_group, remove_placement_group

from align_core.config import ClusterConfig, EngineConfig, LossConfig, SamplingConfig, TrainerConfig
from align_core.contracts import RolloutEngine, WeightSink, WeightSource
from align_core.errors import ConfigError
from align_core.ray import cluster
from align_core.ray.workers import Place, WorkerGroup
from align_core.stages.local import make_engine
from align_core.stages.world import Model
from align_core.types import Batch, Completion, ParamMeta, Prompt, WeightChunk, WeightTensor

# Shares of a GPU that a trainer rank and an engine rank take, so that Ray lets several roles live on one GPU.
_TRAINER_SHARE = 0.2
_ENGINE_SHARE = 0.2


class RayWorld:
    """Every role colocated: rank i of each trainer and of each engine is on GPU i (or anywhere, on CPU)."""

    def __init__(self, config: ClusterConfig) -> None:
        """Starts nothing yet: a stage checks its data first, and asks for processes then."""
        self._config = config
        self._gpus = 0
        self._group: Any = None
        self._opened: list[RayTrainer | RayEngine] = []

    def trainer(self, config: TrainerConfig) -> Model:
        """A model over `config.parallel.world_size` processes."""
        self._start()
        world_size = config.parallel.world_size
        role = f"{'trainer' if config.trainable else 'frozen'} {config.head} model {config.model.name}"
        trainer = RayTrainer(config, WorkerGroup(role, self._places(world_size, _TRAINER_SHARE), group=self._group))
        self._opened.append(trainer)
        return trainer

    def engine(self, model: Path, config: EngineConfig) -> RolloutEngine:
        """An engine of the registry in its own process."""
        self._start()
        if self._gpus and config.tensor > 1:
            raise ConfigError(f"engine.tensor {config.tensor}: an engine over several GPUs is not there yet; use 1")
        share = _ENGINE_SHARE if self._gpus else 0.0
        workers = WorkerGroup(f"engine {config.name}", [Place(gpus=share)], group=self._group)
        engine = RayEngine(model, config, workers)
        self._opened.append(engine)
        return engine

    def close(self) -> None:
        """Ends all processes; Ray stays for the next world of this driver."""
        while self._opened:
            self._opened.pop().close()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _start(self) -> None:
        if self._group is not None:
            return
        cluster.start(self._config)
        self._gpus = int(ray.cluster_resources().get("GPU", 0))
        bundle = {"GPU": 1} if self._gpus else {"CPU": 0.01}
        self._group = placement_group([bundle] * max(self._gpus, 1), strategy="PACK")
        ray.get(self._group.ready())

    def _places(self, ranks: int, share: float) -> list[Place]:
        if not self._gpus:
            return [Place() for _ in range(ranks)]
        if ranks > self._gpus:
            raise ConfigError(f"{ranks} ranks need {ranks} GPUs, the cluster has {self._gpus}; lower parallel.*")
        return [Place(gpus=share, bundle=rank) for rank in range(ranks)]


class RayTrainer:
    """A Megatron model over several processes; every rank gets every batch, rank 0's answer is returned."""

    def __init__(self, config: TrainerConfig, workers: WorkerGroup) -> None:
        self._workers = workers
        self._meeting = Path(tempfile.mkdtemp(prefix="align-ranks-"))
        workers.build([partial(_make_rank, config, rank, self._meeting / "store") for rank in range(len(workers))])

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.Trainer`."""
        logprobs: NDArray[np.float32] = self._first("logprobs", batch)
        return logprobs

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.SupportsScoring`."""
        scores: NDArray[np.float32] = self._first("scores", batch)
        return scores

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """See `align_core.contracts.Trainer`."""
        metrics: Mapping[str, float] = self._first("step", batch, loss)
        return metrics

    def weights(self) -> WeightSource:
        """The weights, through a file in shared memory that each rank writes its own part of."""
        return SharedMemorySource(self._workers)

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        """See `align_core.contracts.Trainer`."""
        self._workers.call("save", path, dict(state))

    def load(self, path: Path) -> Mapping[str, str]:
        """See `align_core.contracts.Trainer`."""
        state: Mapping[str, str] = self._first("load", path)
        return state

    def export(self, path: Path) -> None:
        """See `align_core.contracts.SupportsExport`."""
        self._workers.call("export", path)

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _first(self, method: str, *arguments: object) -> Any:
        shared = [ray.put(argument) if isinstance(argument, Batch) else argument for argument in arguments]
        return self._workers.call(method, *shared)[0]


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
        self._file = tempfile.NamedTemporaryFile(prefix="align-weights-", dir=_shared_memory())  # noqa: SIM115
        self._file.truncate(int(offsets[-1]))
        path = Path(self._file.name)
        partial_sums = self._workers.call("write_weights", path)
        for meta, offset in zip(self._layout, offsets):
            total = sum(sums.get(meta.name, 0) for sums in partial_sums) % 2**64
            yield WeightTensor(meta=meta, checksum=total, file=path, offset=int(offset))


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


def _make_rank(config: TrainerConfig, rank: int, meeting: Path) -> Any:
    # torch and megatron belong to the worker; the driver runs without them.
    from align_core.megatron.parallel import init_rank  # noqa: PLC0415
    from align_core.megatron.trainer import MegatronTrainer  # noqa: PLC0415

    context = init_rank(
        parallel=config.parallel,
        rank=rank,
        rendezvous=f"file://{meeting}" if config.parallel.world_size > 1 else None,
        device=config.training.device,
        seed=config.seed,
    )
    return MegatronTrainer(config, context)


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
