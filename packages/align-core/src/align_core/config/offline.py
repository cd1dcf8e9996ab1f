"""The stages that learn from files alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align_core.config.checks import positive
from align_core.config.losses import DpoLoss, KtoLoss, RewardLoss, SftLoss
from align_core.config.stage import StageConfig
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(StageConfig):
    """What the stages share that learn from a file alone."""

    eval_data: list[str] | Path | None = None
    """Held-out file or files; what the stage measures there is logged as `eval_...`."""
    eval_every: int = 100
    """Steps between evaluations; also before the first step and after the last."""
    keep_best: bool = False
    """Write the model of the best evaluation to OUT/best (accuracy where there is one, else loss)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "eval_every")
        if self.keep_best and self.eval_data is None:
            raise ConfigError("keep_best needs held-out data to judge by; give --eval_data FILE")


@dataclass(frozen=True, kw_only=True)
class SftConfig(OfflineConfig):
    """`align sft`: supervised fine-tuning on prompt and response."""

    loss: SftLoss = field(default_factory=SftLoss)
    """Which turns count."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """`align reward`: a scalar head that ranks responses."""

    loss: RewardLoss = field(default_factory=RewardLoss)
    """Margin and centring."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(OfflineConfig):
    """What the stages share that compare the model with what it was before training."""

    reference: Literal["once", "step"] = "once"
    """The untrained model's log-probs: all computed before the first step and kept on disk (no memory on the device),
    or in each step by a second, frozen model (no time before the first step; the only way where data never repeats)."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(ReferenceConfig):
    """`align dpo`: preference optimisation without sampling."""

    loss: DpoLoss = field(default_factory=DpoLoss)
    """Form, beta and label smoothing."""


@dataclass(frozen=True, kw_only=True)
class KtoConfig(ReferenceConfig):
    """`align kto`: learning from responses that are marked as wanted or not, one at a time."""

    loss: KtoLoss = field(default_factory=KtoLoss)
    """Beta and the weights of both kinds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise ConfigError(
                f"batch_size {self.batch_size}: the KL baseline pairs each prompt with another record's response; "
                "use 2 or more"
            )
