"""A Megatron model over several worker processes, one rank each, as one `Trainer` in the driver."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from align_core.config import LossConfig, TrainerConfig
from align_core.contracts import WeightSource
from align_core.imports import uncollected
from align_core.ray.crossing import CrossingSource
from align_core.ray.shared import reachable
from align_core.ray.source import DirectWorkersSource, LinkedWorkersSource, SharedMemorySource
from align_core.ray.workers import WorkerGroup
from align_core.types import Batch

MakeRank = Callable[[TrainerConfig, int, str, float], Any]
"""(model, rank, where the ranks meet, longest wait of a rank for another in seconds) -> the rank's object"""


class RayTrainer:
    """A Megatron model over several processes; every rank gets every batch, rank 0's answer is returned."""

    def __init__(
        self,
        config: TrainerConfig,
        workers: WorkerGroup,
        *,
        timeout_s: float = 1800.0,
        make_rank: MakeRank | None = None,
        several_nodes: bool = False,
    ) -> None:
        """Loads the model.

        Args:
            several_nodes: ranks or engines may be on different ones.
            timeout_s: longest wait of a rank for another one, seconds.
            make_rank: what to run in each worker instead of a rank of Megatron.
        """
        self._workers = workers
        self._source: LinkedWorkersSource | None = None
        self._several_nodes = several_nodes
        self._on_gpus = all(place.gpus for place in workers.processes.places) and config.training.device != "cpu"
        nodes = len({place.node_id for place in workers.processes.places})
        self._meeting = workers.run(0, _open_meeting, nodes) if len(workers) > 1 else ""
        make = make_rank or _make_rank
        workers.build([partial(make, config, rank, self._meeting, timeout_s) for rank in range(len(workers))])

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.Trainer`."""
        logprobs: NDArray[np.float32] = self._first("logprobs", batch)
        return logprobs

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.SupportsScoring`."""
        scores: NDArray[np.float32] = self._first("scores", batch)
        return scores

    def values(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.SupportsValues`."""
        values: NDArray[np.float32] = self._first("values", batch)
        return values

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """See `align_core.contracts.Trainer`."""
        self._before_change()
        metrics: Mapping[str, float] = self._first("step", batch, loss)
        return metrics

    def evaluate(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """See `align_core.contracts.SupportsEvaluation`."""
        metrics: Mapping[str, float] = self._first("evaluate", batch, loss)
        return metrics

    def weights(self) -> WeightSource:
        """The weights where GPUs hold them, over links, or in a file that each rank writes its own part of."""
        if self._source is None:
            self._source = (DirectWorkersSource if self._on_gpus else LinkedWorkersSource)(
                self._workers,
                partial(CrossingSource if self._several_nodes else SharedMemorySource, self._workers),
                several_nodes=self._several_nodes,
            )
        return self._source

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        """See `align_core.contracts.Trainer`."""
        self._workers.call("save", path, dict(state))

    def finish_saving(self) -> None:
        """See `align_core.contracts.SupportsAsyncSave`."""
        self._workers.call("finish_saving")

    def load(self, path: Path) -> Mapping[str, str]:
        """See `align_core.contracts.Trainer`."""
        self._before_change()
        state: Mapping[str, str] = self._first("load", path)
        return state

    def export(self, path: Path) -> None:
        """See `align_core.contracts.SupportsExport`."""
        self._workers.call("export", path)

    def offload(self, weights: bool = True) -> None:
        """See `align_core.contracts.SupportsOffload`."""
        self._workers.call("offload", weights)

    def reload(self) -> None:
        """See `align_core.contracts.SupportsOffload`."""
        self._workers.call("reload")

    def close(self) -> None:
        """Lets go of the model; ends the processes if no other model uses them."""
        self._workers.close()
        if self._meeting.startswith("file://"):
            shutil.rmtree(Path(self._meeting.removeprefix("file://")).parent, ignore_errors=True)

    def _before_change(self) -> None:
        if self._source is not None:
            self._source.before_change()

    def _first(self, method: str, *arguments: object) -> Any:
        with ExitStack() as stack:
            shared = [
                stack.enter_context(reachable(argument, everyone_here=self._workers.on_this_node))
                if isinstance(argument, Batch)
                else argument
                for argument in arguments
            ]
            return self._workers.call_first(method, *shared)


# torch and megatron belong to the workers; the driver runs without them.


def _open_meeting(nodes: int) -> str:
    """Runs on rank 0."""
    from align_core.transfer.rendezvous import open_meeting  # noqa: PLC0415

    return open_meeting(ray.util.get_node_ip_address() if nodes > 1 else "")


def _make_rank(config: TrainerConfig, rank: int, meeting: str, timeout_s: float) -> Any:
    with uncollected():
        from align_core.megatron.parallel import init_rank  # noqa: PLC0415
        from align_core.megatron.trainer import MegatronTrainer  # noqa: PLC0415
        from align_core.transfer.rendezvous import join_meeting  # noqa: PLC0415

    world = config.parallel.world_size
    context = init_rank(
        parallel=config.parallel,
        rank=rank,
        rendezvous=join_meeting(meeting, ranks=world) if world > 1 else None,
        device=config.training.device,
        seed=config.seed,
        timeout_s=timeout_s,
    )
    return MegatronTrainer(config, context)
