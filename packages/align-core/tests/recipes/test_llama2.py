"""The Llama-2 recipes are those of the tutorial, and every stage takes them from the command line."""

import json
from pathlib import Path

import pytest

from align_core import registry
from align_core.config import DpoConfig, RewardConfig, RlhfConfig, SftConfig
from align_core.recipes.llama2 import LLAMA2_7B, LLAMA2_13B, LLAMA2_70B
from align_core.settings import parse

HERE = (Path("m"), Path("d"), Path("o"))


@pytest.mark.parametrize(
    ("recipe", "tensor", "pipeline"),
    [(LLAMA2_7B, 4, 1), (LLAMA2_13B, 8, 1), (LLAMA2_70B, 8, 4)],
    ids=["7b", "13b", "70b"],
)
def test_layouts_of_the_tutorial(recipe: object, tensor: int, pipeline: int) -> None:
    config = recipe["sft"](*HERE)  # type: ignore[index]
    assert (config.parallel.tensor, config.parallel.pipeline, config.batch_size) == (tensor, pipeline, 64)


def test_numbers_of_the_tutorial() -> None:
    sft, reward, dpo, rlhf = (LLAMA2_7B[stage](*HERE) for stage in ("sft", "reward", "dpo", "rlhf"))
    assert isinstance(sft, SftConfig) and isinstance(reward, RewardConfig)
    assert (sft.optimizer.lr, sft.optimizer.warmup_steps, sft.steps, sft.max_length) == (2e-5, 40, 1000, 2048)
    assert (reward.optimizer.lr, reward.optimizer.warmup_steps, reward.optimizer.weight_decay) == (1e-5, 300, 0.1)
    assert isinstance(dpo, DpoConfig) and isinstance(rlhf, RlhfConfig)
    assert (dpo.optimizer.clip_grad, dpo.batch_size, dpo.loss.beta) == (5.0, 128, 0.1)
    assert (rlhf.batch_size // rlhf.updates_per_rollout, rlhf.sampling.max_tokens, rlhf.kl.coef) == (128, 512, 0.02)


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-13b", "llama2-70b"])
def test_recipe_is_found_by_name(name: str) -> None:
    assert name in registry.names("align.recipes")
    words = ["--recipe", name, "--model", "m", "--data", "d", "--out", "o", "--optimizer.lr", "1e-6"]
    config = parse(SftConfig, words, stage="sft")
    assert config.training.dtype == "bfloat16"
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-6, 40)


def test_7b_fits_a_gpu_of_80_gb(tmp_path: Path) -> None:
    """By the estimate of a dry run: a quarter of the weights with their optimizer state, and 16,384 tokens."""
    from align_core.memory import model_memory
    from align_core.model_shape import read_model_shape

    sizes = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    config = LLAMA2_7B["sft"](*HERE)
    memory = model_memory(read_model_shape(tmp_path), parallel=config.parallel, training=config.training)
    assert memory.total / 2**30 < 72
