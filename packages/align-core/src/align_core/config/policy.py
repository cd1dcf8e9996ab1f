"""What the stages share that sample: when they do, and how engine and trainer are kept together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align_core.config.checks import between, positive
from align_core.config.engine import EngineConfig, SamplingConfig
from align_core.config.scoring import ScoringConfig
from align_core.config.stage import StageConfig
from align_core.config.training import ParallelConfig
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights for the difference between the engine that sampled and the trainer that learns."""

    method: Literal["none", "truncated", "masked", "negative_mask"] = "none"
    """`truncated` importance sampling; `masked`: tokens beyond the bounds teach nothing (IcePop); `negative_mask`: bad
    sequences that the policy has moved far from teach nothing (DeepSeek-V3.2)."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of a token, of the whole sequence, or its geometric mean over the sequence."""
    cap: float = 2.0
    """Largest weight of `truncated`."""
    low: float = 0.5
    """Smallest ratio that `masked` keeps; IcePop's."""
    high: float = 5.0
    """Largest ratio that `masked` keeps; IcePop's."""
    threshold: float = 0.1
    """Nats a token beyond which `negative_mask` drops a sequence."""

    def __post_init__(self) -> None:
        between(self, "low", 0.0, 1.0)
        for name in ("cap", "high"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        positive(self, "threshold")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """When completions are sampled, and how old the weights that sample them may be."""

    kind: Literal["sync", "one_step_off", "async"] = "sync"
    """`sync`: sample, then train, by turns. `one_step_off`: sample the next step while this one trains. `async`: sample
    all the time; `engine.in_flight` says what becomes of completions under way when new weights come."""
    max_staleness: int = 1
    """Of `async`: most updates between the weights that begin a completion and those that it trains, which is also how
    many steps a long completion has to end; 0 is `sync`. Learning suffers beyond 4 to 8 (Fu et al. 2025, AReaL)."""

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ConfigError(f"max_staleness must not be negative, got {self.max_staleness}")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(StageConfig):
    """What the stages that sample share: prompts, engine, rewards, evaluation."""

    reward: str = "math"
    """Rewards with weights, `NAME[=WEIGHT],...`: `model` (the reward model), `overlong`, `repetition`, `format`,
    `command`, `http`, `judge`, a name of the entry-point group `align.rewards`, or your function `FILE.py:NAME`."""
    reward_model: Path | None = None
    """Checkpoint directory of a reward model, for the reward `model`."""
    reward_model_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the reward model."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How rewards are computed."""
    updates_per_rollout: int = 1
    """Optimizer updates on each batch of completions; with 1 the ratio is exactly 1 and nothing is clipped."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    """Completions a prompt (n; the tutorial's 8) and lengths."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The rollout engine."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Whether sampling and training take turns or overlap."""
    eval_data: Path | None = None
    """Held-out prompts; the mean reward of greedy answers to them is logged as `eval_reward`."""
    eval_reward: str = ""
    """Rewards of the evaluation, written like `reward`; empty takes those of training."""
    evaluations: str = ""
    """Further evaluations at the same steps, `NAME=PATH,...` with names of the entry-point group `align.evaluations`:
    `accuracy=FILE` (greedy, graded; with align-eval), `mt-bench-answers=DIR`, or a third party's."""
    eval_limit: int | None = None
    """Only the first so many tasks of each of `evaluations`."""
    eval_every: int = 10
    """Steps between evaluations; also before the first step and after the last."""
    canary_threshold: float = 0.1
    """Largest mean |log-prob difference| between engine and trainer on the same tokens, nats, before the run stops."""
    old_logprobs: Literal["trainer", "fused", "engine"] = "trainer"
    """Log-probs that ratios are taken to: scored by the trainer before the update; by the update's own forward pass,
    which saves that of scoring and is exact for one update a rollout; or the engine's, which compares nothing, so that
    no `canary_threshold` stops the run."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """What is done about the difference between engine and trainer, which `old_logprobs: trainer` measures."""
    sft_data: Path | None = None
    """Demonstrations mixed into every update (the PPO-ptx of InstructGPT); with `sft_coef`."""
    sft_coef: float = 0.0
    """Weight of their cross-entropy beside the policy's loss."""
    sft_batch_size: int = 16
    """Demonstrations an update."""
    samples: int = 4
    """Completions a step that go to samples.jsonl with reward and what the reward read out of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "updates_per_rollout", "eval_every", "canary_threshold", "sft_batch_size")
        if self.schedule.kind != "sync" and (self.cluster.in_process or self.cluster.placement == "colocated"):
            raise ConfigError(
                f"schedule.kind {self.schedule.kind!r} samples while it trains, which needs devices for each; set "
                "cluster.placement to 'disaggregated' and leave cluster.in_process off"
            )
        if self.uses_reward_model and self.reward_model is None:
            raise ConfigError("reward 'model' needs the directory of a reward model; give --reward_model DIR")
        if self.reward_model is not None and not self.needs_reward_model:
            raise ConfigError(f"reward_model is set, but reward is {self.reward!r}; give --reward model to use it")
        if self.cluster.in_process and self.reward_model_parallel.world_size > 1:
            raise ConfigError(
                f"cluster.in_process runs one rank, but reward_model_parallel asks for "
                f"{self.reward_model_parallel.world_size}; leave it off to use Ray"
            )
        if self.batch_size % self.updates_per_rollout:
            raise ConfigError(
                f"updates_per_rollout {self.updates_per_rollout} does not divide batch_size {self.batch_size} prompts"
            )
        if self.old_logprobs == "fused" and self.updates_per_rollout > 1:
            raise ConfigError(
                f"old_logprobs 'fused' is exact for one update a rollout only, updates_per_rollout is "
                f"{self.updates_per_rollout}; use 'trainer'"
            )
        if self.old_logprobs != "trainer" and self.correction.method != "none":
            raise ConfigError(
                f"correction {self.correction.method!r} compares the engine with the trainer's scoring; set "
                "old_logprobs to 'trainer'"
            )
        if (self.sft_coef > 0) != (self.sft_data is not None):
            raise ConfigError("sft_data and sft_coef go together: demonstrations and their weight; set both or none")

    @property
    def sampling_bias(self) -> str:
        """What is wrong with learning from completions that are sampled like this; empty where nothing is."""
        if self.sampling.temperature == 1 and self.sampling.top_p == 1:
            return ""
        return (
            f"sampling.temperature {self.sampling.temperature:g} and sampling.top_p {self.sampling.top_p:g} do not "
            "sample from the distribution that is trained, which biases gradients and the KL; set both to 1 unless you "
            "know why (evaluations are greedy in any case)"
        )

    @property
    def uses_reward_model(self) -> bool:
        """Whether a reward of training or evaluation is the reward model's."""
        words = f"{self.reward},{self.eval_reward}".split(",")
        return any(word.strip().partition("=")[0] == "model" for word in words)

    @property
    def needs_reward_model(self) -> bool:
        """Whether `reward_model` has a use in this stage."""
        return self.uses_reward_model


def check_group(config: PolicyConfig) -> None:
    """Raises ConfigError if a prompt has too few completions to compare."""
    if config.sampling.n < 2:
        raise ConfigError(
            f"a group of {config.sampling.n} completion has no relative advantage; set sampling.n to 2 or more"
        )
