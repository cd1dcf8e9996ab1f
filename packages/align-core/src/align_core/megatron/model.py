"""Builds this rank's part of a Llama as a megatron-core GPTModel, and fills it from a checkpoint directory.

The layer is megatron-core's, with torch's RMSNorm and our attention; nothing of Transformer Engine. All fusions are
off: in float32 the model then equals Hugging Face's to rounding. Where each weight lies is `align_convert`'s knowledge.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from align_convert.config import ModelConfig
from align_convert.fill import fill_shard
from align_convert.layout import Layout, Rank
from align_convert.plan import Index, Shard, rank_plan
from align_convert.source import Source
from align_core.config import Dtype, ParallelConfig
from align_core.errors import CheckpointError
from align_core.megatron import cpu
from align_core.megatron.attention import PackedAttention, Rotary, rotary_frequencies
from align_core.megatron.parallel import RankContext
from align_core.megatron.quiet import quiet_megatron

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Each rank's share of the vocabulary is a multiple of this: matrices of odd width miss the fast kernels of GPUs.
_VOCAB_DIVISOR = 64
SCORE_WEIGHT = "output_layer.weight"
# torch_dist checkpoints carry Transformer Engine's names, whichever layer wrote them.
_CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Norm(nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor; sequence parallelism sums its gradient over ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScoreHead(MegatronModule):  # type: ignore[misc]
    """One number a token, in the place of the language-model head; every tensor-parallel rank computes all of it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        # Zeros, not noise: the first reward-model loss is then exactly ln 2, and no seed enters the result.
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=_device(), dtype=config.params_dtype))

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """[tokens, 1, hidden] to [tokens, 1, 1], and the bias that there is not."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return nn.functional.linear(hidden, self.weight), None


class LlamaModel(GPTModel):  # type: ignore[misc]
    """GPTModel that can be built where `Tensor.cuda` does not work."""

    def setup_embeddings_and_output_layer(self) -> None:
        """Tag the weights that two pipeline stages share."""
        with cpu.tensors_stay():
            super().setup_embeddings_and_output_layer()


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout in align_convert's words."""
    return Layout(tp=parallel.tensor, pp=parallel.pipeline, vocab_divisor=_VOCAB_DIVISOR)


def plan_of(config: ModelConfig, context: RankContext) -> tuple[Shard, ...]:
    """All tensors of this rank and the Hugging Face pieces that they are made of."""
    return rank_plan(config, layout_of(context.parallel), Rank(tp=context.tensor, pp=context.pipeline))


@quiet_megatron()
def build_model(config: ModelConfig, context: RankContext, dtype: Dtype) -> LlamaModel:
    """This rank's part of the model, its weights not yet set."""
    layers = config.num_layers // context.parallel.pipeline
    transformer = _transformer_config(config, context, DTYPES[dtype])
    model = LlamaModel(
        config=transformer,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[_layer_spec(config)] * layers, layer_norm=Norm),
        vocab_size=layout_of(context.parallel).padded_vocab(config.vocab_size),
        max_sequence_length=config.max_positions,
        pre_process=context.is_first_stage,
        post_process=context.is_last_stage,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
    )
    frequencies = rotary_frequencies(head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    model.rotary_pos_emb = Rotary(frequencies.to(context.device))
    if config.head == "score" and context.is_last_stage:
        model.output_layer = ScoreHead(transformer)
    return model


@torch.no_grad()
def load_weights(model: LlamaModel, config: ModelConfig, context: RankContext, source: Source) -> None:
    """Fill the model from a checkpoint; a score head that the checkpoint does not have stays zero.

    Raises:
        CheckpointError: the model and the plan do not hold the same tensors.
    """
    parameters = dict(model.named_parameters())
    shards = plan_of(config, context)
    check_names(parameters, shards)
    new_head = config.head == "score" and source.config.head == "lm"
    for shard in shards:
        if new_head and shard.name == SCORE_WEIGHT:
            continue
        parameter = parameters[shard.name]

        def read(name: str, index: Index) -> Tensor:
            return source.read_hf(name, index)

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


def _transformer_config(config: ModelConfig, context: RankContext, dtype: torch.dtype) -> Any:
    parallel = context.parallel
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable lengths insist on it, though there are no experts
        calculate_per_token_loss=True,  # sums gradients over micro-batches and data-parallel ranks
        # Weights are loaded, so nothing is drawn; but without initialisation they would lose their tensor-parallel tag,
        # and with it the right gradient norm.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _layer_spec(config: ModelConfig) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=PackedAttention, linear_proj=RowParallelLinear
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": config.ffn_size},
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_CHECKPOINT_NAMES,
        ),
    )


def _device() -> torch.device:
    """Where megatron-core puts its own weights."""
    return torch.device("cpu") if cpu.installed() else torch.device("cuda", torch.cuda.current_device())
