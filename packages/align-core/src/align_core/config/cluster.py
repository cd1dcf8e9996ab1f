"""Where the processes of a run live."""

from dataclasses import dataclass
from typing import Literal

from align_core.config.checks import positive
from align_core.config.training import ParallelConfig
from align_core.errors import ConfigError

PlacementMode = Literal["colocated", "disaggregated"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the processes run."""

    address: str | None = None
    """Ray cluster to join, `HOST:PORT` or `auto`; none starts a private one on this machine."""
    in_process: bool = False
    """No Ray: trainer and engine live in the calling process (one rank only); for notebooks and debugging."""
    placement: PlacementMode = "colocated"
    """`colocated`: models and engines on the same GPUs, by turns. `disaggregated`: engines on the last GPUs alone."""
    described: str = ""
    """For --dry-run: the cluster to plan for as `NODESxGPUSxGIB`, for example `1x8x80`; it need not be here."""
    share_workers: bool = True
    """Frozen models live in the processes of a trained one of the same layout; off gives each its own."""
    timeout_s: float = 1800.0
    """Longest wait of a rank for another in one collective operation, seconds; then the run ends and names it."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")


def check_one_rank(cluster: ClusterConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError if a model of several ranks is asked for without Ray."""
    if cluster.in_process and parallel.world_size > 1:
        raise ConfigError(
            f"cluster.in_process runs one rank, but parallel asks for {parallel.world_size}; leave it off to use Ray"
        )
