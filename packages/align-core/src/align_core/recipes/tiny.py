"""The recipe `tiny`: the embedded model of `align tutorial` on two CPU cores, tensor parallel 2.

Numbers were chosen by experiment so that every stage visibly learns within two minutes; benchmarks/results has the
spread over seeds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from align_core.config import (
    DpoConfig,
    DpoLoss,
    EngineConfig,
    GrpoConfig,
    GrpoLoss,
    KlConfig,
    KtoConfig,
    KtoLoss,
    OnlineDpoConfig,
    OnlineDpoLoss,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    RewardConfig,
    RlhfConfig,
    SamplingConfig,
    SftConfig,
    StageConfig,
    ValueLoss,
)

_CONTEXT = 64  # a question with its template is about 30 tokens, an answer at most 5
_TWO_RANKS = ParallelConfig(tensor=2)
Policy = TypeVar("Policy", bound=PolicyConfig)


def sft(model: Path, data: Path, out: Path) -> SftConfig:
    """Long enough to imitate the careless student well, on held-out sums too."""
    return SftConfig(
        model=model,
        data=data,
        out=out,
        steps=300,
        batch_size=128,
        max_length=_CONTEXT,
        parallel=_TWO_RANKS,
        optimizer=OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1),
    )


def reward(model: Path, data: Path, out: Path) -> RewardConfig:
    """From the SFT model, whose features know sums already; four rated answers a question."""
    return RewardConfig(
        model=model,
        data=data,
        out=out,
        steps=300,
        batch_size=24,
        max_length=_CONTEXT,
        parallel=_TWO_RANKS,
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=10, weight_decay=0.1),
    )


def grpo(model: Path, data: Path, out: Path) -> GrpoConfig:
    """Groups of eight; the first steps already find the right answers that SFT made unlikely."""
    return _policy(GrpoConfig, model, data, out, loss=GrpoLoss(kl_coef=0.0))


def rlhf(model: Path, data: Path, out: Path) -> RlhfConfig:
    """PPO, four completions a prompt; a strong pull to the SFT model: the tiny reward model can be fooled."""
    return _policy(
        RlhfConfig,
        model,
        data,
        out,
        reward_model=model,  # a placeholder, as all paths of a recipe are
        batch_size=96,
        sampling=SamplingConfig(n=4, max_tokens=8),
        value_parallel=_TWO_RANKS,
        value_optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=2),
        value_warmup=3,
        value_loss=ValueLoss(clip=None),
        kl=KlConfig(coef=0.1),
    )


def online_dpo(model: Path, data: Path, out: Path) -> OnlineDpoConfig:
    """Groups of eight, all pairs; beta as for dpo, times the length that its mean divides by."""
    return _policy(OnlineDpoConfig, model, data, out, loss=OnlineDpoLoss(beta=0.5))


def _policy(kind: type[Policy], model: Path, data: Path, out: Path, **own: Any) -> Policy:
    """What the stages that sample share here, and a stage's own settings over it."""
    shared: dict[str, Any] = {
        "steps": 50,
        "batch_size": 64,
        "max_length": _CONTEXT,
        "save_every": 10,
        "parallel": _TWO_RANKS,
        "reward_model_parallel": _TWO_RANKS,
        "optimizer": OptimizerConfig(lr=2e-4, schedule="cosine", warmup_steps=5),
        "sampling": SamplingConfig(n=8, max_tokens=8),
        "engine": EngineConfig(context=_CONTEXT, kv_cache_mib=128, max_sequences=512, enforce_eager=True),
    }
    return kind(model=model, data=data, out=out, **{**shared, **own})


def dpo(model: Path, data: Path, out: Path) -> DpoConfig:
    """Right answers against wrong ones, from the SFT model."""
    return DpoConfig(
        model=model,
        data=data,
        out=out,
        steps=200,
        batch_size=32,
        max_length=_CONTEXT,
        parallel=_TWO_RANKS,
        optimizer=OptimizerConfig(lr=2e-4, schedule="cosine", warmup_steps=10),
        loss=DpoLoss(beta=0.2),
    )


def kto(model: Path, data: Path, out: Path) -> KtoConfig:
    """Right and wrong answers one by one, from the SFT model."""
    return KtoConfig(
        model=model,
        data=data,
        out=out,
        steps=200,
        batch_size=64,
        max_length=_CONTEXT,
        parallel=_TWO_RANKS,
        optimizer=OptimizerConfig(lr=2e-4, schedule="cosine", warmup_steps=10),
        loss=KtoLoss(beta=0.2),
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
