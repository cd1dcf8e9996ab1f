"""A `World` over Ray: trainers as groups of Megatron ranks, engines in processes of their own, on shared devices."""

from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from align_core.config import ClusterConfig, EngineConfig, TrainerConfig
from align_core.contracts import RolloutEngine
from align_core.errors import ConfigError
from align_core.ray import cluster
from align_core.ray.engine import RayEngine
from align_core.ray.trainer import RayTrainer
from align_core.ray.workers import Place, WorkerGroup
from align_core.stages.world import Model

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
