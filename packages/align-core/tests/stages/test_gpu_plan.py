"""What each GPU of a described cluster would hold: by hand for one shape, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align_core.config import (
    ClusterConfig,
    EngineConfig,
    ParallelConfig,
    RlhfConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainingConfig,
)
from align_core.errors import ConfigError
from align_core.memory import model_memory
from align_core.model_shape import read_model_shape
from align_core.stages.dry_run import plan_lines
from align_core.stages.gpu_plan import gpu_lines, roles

LLAMA_2_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
FOUR = ParallelConfig(tensor=4, sequence=True)


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    folder = tmp_path / "7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return folder


def rlhf(model: Path, cluster: ClusterConfig, **changes: Any) -> RlhfConfig:
    settings: dict[str, Any] = {
        "model": model,
        "reward_model": model,
        "data": model,
        "out": model / "out",
        "parallel": FOUR,
        "reward_model_parallel": FOUR,
        "value_parallel": FOUR,
        "training": TrainingConfig(dtype="bfloat16"),
        "engine": EngineConfig(dtype="bfloat16", memory_fraction=0.6),
        "sampling": SamplingConfig(max_tokens=512),
        "cluster": cluster,
    }
    return RlhfConfig(**{**settings, **changes})


def test_llama_2_7b_rlhf_on_four_h200(seven: Path) -> None:
    """Policy, reference, reward and value model colocated: 2 of the 4 models have optimizers."""
    config = rlhf(seven, ClusterConfig(described="1x4x141"))
    assert [role.name for role in roles(config)] == ["trained model", "frozen reference", "reward model", "value model"]
    lines = dict(gpu_lines(config))
    assert lines["GPUs of the trained model"] == lines["GPUs of the value model"] == "node 0: 0, 1, 2, 3"
    assert lines["GPUs of engine 0"] == "node 0: 0"
    shape = read_model_shape(seven)
    trained = model_memory(shape, parallel=FOUR, training=config.training)
    # 6.74e9 weights over 4 ranks: 2 bytes each in bf16.
    assert trained.weights == pytest.approx(6.74e9 / 4 * 2, rel=0.01)
    frozen = [
        model_memory(shape, parallel=FOUR, training=config.training, head=head, trainable=False).weights
        for head in ("lm", "score")
    ]
    value = model_memory(shape, parallel=FOUR, training=config.training, head="score")
    standing = sum(m.weights + m.gradients + m.optimizer for m in (trained, value)) + sum(frozen)
    working = max(m.activations + m.logits for m in (trained, value))
    total = standing + working + 3 * 2**30  # one process of all four models, and the sleeping engine
    assert lines["fullest GPU, models at work"].startswith(f"{total / 2**30:.1f} GiB")
    engine = 0.6 * 141 + trained.weights / 2**30 + 1
    assert lines["fullest GPU, engine at work"].startswith(f"{engine:.1f} GiB")


def test_disaggregated_gpus_and_nodes(seven: Path) -> None:
    cluster = ClusterConfig(described="2x4x80", placement="disaggregated")
    config = rlhf(seven, cluster, schedule=ScheduleConfig(kind="one_step_off"), engine=EngineConfig(replicas=2))
    lines = dict(gpu_lines(config))
    assert lines["GPUs of the trained model"] == "node 0: 0, 1, 2, 3"
    assert (lines["GPUs of engine 0"], lines["GPUs of engine 1"]) == ("node 1: 2", "node 1: 3")
    assert "engine" not in lines["fullest GPU, models at work"]


def test_what_cannot_fit_is_refused_with_the_gpu_and_the_parts(seven: Path) -> None:
    with pytest.raises(ConfigError, match=r"GPU 0 of node 0 would hold about .* with models at work, and has 24 GiB"):
        list(gpu_lines(rlhf(seven, ClusterConfig(described="1x4x24"))))
    with pytest.raises(ConfigError, match=r"memory_fraction 0\.1 of 80 GiB are 8\.0 GiB; the weights and one sequence"):
        list(gpu_lines(rlhf(seven, ClusterConfig(described="1x4x80"), engine=EngineConfig(memory_fraction=0.1))))
    with pytest.raises(ConfigError, match=r"4 ranks need as many GPUs, the cluster has 2"):
        list(gpu_lines(rlhf(seven, ClusterConfig(described="1x2x141"))))
    awake = EngineConfig(memory_fraction=0.9, sleep=False, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"has 141 GiB"):
        list(gpu_lines(rlhf(seven, ClusterConfig(described="1x4x141"), engine=awake)))


@pytest.mark.usefixtures("length")
def test_dry_run_shows_the_plan_of_a_described_cluster(make_config: Callable[..., Any]) -> None:
    config = make_config("grpo", cluster=ClusterConfig(described="1x1x80"), engine=EngineConfig(context=64))
    lines = dict(plan_lines(config))
    assert lines["GPUs of the trained model"] == lines["GPUs of engine 0"] == "node 0: 0"
    assert lines["fullest GPU, models at work"].endswith("of 80 GiB")
    small = replace(config, cluster=ClusterConfig(described="1x1x0.5"))
    with pytest.raises(ConfigError, match=r"has 0\.5 GiB"):
        plan_lines(small)
    assert not config.out.exists()
