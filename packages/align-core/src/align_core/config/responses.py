"""The commands that annotate a file of responses with a frozen model."""

from dataclasses import dataclass, field
from pathlib import Path

from align_core.config.checks import positive
from align_core.config.cluster import ClusterConfig, check_one_rank
from align_core.config.training import LoraConfig, ParallelConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ResponsesConfig:
    """What the commands share that annotate a file of responses with a frozen model."""

    model: Path
    """Hugging Face or Megatron checkpoint directory."""
    data: list[str] | Path
    """JSON-lines file of prompts with a response, or a list of responses, each."""
    out: Path
    """File to write: the same rows with what was found; must not exist."""
    max_length: int = 2048
    """Longest sequence, tokens; what is longer is cut as in training."""
    template: str = "auto"
    """Prompt template, as in training."""
    batch_size: int = 64
    """Rows handled at once."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Precision and micro-batches."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of all weights; the result is merged."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray, or this process alone."""

    def __post_init__(self) -> None:
        positive(self, "max_length", "batch_size")
        check_one_rank(self.cluster, self.parallel)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ResponsesConfig):
    """`align score`: a reward model's scores of responses."""


@dataclass(frozen=True, kw_only=True)
class LogprobsConfig(ResponsesConfig):
    """`align logprobs`: a language model's log-probs of responses."""

    tokens: bool = False
    """Write each token's id and log-prob too."""
