"""How much device memory a model or an engine takes, estimated from sizes: for plans, before anything is started.

Counts what a trainer keeps (weights, gradients in float32, this rank's share of AdamW's state with float32 main
weights, the activations of the micro-batches under way, and what the head makes), and of an engine its weights and one
sequence's keys and values. Leaves out the allocator's slack and the runtime (about 1 GiB a process). The tests compare
it with peaks measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from align_core.config import EngineConfig, LoraConfig, ParallelConfig, TrainingConfig
from align_core.model_shape import ModelShape
from align_core.types import ITEM_BYTES, Head

_FLOAT32 = 4
# How the head works: `align_core.megatron.passes` and `align_algos.fused` (a test compares), which need torch.
_LOGITS_KEPT = 1 << 30
_LOGITS_SHARE = 0.4
_LOGITS_BLOCK = 512 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMemory:
    """Bytes on the fullest device of a model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, over all layers of the rank."""
    logits: int
    """At the head, beside the activations; with full recompute, or one layer's activations if those are more."""

    @property
    def standing(self) -> int:
        """What stays on the device between steps, unless it is offloaded."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> int:
        """What comes and goes within a step; models that take turns share it."""
        return self.activations + self.logits

    @property
    def total(self) -> int:
        """All of them."""
        return self.standing + self.working


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Bytes on each device of a rollout engine."""

    weights: int
    sequence: int
    """Keys and values of one sequence of the engine's whole context."""

    @property
    def least(self) -> int:
        """Less than this, and it cannot answer one request of full length."""
        return self.weights + self.sequence

    def taken(self, engine: EngineConfig, *, gpu_bytes: int) -> int:
        """What the engine takes of a GPU of that size, as its settings say: a share of it, or a cache of fixed size."""
        if engine.kv_cache_mib:
            return self.weights + engine.kv_cache_mib * 2**20
        return int(engine.memory_fraction * gpu_bytes)


def engine_memory(shape: ModelShape, engine: EngineConfig) -> EngineMemory:
    """An estimate for one of the engine's `tensor` devices; key/value heads are repeated where they are fewer."""
    item = ITEM_BYTES[engine.dtype]
    heads = -(-shape.kv_heads // engine.tensor)
    return EngineMemory(
        weights=item * -(-shape.parameters() // engine.tensor),
        sequence=2 * item * shape.layers * heads * shape.head_dim * engine.context,
    )


def models_memory(models: Sequence[ModelMemory]) -> int:
    """Bytes of models that share a device and take turns: all that stands, and the most that any of them works with."""
    return sum(each.standing for each in models) + max((each.working for each in models), default=0)


def model_memory(
    shape: ModelShape,
    *,
    parallel: ParallelConfig,
    training: TrainingConfig,
    head: Head = "lm",
    trainable: bool = True,
    lora: LoraConfig | None = None,
) -> ModelMemory:
    """An estimate for one rank of the first pipeline stage, which holds the embedding and most activations."""
    layers = -(-shape.layers // parallel.pipeline)
    experts = layers * shape.expert_parameters
    if parallel.pipeline == 1:
        shared = shape.parameters(head=head) - experts
    else:
        shared = layers * shape.shared_parameters + shape.vocab * shape.hidden
    held = -(-shared // parallel.tensor) + -(-experts // (parallel.tensor * parallel.expert))
    item = ITEM_BYTES[training.dtype]
    tokens = -(-training.micro_batch_tokens // parallel.context)
    # AdamW's two averages, and the float32 weights that bfloat16 ones are rounded from; each copy keeps a share, and
    # of experts, which have fewer copies, a larger share of fewer.
    if lora is not None and lora.rank:
        learnt = copied = -(-layers * _adapters(shape, lora.rank) // parallel.tensor)
    else:
        learnt, copied = held, -(-(shared + experts) // parallel.tensor)
    state = copied * _FLOAT32 * (2 if training.dtype == "float32" else 3) // (parallel.data * parallel.context)
    logits = 0 if head == "score" or parallel.pipeline > 1 else _head_bytes(shape, tokens, item, parallel, trainable)
    layer = tokens * item * _layer_activations(shape, parallel, training)
    if training.recompute == "full":
        whole = tokens * item * _layer_activations(shape, parallel, TrainingConfig())
        logits = max(logits, whole)
    # A pipeline's first stage has as many micro-batches under way as there are stages.
    kept = layers * parallel.pipeline * layer if trainable else layer
    return ModelMemory(
        weights=held * item,
        gradients=learnt * _FLOAT32 if trainable else 0,
        optimizer=state if trainable else 0,
        activations=kept,
        logits=logits,
    )


def _head_bytes(shape: ModelShape, tokens: int, item: int, parallel: ParallelConfig, trainable: bool) -> int:
    """Logits that are kept for the backward pass, or a block of them, and the head's gradient before it is added."""
    rows = -(-shape.vocab // parallel.tensor)
    logits = tokens * rows * item
    if not trainable:
        return min(logits, _LOGITS_BLOCK)
    kept = min(logits, max(_LOGITS_KEPT, int(_LOGITS_SHARE * logits)))
    return kept + min(logits - kept, _LOGITS_BLOCK) + rows * shape.hidden * item


def _adapters(shape: ModelShape, rank: int) -> int:
    """Weights of the adapters of one layer: rank x (inputs + outputs) of each of its four products."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ends = (shape.hidden + query + 2 * kv) + (query + shape.hidden) + (shape.hidden + 2 * shape.ffn)
    return rank * (ends + shape.ffn + shape.hidden)


def _layer_activations(shape: ModelShape, parallel: ParallelConfig, training: TrainingConfig) -> int:
    """Values a token that a layer keeps for its backward pass: around both norms, attention, and the gated MLP."""
    forgotten = training.recomputed
    if training.recompute == "full":
        whole, cut = shape.hidden, 0
    else:
        whole = (2 if "norm" in forgotten else 4) * shape.hidden
        of_attention = (shape.heads + 2 * shape.kv_heads) + (0 if "attention" in forgotten else shape.heads)
        cut = of_attention * shape.head_dim + _mlp_activations(shape, training)
    if parallel.sequence:
        return -(-(whole + cut) // parallel.tensor)
    return whole + -(-cut // parallel.tensor)


def _mlp_activations(shape: ModelShape, training: TrainingConfig) -> int:
    """Of the gated MLP, or of router and experts, without recompute of whole layers."""
    forgotten = training.recomputed
    if shape.experts > 1:  # each copy of a token on its way to an expert and back, besides what its expert keeps
        return 0 if forgotten & {"mlp", "activation"} else shape.experts_per_token * 3 * (shape.ffn + shape.hidden)
    return (0 if "mlp" in forgotten else 2 if "activation" in forgotten else 3) * shape.ffn  # gate, up, their product
