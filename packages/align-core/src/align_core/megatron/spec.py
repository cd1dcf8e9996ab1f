"""What a transformer layer is made of, for every family: megatron-core's settings and its layer specification.

The layer is megatron-core's, with torch's RMSNorm, our attention and activation, or Transformer Engine's. Its fusions
that need a compiler or Apex are off: in float32 the model then equals Hugging Face's to rounding. Which biases
and norms a family has is read off its weight table.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from align_convert.config import ModelConfig
from align_core.config import Dtype, LoraConfig, TrainingConfig
from align_core.megatron.attention import PackedAttention
from align_core.megatron.experts import expert_layer, expert_settings
from align_core.megatron.layers import Norm, swiglu
from align_core.megatron.lora import LoraColumnLinear, LoraRowLinear
from align_core.megatron.parallel import RankContext
from align_core.megatron.recompute import ForgetfulLayer, ForgettableAttention, ForgettableMLP, ForgettableNorm
from align_core.megatron.transformer_engine import FusedLayers
from align_core.megatron.wgrad import can_accumulate

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# torch_dist checkpoints carry Transformer Engine's names, whichever layer wrote them.
_CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def transformer_config(config: ModelConfig, context: RankContext, training: TrainingConfig) -> Any:
    """megatron-core's settings."""
    parallel, dtype = context.parallel, DTYPES[training.dtype]
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        use_te_activation_func=True,  # by its name Transformer Engine's; takes whatever the specification says
        add_bias_linear=False,
        add_qkv_bias=_has(config, "linear_qkv.bias"),
        qk_layernorm=_has(config, "q_layernorm.weight"),
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Interleaved stages send both ways at once, and with two stages to the same rank: megatron-core then tells the
        # two apart only when it does not batch them, and never when the ranks first tell each other shapes.
        variable_seq_lengths=parallel.virtual == 1,
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        moe_token_dispatcher_type="alltoall",  # variable lengths insist on it, also where there are no experts
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
        gradient_accumulation_fusion=can_accumulate(context.device, dtype),
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        **_recompute(training),
        **expert_settings(config, parallel, training),
    )


def layer_spec(
    config: ModelConfig, training: TrainingConfig, lora: LoraConfig, rotary: Tensor, fused: FusedLayers | None = None
) -> ModuleSpec:
    """One layer; `rotary` are the frequencies of its positions, `fused` the modules of Transformer Engine, if any."""
    column: Any = ColumnParallelLinear
    gated: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    if lora.rank:
        column = ModuleSpec(module=LoraColumnLinear, params={"lora": lora})
        gated = ModuleSpec(module=LoraColumnLinear, params={"lora": lora, "gated": True})
        row = ModuleSpec(module=LoraRowLinear, params={"lora": lora})
    forgotten = training.recomputed
    norm: type[nn.Module] = ForgettableNorm if "norm" in forgotten else Norm
    core: type[nn.Module] = ForgettableAttention if "attention" in forgotten else PackedAttention
    if fused is not None:
        column = gated = fused.norm_column
        row, core, norm = fused.row, fused.attention, IdentityOp
    has_qk_norm = _has(config, "q_layernorm.weight")
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ModuleSpec(module=core, params={"frequencies": rotary}),
            linear_proj=row,
            q_layernorm=Norm if has_qk_norm else None,
            k_layernorm=Norm if has_qk_norm else None,
        ),
    )
    of_mlp: dict[str, Any] = {"ffn_hidden_size": config.ffn_size}
    forgets_mlp = "mlp" in forgotten or "activation" in forgotten
    dense = ModuleSpec(
        module=ForgettableMLP if forgets_mlp else MLP,
        params={**of_mlp, "whole": "mlp" in forgotten} if forgets_mlp else of_mlp,
        submodules=MLPSubmodules(linear_fc1=gated, linear_fc2=row, activation_func=swiglu),
    )
    return ModuleSpec(
        module=ForgetfulLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=dense if config.num_experts is None else expert_layer(training),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_checkpoint_names(config) if fused is None else {},
        ),
    )


def _recompute(training: TrainingConfig) -> dict[str, Any]:
    """megatron-core's part of it; what is selective is in the modules (`recompute.py`)."""
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _has(config: ModelConfig, ending: str) -> bool:
    """Whether a layer of this family has such a weight."""
    return any(rule.megatron.endswith(ending) for rule in config.table.rules)


def _checkpoint_names(config: ModelConfig) -> dict[str, str]:
    """The norm before a mixture of experts keeps its own."""
    kept_apart = () if config.num_experts is None else ("pre_mlp_layernorm.",)
    return {ours: theirs for ours, theirs in _CHECKPOINT_NAMES.items() if ours not in kept_apart}


def _leave(weight: Tensor) -> Tensor:
    return weight
