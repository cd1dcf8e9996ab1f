"""GRPO over Ray with a live vLLM engine: the first three steps are alike whatever the trainer's layout.

The engine is one for all layouts, because starting one takes longest; its versions are shifted for each run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

from align_core.config import (
    ClusterConfig,
    EngineConfig,
    GrpoConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainerConfig,
)
from align_core.contracts import RolloutEngine, WeightSink
from align_core.ray import cluster
from align_core.ray.world import RayWorld
from align_core.stages.grpo import run_grpo
from align_core.stages.local import LocalWorld
from align_core.stages.run import read_metrics
from align_core.stages.world import Model
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Completion, ParamMeta, Prompt

pytestmark = pytest.mark.slow

LAYOUTS = {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2), "dp2": ParallelConfig(data=2)}
REWARD = "def digits(prompts, completions, columns):\n    return [sum(c.isdigit() for c in t) for t in completions]\n"


class Shifted:
    """The shared engine, whose versions begin at 0 again."""

    def __init__(self, engine: RolloutEngine, first: int) -> None:
        self._engine, self._first = engine, first

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return [replace(c, version=c.version - self._first) for c in self._engine.generate(prompts, sampling)]

    def weight_sink(self) -> WeightSink:
        return _ShiftedSink(self._engine.weight_sink(), self._first)

    def close(self) -> None:
        """The engine goes on."""


class _ShiftedSink:
    def __init__(self, sink: WeightSink, first: int) -> None:
        self._first = first
        self.load, self.commit, self._begin = sink.load, sink.commit, sink.begin

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._begin(metadata, version + self._first)

    load: object
    commit: object


class SharedEngineWorld:
    """Trainers of a world of their own, and the shared engine."""

    def __init__(self, trainers: RayWorld | LocalWorld, engine: RolloutEngine, first: int) -> None:
        self._trainers, self._engine = trainers, Shifted(engine, first)

    def trainer(self, config: TrainerConfig) -> Model:
        return self._trainers.trainer(config)

    def engine(self, model: Path, config: EngineConfig) -> RolloutEngine:
        return self._engine

    def close(self) -> None:
        self._trainers.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, prompts and reward."""
    folder = tmp_path_factory.mktemp("layouts")
    make_tiny_model(folder / "hf", seed=3)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n} + {n}"}}\n' for n in range(8)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[RolloutEngine]:
    world = RayWorld(ClusterConfig())
    yield world.engine(folder / "hf", EngineConfig(context=64, kv_cache_mib=64))
    world.close()
    cluster.stop()


def test_first_three_steps_are_alike_under_every_layout(folder: Path, engine: RolloutEngine) -> None:
    expected = _run(folder, engine, "one", ParallelConfig(), number=0)
    assert len({line["reward"] for line in expected}) > 1
    assert abs(expected[0]["approx_kl"]) < 1e-9
    assert expected[0]["canary_max"] < 1e-5
    for number, (name, parallel) in enumerate(LAYOUTS.items(), start=1):
        found = _run(folder, engine, name, parallel, number=number)
        for ours, theirs in zip(found, expected, strict=True):
            for key, value in theirs.items():
                if "second" not in key and key not in ("time", "tokens_per_s") and not key.startswith("canary"):
                    assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-3), (name, theirs["step"], key)
            assert ours["canary_max"] < 1e-4


def _run(
    folder: Path, engine: RolloutEngine, name: str, parallel: ParallelConfig, *, number: int
) -> list[dict[str, float]]:
    config = GrpoConfig(
        model=folder / "hf",
        data=folder / "prompts.jsonl",
        out=folder / name,
        steps=3,
        batch_size=4,
        max_length=64,
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        reward=f"{folder / 'reward.py'}:digits",
        sampling=SamplingConfig(n=4, max_tokens=8),
        engine=EngineConfig(context=64, kv_cache_mib=64),
    )
    trainers = LocalWorld() if parallel.world_size == 1 else RayWorld(ClusterConfig())
    world = SharedEngineWorld(trainers, engine, first=10 * number)
    try:
        run_grpo(config, world)
    finally:
        world.close()
    return read_metrics(folder / name)
