"""The recipe `smollm2-gpu`: SmolLM2-135M on one GPU in bfloat16, on real conversations and pairs, in under a minute.

benchmarks/results/real-data.md holds the curves that these settings gave.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from align_core.config import OptimizerConfig, RewardConfig, RewardLoss, SftConfig, StageConfig, TrainingConfig


def sft(model: Path, data: Path, out: Path) -> SftConfig:
    """Two epochs over 450 conversations."""
    return SftConfig(
        model=model,
        data=data,
        out=out,
        steps=56,
        batch_size=16,
        max_length=1024,
        eval_every=7,
        optimizer=OptimizerConfig(lr=2e-5, schedule="cosine", warmup_steps=4),
        training=TrainingConfig(dtype="bfloat16", micro_batch_tokens=16384),
    )


def reward(model: Path, data: Path, out: Path) -> RewardConfig:
    """Two epochs over 2,000 pairs in the Human/Assistant template; the better of the two learning rates measured."""
    return RewardConfig(
        model=model,
        data=data,
        out=out,
        steps=126,
        batch_size=32,
        max_length=768,
        template="human-assistant",
        eval_every=14,
        optimizer=OptimizerConfig(lr=5e-5, schedule="cosine", warmup_steps=10),
        training=TrainingConfig(dtype="bfloat16", micro_batch_tokens=32768),
        loss=RewardLoss(centre_coef=0.01),
    )


STAGES: Mapping[str, Callable[[Path, Path, Path], StageConfig]] = {"sft": sft, "reward": reward}
