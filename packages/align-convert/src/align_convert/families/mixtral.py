"""Mixtral: Mistral with a router and experts in place of the MLP; no shared expert."""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, NORMS, experts
from align_convert.rules import Family

_EXPERTS = experts("block_sparse_moe.", "expert_ffn", gate="w1", up="w3", down="w2")

FAMILY = Family(
    name="mixtral",
    model_type="mixtral",
    lm_architecture="MixtralForCausalLM",
    score_architecture="MixtralForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *_EXPERTS, *NORMS, *HEADS),
    required_settings={"hidden_act": ("silu",)},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    experts_keys=("num_local_experts",),
    expert_ffn_key="intermediate_size",
)
