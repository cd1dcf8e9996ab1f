"""Where a run's metrics go besides metrics.jsonl: one class a service, found by name in the group `align.trackers`.

A service's package is imported when a run uses it. Credentials are the service's own matter (its environment variables
or login file); none is read or written here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from align_core import registry
from align_core.errors import missing_dependency

_PIP_NAMES = {"tensorboard": "align-core[tensorboard]"}
"""What to install for a built-in tracker; the others' packages are named as the tracker is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a tracker gets to know about the run."""

    id: str
    """The same for a run and its continuations."""
    name: str
    """For people: the stage and its directory."""
    out: Path
    """The run's directory; a tracker's own files belong below it."""
    settings: Mapping[str, object]
    """All settings, as plain values."""
    first_step: int
    """Where this process begins; what was logged from there on by a process that died is to be replaced."""


class Tracker(Protocol):
    """Takes metrics; constructed with a RunInfo."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers."""
        ...

    def close(self) -> None:
        """Hands over what is still buffered; called once."""
        ...


@runtime_checkable
class TakesTexts(Protocol):
    """A tracker that shows texts too."""

    def text(self, step: int, name: str, markdown: str) -> None:
        """One step's text called `name`."""
        ...


class Factory(Protocol):
    """What the entry point names: a class with this constructor."""

    def __call__(self, info: RunInfo) -> Tracker:
        """Begin to track, or go on where the run with this id was."""
        ...


def check_trackers(names: Sequence[str] | None) -> list[str]:
    """The trackers to use, each known and installed; None takes TensorBoard where it is.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: the service's package is not installed.
    """
    if names is None:
        usable = "tensorboard" in registry.names("align.trackers") and find_spec("tensorboard") is not None
        return ["tensorboard"] if usable else []
    for name in names:
        registry.check("align.trackers", name)
        if name in BUILT_IN and find_spec(name) is None:
            raise missing_dependency(name, _PIP_NAMES.get(name, name), needed_for=f"the tracker {name!r}")
    return list(names)


def open_trackers(names: Sequence[str], info: RunInfo) -> list[Tracker]:
    """The trackers of a run, each begun or continued."""
    return [cast("Factory", registry.load("align.trackers", name))(info) for name in names]


BUILT_IN = ("tensorboard", "wandb", "trackio", "mlflow")
