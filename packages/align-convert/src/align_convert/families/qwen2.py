"""Qwen2 and Qwen2.5: a Llama with a bias on query, key and value."""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, MLP, NORMS, QKV_BIAS
from align_convert.rules import Family

FAMILY = Family(
    name="qwen2",
    model_type="qwen2",
    lm_architecture="Qwen2ForCausalLM",
    score_architecture="Qwen2ForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *QKV_BIAS, *MLP, *NORMS, *HEADS),
    required_settings={"hidden_act": ("silu",)},
    defaults={"num_key_value_heads": 32},
    megatron_args={"add_qkv_bias": True},
)
