"""The stages that sample: GRPO, online DPO and PPO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align_core.config.checks import between, positive
from align_core.config.engine import SamplingConfig
from align_core.config.losses import GrpoLoss, OnlineDpoLoss, PpoLoss, ValueLoss
from align_core.config.policy import PolicyConfig, check_group
from align_core.config.training import OptimizerConfig, ParallelConfig
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(PolicyConfig):
    """`align grpo`: group-relative policy optimisation with a verifiable reward or a reward model."""

    loss: GrpoLoss = field(default_factory=GrpoLoss)
    """Variant, clipping and KL."""
    drop_tied_groups: bool = False
    """Leave groups with equal rewards out of the update (the filter of DAPO's dynamic sampling); they teach nothing,
    but count in the average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self)
        if self.loss.kl_in_reward and self.old_logprobs == "fused":
            raise ConfigError("loss.kl_in_reward needs log-probs before the update; set old_logprobs to 'trainer'")


@dataclass(frozen=True, kw_only=True)
class OnlineDpoConfig(PolicyConfig):
    """`align online-dpo`: preferences between the policy's own completions, ordered by their rewards."""

    loss: OnlineDpoLoss = field(default_factory=OnlineDpoLoss)
    """Beta and which pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self)
        if self.correction.method != "none":
            raise ConfigError(
                f"correction {self.correction.method!r} weighs ratios to old log-probs, which online DPO's loss has "
                "not; leave correction.method at 'none', or use grpo"
            )


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """The KL penalty inside PPO's reward, and what steers its weight."""

    coef: float = 0.02
    """Weight of the KL to the reference in each token's reward, per nat (first one, if adaptive); the tutorial's."""
    adaptive: bool = False
    """Steer the weight towards `target` (Ziegler et al. 2019); the tutorial's fix_kl_coef is on, so off."""
    target: float = 6.0
    """Nats a completion, of the KL to the reference; the tutorial's."""
    horizon: int = 10000
    """Completions over which the weight moves by up to 20 %; the tutorial's."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of each token's KL; k1 is unbiased, also in its gradient."""

    def __post_init__(self) -> None:
        positive(self, "target", "horizon")
        if self.coef < 0:
            raise ConfigError(f"coef must not be negative, got {self.coef}")


def _value_optimizer() -> OptimizerConfig:
    return OptimizerConfig(lr=5e-6, min_lr=5e-7, schedule="linear", weight_decay=0.01)


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(PolicyConfig):
    """`align rlhf`: PPO with policy, frozen reference, reward model and value model."""

    reward: str = "model"
    """As for grpo; the reward model by default."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """One completion a prompt; the value model, not a group, is the baseline."""
    loss: PpoLoss = field(default_factory=PpoLoss)
    """Clipping of the policy."""
    value_loss: ValueLoss = field(default_factory=ValueLoss)
    """Clipping of the value model."""
    value_model: Path | None = None
    """Checkpoint that the value model starts from; the reward model by default, else the policy with a zero head."""
    value_optimizer: OptimizerConfig = field(default_factory=_value_optimizer)
    """AdamW of the value model; the tutorial's learning rates."""
    value_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the value model."""
    value_warmup: int = 0
    """First steps in which only the value model learns; a critic that knows nothing gives the policy noise."""
    kl: KlConfig = field(default_factory=KlConfig)
    """KL penalty in the reward."""
    gamma: float = 1.0
    """Discount a token; the tutorial's."""
    lam: float = 0.95
    """Weight of longer advantage estimates; the tutorial's."""
    whiten: bool = True
    """Advantages with mean 0 and variance 1 over the valid tokens of the whole rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, "gamma", 0.0, 1.0)
        between(self, "lam", 0.0, 1.0)
        if not 0 <= self.value_warmup < self.steps:
            raise ConfigError(f"value_warmup must be less than the {self.steps} steps, got {self.value_warmup}")
        if self.old_logprobs == "fused":
            raise ConfigError("PPO's reward needs log-probs before the update; set old_logprobs to 'trainer'")
        if self.kl.adaptive and self.kl.horizon < self.batch_size * self.sampling.n:
            raise ConfigError(
                f"kl.horizon {self.kl.horizon} is shorter than a step of {self.batch_size * self.sampling.n} "
                "completions; raise it"
            )
        if self.cluster.in_process and self.value_parallel.world_size > 1:
            raise ConfigError(
                f"cluster.in_process runs one rank, but value_parallel asks for {self.value_parallel.world_size}; "
                "leave it off to use Ray"
            )

    @property
    def needs_reward_model(self) -> bool:
        """The value model may start from a reward model that gives no reward itself."""
        return True
