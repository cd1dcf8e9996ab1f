"""The recipe `smollm2`: SmolLM2-135M-Instruct, small steps that two CPU cores manage; raise them on a GPU.

Nine attention heads and three key/value heads allow tensor parallel 1 or 3, never 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align_core.config import (
    DpoConfig,
    EngineConfig,
    GrpoConfig,
    KtoConfig,
    OnlineDpoConfig,
    OptimizerConfig,
    RewardConfig,
    RlhfConfig,
    SamplingConfig,
    SftConfig,
    StageConfig,
)

_CONTEXT = 512
_SHORT: dict[str, Any] = {"steps": 20, "max_length": _CONTEXT}
_SAMPLED: dict[str, Any] = {
    **_SHORT,
    "save_every": 5,
    "optimizer": OptimizerConfig(lr=1e-6, schedule="constant"),
    "engine": EngineConfig(context=_CONTEXT, kv_cache_mib=400, max_sequences=64),
}
_WARMED = OptimizerConfig(lr=1e-5, schedule="cosine", warmup_steps=2)


def sft(model: Path, data: Path, out: Path) -> SftConfig:
    """Worked solutions; a low learning rate, because the model has been instructed already."""
    return SftConfig(
        model=model,
        data=data,
        out=out,
        batch_size=4,
        optimizer=_WARMED,
        **_SHORT,
    )


def reward(model: Path, data: Path, out: Path) -> RewardConfig:
    """Right solutions against the same with a spoilt result."""
    return RewardConfig(
        model=model,
        data=data,
        out=out,
        batch_size=4,
        optimizer=_WARMED,
        **_SHORT,
    )


def grpo(model: Path, data: Path, out: Path) -> GrpoConfig:
    """Few prompts a step, groups of four, short answers: what a laptop manages in about a minute a step."""
    return GrpoConfig(
        model=model,
        data=data,
        out=out,
        batch_size=4,
        sampling=SamplingConfig(n=4, max_tokens=128),
        **_SAMPLED,
    )


def rlhf(model: Path, data: Path, out: Path) -> RlhfConfig:
    """As grpo; the value model learns faster than the policy, which waits two steps for it."""
    return RlhfConfig(
        model=model,
        reward_model=model,  # a placeholder, as all paths of a recipe are
        data=data,
        out=out,
        batch_size=16,
        value_optimizer=OptimizerConfig(lr=1e-5, schedule="constant"),
        value_warmup=2,
        sampling=SamplingConfig(max_tokens=128),
        **_SAMPLED,
    )


def online_dpo(model: Path, data: Path, out: Path) -> OnlineDpoConfig:
    """As grpo."""
    return OnlineDpoConfig(
        model=model,
        data=data,
        out=out,
        batch_size=4,
        sampling=SamplingConfig(n=4, max_tokens=128),
        **_SAMPLED,
    )


def dpo(model: Path, data: Path, out: Path) -> DpoConfig:
    """Right solutions against spoilt ones."""
    return DpoConfig(
        model=model,
        data=data,
        out=out,
        batch_size=4,
        optimizer=replace(_WARMED, lr=1e-6),
        **_SHORT,
    )


def kto(model: Path, data: Path, out: Path) -> KtoConfig:
    """The same pairs, their responses one by one."""
    return KtoConfig(
        model=model,
        data=data,
        out=out,
        batch_size=8,
        optimizer=replace(_WARMED, lr=1e-6),
        **_SHORT,
    )


STAGES: Mapping[str, Callable[[Path, Path, Path], StageConfig]] = {
    "sft": sft,
    "reward": reward,
    "rlhf": rlhf,
    "online-dpo": online_dpo,
    "grpo": grpo,
    "dpo": dpo,
    "kto": kto,
}
