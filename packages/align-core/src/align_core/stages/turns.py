"""Who has the GPUs, where models and engine share them: one of the two at a time, so that each may fill the memory.

Does nothing where each has devices of its own, and on CPU.
"""

from typing import Protocol, runtime_checkable

from align_core.contracts import RolloutEngine, SupportsSleep
from align_core.stages.world import Model, World


@runtime_checkable
class SharesGpus(Protocol):
    """A world that may have put models and engines on the same GPUs."""

    @property
    def shares_gpus(self) -> bool:
        """Whether it has."""
        ...

    def offload_models(self, *, but_weights_of: Model | None = None) -> None:
        """Every model leaves the GPUs; the weights of one may stay. They come back by themselves when they are used."""
        ...


class Turns:
    """The three states of a step: weights on their way, engine at work, models at work."""

    def __init__(self, world: World, engine: RolloutEngine, *, sleep: bool) -> None:
        """`sleep` False leaves the engine awake always; then both must fit beside each other."""
        self._world = world if isinstance(world, SharesGpus) and world.shares_gpus and sleep else None
        self._engine = engine

    def for_weights_of(self, policy: Model) -> None:
        """The engine wakes beside the policy's weights, of which it takes a copy."""
        if self._world is not None:
            self._world.offload_models(but_weights_of=policy)
            self._sleeper().wake()

    def for_engine(self) -> None:
        """The engine has the GPUs, with the weights that it got."""
        if self._world is not None:
            self._world.offload_models()

    def for_models(self) -> None:
        """The engine sleeps. Its weights are not kept: the next step brings new ones."""
        if self._world is not None:
            self._sleeper().sleep(keep_weights=False)

    def _sleeper(self) -> SupportsSleep:
        assert isinstance(self._engine, SupportsSleep)
        return self._engine
