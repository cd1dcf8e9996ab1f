"""How much device memory a model takes, estimated from its sizes: for plans, before anything is started.

Counts what the trainer keeps: weights, gradients in float32, this rank's share of AdamW's state with float32 main
weights, the activations of the micro-batches under way, and the logits. Leaves out the allocator's slack and the
runtime (about 1 GiB a process). The tests compare it with peaks measured on a GPU.
"""

from dataclasses import dataclass

from align_core.config import LoraConfig, ParallelConfig, TrainingConfig
from align_core.model_shape import ModelShape
from align_core.types import ITEM_BYTES, Head

_FLOAT32 = 4


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
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


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
    if parallel.pipeline == 1:
        weights = shape.parameters(head=head)
    else:
        weights = layers * shape.layer_parameters + shape.vocab * shape.hidden
    held = -(-weights // parallel.tensor)
    item = ITEM_BYTES[training.dtype]
    tokens = -(-training.micro_batch_tokens // parallel.context)
    # AdamW's two averages, and the float32 weights that bfloat16 ones are rounded from; each copy keeps a share.
    learnt = held if lora is None or not lora.rank else -(-layers * _adapters(shape, lora.rank) // parallel.tensor)
    state = learnt * _FLOAT32 * (2 if training.dtype == "float32" else 3) // (parallel.data * parallel.context)
    logits = tokens * -(-shape.vocab // parallel.tensor) * (item + _FLOAT32)
    if head == "score" or parallel.pipeline > 1:
        logits = 0
    layer = tokens * item * _layer_activations(shape, parallel, training.recompute)
    if training.recompute == "full":
        whole = tokens * item * _layer_activations(shape, parallel, "none")
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


def _adapters(shape: ModelShape, rank: int) -> int:
    """Weights of the adapters of one layer: rank x (inputs + outputs) of each of its four products."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ends = (shape.hidden + query + 2 * kv) + (query + shape.hidden) + (shape.hidden + 2 * shape.ffn)
    return rank * (ends + shape.ffn + shape.hidden)


def _layer_activations(shape: ModelShape, parallel: ParallelConfig, recompute: str) -> int:
    """Values a token that a layer keeps for its backward pass: around both norms, attention, and the gated MLP."""
    whole = shape.hidden if recompute == "full" else 4 * shape.hidden
    cut = 0
    if recompute != "full":
        of_mlp = 3 if recompute == "none" else 2  # gate, up, and (unless computed again) their product
        cut = 2 * (shape.heads + shape.kv_heads) * shape.head_dim + of_mlp * shape.ffn
    if parallel.sequence:
        return -(-(whole + cut) // parallel.tensor)
    return whole + -(-cut // parallel.tensor)
