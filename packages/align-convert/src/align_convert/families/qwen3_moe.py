"""Qwen3-MoE: Qwen3 with a router and experts in place of the MLP in every layer; no shared expert."""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, NORMS, QK_NORMS, experts
from align_convert.rules import Family

_EXPERTS = experts("mlp.", "expert_ffn", gate="gate_proj", up="up_proj", down="down_proj")

FAMILY = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    lm_architecture="Qwen3MoeForCausalLM",
    score_architecture="Qwen3MoeForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *QK_NORMS, *_EXPERTS, *NORMS, *HEADS),
    required_settings={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    defaults={
        "num_key_value_heads": 4,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    megatron_args={"qk_layernorm": True},
    experts_keys=("num_experts", "num_local_experts"),
)
