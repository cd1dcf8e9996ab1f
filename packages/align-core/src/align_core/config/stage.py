"""What every training stage needs, and what it tells the processes of its models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align_core.config.checks import positive
from align_core.config.cluster import ClusterConfig, check_one_rank
from align_core.config.training import LoraConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage needs."""

    model: Path
    """Hugging Face or Megatron checkpoint directory to start from."""
    data: list[str] | Path
    """JSON-lines file of the stage's records, or a directory that `align data prepare` wrote. Several files: repeat
    the option, each `FILE` (all records alike) or `FILE:RATIO` (a fixed share of every batch)."""
    out: Path
    """Directory for checkpoints, metrics and the final model; a run found there is continued."""
    steps: int = 1000
    """Steps in all: batches for one optimizer update each; for GRPO, rollouts."""
    batch_size: int = 64
    """Records a step, over all data-parallel copies: sequences, pairs, or prompts."""
    max_length: int = 2048
    """Longest sequence, tokens; longer prompts are cut at the left of their content, longer responses at the right."""
    template: str = "auto"
    """Prompt template: `human-assistant`, `chat` (the tokenizer's), `plain`; `auto` takes chat where there is one."""
    seed: int = 0
    """Orders the data and seeds every generator."""
    save_every: int = 100
    """Steps between checkpoints to resume from."""
    keep_last: int = 1
    """Newest checkpoints that are kept while training; all go once the trained model is in OUT/model."""
    export: Literal["megatron", "hf"] = "megatron"
    """`hf` writes OUT/hf besides: the trained model as a Hugging Face directory."""
    trackers: list[str] | None = None
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`, `mlflow`, or a name of the
    entry-point group `align.trackers`; unset takes TensorBoard where it is installed."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the trained model (and of its frozen reference)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Precision and micro-batches."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of all weights; the result is merged."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray, or this process alone."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size", "max_length", "save_every", "keep_last")
        if self.optimizer.warmup_steps >= self.steps:
            raise ConfigError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves none of the {self.steps} steps at full "
                f"learning rate; use at most {self.steps - 1}"
            )
        check_one_rank(self.cluster, self.parallel)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """One model of a stage, as its worker processes need to know it. Stages make it; users do not write it."""

    model: Path
    """Checkpoint directory to load."""
    head: Literal["lm", "score"] = "lm"
    """Language model, or one scalar a sequence. A language model loaded for `score` gets a fresh zero head."""
    trainable: bool = True
    """False for frozen models: no optimizer, no gradients."""
    steps: int = 1
    """Updates of the stage, for the learning-rate schedule."""
    seed: int = 0
    """Seeds the rank's generators."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Unused when frozen."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Precision and micro-batches."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of all weights; the result is merged."""

    @staticmethod
    def of_stage(
        config: StageConfig,
        *,
        model: Path | None = None,
        head: Literal["lm", "score"] = "lm",
        trainable: bool = True,
        parallel: ParallelConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        updates_per_step: int = 1,
    ) -> "TrainerConfig":
        """The stage's own model, or another one that is trained or frozen beside it."""
        return TrainerConfig(
            model=model or config.model,
            head=head,
            trainable=trainable,
            steps=config.steps * updates_per_step,
            seed=config.seed,
            parallel=parallel or config.parallel,
            optimizer=optimizer or config.optimizer,
            training=config.training,
            lora=config.lora if trainable else LoraConfig(),
        )
