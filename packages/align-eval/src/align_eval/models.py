"""Model directories: names, and engines started on them. Megatron checkpoints are converted on the way.

Engines and the converter are found through entry points; nothing here knows which they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from align_core import registry
from align_core.config import EngineConfig
from align_core.contracts import Command, RolloutEngine
from align_core.errors import CheckpointError, ConfigError, DataError
from align_core.fingerprint import fingerprint

_MEGATRON = ("latest_checkpointed_iteration.txt", "mp_rank_*", ".metadata")  # any of them in a Megatron directory


@runtime_checkable
class EngineClass(Protocol):
    """What the entry-point group `align.engines` offers."""

    def from_model(self, model: Path, config: EngineConfig) -> RolloutEngine:
        """Starts an engine on the Hugging Face directory `model`."""
        ...


def engine_class(name: str) -> EngineClass:
    """The engine registered as `name`; raises ConfigError for an unknown one."""
    found = registry.load("align.engines", name)
    if not isinstance(found, EngineClass):
        raise ConfigError(f"rollout engine {name!r} offers no from_model(model, config), so it cannot be started here")
    return found


@contextmanager
def running_engine(model: Path, config: EngineConfig) -> Iterator[RolloutEngine]:
    """The engine that `config` names, started on `model` and freed at the end whatever happens."""
    engine = engine_class(config.name).from_model(model, config)
    try:
        yield engine
    finally:
        engine.close()


def model_names(models: Sequence[str]) -> dict[str, Path]:
    """A short name for each model: NAME of `NAME=DIR`, else as many trailing folders of DIR as tell them apart.

    `runs/sft/hf runs/dpo/hf` become `sft-hf` and `dpo-hf`.
    """
    named: dict[str, Path] = {}
    unnamed: list[Path] = []
    for model in models:
        name, equals, directory = model.partition("=")
        if equals and not Path(model).exists():
            if not name or not directory or "/" in name:
                raise ConfigError(f"expected --model DIR or --model NAME=DIR, got {model!r}")
            _add(named, name, Path(directory))
        else:
            unnamed.append(Path(model))
    parts = [path.resolve().parts[1:] or ("root",) for path in unnamed]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    for path, part in zip(unnamed, parts):
        _add(named, "-".join(part[-depth:]), path)
    return named


def check_directories(models: dict[str, Path]) -> None:
    """Raises DataError for a model directory that does not exist."""
    for path in models.values():
        if not path.is_dir():
            raise DataError(f"model directory {str(path)!r} does not exist")


def hugging_face(model: Path, *, work: Path) -> Path:
    """`model` itself, or the Hugging Face directory that a Megatron checkpoint is converted to below `work`, once.

    Raises:
        ConfigError: a conversion is needed and align-convert is not installed.
        CheckpointError: the conversion failed; it has printed why.
    """
    if not any(True for mark in _MEGATRON for _ in model.glob(mark)):
        return model
    converted = work / f"{model.name}-{fingerprint(model)}"
    if not converted.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        convert = cast("Command", registry.load("align.commands", "convert"))
        if convert(["to-hf", str(model), str(converted)]) != 0:
            raise CheckpointError(f"{str(model)!r} is a Megatron checkpoint that could not be converted")
    return converted


def _add(named: dict[str, Path], name: str, path: Path) -> None:
    if name in named:
        raise ConfigError(f"two models are called {name!r}: {str(named[name])!r} and {str(path)!r}; use NAME=DIR")
    named[name] = path
