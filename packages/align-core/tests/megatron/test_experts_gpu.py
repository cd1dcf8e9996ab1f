"""A mixture of experts on one CUDA device, against Hugging Face on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_llama import ragged_batch, reference_training
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_core.config import Dtype, OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
STEPS = 6
SETTINGS: dict[str, dict[str, object]] = {
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # More experts than the short batch can reach: some get no token, and kernels no row.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 64,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
Found = tuple[NDArray[np.float32], list[dict[str, float]]]


@pytest.mark.parametrize("family", SETTINGS)
def test_one_device_trains_as_hugging_face(llama: Callable[..., Path], family: str) -> None:
    """float32: TF32 is off, so log-probs and losses are Hugging Face's to rounding."""
    directory = llama(**SETTINGS[family])
    first, steps = run_ranks(_train, ParallelConfig(), directory, "float32", False, device="cuda")[0]
    expected_first, expected_losses, _ = reference_training(directory, steps=STEPS)
    np.testing.assert_allclose(first, expected_first, atol=1e-4, rtol=0)
    np.testing.assert_allclose([step["loss"] for step in steps], expected_losses, atol=1e-4, rtol=0)


@pytest.mark.parametrize("router_float32", [False, True], ids=["router16", "router32"])
def test_bfloat16_is_near_and_learns(llama: Callable[..., Path], router_float32: bool) -> None:
    """A token whose second and third expert are nearly even may choose the other one, so only the mean is close."""
    directory = llama(**SETTINGS["mixtral"])
    first, steps = run_ranks(_train, ParallelConfig(), directory, "bfloat16", router_float32, device="cuda")[0]
    expected_first, expected_losses, _ = reference_training(directory, steps=STEPS)
    assert np.abs(first - expected_first).mean() < 0.05
    np.testing.assert_allclose([step["loss"] for step in steps], expected_losses, atol=0.1, rtol=0)
    assert all(np.isfinite(step["grad_norm"]) and not step["skipped"] for step in steps)


@two_devices
def test_experts_on_two_devices_train_as_on_one(llama: Callable[..., Path]) -> None:
    directory = llama(**SETTINGS["mixtral"])
    _, one = run_ranks(_train, ParallelConfig(), directory, "float32", False, device="cuda")[0]
    spread = ParallelConfig(data=2, expert=2)
    _, two = run_ranks(_train, spread, directory, "float32", False, device="cuda")[0]
    for step, reference in zip(two, one, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], abs=1e-4)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)


def _train(context: RankContext, directory: Path, dtype: Dtype, router_float32: bool) -> Found:
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(micro_batch_tokens=48, dtype=dtype, device="cuda", router_float32=router_float32),
    )
    trainer = MegatronTrainer(config, context)
    first = trainer.logprobs(ragged_batch())
    return first, [dict(trainer.step(ragged_batch(seed=step), SftLoss())) for step in range(STEPS)]
