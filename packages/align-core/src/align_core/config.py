"""Every setting of every stage: one tree of frozen dataclasses, with unit and reason of the default under each field.

Values are checked where they are made (`__post_init__`); reading YAML files and command lines is the work of
`align_core.settings`. "The tutorial" below is the Llama tutorial whose road this project follows. No slots: the
argument parser reads `__dict__`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align_core.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cuda", "cpu"]
Verify = Literal["sampled", "full", "off"]
InFlight = Literal["drain", "abort", "continue"]


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0:  # catches NaN too
            raise ConfigError(f"{name} must be greater than 0, got {value}")


def _between(owner: object, name: str, low: float, high: float) -> None:
    value = getattr(owner, name)
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low} and {high}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes: tensor x pipeline x data of them."""

    tensor: int = 1
    """Ways each weight matrix is cut; must divide the attention heads and the FFN width."""
    pipeline: int = 1
    """Stages the layers are cut into; must divide the number of layers."""
    data: int = 1
    """Copies of the model that share a batch."""
    sequence: bool = False
    """Cut activations along the sequence between tensor-parallel regions (saves memory); needs tensor > 1."""

    def __post_init__(self) -> None:
        _positive(self, "tensor", "pipeline", "data")
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "sequence parallelism needs tensor > 1; set parallel.tensor or leave parallel.sequence off"
            )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Defaults are the tutorial's SFT settings."""

    lr: float = 2e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up, over the steps of the stage."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the gradient average."""
    beta2: float = 0.95
    """Decay of the squared-gradient average."""
    eps: float = 1e-8
    """Added to the denominator; AdamW's customary value."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps")
        _between(self, "beta1", 0.0, 1.0)
        _between(self, "beta2", 0.0, 1.0)
        for name in ("min_lr", "warmup_steps", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a trainer computes: precision, micro-batches, device."""

    dtype: Dtype = "float32"
    """Precision of weights and activations in the forward and backward pass; the optimizer's are float32 always."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward pass, packed without padding; memory grows with it, results do not depend on it."""
    device: Device = "auto"
    """`auto` takes CUDA where there is a device."""

    def __post_init__(self) -> None:
        _positive(self, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are sampled."""

    n: int = 1
    """Completions a prompt."""
    max_tokens: int = 512
    """Most new tokens; the tutorial's max_new_tokens."""
    temperature: float = 1.0
    """0 is greedy. Training assumes 1: then the engine's log-probs are those of the trained distribution."""
    top_p: float = 1.0
    """Nucleus size. The tutorial's 0.9 makes sampled and trained distributions differ, which biases training; so 1."""
    seed: int = 0
    """Completion j of prompt i is reproducible from (seed, i, j)."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the tokens up to and with the one that completes a text are kept."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's end-of-sequence tokens; kept like those."""

    def __post_init__(self) -> None:
        _positive(self, "n", "max_tokens")
        if "" in self.stop:
            raise ConfigError("stop holds an empty text, which would end every completion; leave it out")
        _between(self, "top_p", 1e-9, 1.0)
        if self.temperature < 0:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError(
                f"greedy decoding (temperature 0) gives {self.n} equal completions; set n to 1 or temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The rollout engine: which, and how much it may take."""

    name: str = "vllm"
    """Name in the entry-point group `align.engines`."""
    tensor: int = 1
    """Ways the engine cuts each weight matrix."""
    dtype: Dtype = "float32"
    """Precision in the engine; equal to training's keeps the two log-probs comparable."""
    context: int = 2048
    """Longest prompt plus completion, tokens."""
    memory_fraction: float = 0.4
    """Share of a GPU's memory for weights and KV cache; leaves room for a trainer on the same GPU."""
    kv_cache_mib: int = 256
    """Size of the KV cache on CPU, MiB."""
    max_sequences: int = 256
    """Most sequences generated at once."""
    seed: int = 0
    """Engine-wide seed; requests carry their own on top."""
    device: Device = "auto"
    """`auto` takes CUDA where there is a device."""
    replicas: int = 1
    """Engines with the same weights, each on devices of its own; a request goes to the least loaded."""
    sleep: bool = True
    """Let the engine give its GPU memory back while another process on the same GPU trains; nothing to give on CPU."""
    verify: Verify = "sampled"
    """Checksums of weights sent from GPU to GPU: of one row in 16, another one each sync, of all, or none. What goes
    through the host's memory is always checked in full."""
    in_flight: InFlight = "drain"
    """What new weights do to requests under way: wait for them, cut them short, or continue them with the new ones."""

    def __post_init__(self) -> None:
        _positive(self, "tensor", "context", "kv_cache_mib", "max_sequences", "replicas")
        _between(self, "memory_fraction", 0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible service, or another judge of `align.judges`; how hard it may be asked."""

    name: str = "openai"
    """Name in the entry-point group `align.judges`."""
    model: str = "gpt-4"
    """The service's name of the model; MT-Bench's published figures come from gpt-4."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the service, up to and with its version."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never a setting."""
    concurrency: int = 16
    """Most requests under way at once."""
    requests_per_minute: int = 0
    """0 is no limit."""
    tokens_per_minute: int = 0
    """Prompt and largest reply together; 0 is no limit."""
    timeout: float = 300.0
    """Seconds without a byte from the service until a request counts as lost; long verdicts take minutes."""
    attempts: int = 8
    """Times a request is sent before it counts as unanswered; refusals (400, 401, 403, 404 ...) are not sent again."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the service calls the limit; models that think want max_completion_tokens."""

    def __post_init__(self) -> None:
        _positive(self, "concurrency", "timeout", "attempts")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}; 0 is no limit")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, got {self.base_url!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What an evaluation of `align.evaluations` needs to know."""

    data: Path
    """Its tasks or questions."""
    out: Path
    """Directory for per-item results."""
    template: str = "auto"
    """Prompt template, as in training."""
    context: int = 2048
    """Longest prompt plus completion that the engine takes, tokens."""
    max_tokens: int = 512
    """Most new tokens an answer."""
    limit: int | None = None
    """Only the first so many tasks."""

    def __post_init__(self) -> None:
        _positive(self, "context", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the processes run."""

    address: str | None = None
    """Ray cluster to join, `HOST:PORT` or `auto`; none starts a private one on this machine."""
    in_process: bool = False
    """No Ray: trainer and engine live in the calling process (one rank only); for notebooks and debugging."""


@dataclass(frozen=True, kw_only=True)
class SftLoss:
    """Cross-entropy on the response tokens, averaged over all of them in the batch."""


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Bradley-Terry over all ordered pairs of a prompt's responses."""


@dataclass(frozen=True, kw_only=True)
class DpoLoss:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = 0.1
    """Strength of the pull to the reference; the paper's and the tutorial's value."""
    label_smoothing: float = 0.0
    """Assumed share of swapped preferences (cDPO)."""

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _between(self, "label_smoothing", 0.0, 0.5)


@dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """Clipped policy gradient with group-normalised advantages and a KL term (Shao et al. 2024)."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low stop pulling; PPO's and the tutorial's value."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high stop pulling."""
    kl_coef: float = 0.0
    """Weight of the k3 KL to the reference in the loss; the tutorial's is 0.1, practice with verifiable rewards 0."""
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); off is the Dr. GRPO form."""

    def __post_init__(self) -> None:
        _positive(self, "clip_low", "clip_high")
        if self.kl_coef < 0:
            raise ConfigError(f"kl_coef must not be negative, got {self.kl_coef}")


LossConfig = SftLoss | RewardLoss | DpoLoss | GrpoLoss


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage needs."""

    model: Path
    """Hugging Face or Megatron checkpoint directory to start from."""
    data: Path
    """JSON-lines file of the stage's records."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the trained model (and of its frozen reference)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Precision and micro-batches."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray, or this process alone."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "max_length", "save_every")
        if self.optimizer.warmup_steps >= self.steps:
            raise ConfigError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves none of the {self.steps} steps at full "
                f"learning rate; use at most {self.steps - 1}"
            )
        if self.cluster.in_process and self.parallel.world_size > 1:
            raise ConfigError(
                f"cluster.in_process runs one rank, but parallel asks for {self.parallel.world_size}; "
                "leave it off to use Ray"
            )


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

    @staticmethod
    def of_stage(
        config: StageConfig,
        *,
        model: Path | None = None,
        head: Literal["lm", "score"] = "lm",
        trainable: bool = True,
        parallel: ParallelConfig | None = None,
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
            optimizer=config.optimizer,
            training=config.training,
        )


@dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    """`align sft`: supervised fine-tuning on prompt and response."""

    loss: SftLoss = field(default_factory=SftLoss)
    """Nothing to set."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """`align reward`: a scalar head that ranks responses."""

    loss: RewardLoss = field(default_factory=RewardLoss)
    """Nothing to set."""
    eval_data: Path | None = None
    """Held-out file; its accuracy is measured at the end."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(StageConfig):
    """`align dpo`: preference optimisation without sampling."""

    loss: DpoLoss = field(default_factory=DpoLoss)
    """Beta and label smoothing."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(StageConfig):
    """`align grpo`: group-relative policy optimisation with a verifiable reward or a reward model."""

    reward: str = "math"
    """Name in the entry-point group `align.rewards`, or `model` for the reward model in `reward_model`."""
    reward_model: Path | None = None
    """Checkpoint directory of a reward model, for `reward: model`."""
    reward_model_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes of the reward model."""
    loss: GrpoLoss = field(default_factory=GrpoLoss)
    """Clipping and KL."""
    updates_per_rollout: int = 1
    """Optimizer updates on each batch of completions; with 1 the ratio is exactly 1 and nothing is clipped."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    """Group size (n; the tutorial's 8) and lengths."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The rollout engine."""
    eval_data: Path | None = None
    """Held-out prompts; the mean reward of greedy answers to them is logged as `eval_reward`."""
    eval_every: int = 10
    """Steps between evaluations; also before the first step and after the last."""
    canary_threshold: float = 0.1
    """Largest mean |log-prob difference| between engine and trainer on the same tokens, nats, before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "updates_per_rollout", "eval_every", "canary_threshold")
        if self.reward == "model" and self.reward_model is None:
            raise ConfigError("reward 'model' needs the directory of a reward model; give --reward_model DIR")
        if self.reward != "model" and self.reward_model is not None:
            raise ConfigError(f"reward_model is set, but reward is {self.reward!r}; give --reward model to use it")
        if self.sampling.n < 2:
            raise ConfigError(
                f"a group of {self.sampling.n} completion has no relative advantage; set sampling.n to 2 or more"
            )
        if self.cluster.in_process and self.reward_model_parallel.world_size > 1:
            raise ConfigError(
                f"cluster.in_process runs one rank, but reward_model_parallel asks for "
                f"{self.reward_model_parallel.world_size}; leave it off to use Ray"
            )
        if self.batch_size % self.updates_per_rollout:
            raise ConfigError(
                f"updates_per_rollout {self.updates_per_rollout} does not divide batch_size {self.batch_size} prompts"
            )
