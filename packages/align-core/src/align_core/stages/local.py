"""Trainers and engines in the calling process: no Ray, one rank, one device."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from align_core import registry
from align_core.config import EngineConfig, TrainerConfig
from align_core.contracts import RolloutEngine, SupportsClose
from align_core.errors import missing_dependency
from align_core.stages.world import Model


class LocalWorld:
    """A `World` in one process."""

    def __init__(self) -> None:
        self._opened: list[SupportsClose] = []

    def trainer(self, config: TrainerConfig) -> Model:
        """A Megatron model of one rank."""
        model = make_trainer(config)
        self._opened.append(cast("SupportsClose", model))
        return model

    def engine(self, model: Path, config: EngineConfig) -> RolloutEngine:
        """An engine of the registry."""
        engine = make_engine(model, config)
        self._opened.append(engine)
        return engine

    def close(self) -> None:
        """Closes engines and trainers, the last opened first."""
        while self._opened:
            self._opened.pop().close()


def make_engine(model: Path, config: EngineConfig) -> RolloutEngine:
    """The engine named `config.name`, in this process."""
    factory = registry.load("align.engines", config.name)
    from_model = cast("Callable[[Path, EngineConfig], RolloutEngine]", getattr(factory, "from_model"))  # noqa: B009
    return from_model(model, config)


def make_trainer(config: TrainerConfig) -> Model:
    """A Megatron trainer of one rank in this process."""
    try:
        from align_core.megatron.trainer import MegatronTrainer  # noqa: PLC0415  (brings torch and megatron)
    except ModuleNotFoundError as error:
        raise missing_dependency(
            str(error.name), "align-core[megatron]", needed_for="training with Megatron-core"
        ) from error
    return MegatronTrainer(config)
