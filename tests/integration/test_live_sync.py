"""Over Ray: a tensor-parallel Megatron trainer feeds a live vLLM engine; both equal Hugging Face after every update."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

import torch
from safetensors.numpy import save_file
from transformers import LlamaForCausalLM

from align_convert import ModelConfig, load_any
from align_convert.copy import to_hf
from align_core.config import (
    ClusterConfig,
    EngineConfig,
    GrpoLoss,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainerConfig,
)
from align_core.errors import CheckpointError, WorkerError
from align_core.ray import cluster
from align_core.ray.world import RayWorld
from align_core.stages.rollout import rollout_batch
from align_core.stages.sync import compare_logprobs, synchronise
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Completion, Prompt

pytestmark = pytest.mark.slow

GREEDY = SamplingConfig(n=1, max_tokens=12, temperature=0.0)
SAMPLED = SamplingConfig(n=4, max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def world() -> Iterator[RayWorld]:
    world = RayWorld(ClusterConfig())
    yield world
    world.close()
    cluster.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "hf"
    make_tiny_model(directory, seed=3)
    return directory


def prompts(*, first_id: int) -> list[Prompt]:
    rng = np.random.default_rng(first_id)
    return [Prompt(id=first_id + k, tokens=rng.integers(3, 300, size=6 + k, dtype=np.int32)) for k in range(5)]


def test_engine_follows_the_trainer_through_updates(world: RayWorld, model: Path, tmp_path: Path) -> None:
    trainer = world.trainer(
        TrainerConfig(model=model, steps=3, parallel=ParallelConfig(tensor=2), optimizer=OptimizerConfig(lr=0.05))
    )
    engine = world.engine(model, EngineConfig(context=64, kv_cache_mib=64))
    seen = set()
    for version in range(3):
        synchronise(trainer.weights(), engine.weight_sink(), version=version)

        # The same weights, by export, conversion and Hugging Face.
        trainer.export(tmp_path / f"megatron-{version}")
        to_hf(load_any(tmp_path / f"megatron-{version}"), tmp_path / f"hf-{version}")
        reference = LlamaForCausalLM.from_pretrained(tmp_path / f"hf-{version}", dtype=torch.float32)
        greedy = engine.generate(prompts(first_id=100 * version), GREEDY)
        for prompt, completion in zip(prompts(first_id=100 * version), greedy, strict=True):
            assert completion.version == version
            assert completion.tokens.tolist() == greedy_tokens(reference, prompt.tokens, len(completion.tokens))
        seen.add(tuple(greedy[0].tokens.tolist()))

        asked = prompts(first_id=100 * version + 50)
        sampled = engine.generate(asked, SAMPLED)
        batch = rollout_batch(asked, sampled)
        old = trainer.logprobs(batch)
        canary = compare_logprobs(engine_logprobs(sampled), old[batch.mask], threshold=1e-4, version=version)
        assert canary.max < 1e-4
        rewards = np.asarray([len(set(c.tokens.tolist())) for c in sampled], dtype=np.float32)
        trainer.step(
            batch.with_columns(tokens={"old_logprobs": old}, sequences={"reward": rewards}), GrpoLoss(kl_coef=0.0)
        )
    assert len(seen) == 3, "the updates must change what the engine says, or the test compares nothing"


def test_error_of_a_rank_reaches_the_caller_as_it_is(world: RayWorld, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises((CheckpointError, WorkerError), match="nowhere"):
        world.trainer(TrainerConfig(model=missing, parallel=ParallelConfig(tensor=2)))


def engine_logprobs(completions: list[Completion]) -> np.ndarray:
    return np.concatenate([c.logprobs for c in completions])


def greedy_tokens(model: LlamaForCausalLM, prompt: np.ndarray, length: int) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_experts_follow_the_trainer(world: RayWorld, model: Path, tmp_path: Path) -> None:
    """Spread over two ranks, into the engine on transformers: vLLM takes no new experts on CPU."""
    directory = tmp_path / "mixtral"
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text()) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.1 * rng.standard_normal(shape, np.float32)
        for name, shape in ModelConfig.from_hf(config).tensors().items()
    }
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    parallel = ParallelConfig(data=2, expert=2)
    trainer = world.trainer(
        TrainerConfig(model=directory, steps=2, parallel=parallel, optimizer=OptimizerConfig(lr=0.05))
    )
    engine = world.engine(directory, EngineConfig(name="transformers", device="cpu", context=64))
    seen = set()
    for version in range(2):
        synchronise(trainer.weights(), engine.weight_sink(), version=version)
        sampled = engine.generate(prompts(first_id=0), SAMPLED)
        batch = rollout_batch(prompts(first_id=0), sampled)
        old = trainer.logprobs(batch)
        canary = compare_logprobs(engine_logprobs(sampled), old[batch.mask], threshold=1e-4, version=version)
        assert canary.max < 1e-4
        seen.add(tuple(engine.generate(prompts(first_id=0), GREEDY)[0].tokens.tolist()))
        rewards = np.asarray([len(set(c.tokens.tolist())) for c in sampled], dtype=np.float32)
        trainer.step(
            batch.with_columns(tokens={"old_logprobs": old}, sequences={"reward": rewards}), GrpoLoss(kl_coef=0.0)
        )
    assert len(seen) == 2, "the update must change what the engine says, or the test compares nothing"
