"""How a model is spread, trained and optimized: settings of one model, whatever it learns."""

from dataclasses import dataclass
from typing import Literal

from align_core.config.checks import between, one_of, positive
from align_core.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cuda", "cpu"]
RecomputeModule = Literal["activation", "mlp", "norm", "attention"]


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
    expert: int = 1
    """Ranks over which the experts of a layer are spread, each with tokens of its own; must divide data x context and
    the number of experts. They are copies of the rest of the model, so it takes no further processes."""
    sequence: bool = False
    """Cut activations along the sequence between tensor-parallel regions (saves memory); needs tensor > 1."""

    def __post_init__(self) -> None:
        positive(self, "tensor", "pipeline", "virtual", "context", "data", "expert")
        if self.virtual > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual {self.virtual} interleaves the stages of a pipeline, and there is one stage; "
                "set parallel.pipeline to 2 or more, or parallel.virtual to 1"
            )
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "sequence parallelism needs tensor > 1; set parallel.tensor or leave parallel.sequence off"
            )
        copies = self.data * self.context
        if copies % self.expert:
            raise ConfigError(
                f"parallel.expert {self.expert} spreads experts over the copies of the model and does not divide "
                f"data x context = {copies}; use {one_of([n for n in range(1, copies + 1) if copies % n == 0])}"
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
        positive(self, "lr", "eps")
        between(self, "beta1", 0.0, 1.0)
        between(self, "beta2", 0.0, 1.0)
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
    layers: Literal["torch", "transformer_engine", "auto"] = "torch"
    """What layers are made of: torch and our kernels; NVIDIA's Transformer Engine, which must be installed (it needs a
    CUDA build; not yet run by us); or `auto`: that where it is installed and can do what else is asked for."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those of `recompute_modules` (selective), or of
    whole layers (full; keeps one hidden state a layer, a quarter more time)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("activation",)
    """Of selective, each with its share of the 7B shape's activations and what it costs: `activation`, of the MLP (a
    sixth; next to nothing); `mlp`, gate and up besides (half in all; a seventh more work); `norm`, what norms give (an
    eighth; next to nothing); `attention`, what it gives (a sixteenth; its forward pass). In a mixture of experts
    `activation` is as `mlp`: all of router and experts, at the price of their forward pass."""
    balance_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts (Fedus et al. 2021, eq. 4), averaged over its layers
    and computed in each micro-batch; 0 leaves it out, and `balance_loss` in the log still tells it. 0.001 to 0.02 is
    usual."""
    router_float32: bool = False
    """Choose experts in float32 where the rest is bfloat16: slower, and steadier with many experts."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory; the newest one is complete later."""

    def __post_init__(self) -> None:
        positive(self, "micro_batch_tokens")
        if self.balance_coef < 0:
            raise ConfigError(f"balance_coef must not be negative, got {self.balance_coef}; 0 leaves that loss out")
        if self.recompute == "selective" and not self.recompute_modules:
            raise ConfigError("recompute 'selective' needs recompute_modules; name some, or set recompute to 'none'")
        if self.recompute != "selective" and self.recompute_modules != ("activation",):
            raise ConfigError(
                f"recompute_modules {', '.join(self.recompute_modules)} have no use with recompute {self.recompute!r}; "
                "set recompute to 'selective'"
            )

    @property
    def recomputed(self) -> frozenset[RecomputeModule]:
        """The modules of each layer whose outputs are made again."""
        return frozenset(self.recompute_modules if self.recompute == "selective" else ())


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on all linear layers (Hu et al. 2021); the rest of the model is frozen."""

    rank: int = 0
    """Width of the adapters; 0 trains all weights instead."""
    alpha: float = 32.0
    """Adapters count alpha / rank times; with 32 a rank of 16 counts twice, as is usual."""

    def __post_init__(self) -> None:
        positive(self, "alpha")
        if self.rank < 0:
            raise ConfigError(f"lora.rank must not be negative, got {self.rank}; 0 trains all weights")
