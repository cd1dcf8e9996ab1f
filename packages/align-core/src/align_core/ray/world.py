"""A `World` over Ray: trainers as groups of Megatron ranks, engines in processes of their own, each in its place."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from align_core.config import ClusterConfig, EngineConfig, TrainerConfig
from align_core.contracts import RolloutEngine
from align_core.placement import Placement, Slot
from align_core.ray import cluster
from align_core.ray.engine import MakeHost, RayEngine
from align_core.ray.engine_host import EngineHost, preload
from align_core.ray.progress import make_board
from align_core.ray.trainer import MakeRank, RayTrainer
from align_core.ray.workers import Place, Processes, WorkerGroup
from align_core.stages.world import Model


class RayWorld:
    """Models and engines on the devices of a Ray cluster; frozen models live in the processes of trained ones."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        expected: EngineConfig | None = None,
        make_rank: MakeRank | None = None,
        make_host: MakeHost = EngineHost,
    ) -> None:
        """Starts nothing yet: a stage checks its data first, and asks for processes then.

        Args:
            expected: an engine that will be asked for: its processes start with the first model's and import its code
                while models are loaded. They take memory of a device when the engine is asked for, not before.
            make_rank: what to run in each worker instead of a rank of Megatron.
            make_host: what to run in each engine's process instead of an engine of the registry.
        """
        self._config = config
        self._expected = expected
        self._make_rank = make_rank
        self._make_host = make_host
        self._placement: Placement | None = None
        self._node_ids: list[str] = []
        self._board: Any = None
        self._reserved: Any = None
        self._shared: list[_Tenancy] = []
        self._opened: list[RayTrainer | RayEngine] = []
        self._early: dict[int, tuple[Processes, Future[list[Any]]]] = {}
        """Processes of the expected engine, by replica, and the end of what they import."""

    def trainer(self, config: TrainerConfig) -> Model:
        """A model over `config.parallel.world_size` processes."""
        places = [self._place([slot]) for slot in self._start().trainer(config.parallel.world_size)]
        role = f"{'trainer' if config.trainable else 'frozen'} {config.head} model {config.model.name}"
        processes = self._tenancy(config, role, places).processes
        trainer = RayTrainer(
            config,
            WorkerGroup(_unlike(role, processes.users), processes),
            timeout_s=self._config.timeout_s,
            make_rank=self._make_rank,
            several_nodes=len({slot.node for slot in self._start().slots}) > 1,
        )
        self._opened.append(trainer)
        return trainer

    def engine(self, model: Path, config: EngineConfig) -> RolloutEngine:
        """An engine of the registry, each of its replicas in a process of its own."""
        self._start()
        places = self._engine_places(config)
        starts = [partial(self._engine_process, config, place, index) for index, place in enumerate(places)]
        engine = RayEngine(model, config, starts, make_host=self._make_host)
        self._opened.append(engine)
        return engine

    @property
    def shares_gpus(self) -> bool:
        """See `align_core.stages.turns.SharesGpus`."""
        return self._placement is not None and self._placement.on_gpus and self._placement.mode == "colocated"

    def offload_models(self, *, but_weights_of: Model | None = None) -> None:
        """See `align_core.stages.turns.SharesGpus`."""
        for opened in self._opened:
            if isinstance(opened, RayTrainer):
                opened.offload(weights=opened is not but_weights_of)

    def close(self) -> None:
        """Ends all processes; Ray stays for the next world of this driver."""
        while self._opened:
            self._opened.pop().close()
        self._shared.clear()
        for processes, imported in self._early.values():
            processes.close()
            wait([imported])  # it hears that the process is gone, while Ray is still there to say so
        self._early.clear()
        if self._board is not None:
            ray.kill(self._board)
            self._board = None
        if self._reserved is not None:
            remove_placement_group(self._reserved)
            self._reserved = None
        self._placement = None

    def _engine_process(self, config: EngineConfig, place: Place, replica: int) -> WorkerGroup:
        """A process for an engine, at the start and again after one has died."""
        role = _engine_role(config, replica)
        if config == self._expected and (early := self._early.pop(replica, None)):
            processes, imported = early
            imported.result()
            return WorkerGroup(role, processes)
        return WorkerGroup(role, Processes(role, [place], board=self._board))

    def _start_early(self, config: EngineConfig) -> None:
        places = self._engine_places(config)
        pool = ThreadPoolExecutor(len(places), thread_name_prefix="align-preload")
        for replica, place in enumerate(places):
            processes = Processes(_engine_role(config, replica), [place], board=self._board)
            self._early[replica] = (processes, pool.submit(processes.ask, {0: ("run", (preload, config))}, "preload"))
        pool.shutdown(wait=False)

    def _engine_places(self, config: EngineConfig) -> list[Place]:
        assert self._placement is not None
        return [self._place(slots) for slots in self._placement.engines(config.tensor, config.replicas)]

    def _start(self) -> Placement:
        if self._placement is None:
            cluster.start(self._config)
            found = cluster.nodes()
            self._node_ids = [name for name, _ in found]
            placement = Placement([node for _, node in found], self._config.placement)
            if placement.on_gpus:
                self._reserved = cluster.reserve(placement.nodes)
            self._board = make_board()
            self._placement = placement
            if self._expected is not None:
                self._start_early(self._expected)
        return self._placement

    def _place(self, slots: list[Slot]) -> Place:
        """Of one process, on the slots of one node."""
        assert self._placement is not None
        gpus = tuple(slot.index for slot in slots) if self._placement.on_gpus else ()
        return Place(node_id=self._node_ids[slots[0].node], gpus=gpus)

    def _tenancy(self, config: TrainerConfig, role: str, places: list[Place]) -> "_Tenancy":
        """The processes for a model: those of another one of the same layout, if one of the two is frozen."""
        for tenancy in self._shared:
            if self._config.share_workers and tenancy.takes(config):
                tenancy.trained |= config.trainable
                return tenancy
        tenancy = _Tenancy(config, Processes(role, places, board=self._board))
        self._shared.append(tenancy)
        return tenancy


class _Tenancy:
    """Processes and the models in them: any number of frozen ones and at most one that is trained."""

    def __init__(self, config: TrainerConfig, processes: Processes) -> None:
        self.processes = processes
        self.trained = config.trainable
        self._first = config

    def takes(self, config: TrainerConfig) -> bool:
        """Whether the model may live here: the process groups of Megatron are one a process."""
        same = (config.parallel, config.training.device) == (self._first.parallel, self._first.training.device)
        return same and bool(self.processes.actors) and not (self.trained and config.trainable)


def _engine_role(config: EngineConfig, replica: int) -> str:
    return f"engine {config.name}" + (f" replica {replica}" if config.replicas > 1 else "")


def _unlike(role: str, taken: set[str]) -> str:
    """The role, numbered if a group of that role is there already."""
    number = 2
    name = role
    while name in taken:
        name = f"{role} #{number}"
        number += 1
    return name
