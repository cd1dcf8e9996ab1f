"""How much device memory a model takes, estimated from its sizes: for plans, before anything is started.

Counts what the trainer keeps: weights, gradients in float32, AdamW's state with float32 main weights, the activations
of one micro-batch, and the logits with what the loss makes of them. Leaves out the allocator's slack and the runtime
(about 1 GiB a process).
"""

from dataclasses import dataclass

from align_core.config import ParallelConfig, TrainingConfig
from align_core.model_shape import ModelShape
from align_core.types import ITEM_BYTES, Head

_FLOAT32 = 4
# Copies of the logits that are alive at once: as the model gives them, in float32 for the loss, and their gradient.
_LOGIT_COPIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMemory:
    """Bytes on the fullest device of a model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def model_memory(
    shape: ModelShape, *, parallel: ParallelConfig, training: TrainingConfig, head: Head = "lm", trainable: bool = True
) -> ModelMemory:
    """An estimate for one rank of the first pipeline stage, which holds the embedding and most activations."""
    layers = -(-shape.layers // parallel.pipeline)
    held = layers * shape.layer_parameters + shape.vocab * shape.hidden + shape.hidden
    if parallel.pipeline == 1:
        held += shape.parameters(head=head) - shape.parameters(head="score")
    held = -(-held // parallel.tensor)
    item = ITEM_BYTES[training.dtype]
    tokens = training.micro_batch_tokens
    moments = 2 * _FLOAT32 * held
    main_weights = _FLOAT32 * held if training.dtype != "float32" else 0
    # A pipeline's first stage has as many micro-batches under way as there are stages.
    kept = layers * parallel.pipeline if trainable else 1
    logits = tokens * -(-shape.vocab // parallel.tensor) * _FLOAT32 * _LOGIT_COPIES if head == "lm" else 0
    return ModelMemory(
        weights=held * item,
        gradients=held * _FLOAT32 if trainable else 0,
        optimizer=moments + main_weights if trainable else 0,
        activations=kept * tokens * item * _layer_activations(shape, parallel),
        logits=logits if parallel.pipeline == 1 else 0,
    )


def _layer_activations(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Values a token that a layer keeps for its backward pass: around both norms, attention, and the gated MLP."""
    whole = 4 * shape.hidden
    cut = 2 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim + 4 * shape.ffn
    if parallel.sequence:
        return -(-(whole + cut) // parallel.tensor)
    return whole + -(-cut // parallel.tensor)
