"""The recipes `llama2-7b`, `llama2-13b` and `llama2-70b`: the tutorial's settings, for nodes of eight GPUs with 80 GB.

Learning rates, batch sizes, lengths and step counts are those of the tutorial's scripts; layouts are its layouts, with
data parallel 1. Where the tutorial's value is one that biases training (top_p 0.9, dropout in PPO), ours is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align_core.config import (
    DpoConfig,
    EngineConfig,
    GrpoConfig,
    KtoConfig,
    OnlineDpoConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RlhfConfig,
    SamplingConfig,
    SftConfig,
    StageConfig,
    TrainingConfig,
)

Recipe = Callable[[Path, Path, Path], StageConfig]

_POLICY = OptimizerConfig(lr=2.4e-7, min_lr=1e-9, schedule="linear", warmup_steps=100, weight_decay=0.01, clip_grad=0.5)
_RL_LENGTH = 1024  # prompt and reply; the reply may take 512 of them


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """What differs between the sizes."""

    parallel: ParallelConfig
    """Of SFT and reward model."""
    policy: ParallelConfig
    """Of the models that are trained by sampling, and of DPO."""
    engine_tensor: int
    micro_batch_tokens: int


_SIZES = {
    "7b": _Size(
        parallel=ParallelConfig(tensor=4, sequence=True),
        policy=ParallelConfig(tensor=4, sequence=True),
        engine_tensor=4,
        micro_batch_tokens=16384,
    ),
    "13b": _Size(
        parallel=ParallelConfig(tensor=8, sequence=True),
        policy=ParallelConfig(tensor=8, pipeline=2, sequence=True),
        engine_tensor=8,
        micro_batch_tokens=16384,
    ),
    "70b": _Size(
        parallel=ParallelConfig(tensor=8, pipeline=4, sequence=True),
        policy=ParallelConfig(tensor=8, pipeline=4, sequence=True),
        engine_tensor=8,
        micro_batch_tokens=4096,
    ),
}


def _stages(size: _Size) -> Mapping[str, Recipe]:
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=size.micro_batch_tokens)
    tuned: dict[str, Any] = {"parallel": size.parallel, "training": training}
    preferred: dict[str, Any] = {"max_length": _RL_LENGTH, "parallel": size.policy, "training": training}
    sampled: dict[str, Any] = {
        **preferred,
        "steps": 200,
        "updates_per_rollout": 8,
        "save_every": 50,
        "optimizer": _POLICY,
        "engine": EngineConfig(tensor=size.engine_tensor, dtype="bfloat16", context=_RL_LENGTH),
    }
    eight = SamplingConfig(n=8, max_tokens=512)

    def sft(model: Path, data: Path, out: Path) -> StageConfig:
        """1000 steps of 64 sequences of up to 2048 tokens."""
        optimizer = OptimizerConfig(lr=2e-5, min_lr=6e-12, schedule="cosine", warmup_steps=40, beta2=0.999)
        return SftConfig(model=model, data=data, out=out, optimizer=optimizer, **tuned)

    def reward(model: Path, data: Path, out: Path) -> StageConfig:
        """The same with a long warm-up and weight decay."""
        optimizer = OptimizerConfig(lr=1e-5, min_lr=6e-12, schedule="cosine", warmup_steps=300, weight_decay=0.1)
        return RewardConfig(model=model, data=data, out=out, optimizer=optimizer, **tuned)

    def dpo(model: Path, data: Path, out: Path) -> StageConfig:
        """128 pairs a step; the tutorial's clip_grad for DPO is 5."""
        optimizer = replace(_POLICY, clip_grad=5.0)
        return DpoConfig(model=model, data=data, out=out, batch_size=128, optimizer=optimizer, **preferred)

    def kto(model: Path, data: Path, out: Path) -> StageConfig:
        """As DPO, with twice the responses; the tutorial has no KTO."""
        return KtoConfig(model=model, data=data, out=out, batch_size=256, optimizer=_POLICY, **preferred)

    def rlhf(model: Path, data: Path, out: Path) -> StageConfig:
        """1024 prompts a step, in eight updates of 128."""
        return RlhfConfig(
            model=model,
            data=data,
            out=out,
            batch_size=1024,
            value_parallel=size.policy,
            reward_model_parallel=size.policy,
            sampling=SamplingConfig(max_tokens=512),
            reward_model=model,  # a placeholder, as all paths of a recipe are
            **sampled,
        )

    def online_dpo(model: Path, data: Path, out: Path) -> StageConfig:
        """128 prompts of eight replies a step."""
        return OnlineDpoConfig(
            model=model,
            data=data,
            out=out,
            batch_size=128,
            reward_model_parallel=size.policy,
            sampling=eight,
            **sampled,
        )

    def grpo(model: Path, data: Path, out: Path) -> StageConfig:
        """128 prompts of eight replies a step, with a verifiable reward."""
        return GrpoConfig(model=model, data=data, out=out, batch_size=128, sampling=eight, **sampled)

    return {
        "sft": sft,
        "reward": reward,
        "dpo": dpo,
        "kto": kto,
        "rlhf": rlhf,
        "online-dpo": online_dpo,
        "grpo": grpo,
    }


LLAMA2_7B, LLAMA2_13B, LLAMA2_70B = (_stages(_SIZES[name]) for name in ("7b", "13b", "70b"))
