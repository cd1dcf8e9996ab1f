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
PlacementMode = Literal["colocated", "disaggregated"]


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
    """How a model is spread over processes: tensor x pipeline x context x data of them."""

    tensor: int = 1
    """Ways each weight matrix is cut; must divide the attention heads and the FFN width."""
    pipeline: int = 1
    """Stages the layers are cut into; must divide the number of layers."""
    virtual: int = 1
    """Chunks of layers that each stage holds, interleaved over the stages to shorten the pipeline's idle time."""
    context: int = 1
    """Ways the tokens of a micro-batch are cut, for sequences too long for one device."""
    data: int = 1
    """Copies of the model that share a batch."""
    sequence: bool = False
    """Cut activations along the sequence between tensor-parallel regions (saves memory); needs tensor > 1."""

    def __post_init__(self) -> None:
        _positive(self, "tensor", "pipeline", "virtual", "context", "data")
        if self.virtual > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual {self.virtual} interleaves the stages of a pipeline, and there is one stage; "
                "set parallel.pipeline to 2 or more, or parallel.virtual to 1"
            )
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "sequence parallelism needs tensor > 1; set parallel.tensor or leave parallel.sequence off"
            )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.context * self.data


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
    max_skipped: int = 3
    """Steps in a row that are skipped because their loss or gradient is not finite; one more ends the run."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps")
        _between(self, "beta1", 0.0, 1.0)
        _between(self, "beta2", 0.0, 1.0)
        for name in ("min_lr", "warmup_steps", "weight_decay", "clip_grad", "max_skipped"):
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
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: the MLP's (selective; a sixth less memory, 1 %
    more time), or of whole layers (full; keeps one hidden state a layer, a third more time)."""

    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory; the newest one is complete later."""

    def __post_init__(self) -> None:
        _positive(self, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on all linear layers (Hu et al. 2021); the rest of the model is frozen."""

    rank: int = 0
    """Width of the adapters; 0 trains all weights instead."""
    alpha: float = 32.0
    """Adapters count alpha / rank times; with 32 a rank of 16 counts twice, as is usual."""

    def __post_init__(self) -> None:
        _positive(self, "alpha")
        if self.rank < 0:
            raise ConfigError(f"lora.rank must not be negative, got {self.rank}; 0 trains all weights")


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
    seeded: bool = True
    """Give each completion a seed of its own. Off, the engine draws for all of them at once: not reproducible, but it
    saves a small kernel for every sequence and token, which counts for small models on GPUs."""
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
    kv_cache_mib: int = 0
    """Size of the KV cache, MiB; 0 takes what memory_fraction leaves on a GPU, and 256 on CPU. With a size of its own
    an engine can start beside programs that take or free memory of the same GPU meanwhile."""
    enforce_eager: bool = False
    """Run without CUDA graphs and compilation: starts in seconds and generates slower. Always so on CPU."""
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
        _positive(self, "tensor", "context", "max_sequences", "replicas")
        if self.kv_cache_mib < 0:
            raise ConfigError(f"kv_cache_mib must be positive, or 0 for a size by the device, got {self.kv_cache_mib}")
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
    extra: str = ""
    """JSON object that goes into every request's body, for what a service offers beyond the protocol."""

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
    placement: PlacementMode = "colocated"
    """`colocated`: models and engines on the same GPUs, by turns. `disaggregated`: engines on the last GPUs alone."""
    described: str = ""
    """For --dry-run: the cluster to plan for as `NODESxGPUSxGIB`, for example `1x8x80`; it need not be here."""
    share_workers: bool = True
    """Frozen models live in the processes of a trained one of the same layout; off gives each its own."""
    timeout_s: float = 1800.0
    """Longest wait of a rank for another in one collective operation, seconds; then the run ends and names it."""

    def __post_init__(self) -> None:
        _positive(self, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class SftLoss:
    """Cross-entropy on the response tokens, averaged over all of them in the batch."""

    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a chat are learnt; the user's and the system's never are."""


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Bradley-Terry over all ordered pairs of a prompt's responses."""

    margin_scale: float = 0.0
    """Score that a difference of one in the labels should make at least (Llama 2's margin); 0 uses their order only."""
    centre_coef: float = 0.0
    """Pulls the scores of a pair to mean 0, which the likelihood leaves open; 0.01 where scores are to be added up."""

    def __post_init__(self) -> None:
        for name in ("margin_scale", "centre_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DpoLoss:
    """Preference losses: direct preference optimisation (Rafailov et al. 2023) and its kin."""

    form: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"] = "sigmoid"
    """`sigmoid` is DPO; `simpo` and `orpo` need no reference. Each is described in align-algos' PAPERS.md."""
    beta: float = 0.1
    """Strength of the pull to the reference; DPO's and the tutorial's value. For SimPO a scale (2), for ORPO lambda."""
    label_smoothing: float = 0.0
    """Assumed share of swapped preferences; with `sigmoid` this is cDPO. `robust` needs it below 0.5."""
    length_normalised: bool | None = None
    """Mean instead of sum over a response's log-ratios. Unset: mean for `ipo` (as in its authors' experiments), sum for
    the others; `simpo` and `orpo` always take the mean."""
    simpo_margin: float = 0.5
    """SimPO's gamma, the reward by which the chosen response should win."""

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _between(self, "label_smoothing", 0.0, 0.5)
        if self.label_smoothing and self.form not in ("sigmoid", "robust", "simpo"):
            raise ConfigError(f"label_smoothing has no meaning in form {self.form!r}; set it to 0")
        if self.form == "robust" and not 0 < self.label_smoothing < 0.5:
            raise ConfigError("form 'robust' needs label_smoothing above 0 and below 0.5: the share of wrong labels")

    @property
    def takes_mean(self) -> bool:
        """`length_normalised`, made definite."""
        return self.form == "ipo" if self.length_normalised is None else self.length_normalised

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the untrained model."""
        return self.form not in ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class KtoLoss:
    """Learning from single responses marked as wanted or not (Ethayarajh et al. 2024)."""

    beta: float = 0.1
    """Strength of the pull to the reference; the paper's value."""
    desirable_weight: float = 1.0
    """Weight of wanted responses; the paper asks for (weight x number) of both kinds within 1 to 4/3 of each other."""
    undesirable_weight: float = 1.0
    """Weight of unwanted responses."""

    def __post_init__(self) -> None:
        _positive(self, "beta", "desirable_weight", "undesirable_weight")


PolicyVariant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
# Clip ranges (low, high) of the papers; CISPO's gives no upper bound, 4 caps the weight at 5.
_CLIPS: dict[str, tuple[float, float]] = {
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}


@dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """Clipped policy gradient with advantages from rewards alone: GRPO (Shao et al. 2024) and its family."""

    variant: PolicyVariant = "grpo"
    """Which advantages, ratio and average: Dr. GRPO (no length and difficulty bias), DAPO (clip-higher), GSPO (ratio of
    sequences), CISPO (clipped weights), RLOO (leave-one-out), REINFORCE++ (whitened over the batch; with baseline)."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low stop pulling; null takes that of the variant's paper, for grpo PPO's 0.2."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high stop pulling; null as for clip_low."""
    kl_coef: float = 0.0
    """Weight of the k3 KL to the reference in the loss; the tutorial's is 0.1, practice with verifiable rewards 0."""
    kl_in_reward: float = 0.0
    """Weight of the k1 KL to the reference inside the reward, as RLOO and REINFORCE++ have it."""
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation; Dr. GRPO, RLOO and REINFORCE++ never do."""
    length: int | None = None
    """Tokens by which Dr. GRPO divides every sequence's sum; null takes sampling.max_tokens."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How grpo averages: over all tokens of the batch (DAPO's way), or over each sequence first (the paper's)."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                _positive(self, name)
        for name in ("kl_coef", "kl_in_reward"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.length is not None:
            _positive(self, "length")
        if self.reduction != "token_mean" and self.variant != "grpo":
            raise ConfigError(f"reduction {self.reduction!r} is grpo's; {self.variant!r} has an average of its own")

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio counts."""
        low, high = _CLIPS.get(self.variant, (0.2, 0.2))
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs enter."""
        return self.kl_coef > 0 or self.kl_in_reward > 0


@dataclass(frozen=True, kw_only=True)
class OnlineDpoLoss:
    """Preferences between completions of one prompt, ordered by their rewards (Guo et al. 2024)."""

    beta: float = 0.1
    """Strength of the pull to the reference; the tutorial's."""
    pairs: Literal["all", "best_vs_rest", "best_vs_worst"] = "all"
    """Which ordered pairs of a group count; the tutorial's are all with different rewards."""
    length_normalised: bool = True
    """Mean instead of sum over a completion's log-ratios, as in the tutorial; no pull towards length."""

    def __post_init__(self) -> None:
        _positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class PpoLoss:
    """Clipped policy gradient with per-token advantages (Schulman et al. 2017)."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low stop pulling; the paper's and the tutorial's value."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high stop pulling."""
    dual_clip: float | None = None
    """Most that a token of negative advantage counts, as a ratio (Ye et al. 2020 use 3); null leaves it out."""

    def __post_init__(self) -> None:
        _positive(self, "clip_low", "clip_high")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Squared error of the value model, the larger of clipped and plain."""

    clip: float | None = 0.2
    """Largest move of a value that counts; the tutorial's is 0.1 without the max; null leaves clipping out."""

    def __post_init__(self) -> None:
        if self.clip is not None:
            _positive(self, "clip")


LossConfig = SftLoss | RewardLoss | DpoLoss | KtoLoss | GrpoLoss | OnlineDpoLoss | PpoLoss | ValueLoss


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
        _positive(self, "steps", "batch_size", "max_length", "save_every", "keep_last")
        if self.optimizer.warmup_steps >= self.steps:
            raise ConfigError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves none of the {self.steps} steps at full "
                f"learning rate; use at most {self.steps - 1}"
            )
        _check_one_rank(self.cluster, self.parallel)


def _check_one_rank(cluster: ClusterConfig, parallel: ParallelConfig) -> None:
    if cluster.in_process and parallel.world_size > 1:
        raise ConfigError(
            f"cluster.in_process runs one rank, but parallel asks for {parallel.world_size}; leave it off to use Ray"
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
        _positive(self, "eval_every")
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
        _positive(self, "max_length", "batch_size")
        _check_one_rank(self.cluster, self.parallel)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ResponsesConfig):
    """`align score`: a reward model's scores of responses."""


@dataclass(frozen=True, kw_only=True)
class LogprobsConfig(ResponsesConfig):
    """`align logprobs`: a language model's log-probs of responses."""

    tokens: bool = False
    """Write each token's id and log-prob too."""


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


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How completions are scored: processes, limits, what a failure does, and the settings of the built-in rewards."""

    workers: int = 1
    """Processes that run reward functions apart from the run; 0 calls them in the driver, without a time limit."""
    timeout: float = 30.0
    """Longest time for one call, seconds; a call that hits it is repeated completion by completion, each with it."""
    chunk: int = 64
    """Completions handed to a process in one call."""
    retries: int = 1
    """Times that a failed scoring is tried again before it counts as a failure."""
    on_failure: Literal["stop", "drop"] = "stop"
    """A completion that cannot be scored ends the run with the reason, or is left out of the update and counted."""
    clip: float = 100.0
    """Scores of a reward model are held within +-clip; the tutorial's cliprange_reward."""
    pattern: str = ""
    """Regular expression that the whole reply must match, for the reward `format`."""
    command: tuple[str, ...] = ()
    """Program and arguments for the reward `command`: JSON on its standard input, scores as JSON on its output."""
    url: str = ""
    """Address for the rewards `http` and `judge` (of the latter an OpenAI-compatible server, up to `/v1`)."""
    model: str = ""
    """Model that the server of `judge` is asked for."""
    rubric: str = "Rate the assistant's reply to the user from 1 (worst) to 10 (best). End with [[rating]]."
    """What `judge` tells the judging model to do; the last [[number]] of its answer is the score."""
    key_variable: str = ""
    """Environment variable with the bearer token for `url`; the token itself is never written or logged."""
    overlong_buffer: int = 32
    """Tokens before sampling.max_tokens over which the reward `overlong` falls from 0 to -1 (DAPO's soft penalty)."""

    def __post_init__(self) -> None:
        _positive(self, "timeout", "chunk", "clip", "overlong_buffer")
        for name in ("workers", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


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
        _between(self, "low", 0.0, 1.0)
        for name in ("cap", "high"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        _positive(self, "threshold")


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
    eval_every: int = 10
    """Steps between evaluations; also before the first step and after the last."""
    canary_threshold: float = 0.1
    """Largest mean |log-prob difference| between engine and trainer on the same tokens, nats, before the run stops."""
    old_logprobs: Literal["trainer", "fused", "engine"] = "trainer"
    """Log-probs that ratios are taken to: scored by the trainer before the update; by the update's own forward pass,
    which saves that of scoring and is exact for one update a rollout; or the engine's (then correct nothing)."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """What is done about the difference between engine and trainer; it is always measured."""
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
        _positive(self, "updates_per_rollout", "eval_every", "canary_threshold", "sft_batch_size")
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
    def uses_reward_model(self) -> bool:
        """Whether a reward of training or evaluation is the reward model's."""
        words = f"{self.reward},{self.eval_reward}".split(",")
        return any(word.strip().partition("=")[0] == "model" for word in words)

    @property
    def needs_reward_model(self) -> bool:
        """Whether `reward_model` has a use in this stage."""
        return self.uses_reward_model


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
        _check_group(self)
        if self.loss.kl_in_reward and self.old_logprobs == "fused":
            raise ConfigError("loss.kl_in_reward needs log-probs before the update; set old_logprobs to 'trainer'")


@dataclass(frozen=True, kw_only=True)
class OnlineDpoConfig(PolicyConfig):
    """`align online-dpo`: preferences between the policy's own completions, ordered by their rewards."""

    loss: OnlineDpoLoss = field(default_factory=OnlineDpoLoss)
    """Beta and which pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_group(self)


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
        _positive(self, "target", "horizon")
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
        _between(self, "gamma", 0.0, 1.0)
        _between(self, "lam", 0.0, 1.0)
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


def _check_group(config: PolicyConfig) -> None:
    if config.sampling.n < 2:
        raise ConfigError(
            f"a group of {config.sampling.n} completion has no relative advantage; set sampling.n to 2 or more"
        )
