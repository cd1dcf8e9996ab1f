"""Over Ray with the real engines: asynchronous sampling without staleness is the synchronous algorithm, bit for bit."""

import json
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
    SamplingConfig,
    ScheduleConfig,
    ScoringConfig,
)
from align_core.ray import cluster
from align_core.ray.world import RayWorld
from align_core.stages.grpo import run_grpo
from align_core.stages.run import read_lines, read_metrics
from align_core.tutorial.additions import write_additions
from align_core.tutorial.tiny import make_tiny_model

pytestmark = pytest.mark.slow

REWARD = """
from align_core.types import Score


def digits(prompts, completions, columns):
    return [Score(value=sum(c.isdigit() for c in text) / max(len(text), 1)) for text in completions]
"""
CLOCKS = ("time", "seconds", "per_s", "mfu", "memory", "staleness")


def metrics(folder: Path, name: str, schedule: ScheduleConfig) -> list[dict[str, float]]:
    config = GrpoConfig(
        model=folder / "hf",
        data=folder / "data" / "prompts.jsonl",
        out=folder / name,
        steps=4,
        batch_size=8,
        max_length=64,
        reward=f"{folder / 'reward.py'}:digits",
        scoring=ScoringConfig(workers=0),
        optimizer=OptimizerConfig(lr=3e-3),
        sampling=SamplingConfig(n=4, max_tokens=8),
        engine=EngineConfig(context=64, kv_cache_mib=64, in_flight="continue"),
        schedule=schedule,
        cluster=ClusterConfig(placement="disaggregated"),
        eval_data=folder / "data" / "prompts.jsonl",
        evaluations=f"accuracy={folder / 'data' / 'test.jsonl'}",
        eval_limit=32,  # numbered from 0, like the training prompts that are under way at step 3
        eval_every=3,
    )
    world = RayWorld(config.cluster)
    try:
        run_grpo(config, world)
    finally:
        world.close()
    return [
        {key: value for key, value in line.items() if not any(clock in key for clock in CLOCKS)}
        for line in read_metrics(config.out)
    ]


def test_async_without_staleness_is_sync_bit_for_bit(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "hf", seed=0)
    write_additions(tmp_path / "data", seed=0)
    prompts = (tmp_path / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    (tmp_path / "data" / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    try:
        sync = metrics(tmp_path, "sync", ScheduleConfig())
        zero = metrics(tmp_path, "zero", ScheduleConfig(kind="async", max_staleness=0))
        one = metrics(tmp_path, "one", ScheduleConfig(kind="async", max_staleness=1))
    finally:
        cluster.stop()
    assert zero == sync
    assert [line["step"] for line in sync if "eval_accuracy" in line] == [0, 3]
    assert len(read_lines(tmp_path / "one" / "evaluations" / "accuracy" / "accuracy_step_3.jsonl")) == 32
    assert one[0] == sync[0] and one[2:] != sync[2:], "with staleness 1 older weights sample, or the test shows nothing"
    stale = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["staleness_max"] for line in stale] == [0, 1, 1, 1]
