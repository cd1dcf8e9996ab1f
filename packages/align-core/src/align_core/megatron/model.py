"""Builds this rank's part of a Llama as megatron-core GPTModels, and fills it from a checkpoint directory.

What a layer is made of is `spec.py`'s knowledge, where each weight lies is `align_convert`'s.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from align_convert.config import ModelConfig
from align_convert.fill import fill_shard
from align_convert.layout import Rank
from align_convert.plan import Index, Shard, rank_plan
from align_convert.source import Source
from align_core.config import LoraConfig, TrainingConfig
from align_core.errors import CheckpointError
from align_core.layouts import layout_of
from align_core.megatron import cpu
from align_core.megatron.layers import LanguageHead, Norm, ScoreHead
from align_core.megatron.lora import base_parameters
from align_core.megatron.parallel import RankContext
from align_core.megatron.quiet import quiet_megatron
from align_core.megatron.rotary import rotary_frequencies
from align_core.megatron.spec import layer_spec, transformer_config
from align_core.megatron.transformer_engine import FusedLayers

SCORE_WEIGHT = "output_layer.weight"


class LlamaModel(GPTModel):  # type: ignore[misc]
    """GPTModel with our head, which can be built where `Tensor.cuda` does not work."""

    def setup_embeddings_and_output_layer(self) -> None:
        """Put our head in the place of megatron-core's, and tag the weights that two pipeline stages share."""
        if self.post_process:
            shared = self.pre_process and self.share_embeddings_and_output_weights
            self.output_layer = LanguageHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=shared,
            )
        with cpu.tensors_stay():
            super().setup_embeddings_and_output_layer()

    @property
    def head_weight(self) -> Tensor:
        """The head's rows of this rank, or the embedding's where they are the same; of the last chunk only."""
        own: Tensor | None = self.output_layer.weight
        return self.embedding.word_embeddings.weight if own is None else own


def plan_of(config: ModelConfig, context: RankContext) -> list[tuple[Shard, ...]]:
    """All tensors of this rank, by chunk, and the Hugging Face pieces that they are made of."""
    ranks = (
        Rank(tp=context.tensor, pp=context.pipeline, vp=chunk, ep=context.expert)
        for chunk in range(context.parallel.virtual)
    )
    return [rank_plan(config, layout_of(context.parallel), rank) for rank in ranks]


@quiet_megatron()
def build_model(
    config: ModelConfig,
    context: RankContext,
    training: TrainingConfig,
    lora: LoraConfig,
    fused: FusedLayers | None = None,
) -> list[LlamaModel]:
    """This rank's part of the model, one chunk a virtual pipeline stage, their weights not yet set.

    Args:
        fused: modules of Transformer Engine to make the layers of.
    """
    transformer = transformer_config(config, context, training)
    rotary = rotary_frequencies(head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    layer = layer_spec(config, training, lora, rotary.to(context.device), fused)
    return [_build_chunk(config, context, transformer, layer, chunk) for chunk in range(context.parallel.virtual)]


def _build_chunk(
    config: ModelConfig, context: RankContext, transformer: Any, layer: ModuleSpec, chunk: int
) -> LlamaModel:
    parallel = context.parallel
    layers = config.num_layers // (parallel.pipeline * parallel.virtual)
    is_last = context.is_last_stage and chunk == parallel.virtual - 1
    model = LlamaModel(
        config=transformer,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm),
        vocab_size=layout_of(parallel).padded_vocab(config.vocab_size),
        max_sequence_length=config.max_positions,
        pre_process=context.is_first_stage and chunk == 0,
        post_process=is_last,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="none",  # attention turns queries and keys itself
        vp_stage=chunk if parallel.virtual > 1 else None,
    )
    if config.head == "score" and is_last:
        model.output_layer = ScoreHead(transformer)
    return model


@torch.no_grad()
def load_weights(chunks: Sequence[LlamaModel], config: ModelConfig, context: RankContext, source: Source) -> None:
    """Fill the model from a checkpoint; a score head that the checkpoint does not have stays zero.

    Raises:
        CheckpointError: the model and the plan do not hold the same tensors.
    """
    new_head = config.head == "score" and source.config.head == "lm"

    def read(name: str, index: Index) -> Tensor:
        return source.read_hf(name, index)

    for chunk, shards in zip(chunks, plan_of(config, context), strict=True):
        parameters = base_parameters(chunk)
        check_names(parameters, shards)
        for shard in shards:
            if new_head and shard.name == SCORE_WEIGHT:
                continue
            parameter = parameters[shard.name]
            parameter.copy_(fill_shard(shard, read, parameter.dtype))


def check_names(parameters: dict[str, nn.Parameter], shards: tuple[Shard, ...]) -> None:
    """Refuse a model whose tensors are not exactly those of the plan."""
    planned = {shard.name: shard.shape for shard in shards}
    built = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wrong = sorted(name for name in planned.keys() | built.keys() if planned.get(name) != built.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensors differ between model and weight plan; {name!r} has shape {built.get(name)} in the "
            f"model and {planned.get(name)} in the plan"
        )
