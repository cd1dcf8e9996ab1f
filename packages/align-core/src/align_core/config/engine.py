"""How completions are sampled, and the engine that samples them."""

from dataclasses import dataclass
from typing import Literal

from align_core.config.checks import between, positive
from align_core.config.training import Device, Dtype
from align_core.errors import ConfigError

Verify = Literal["sampled", "full", "off"]
InFlight = Literal["drain", "abort", "continue"]
Transport = Literal["auto", "memory", "links", "host"]


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
        positive(self, "n", "max_tokens")
        if "" in self.stop:
            raise ConfigError("stop holds an empty text, which would end every completion; leave it out")
        between(self, "top_p", 1e-9, 1.0)
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
    transport: Transport = "auto"
    """How new weights come: `memory` the engine reads them on the trainer's GPUs, `links` each rank sends its parts
    (NCCL between GPUs, gloo on CPU), `host` through the host's memory; `auto` takes the first that is possible, and
    `host` on CPU."""
    in_flight: InFlight = "drain"
    """What new weights do to requests under way: wait for them, cut them short, or continue them with the new ones."""

    def __post_init__(self) -> None:
        positive(self, "tensor", "context", "max_sequences", "replicas")
        if self.kv_cache_mib < 0:
            raise ConfigError(f"kv_cache_mib must be positive, or 0 for a size by the device, got {self.kv_cache_mib}")
        between(self, "memory_fraction", 0.01, 0.99)
