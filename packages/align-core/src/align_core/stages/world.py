"""What a stage asks its surroundings for: trainers and engines, wherever they run.

`align_core.ray.world.RayWorld` spreads them over processes; `align_core.stages.local.LocalWorld` keeps them in this
one.
"""

from pathlib import Path
from typing import Protocol

from align_core.config import EngineConfig, TrainerConfig
from align_core.contracts import (
    RolloutEngine,
    SupportsEvaluation,
    SupportsExport,
    SupportsScoring,
    SupportsValues,
    Trainer,
)


class Model(Trainer, SupportsScoring, SupportsValues, SupportsEvaluation, SupportsExport, Protocol):
    """A trainer with every capability that stages use."""


class World(Protocol):
    """Makes trainers and engines, and ends them all."""

    def trainer(self, config: TrainerConfig) -> Model:
        """A model, loaded and ready."""
        ...

    def engine(self, model: Path, config: EngineConfig) -> RolloutEngine:
        """An engine of the registry that serves `model`, a Hugging Face or Megatron checkpoint directory."""
        ...

    def close(self) -> None:
        """Ends everything this world has made."""
        ...
