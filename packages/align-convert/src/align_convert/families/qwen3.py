"""Qwen3 (dense): a Llama with a norm on each query and key head, whose size does not follow from hidden_size."""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, MLP, NORMS, QK_NORMS
from align_convert.rules import Family

FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    lm_architecture="Qwen3ForCausalLM",
    score_architecture="Qwen3ForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *QK_NORMS, *MLP, *NORMS, *HEADS),
    required_settings={"hidden_act": ("silu",), "attention_bias": (False,)},
    defaults={"head_dim": 128, "num_key_value_heads": 32},
    megatron_args={"qk_layernorm": True},
)
