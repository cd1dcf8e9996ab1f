"""Trainers and engines in this process: found by name, closed in reverse."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from align_core import registry
from align_core.config import EngineConfig, TrainerConfig
from align_core.errors import ConfigError, MissingDependencyError
from align_core.stages import local
from align_core.stages.local import LocalWorld, make_trainer


class Thing:
    """A trainer or an engine, as far as a world knows."""

    closed: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "Thing":
        return cls(f"engine {model} {config.context}")

    def close(self) -> None:
        Thing.closed.append(self.name)


def test_world_makes_and_closes_the_last_opened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Thing, "closed", [], raising=False)
    monkeypatch.setattr(registry, "load", lambda group, name: {("align.engines", "thing"): Thing}[group, name])
    monkeypatch.setattr(local, "make_trainer", lambda config: Thing("trainer"))
    world = LocalWorld()
    world.trainer(TrainerConfig(model=Path("m")))
    world.engine(Path("m"), EngineConfig(name="thing", context=7))
    world.close()
    world.close()
    assert Thing.closed == ["engine m 7", "trainer"]


def test_unknown_engine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown rollout engine 'vlm'; did you mean 'vllm'\?"):
        LocalWorld().engine(Path("m"), EngineConfig(name="vlm"))


def test_training_without_megatron_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "align_core.megatron.trainer":
            raise ModuleNotFoundError("No module named 'megatron'", name="megatron")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"needs megatron, .* pip install 'align-core\[megatron\]'"):
        make_trainer(TrainerConfig(model=Path("m")))
