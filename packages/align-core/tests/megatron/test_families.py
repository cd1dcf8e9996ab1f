"""Every dense family against its own Hugging Face model: log-probs, and SFT that trains its biases and norms."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron_llama import ragged_batch, reference_training
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_core.config import OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.errors import ConfigError
from align_core.megatron import MegatronTrainer, RankContext

STEPS = 4
FAMILIES: dict[str, dict[str, object]] = {
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2)], ids=["one", "tp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_hugging_face(llama: Callable[..., Path], family: str, parallel: ParallelConfig) -> None:
    directory = llama(**FAMILIES[family])
    first, losses, last = run_ranks(_train, parallel, directory)[0]
    expected_first, expected_losses, expected_last = reference_training(directory, steps=STEPS)
    np.testing.assert_allclose(first, expected_first, atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(last, expected_last, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
            r"attends to the last 32 tokens only .*set it to null",
        ),
    ],
    ids=["window"],
)
def test_what_training_does_not_do_is_refused(
    llama: Callable[..., Path], tmp_path: Path, settings: dict[str, object], complaint: str
) -> None:
    config = json.loads((llama() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match=complaint):
        MegatronTrainer(TrainerConfig(model=tmp_path))


Found = tuple[NDArray[np.float32], list[float], NDArray[np.float32]]


def _train(context: RankContext, directory: Path) -> Found:
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(micro_batch_tokens=48, device="cpu"),
    )
    trainer = MegatronTrainer(config, context)
    first = trainer.logprobs(ragged_batch())
    losses = [trainer.step(ragged_batch(seed=step), SftLoss())["loss"] for step in range(STEPS)]
    return first, losses, trainer.logprobs(ragged_batch())
