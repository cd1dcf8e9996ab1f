"""A Megatron model over several worker processes, one rank each, as one `Trainer` in the driver."""

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from align_core.config import LossConfig, TrainerConfig
from align_core.contracts import WeightSource
from align_core.ray.source import SharedMemorySource
from align_core.ray.workers import WorkerGroup
from align_core.types import Batch


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

    def values(self, batch: Batch) -> NDArray[np.float32]:
        """See `align_core.contracts.SupportsValues`."""
        values: NDArray[np.float32] = self._first("values", batch)
        return values

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

    def offload(self, weights: bool = True) -> None:
        """See `align_core.contracts.SupportsOffload`."""
        self._workers.call("offload", weights)

    def reload(self) -> None:
        """See `align_core.contracts.SupportsOffload`."""
        self._workers.call("reload")

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _first(self, method: str, *arguments: object) -> Any:
        shared = [ray.put(argument) if isinstance(argument, Batch) else argument for argument in arguments]
        return self._workers.call(method, *shared)[0]


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
